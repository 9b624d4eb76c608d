"""Padding up to a bucket and trimming back, in NumPy: nothing here compiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.axes import LeafAxes, Shape
from cudagraph_jax.shapes.ladder import Bucket

if TYPE_CHECKING:
    import numpy.typing as npt

Array = np.ndarray[tuple[Any, ...], np.dtype[np.generic]]
Index = tuple[slice, ...]
PadValue = bool | int | float | complex | str

EDGE: Final = "edge"
"""The pad value that repeats the last real row and the last real position; 0 without any."""


class _Unchosen(int):
    """A number that stands where none was given."""


UNCHOSEN: Final = _Unchosen(0)
"""The pad value 0 of an array for which nobody chose one: nothing says that it is ignored."""


def real_index(axes: LeafAxes, ndim: int, sizes: Bucket) -> Index:
    """The index of the real elements in an array padded to a bucket."""
    index = [slice(None)] * ndim
    if axes.batch is not None:
        index[axes.batch] = slice(sizes.batch_size)
    if axes.seq is not None:
        index[axes.seq] = slice(sizes.seq_len)
    return tuple(index)


def check_pad_value(value: PadValue, dtype: np.dtype[np.generic], *, name: str) -> None:
    """Raises unless an array of `dtype` can hold `value`, to its own precision.

    Raises:
        InputShapeError: It cannot: the padding of `name` would be something else.
    """
    if value in (0, EDGE):
        return
    try:
        with np.errstate(all="raise"):
            held = np.asarray(value).astype(dtype)
    except (OverflowError, ValueError, FloatingPointError):
        held = None
    floating = jnp.issubdtype(dtype, np.inexact)
    if held is None or not (floating or held.astype(np.float64) == value):
        raise InputShapeError(
            f"pad_values has {value!r} for {name}, which its dtype {dtype} does not hold: "
            "choose another value"
        )


@dataclass(frozen=True, slots=True)
class Padder:
    """Pads arrays of one shape into a bucket; made once per shape, called on every request.

    Attributes:
        shape: The bucket's shape for this array.
        dtype: What the bucket was lowered for.
        index: Where the real elements go.
        value: What the padding is filled with, or `"edge"`.
        axes: Where the array carries the two sizes.
    """

    shape: Shape
    dtype: np.dtype[np.generic]
    index: Index
    value: PadValue
    axes: LeafAxes

    def __call__(self, array: npt.ArrayLike) -> Array:
        """A new NumPy array of the bucket's shape with `array` in its corner.

        An array on an accelerator is copied to the host for this.
        """
        if self.value == 0:
            padded: Array = np.zeros(self.shape, self.dtype)
        elif self.value == EDGE:
            padded = np.empty(self.shape, self.dtype)
        else:
            padded = np.full(self.shape, self.value, self.dtype)
        padded[self.index] = array
        if self.value == EDGE:
            self._repeat_edges(padded)
        return padded

    def _repeat_edges(self, padded: Array) -> None:
        for axis in self.axes:
            if axis is None:
                continue
            size = self.index[axis].stop
            if size == 0:
                padded.fill(0)  # there is nothing to repeat
                return
            before = (slice(None),) * axis
            padded[(*before, slice(size, None))] = padded[(*before, slice(size - 1, size))]


def padder(
    shape: Shape,
    dtype: np.dtype[np.generic],
    *,
    axes: LeafAxes,
    sizes: Bucket,
    bucket: Bucket,
    value: PadValue = 0,
) -> Padder | None:
    """The `Padder` from `shape`, an array of `sizes`, to `bucket`; None where it fits already."""
    target = axes.resize(shape, bucket)
    if target == shape:
        return None
    return Padder(target, dtype, real_index(axes, len(shape), sizes), value, axes)
