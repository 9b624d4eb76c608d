"""Padding up to a bucket and trimming back, in NumPy: nothing here compiles."""

from __future__ import annotations

import math
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

ANY: Final = "any"
"""The pad value of a function that ignores whatever padding holds, NaN included: here it is 0."""


class _Unchosen(int):
    """A number that stands where none was given."""


UNCHOSEN: Final = _Unchosen(0)
"""The pad value 0 of an array for which nobody chose one: nothing says that it is ignored.

It is zero bytes: in float8_e8m0fnu, which has no 0, they are its smallest number, 2**-127.
"""


def real_index(axes: LeafAxes, ndim: int, sizes: Bucket) -> Index:
    """The index of the real elements in an array padded to a bucket."""
    index = [slice(None)] * ndim
    for place, length in axes.dims:
        index[place] = length.real(sizes)
    return tuple(index)


def mask_of(shape: Shape, index: Index) -> Array:
    """A mask of `shape`, True at `index`."""
    mask: Array = np.zeros(shape, np.bool_)
    mask[index] = True
    return mask


def check_pad_value(value: PadValue, dtype: np.dtype[np.generic], *, name: str) -> None:
    """Raises unless an array of `dtype` can hold `value`, to its own precision.

    Raises:
        InputShapeError: It cannot: the padding of `name` would be something else.
    """
    if value is UNCHOSEN or isinstance(value, str):
        return
    if not _holds(dtype, value):
        raise InputShapeError(
            f"pad_values has {value!r} for {name}, which its dtype {dtype} does not hold: "
            "choose another value"
        )


def _holds(dtype: np.dtype[np.generic], value: complex) -> bool:
    """Whether `value` is in `dtype` what it is, but for rounding.

    So not -inf for float8_e4m3fn, which has no infinity and takes NaN for it, nor 300 for int8.
    """
    if jnp.issubdtype(dtype, np.complexfloating):
        part = np.dtype(np.float32 if dtype == np.complex64 else np.float64)
        return _holds_real(part, value.real) and _holds_real(part, value.imag)
    if np.iscomplexobj(value):
        return value.imag == 0 and _holds(dtype, value.real)
    if dtype == np.bool_:
        return value in (0, 1)
    real = value.real
    if jnp.issubdtype(dtype, np.integer):
        limits = jnp.iinfo(dtype)  # type: ignore[no-untyped-call]
        whole = math.isfinite(real) and real == int(real)
        return whole and int(limits.min) <= int(real) <= int(limits.max)
    return _holds_real(dtype, real)


def _holds_real(dtype: np.dtype[np.generic], value: float) -> bool:
    try:
        wanted = float(value)
    except OverflowError:
        return False  # an integer beyond all floats
    with np.errstate(all="ignore"):
        held = float(np.asarray(wanted).astype(dtype))
    if not (math.isfinite(wanted) and math.isfinite(held)):
        return held == wanted or (math.isnan(held) and math.isnan(wanted))
    limits = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    spacing = math.ldexp(float(limits.eps), math.frexp(held)[1] - 1)
    # float4 and float6 saturate: their 6.0 is 7 rounded, but not 300. The half has a little more,
    # because ml_dtypes rounds through float32.
    off = 0.51 * max(spacing, float(limits.smallest_subnormal))
    return (held == 0) == (wanted == 0) and abs(held - wanted) <= off


@dataclass(frozen=True, slots=True)
class Padder:
    """Pads arrays of one shape into a bucket; made once per shape, called on every request.

    Attributes:
        shape: The bucket's shape for this array.
        dtype: What the bucket was lowered for.
        index: Where the real elements go.
        value: What the padding is filled with, `"edge"`, or `"any"`.
        axes: Which dimensions of the array follow a size.
        is_zero: Whether the padding is zeros, and nothing has to be done but to copy the array.
    """

    shape: Shape
    dtype: np.dtype[np.generic]
    index: Index
    value: PadValue
    axes: LeafAxes
    is_zero: bool

    def __call__(self, array: npt.ArrayLike) -> Array:
        """A new NumPy array of the bucket's shape with `array` in its corner.

        An array on an accelerator is copied to the host for this.
        """
        if self.is_zero:
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
        for axis, _ in self.axes.dims:
            real = range(*self.index[axis].indices(padded.shape[axis]))
            if not real:
                padded.fill(0)  # there is nothing to repeat
                return
            before = (slice(None),) * axis
            for edge, padding in (
                (real[-1], slice(real[-1] + 1, None)),
                (real[0], slice(real[0])),
            ):
                padded[(*before, padding)] = padded[(*before, slice(edge, edge + 1))]


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
    index = real_index(axes, len(shape), sizes)
    return Padder(target, dtype, index, value, axes, is_zero=is_zero(value))


def is_zero(value: PadValue) -> bool:
    """Whether padding is zeros: not -0.0, of which 1/x and atan2 differ."""
    if isinstance(value, str) or value != 0:
        return value == ANY
    return math.copysign(1, value.real) > 0 and math.copysign(1, value.imag) > 0


SMALL_BYTES = 1 << 16
"""What an answer may keep beside itself without a thought."""


def own_part(whole: Array, index: tuple[Any, ...]) -> Array:
    """A part of `whole` that does not keep all of it, where that is much; read-only like it."""
    # A view keeps the whole bucket for as long as somebody keeps the answer: 12 MiB for 450 KiB.
    # To copy those takes 14 us.
    part: Array = whole[index]
    if whole.nbytes - part.nbytes <= SMALL_BYTES:
        return part
    part = part.copy()
    part.flags.writeable = False
    return part


def read_only(array: Array) -> Array:
    """`array` as it is handed out; whoever has the array itself may write into it as before."""
    view = array.view()
    view.flags.writeable = False
    return view
