"""Runs of a bucket without a request, so that its command buffers are recorded."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.text import said_by
from cudagraph_jax.errors import CaptureError, InputShapeError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import AbstractLeaf, copied_key
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import EDGE, Array, PadValue
from cudagraph_jax.shapes.pytrees import PyTree


def run_idle(entry: CUDAGraphEntry, iterations: int, *, leaves: Sequence[object] = ()) -> None:
    """Runs `entry` on padding alone and waits; records no replay.

    Args:
        entry: What to run.
        iterations: How often. XLA records a command buffer on the second run (docs/xla.md).
        leaves: The leaves of a call of the entry's variant: what is passed through is taken from
            them. Where they are shapes, or none are given, it is what the entry was captured
            with, while that is alive; else zeros.

    Raises:
        CaptureError: A run failed.
    """
    use_jax()
    for _ in range(iterations):
        args, kwargs = idle_arguments(entry, leaves=leaves)
        try:
            jax.block_until_ready(entry.executable.call(*args, **kwargs))
        except Exception as error:
            raise CaptureError(
                f"{entry.bucket} was compiled, but does not run: {said_by(error)}", stage="warm-up"
            ) from error
        entry.journal.idle_runs += 1


def idle_arguments(
    entry: CUDAGraphEntry, *, leaves: Sequence[object] = ()
) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
    """Arguments of the bucket's size that hold nothing but padding, all of it unmasked."""
    program = entry.program
    known = program.known_leaves()
    given = [
        known[index] if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        for index, leaf in enumerate(leaves or known)
    ]
    for index in program.donated_leaves:
        given[index] = None  # a run would use it up
    for index, key in program.keys.items():
        given[index] = copied_key(key) if index in program.donated_leaves else key
    values = [
        _idle_leaf(leaf, axes, pad, value, entry.bucket)
        for leaf, axes, pad, value in zip(
            program.variant.leaves, program.axes, program.leaf_pads, given, strict=True
        )
    ]
    args, kwargs = jax.tree.unflatten(program.variant.structure, values)
    if program.target.mask_argname is not None:
        kwargs = {**kwargs, program.target.mask_argname: np.ones(entry.bucket, np.bool_)}
    return args, kwargs


def _idle_leaf(
    leaf: AbstractLeaf, axes: LeafAxes, pad: PadValue, given: object, bucket: Bucket
) -> object:
    if axes.passes_through and not (given is None or isinstance(given, jax.ShapeDtypeStruct)):
        return given
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise InputShapeError(
            f"{leaf} is a PRNG key: give the key itself to warm-up, not its shape"
        )
    shape = axes.resize(tuple(size or 0 for size in leaf.shape), bucket)
    filled: Array = np.full(shape, 0 if pad == EDGE else pad, leaf.dtype)
    return filled
