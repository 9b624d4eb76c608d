"""What a store did since it was opened."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cudagraph_jax._base.fork import forkable_lock
from cudagraph_jax.store.outcomes import Reason


class Counts:
    """Counts of a store, safe to change from many threads."""

    def __init__(self) -> None:
        self._lock = forkable_lock()
        self._hits = 0
        self._misses: Counter[Reason] = Counter()
        self._moved_aside = 0
        self._written = 0

    def hit(self) -> None:
        """An executable was found."""
        with self._lock:
            self._hits += 1

    def miss(self, reason: Reason) -> None:
        """An executable was not found."""
        with self._lock:
            self._misses[reason] += 1

    def move_aside(self) -> None:
        """A file was put aside."""
        with self._lock:
            self._moved_aside += 1

    def write(self) -> None:
        """An executable was written."""
        with self._lock:
            self._written += 1

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON can hold them; every reason is there."""
        with self._lock:
            return {
                "hits": self._hits,
                "misses": {reason.value: self._misses[reason] for reason in Reason},
                "moved_aside": self._moved_aside,
                "written": self._written,
            }
