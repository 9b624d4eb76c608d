"""The sizes of observed requests: distinct, counted, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.ladder import Bucket

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

Sizes: TypeAlias = npt.ArrayLike | Mapping[int, int] | Mapping[tuple[int, int], int]
"""Lengths (N,), pairs (N, 2) of (batch, seq_len), or a mapping of either to how often it came."""

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
    def of(cls, sizes: Sizes) -> Observed:
        """The distinct sizes in an array or a histogram; lengths alone have batch 1.

        Raises:
            ConfigError: No sizes at all, a size below 1 or none that is whole, a negative count,
                or an array of another shape.
        """
        if isinstance(sizes, Observed):
            return sizes
        if isinstance(sizes, Mapping):
            pairs = _pairs(_array(list(sizes)))
            counts = _counts(list(sizes.values()))
        else:
            pairs = _pairs(_array(sizes))
            counts = np.ones(len(pairs))
        asked = counts > 0
        if not asked.any():
            raise ConfigError(f"sizes hold no request: {_EXPECTED}")
        distinct, place = np.unique(pairs[asked], axis=0, return_inverse=True)
        total = np.bincount(place.reshape(-1), weights=counts[asked]).astype(np.float64)
        return cls(distinct[:, 0], distinct[:, 1], total)


def _array(sizes: object) -> npt.NDArray[np.generic]:
    if not isinstance(sizes, np.ndarray) and isinstance(sizes, Iterable):
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


def _pairs(array: npt.NDArray[np.generic]) -> Ints:
    """The array as (N, 2) pairs of whole sizes of 1 or more."""
    whole = _whole(array, name="sizes")
    if (whole < 1).any():
        place = int(np.argwhere(whole < 1)[0][0])
        raise ConfigError(f"sizes[{place}]={whole[place].tolist()!r} is below 1: leave it out")
    if whole.ndim == 1:
        return np.stack([np.ones_like(whole), whole], axis=1)
    return whole


def _counts(counts: list[object]) -> Floats:
    whole = _whole(np.asarray(counts), name="counts")
    if whole.ndim != 1 or (whole < 0).any():
        raise ConfigError("a histogram has a count below 0: counts are whole numbers from 0 up")
    return whole.astype(np.float64)


def _whole(array: npt.NDArray[np.generic], *, name: str) -> Ints:
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{name} have the dtype {array.dtype}: give whole numbers")
    numbers = array.astype(np.float64)
    wrong = ~np.isfinite(numbers) | (numbers != np.floor(numbers))
    if wrong.any():
        place = int(np.argwhere(wrong)[0][0])
        raise ConfigError(f"{name}[{place}]={array[place].tolist()!r} is no whole number")
    return array.astype(np.int64)
