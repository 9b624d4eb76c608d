"""Ladders: the sorted sizes that a ragged dimension is padded up to."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, pairwise, takewhile
from typing import Any, Self

from cudagraph_jax._base.checks import positive_size
from cudagraph_jax.errors import ConfigError


def axis_name(axis: str) -> str:
    """What messages call the size of an axis: that of seq is seq_len."""
    return "seq_len" if axis == "seq" else axis


class Bucket(tuple[Any, ...]):
    """The sizes of a call, or those that it is padded to: what gets a graph.

    A tuple of the batch, the sequence and, where there are further named axes, a pair of name and
    size for each of them, by name.

    Args:
        batch_size: Rows; 1 for functions without a batch axis.
        seq_len: Length of the sequence; 1 for functions without a sequence axis.
        **named: Sizes of further axes.

    Example:
        >>> Bucket(8, 1, width=224, height=192)
        Bucket(batch_size=8, seq_len=1, height=192, width=224)
    """

    __slots__ = ()

    def __new__(cls, batch_size: int, seq_len: int, **named: int) -> Self:
        """The bucket of these sizes."""
        return super().__new__(cls, (batch_size, seq_len, *sorted(named.items())))

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Self:
        """The bucket of sizes by the name of their axis; 1 for a batch or a sequence left out."""
        named = sorted(item for item in sizes.items() if item[0] not in ("batch", "seq"))
        return super().__new__(cls, (sizes.get("batch", 1), sizes.get("seq", 1), *named))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).of, (self.sizes,)  # an axis may be called as an argument of `__new__`

    def __repr__(self) -> str:
        named = "".join(f", {axis}={size}" for axis, size in self[2:])
        return f"Bucket(batch_size={self.batch_size}, seq_len={self.seq_len}{named})"

    def __str__(self) -> str:
        named = "".join(f",{axis}={size}" for axis, size in self[2:])
        return f"{self.batch_size}x{self.seq_len}{named}"

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self[0]  # type: ignore[no-any-return]  # the rest is a list of pairs

    @property
    def seq_len(self) -> int:
        """Length of the sequence."""
        return self[1]  # type: ignore[no-any-return]

    @property
    def described(self) -> str:
        """The names of the axes and their sizes, as errors say them."""
        names = ", ".join(map(axis_name, self.sizes))
        return f"({names})={tuple(self.sizes.values())}"

    @property
    def short(self) -> str:
        """The sizes alone, as errors say them where they are known to be of this order."""
        return str(self if self[2:] else tuple(self))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the name of their axis: batch, seq, and the further ones."""
        return {"batch": self.batch_size, "seq": self.seq_len, **self.named}

    @property
    def named(self) -> dict[str, int]:
        """The sizes of the further axes, by their name."""
        return dict(self[2:])

    def size(self, axis: str) -> int:
        """The size of one axis.

        Raises:
            KeyError: There is none of this name.
        """
        if axis == "batch":
            return self.batch_size
        return self.seq_len if axis == "seq" else dict(self[2:])[axis]

    def with_sizes(self, sizes: Mapping[str, int]) -> Self:
        """The same with other sizes of some axes, by their name."""
        return self.of({**self.sizes, **sizes})

    def only(self, axes: Collection[str], *, others: Bucket) -> Self:
        """The same with the sizes of `others` for all axes but `axes`."""
        if all(axis in axes for axis in self.sizes):
            return self
        return self.of(
            {axis: size if axis in axes else others.size(axis) for axis, size in self.sizes.items()}
        )

    def map(self, function: Callable[..., int], *others: Bucket) -> Self:
        """What `function` gives for each size, and those of `others`."""
        return self.of(
            {
                axis: function(size, *(other.size(axis) for other in others))
                for axis, size in self.sizes.items()
            }
        )

    @property
    def elements(self) -> int:
        """The product of all sizes: the elements that a replay computes."""
        return math.prod(self.sizes.values())

    @property
    def is_empty(self) -> bool:
        """Whether it has no elements, which no bucket serves."""
        return 0 in self.sizes.values()

    def holds(self, sizes: Bucket, *, pads_seq: bool = True) -> bool:
        """Whether a call of `sizes` can be padded up to this bucket."""
        if self.sizes.keys() != sizes.sizes.keys():
            return False  # of a function of other axes
        return (pads_seq or self.seq_len == sizes.seq_len) and all(
            size >= sizes.size(axis) for axis, size in self.sizes.items()
        )


