"""The sizes of observed requests: distinct, counted, checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from cudagraph_jax._base.checks import nearest
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
    | Iterable[tuple[int, ...]]
    | Mapping[tuple[int, ...], int]
    | Mapping[str, npt.ArrayLike]
)
"""One number for each of k axes (N, k), or a mapping of these to how often they came, or of each
axis to its sizes (N,). On the axes ("batch", "seq") lengths (N,) alone have batch 1."""

BATCH_SEQ = ("batch", "seq")
"""The axes that are meant where none are named."""

LARGEST_SIZE = 2**53
"""Sizes go up to it: beyond, float64 does not tell a whole number from the next."""


def checked_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """The names of axes, each once.

    Raises:
        ConfigError: There are none, one is no name, or one is there twice.
    """
    if isinstance(axes, str) or not isinstance(axes, Sequence) or not axes:
        raise ConfigError(f'axes={axes!r:.80} are no names: give a tuple, such as ("batch", "src")')
    for place, axis in enumerate(axes):
        if not isinstance(axis, str) or not axis.isidentifier() or axis == "_":
            raise ConfigError(
                f"axes has {axis!r}, which is no name: give one that an identifier may have, such "
                'as "src"'
            )
        if axis in axes[:place]:
            raise ConfigError(f"axes has {axis!r} twice: name each axis once")
    return tuple(axes)


def argument_names(axes: Sequence[str]) -> list[str]:
    """What a size on each axis is called: `seq_len` on "seq", else as the axis is."""
    return ["seq_len" if axis == "seq" else axis for axis in axes]


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Distinct sizes on k axes and how often each was asked for.

    Attributes:
        axes: The names of the axes.
        columns: The sizes on each axis, k times int64 (N,).
        counts: Requests of each, float64 (N,).
    """

    axes: tuple[str, ...]
    columns: tuple[Ints, ...]
    counts: Floats

    @property
    def requests(self) -> int:
        """All requests."""
        return int(self.counts.sum())

    @property
    def largest(self) -> tuple[int, ...]:
        """The largest size on each axis, which need not have come together."""
        return tuple(int(column.max()) for column in self.columns)

    @classmethod
    def of(
        cls,
        sizes: Sizes | Observed,
        axes: tuple[str, ...] = BATCH_SEQ,
        *,
        max_elements: float = math.inf,
    ) -> Observed:
        """The distinct sizes in an array or a histogram.

        Args:
            sizes: What was asked for; see `plan_buckets`.
            axes: The names of the axes.
            max_elements: How many a request has at most that did not carry all of the axes.

        Raises:
            ConfigError: No sizes at all, one below 1, above `LARGEST_SIZE` or not whole, a count
                that is no whole number of 0 or more, or not one number for each axis.
        """
        if isinstance(sizes, Observed):
            return sizes
        if isinstance(sizes, Mapping) and sizes and all(isinstance(key, str) for key in sizes):
            sizes = _stacked(cast(Mapping[str, npt.ArrayLike], sizes), axes)
        if isinstance(sizes, Mapping) and all(isinstance(size, Bucket) for size in sizes):
            sizes = _of_axes(cast(Mapping[Bucket, int], sizes), axes, max_elements)
        if isinstance(sizes, Mapping):
            rows = _rows(_array(list(sizes), axes))
            counts = _counts(list(sizes.values()))
        else:
            rows, counts = _in_parts(_array(sizes, axes))
        asked = counts > 0
        if not asked.any():
            raise ConfigError(f"sizes hold no request, all counts are 0: {_expected(axes)}")
        rows, counts = distinct(rows[asked], counts[asked])
        if len(axes) > rows.shape[1]:  # lengths alone
            rows = np.stack([np.ones_like(rows[:, 0]), rows[:, 0]], axis=1)
        return cls(axes, tuple(np.ascontiguousarray(rows.T)), counts)


def _of_axes(
    sizes: Mapping[Bucket, int], axes: Sequence[str], max_elements: float
) -> dict[tuple[int, ...], int]:
    """What a manager was asked for, on these axes.

    A call that did not carry one has the least size that others had, so that no bucket is made for
    it; 1 where it would have too many elements with that.

    Raises:
        ConfigError: Calls carried another axis.
    """
    least = {
        axis: min((each.sizes[axis] for each in sizes if axis in each.sizes), default=1)
        for axis in axes
    }
    found: Counter[tuple[int, ...]] = Counter()
    for bucket, count in sizes.items():
        for axis, size in bucket.sizes.items():
            if axis not in axes and size != 1:
                raise ConfigError(
                    f"{bucket} has {axis}={size}, which is none of the axes {', '.join(axes)}: "
                    f"give axes={(*axes, axis)!r}"
                )
        asked = tuple(bucket.sizes.get(axis, least[axis]) for axis in axes)
        if math.prod(asked) > max_elements:
            asked = tuple(bucket.sizes.get(axis, 1) for axis in axes)
        found[asked] += count
    return dict(found)


