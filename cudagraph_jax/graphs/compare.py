"""How far two answers are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from cudagraph_jax.errors import CaptureError
from cudagraph_jax.shapes.padding import Array

# Some factors' rounding to ten bits after the point, which adds up over layers.
_TF32 = 4 * 2.0**-10
_ALL_DIGITS = ("highest", "float32", "F32_F32_F32", "F64_F64_F64")


class Tolerance(NamedTuple):
    """How far answers may be apart: `atol + rtol * abs(expected)`, as in `numpy.allclose`.

    Where both are None it is half of the digits of the largest element: buckets agree to rounding,
    not bit for bit (docs/xla.md), and a bucket may be reduced in another order than the eager
    operations. Where all are small they may come from larger ones that cancel: then it is 32 times
    the rounding of 1. Integers and bools must be equal.
    """

    rtol: float | None = None
    atol: float | None = None

    def allowed(
        self, size: npt.NDArray[np.float64], epsilon: float, products: float = 0.0
    ) -> npt.NDArray[np.float64]:
        """By how much each element may be off.

        Args:
            size: How large each is; 0 for those that are not finite.
            epsilon: The distance from 1 to the next number of their dtype.
            products: By how much matrix products may be off, of the largest element.
        """
        if self.rtol is None and self.atol is None:
            half = epsilon**0.5
            largest = max(half, products) * size.max(initial=0.0)
            return np.full_like(size, max(largest, min(half, 32 * epsilon)))
        return (self.atol or 0.0) + (self.rtol or 0.0) * size


USUAL = Tolerance()
EXACT = Tolerance(0.0, 0.0)


class ArrayDifference(NamedTuple):
    """An element that is off by more than it may be.

    Attributes:
        at: Where it is.
        found: What it is.
        expected: What it should be.
        off: By how much it is off.
        allowed: By how much it might be.
    """

    at: tuple[int, ...]
    found: Any
    expected: Any
    off: float
    allowed: float


def worst_difference(
    found: Array,
    expected: Array,
    *,
    tolerance: Tolerance = USUAL,
    where: npt.NDArray[np.bool_] | None = None,
) -> ArrayDifference | None:
    """The element that is furthest beyond the tolerance; None where all are within.

    Args:
        found: What is compared.
        expected: What it should be.
        tolerance: How far they may be apart.
        where: Which elements are compared, to be broadcast to both; None: all.

    Raises:
        CaptureError: The shapes or the dtypes differ.
    """
    if found.shape != expected.shape:
        raise CaptureError(
            f"the bucket gives the shape {found.shape}, the eager function {expected.shape}: "
            "return the same shapes, traced or not",
            stage="check",
        )
    if found.dtype != expected.dtype:
        raise CaptureError(
            f"the bucket gives {found.dtype}, the eager function {expected.dtype}: return the same "
            "dtype for every size, traced or not",
            stage="check",
        )
    if found.size == 0:
        return None
    # Not by an index, which would lose where they are: the others are 0, and so is what they allow.
    compared = [array if where is None else _only(array, where) for array in (found, expected)]
    off, allowed = _distances(compared[0], compared[1], tolerance)
    excess = off - allowed
    worst = np.unravel_index(int(np.argmax(excess)), off.shape)
    if excess[worst] <= 0:
        return None
    at = tuple(int(place) for place in worst)
    return ArrayDifference(
        at, found[worst], expected[worst], float(off[worst]), float(allowed[worst])
    )


def _only(array: Array, where: npt.NDArray[np.bool_]) -> Array:
    chosen: Array = np.where(where, array, np.zeros((), array.dtype))
    return chosen


def _distances(
    found: Array, expected: Array, tolerance: Tolerance
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """By how much each element is off, and may be; NaN is off from all but NaN."""
    if not jnp.issubdtype(found.dtype, np.inexact):
        return (found != expected).astype(np.float64), np.zeros(found.shape)
    is_complex = jnp.issubdtype(found.dtype, np.complexfloating)
    wide = np.complex128 if is_complex else np.float64
    have, want = found.astype(wide), expected.astype(wide)
    same = (have == want) | (np.isnan(have) & np.isnan(want))
    off = np.where(same, 0.0, np.abs(np.where(same, 0, have) - np.where(same, 0, want)))
    size = np.abs(np.where(np.isfinite(want), want, 0))
    epsilon = float(jnp.finfo(found.dtype).eps)  # type: ignore[no-untyped-call]
    allowed = tolerance.allowed(size, epsilon, coarse_products(found.dtype))
    return np.where(np.isnan(off), np.inf, off), allowed


def coarse_products(
    dtype: np.dtype[Any], *, platform: Callable[[], str] = jax.default_backend
) -> float:
    """By how much matrix products of `dtype` may be off, of the largest element; 0: by rounding.

    GPUs take ten bits of float32 factors (TF32) unless told otherwise, and whether a product does
    so may depend on the bucket:
    https://docs.jax.dev/en/latest/_autosummary/jax.default_matmul_precision.html

    Args:
        dtype: An inexact dtype.
        platform: Gives the backend's name.
    """
    if dtype != np.float32 or platform() != "gpu":
        return 0.0
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # no stub
    return 0.0 if precision in _ALL_DIGITS else _TF32
