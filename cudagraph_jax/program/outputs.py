"""The outputs of a program: where they carry the sizes, and what the caller gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.axes import AxisPattern, LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.output_axes import OutputAxes, OutputShape
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix

Unpad = Literal["host", "device", "none"]


class OutputLeaf(NamedTuple):
    """One output array of a program.

    Attributes:
        name: What errors call it.
        axes: Where it carries the two sizes.
        unpad: What the caller gets of it.
        ndim: Its rank.
        comparable: Whether `axes` is known and NumPy can hold it; always so where it is trimmed.
    """

    name: str
    axes: LeafAxes
    unpad: Unpad
    ndim: int
    comparable: bool = True


class Outputs(NamedTuple):
    """All outputs of a program: the same for each of its buckets."""

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[OutputLeaf, ...]


def outputs_of(tree: PyTree, found: Sequence[OutputAxes], *, unpad: PyTree) -> Outputs:
    """The outputs of `tree`, whose axes were found.

    Args:
        tree: The outputs as `jax.ShapeDtypeStruct`.
        found: The axes of each.
        unpad: A pytree prefix of `Unpad`.

    Raises:
        InputShapeError: One must be trimmed and cannot be, or `unpad` does not fit.
    """
    arrays, structure = jax.tree.flatten(tree)
    modes = broadcast_prefix(unpad, tree, name="unpad")
    leaves = tuple(
        _output_leaf(array, axes, mode)
        for array, axes, mode in zip(arrays, found, modes, strict=True)
    )
    return Outputs(structure, leaves)


def named_shapes(tree: PyTree) -> list[OutputShape]:
    """The shapes of outputs, with the names that errors call them by."""
    found = []
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        where = jax.tree_util.keystr(path)
        found.append(OutputShape(f"output {where}" if where else "the output", array.shape))
    return found


def untrimmed_outputs(tree: PyTree) -> list[OutputAxes]:
    """Outputs whose axes nobody asks for."""
    return [
        OutputAxes(name, LeafAxes(), f"the axes of {name} were not looked for")
        for name, _ in named_shapes(tree)
    ]


def declared_outputs(out_axes: PyTree, tree: PyTree, bucket: Bucket) -> list[OutputAxes]:
    """The axes of outputs as they were declared.

    Raises:
        InputShapeError: They do not fit the shapes at `bucket`.
    """
    patterns = broadcast_prefix(out_axes, tree, name="out_axes")
    found = []
    for pattern, (name, shape) in zip(patterns, named_shapes(tree), strict=True):
        axes = (
            AxisPattern.parse(pattern).resolve(len(shape), name=name)
            if isinstance(pattern, str)
            else LeafAxes()
        )
        if axes.resize(shape, bucket) != shape:
            raise InputShapeError(
                f"{name} has the shape {shape} at (batch, seq_len)={tuple(bucket)}, but out_axes "
                f"says {pattern!r}: correct out_axes, or leave it out to have it found"
            )
        found.append(OutputAxes(name, axes))
    return found


def _output_leaf(array: jax.ShapeDtypeStruct, found: OutputAxes, mode: object) -> OutputLeaf:
    unpad = check_unpad(mode)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    if unpad == "none":
        comparable = found.problem is None and not is_key
        return OutputLeaf(found.name, found.axes, unpad, len(array.shape), comparable)
    if unpad == "host" and is_key:
        raise InputShapeError(
            f"{found.name} is a PRNG key array, which NumPy cannot hold: "
            'return jax.random.key_data of it, or ask for unpad="device" or "none"'
        )
    return OutputLeaf(found.name, found.checked(), unpad, len(array.shape), not is_key)


def check_unpad(mode: object) -> Unpad:
    """`mode` as one of the three ways to hand out an output.

    Raises:
        InputShapeError: It is none of them.
    """
    if mode == "host" or mode == "device" or mode == "none":
        return mode
    raise InputShapeError(f'unpad={mode!r} is unknown: use "host", "device" or "none"')
