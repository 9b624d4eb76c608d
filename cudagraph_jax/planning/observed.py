"""The sizes of observed requests: distinct, counted, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.ladder import Bucket

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# A mapping's key type is invariant: buckets are named although they are pairs.
Sizes: TypeAlias = (
    npt.ArrayLike
    | Iterable[int]
    | Iterable[tuple[int, int]]
    | Mapping[int, int]
    | Mapping[tuple[int, int], int]
    | Mapping[Bucket, int]
)
"""Lengths (N,), pairs (N, 2) of (batch, seq_len), or a mapping of either to how often it came."""

LARGEST_SIZE = 2**53
"""Sizes go up to it: beyond, float64 does not tell a whole number from the next."""

_EXPECTED = (
    "expected lengths (N,), (batch, seq_len) pairs (N, 2), or a mapping of either to its count"
)


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Distinct (batch, seq_len) sizes and how often each was asked for.

    Attributes:
        batches: Batch sizes, int64 (N,).
        seq_lens: Sequence lengths, int64 (N,).
        counts: Requests of each, float64 (N,).
    """

    batches: Ints
    seq_lens: Ints
    counts: Floats

    @property
    def requests(self) -> int:
        """All requests."""
        return int(self.counts.sum())

    @property
    def largest(self) -> Bucket:
        """The largest batch and the largest seq_len, which need not have come together."""
        return Bucket(int(self.batches.max()), int(self.seq_lens.max()))

    @classmethod
    def of(cls, sizes: Sizes | Observed) -> Observed:
        """The distinct sizes in an array or a histogram; lengths alone have batch 1.

        Raises:
            ConfigError: No sizes at all, one below 1, above `LARGEST_SIZE` or not whole, a count
                that is no whole number of 0 or more, or an array of another shape.
        """
        if isinstance(sizes, Observed):
            return sizes
        if isinstance(sizes, Mapping):
            pairs = _pairs(_array(list(sizes)))
            counts = _counts(list(sizes.values()))
        else:
            pairs, counts = _in_parts(_array(sizes))
        asked = counts > 0
        if not asked.any():
            raise ConfigError(f"sizes hold no request, all counts are 0: {_EXPECTED}")
        return cls(*_distinct(pairs[asked], counts[asked]))


def _in_parts(array: npt.NDArray[np.generic]) -> tuple[Ints, Floats]:
    """Pairs and their counts, each part of the array's rows by itself.

    Counting takes a dozen times the memory of what is counted.
    """
    parts = [
        _distinct(pairs, np.ones(len(pairs)))
        for start in range(0, len(array), _PART)
        for pairs in [_pairs(array[start : start + _PART], start=start)]
    ]
    batches, seq_lens, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return np.stack([batches, seq_lens], axis=1), counts


_PART = 2**18


def _distinct(pairs: Ints, counts: Floats) -> tuple[Ints, Ints, Floats]:
    """The different pairs, ascending, and the sum of each one's counts."""
    # Each axis by itself: many times as fast as sorting rows.
    batches, batch = np.unique(pairs[:, 0], return_inverse=True)
    lengths, length = np.unique(pairs[:, 1], return_inverse=True)
    codes, place = np.unique(batch * len(lengths) + length, return_inverse=True)
    total = np.bincount(place, weights=counts).astype(np.float64)
    return batches[codes // len(lengths)], lengths[codes % len(lengths)], total


def _array(sizes: object) -> npt.NDArray[np.generic]:
    if isinstance(sizes, str | bytes):
        raise ConfigError(f"sizes={sizes!r} is text: {_EXPECTED}")
    if isinstance(sizes, Iterable) and not hasattr(sizes, "__array__"):
        sizes = list(sizes)
    try:
        array = np.asarray(sizes)
    except ValueError:
        raise ConfigError(f"sizes are ragged: {_EXPECTED}") from None
    if array.size == 0:
        raise ConfigError(f"sizes are empty: {_EXPECTED}")
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 2):
        raise ConfigError(f"sizes have the shape {array.shape}: {_EXPECTED}")
    return array


def _pairs(array: npt.NDArray[np.generic], *, start: int = 0) -> Ints:
    """The array as (N, 2) pairs of whole sizes of 1 or more; it is a part from `start` on."""
    whole = _whole(array, name="sizes", minimum=1, start=start)
    if whole.ndim == 1:
        return np.stack([np.ones_like(whole), whole], axis=1)
    return whole


def _counts(counts: list[object]) -> Floats:
    try:
        array = np.asarray(counts)
    except ValueError:
        array = np.empty(0, object)
    if array.ndim != 1:
        raise ConfigError("counts are no numbers: give a whole number of 0 or more for each size")
    return _whole(array, name="counts", minimum=0).astype(np.float64)


def _whole(array: npt.NDArray[np.generic], *, name: str, minimum: int, start: int = 0) -> Ints:
    remedy = f"give whole numbers from {minimum} to 2**53"
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{name} have the dtype {array.dtype}: {remedy}")
    # As they are: in float64, 2**53 + 1 would pass for 2**53, which float16 does not have.
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
    numbers = cast(npt.NDArray[np.int64 | np.float64], array)
    problems = (
        (~np.isfinite(numbers) | (np.floor(numbers) != numbers), "is no whole number"),
        (numbers < minimum, f"is below {minimum}"),
        (numbers > LARGEST_SIZE, "is above 2**53"),
    )
    for wrong, problem in problems:
        if wrong.any():
            place = int(np.argwhere(wrong)[0][0])
            value = array[place].tolist()
            raise ConfigError(f"{name}[{start + place}]={value!r} {problem}: {remedy}")
    return array.astype(np.int64)
