"""`debug_mode`: a new bucket must give the eager answer, whatever its padding holds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import CaptureError, PaddingLeakError
from cudagraph_jax.graphs.call import Call
from cudagraph_jax.graphs.eager import run_eagerly
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array, PadValue, real_index
from cudagraph_jax.shapes.prefix import PyTree

# Of the largest element, by bytes of the dtype. Buckets agree to rounding, not bit for bit
# (FACTS.md), and a bucket may be reduced in another order than the eager operations.
_TOLERANCE = {2: 5e-2, 4: 1e-4, 8: 1e-9}
_HUGE = 1e4


def check_entry(entry: CUDAGraphEntry, call: Call) -> None:
    """Raises unless `entry` gives the eager answer for the real rows of `call`.

    The padding is then filled with NaN, or for integers with an end of the range of their real
    values, and the real rows must not move. Where NaN moves them, large finite values decide: a
    weight of exactly zero stops those, and never NaN. An array that is all 0 and 1, of whatever
    dtype, is taken for a mask and keeps its padding.

    Args:
        entry: A new entry.
        call: A call of its variant. Arrays that it leaves abstract are drawn at random.

    Raises:
        PaddingLeakError: The real rows depend on the padding.
        CaptureError: They differ from the eager answer where there is no padding.
    """
    real = _with_room_for_padding(entry, call)
    target = dataclasses.replace(entry.program.target, unpad="none")
    expected = jax.tree.leaves(run_eagerly(target, real.args, real.kwargs, real.sizes))
    usual = _replay(entry, real, entry.program.pad_values)
    _compare(entry, real, usual, expected, "its usual padding")
    if real.sizes == entry.bucket:
        return
    try:
        poisoned = _replay(entry, real, _poison(entry, real, float("nan"), largest=True))
        _compare(entry, real, poisoned, usual, "NaN in the padding")
    except PaddingLeakError:
        for value, largest in ((_HUGE, True), (-_HUGE, False)):
            poisoned = _replay(entry, real, _poison(entry, real, value, largest=largest))
            _compare(entry, real, poisoned, usual, f"{value:g} in the padding")


def _with_room_for_padding(entry: CUDAGraphEntry, call: Call) -> Call:
    """`call` with real arrays, cut where it would fill the bucket."""
    program, bucket = entry.program, entry.bucket
    batch = min(call.sizes.batch_size, max(1, bucket.batch_size - 1))
    seq = min(call.sizes.seq_len, max(1, bucket.seq_len - 1))
    sizes = Bucket(
        batch if program.carries_batch else bucket.batch_size,
        seq if program.carries_seq else bucket.seq_len,
    )
    draw = np.random.default_rng(0)
    leaves = []
    for leaf, axes in zip(call.leaves, call.axes, strict=True):
        value = _concrete(leaf, draw)
        if not axes.passes_through:
            value = np.asarray(value)[real_index(axes, np.ndim(value), sizes)]
        leaves.append(value)
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return dataclasses.replace(call, args=args, kwargs=kwargs, leaves=tuple(leaves), sizes=sizes)


def _concrete(leaf: PyTree, draw: np.random.Generator) -> PyTree:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        if jnp.issubdtype(leaf.dtype, np.inexact):
            return np.asarray(draw.standard_normal(leaf.shape)).astype(leaf.dtype)
        return np.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        # A copy on the host: the caller's own may be donated, and one run would use it up.
        return np.asarray(leaf)
    return leaf


def _poison(
    entry: CUDAGraphEntry, call: Call, floating: float, *, largest: bool
) -> tuple[PadValue, ...]:
    """What the padding of each leaf of the positional arguments is filled with."""
    values: list[PadValue] = []
    for leaf, axes, usual in zip(call.leaves, call.axes, entry.program.pad_values, strict=False):
        if axes.passes_through:
            values.append(usual)
            continue
        array = np.asarray(leaf)
        if not array.size or _is_mask(array):
            values.append(usual)
        elif jnp.issubdtype(array.dtype, np.inexact):
            values.append(floating)
        else:
            values.append(int(array.max() if largest else array.min()))
    return tuple(values)


def _is_mask(array: Array) -> bool:
    return bool(np.all((array == 0) | (array == 1)))


def _replay(entry: CUDAGraphEntry, call: Call, pad_values: tuple[PadValue, ...]) -> list[Array]:
    """The trimmed outputs of `entry` for `call`, padded with `pad_values`."""
    filled = dataclasses.replace(entry, program=entry.program.padded_with(pad_values))
    outputs = filled.padded_outputs(call)
    return [
        np.asarray(output)[real_index(leaf.axes, leaf.ndim, call.sizes)]
        for output, leaf in zip(outputs, entry.outputs.leaves, strict=True)
        if leaf.comparable
    ]


def _compare(
    entry: CUDAGraphEntry, call: Call, found: list[Array], expected: list[PyTree], how: str
) -> None:
    leaves = entry.outputs.leaves
    if len(expected) != len(found):
        expected = [value for value, leaf in zip(expected, leaves, strict=True) if leaf.comparable]
    names = [leaf.name for leaf in leaves if leaf.comparable]
    for name, have, want in zip(names, found, map(np.asarray, expected), strict=True):
        worst = _worst_element(have, want)
        if worst is None:
            continue
        message = (
            f"{entry.program.target.name} at {tuple(call.sizes)} in the bucket {entry.bucket}: "
            f"{name}{list(worst)} is {have[worst]} with {how}, but should be {want[worst]}"
        )
        if call.sizes == entry.bucket:
            raise CaptureError(
                f"{message}: the compiled function differs from the eager one; is it pure?",
                stage="check",
            )
        raise PaddingLeakError(
            f"{message}: the padding changes the real rows; let the function take a mask "
            "(mask_argname) and use it, or choose pad_values that it ignores"
        )


def _worst_element(found: Array, expected: Array) -> tuple[int, ...] | None:
    """Index of the element that is furthest off; None where all are within the tolerance."""
    if found.shape != expected.shape:
        raise CaptureError(
            f"the bucket gives the shape {found.shape}, the eager function {expected.shape}: "
            "declare out_axes",
            stage="check",
        )
    if found.size == 0:
        return None
    if not jnp.issubdtype(found.dtype, np.inexact):
        off = (found != expected).astype(np.float64)
        limit = 0.0
    else:
        wide = np.complex128 if jnp.issubdtype(found.dtype, np.complexfloating) else np.float64
        have, want = found.astype(wide), expected.astype(wide)
        same = (have == want) | (np.isnan(have) & np.isnan(want))
        off = np.where(same, 0.0, np.abs(np.where(same, 0, have) - np.where(same, 0, want)))
        off = np.where(np.isnan(off), np.inf, off)
        finite = np.abs(want[np.isfinite(want)])
        limit = _TOLERANCE.get(found.dtype.itemsize, 1e-4) * max(1.0, finite.max(initial=0.0))
    worst = np.unravel_index(int(np.argmax(off)), off.shape)
    return tuple(int(index) for index in worst) if off[worst] > limit else None
