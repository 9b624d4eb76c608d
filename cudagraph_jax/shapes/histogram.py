"""How often each size was asked for, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cudagraph_jax._base.fork import forkable_lock
from cudagraph_jax.shapes.ladder import Bucket

MAX_SIZES = 4096
"""Different sizes that are told apart: about a megabyte."""


class SizeHistogram:
    """Counts of (batch, seq_len) sizes; safe to use from many threads.

    Where there are more different sizes than the limit, they are counted as the next multiple of a
    step that doubles, on the axis that has more of them, but never as more than the largest.

    Args:
        max_sizes: How many are told apart.
    """

    def __init__(self, *, max_sizes: int = MAX_SIZES) -> None:
        self._max_sizes = max_sizes
        self._lock = forkable_lock()
        self._counts: Counter[Bucket] = Counter()
        self._largest = Bucket(0, 0)
        self._steps = Bucket(1, 1)
        self._is_fresh = False

    def add(self, sizes: Bucket, count: int = 1) -> None:
        """Counts requests of one size; an empty batch or sequence is none that a bucket serves."""
        if 0 in sizes or not count:
            return
        with self._lock:
            self._largest = Bucket(*map(max, self._largest, sizes))
            self._counts[self._rounded(sizes)] += count
            self._is_fresh = True
            while len(self._counts) > self._max_sizes:
                self._coarsen()

    def counts(self) -> dict[Bucket, int]:
        """A snapshot, ascending."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def fade(self) -> None:
        """Halves the counts if any is new, so that newer requests count for more; none is lost."""
        with self._lock:
            if self._is_fresh:
                for sizes, count in self._counts.items():
                    self._counts[sizes] = max(1, count // 2)
            self._is_fresh = False

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._counts.clear()
            self._is_fresh = False
            self._largest, self._steps = Bucket(0, 0), Bucket(1, 1)

    def _rounded(self, sizes: Bucket) -> Bucket:
        return Bucket(
            *(
                min(-(-size // step) * step, largest)
                for size, step, largest in zip(sizes, self._steps, self._largest, strict=True)
            )
        )

    def _coarsen(self) -> None:
        batch, seq = self._steps
        if _distinct(sizes.batch_size for sizes in self._counts) > _distinct(
            sizes.seq_len for sizes in self._counts
        ):
            self._steps = Bucket(2 * batch, seq)
        else:
            self._steps = Bucket(batch, 2 * seq)
        counts, self._counts = self._counts, Counter()
        for sizes, count in counts.items():
            self._counts[self._rounded(sizes)] += count


def _distinct(sizes: Iterable[int]) -> int:
    return len(set(sizes))