def _expected(axes: Sequence[str]) -> str:
    if tuple(axes) == BATCH_SEQ:
        return (
            "expected lengths (N,), (batch, seq_len) pairs (N, 2), or a mapping of either to its "
            "count"
        )
    one = "sizes (N,)" if len(axes) == 1 else f"({', '.join(argument_names(axes))}) tuples"
    shape = "" if len(axes) == 1 else f" (N, {len(axes)})"
    return f"expected {one}{shape}, a mapping of these to counts, or of each axis to its sizes (N,)"


def _stacked(columns: Mapping[str, npt.ArrayLike], axes: Sequence[str]) -> npt.NDArray[np.generic]:
    """A mapping of axes to sizes as one array (N, k)."""
    for name in columns:
        if name not in axes:
            raise ConfigError(f"sizes has {name!r}, which is no axis: {nearest(name, axes)}")
    for axis in axes:
        if axis not in columns:
            raise ConfigError(f"sizes lacks the axis {axis!r}: give its sizes beside {[*columns]}")
    arrays = [np.asarray(columns[axis]) for axis in axes]
    shapes = {axis: array.shape for axis, array in zip(axes, arrays, strict=True)}
    if len(set(shapes.values())) > 1 or arrays[0].ndim != 1:
        raise ConfigError(f"sizes have the shapes {shapes}: give as many sizes (N,) on each axis")
    return np.stack(arrays, axis=1)


def _in_parts(array: npt.NDArray[np.generic]) -> tuple[Ints, Floats]:
    """Rows and their counts, each part of the array's rows by itself.

    Counting takes a dozen times the memory of what is counted.
    """
    parts = [
        distinct(rows, np.ones(len(rows)))
        for start in range(0, len(array), _PART)
        for rows in [_rows(array[start : start + _PART], start=start)]
    ]
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([each for _, each in parts])


_PART = 2**18


def distinct(rows: Ints, counts: Floats) -> tuple[Ints, Floats]:
    """The different rows, ascending, and the sum of each one's counts."""
    # Each axis by itself: many times as fast as sorting rows. The codes of the axes so far are
    # dense, so that they stay below N times the values of the next one.
    values, code = np.unique(rows[:, 0], return_inverse=True)
    different = values[:, None]
    for column in rows.T[1:]:
        values, place = np.unique(column, return_inverse=True)
        codes, code = np.unique(code * len(values) + place, return_inverse=True)
        before, last = np.divmod(codes, len(values))
        different = np.column_stack([different[before], values[last]])
    return different, np.bincount(code, weights=counts).astype(np.float64)


def _array(sizes: object, axes: Sequence[str]) -> npt.NDArray[np.generic]:
    expected = _expected(axes)
    if isinstance(sizes, str | bytes):
        raise ConfigError(f"sizes={sizes!r:.80} is text: {expected}")
    if isinstance(sizes, Iterable) and not hasattr(sizes, "__array__"):
        sizes = list(sizes)
    try:
        array = np.asarray(sizes)
    except ValueError:
        _refuse_odd_row(cast(Iterable[object], sizes), axes)
        raise ConfigError(f"sizes are ragged: {expected}") from None
    if array.size == 0:
        raise ConfigError(f"sizes are empty: {expected}")
    alone = len(axes) == 1 or tuple(axes) == BATCH_SEQ
    if not (array.ndim == 1 and alone) and array.shape[1:] != (len(axes),):
        _refuse_odd_row(array.tolist() if array.ndim else (), axes)
        raise ConfigError(f"sizes have the shape {array.shape}: {expected}")
    return array


def _refuse_odd_row(rows: Iterable[object], axes: Sequence[str]) -> None:
    """Names the first row that has not one number for each of the axes that were named."""
    for place, row in enumerate(() if tuple(axes) == BATCH_SEQ else rows):
        numbers = len(row) if isinstance(row, Sequence) else 1
        if numbers != len(axes):
            raise ConfigError(
                f"sizes[{place}]={row!r:.80} has {numbers} "
                f"{'number' if numbers == 1 else 'numbers'}, but the axes are {', '.join(axes)}: "
                f"{_expected(axes)}"
            )


def _rows(array: npt.NDArray[np.generic], *, start: int = 0) -> Ints:
    """The array as (N, k) whole sizes of 1 or more; it is a part from `start` on."""
    whole = _whole(array, name="sizes", minimum=1, start=start)
    return whole[:, None] if whole.ndim == 1 else whole


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