class Ladder(tuple[int, ...]):
    """Sorted, distinct, positive sizes; a tuple with `fit`.

    Args:
        sizes: The sizes in any order.
        name: What error messages call the ladder.

    Raises:
        ConfigError: No size at all, one below 1, one that is no integer, or one given twice.

    Example:
        >>> ladder = Ladder.powers_of_two(20)
        >>> ladder
        Ladder((1, 2, 4, 8, 16, 20))
        >>> ladder.fit(9), ladder.fit(21)
        (16, None)
    """

    __slots__ = ()

    def __new__(cls, sizes: Iterable[int], *, name: str = "sizes") -> Self:
        """The ladder of `sizes`, sorted."""
        if isinstance(sizes, str | bytes):
            raise ConfigError(f"{name}={sizes!r:.80} is text: give integers, such as (1, 2, 4)")
        try:
            given = [positive_size(size, name=f"{name}[{i}]") for i, size in enumerate(sizes)]
        except TypeError:
            raise ConfigError(
                f"{name}={sizes!r:.80} is not a collection of integers: give one, such as (1, 2, 4)"
            ) from None
        if not given:
            raise ConfigError(f"{name} is empty: give at least one size")
        ordered = sorted(given)
        for size, following in pairwise(ordered):
            if size == following:
                raise ConfigError(f"{name} has {size} twice: give each size once")
        return super().__new__(cls, ordered)

    def __getnewargs__(self) -> tuple[tuple[int, ...]]:
        return (tuple(self),)

    def __repr__(self) -> str:
        return f"Ladder({tuple(self)!r})"

    @property
    def max(self) -> int:
        """The largest size."""
        return self[-1]

    def fit(self, n: int) -> int | None:
        """The smallest size that holds `n`, or None where `n` is larger than all of them."""
        index = bisect_left(self, n)
        return self[index] if index < len(self) else None

    def rounded(self, multiple: int) -> Self:
        """The same with each size rounded up to a multiple: of the devices that share it, say.

        Example:
            >>> Ladder.powers_of_two(16).rounded(4)
            Ladder((4, 8, 16))
        """
        step = positive_size(multiple, name="multiple")
        return type(self)({-(-size // step) * step for size in self})

    @classmethod
    def powers_of_two(cls, max_size: int) -> Self:
        """1, 2, 4 … and `max_size` itself."""
        return cls._below(max_size, _doubling(1))

    @classmethod
    def linear(cls, step: int, max_size: int) -> Self:
        """`step`, 2 · `step`, 3 · `step` … and `max_size` itself."""
        step = positive_size(step, name="step")
        return cls._below(max_size, range(step, positive_size(max_size, name="max_size"), step))

    @classmethod
    def geometric(cls, ratio: float, max_size: int) -> Self:
        """1 and each size `ratio` times the one before, rounded up, and `max_size` itself.

        The relative padding of any n is below `ratio - 1`, but for rounding at small sizes.

        Raises:
            ConfigError: `ratio` is no finite number above 1.
        """
        if not isinstance(ratio, int | float) or not 1 < ratio < math.inf:
            raise ConfigError(f"ratio={ratio!r:.80} is no number above 1: give one, such as 1.5")
        return cls._below(max_size, _growing(ratio))

    @classmethod
    def vllm(cls, max_size: int) -> Self:
        """The default capture sizes of vLLM: 1, 2, 4, then steps of 8 to 256, then of 16.

        Source: vLLM, `VllmConfig._set_cudagraph_sizes`.
        """
        max_size = positive_size(max_size, name="max_size")
        steps = chain((1, 2, 4), range(8, 256, 8), range(256, max(max_size, 257), 16))
        return cls._below(max_size, steps)

    @classmethod
    def sglang(cls, max_size: int) -> Self:
        """The default decode batch sizes of SGLang: 1, 2, 4, 8, 12, then steps of 8, 16 and 32.

        Source: SGLang, `ServerArgs`, the list of `cuda_graph_bs` without speculative decoding.
        """
        max_size = positive_size(max_size, name="max_size")
        steps = chain(
            (1, 2, 4, 8, 12),
            range(16, 257, 8),
            range(272, 512, 16),
            range(512, max(max_size, 513), 32),
        )
        return cls._below(max_size, steps)

    @classmethod
    def _below(cls, max_size: int, sizes: Iterable[int]) -> Self:
        top = positive_size(max_size, name="max_size")
        return cls((*takewhile(lambda size: size < top, sizes), top))


def _doubling(size: int) -> Iterator[int]:
    while True:
        yield size
        size *= 2


def _growing(ratio: float) -> Iterator[int]:
    size = 1
    while True:
        yield size
        # At least one more, so that a ratio such as 1.1 gets past the small sizes.
        size = max(size + 1, math.ceil(size * ratio))
