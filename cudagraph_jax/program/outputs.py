"""The outputs of a program: where they carry the sizes, and what the caller gets of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.axes import AxisPattern, LeafAxes, Shape, side
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.output_axes import (
    FoundAxes,
    OutputAxes,
    OutputsAtSize,
    OutputShape,
)
from cudagraph_jax.shapes.padding import Index, real_index
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix

Unpad = Literal["host", "device", "none", "padded"]
UNPADS = '"host", "device", "none" or "padded"'
WITH_PADDING = frozenset({"none", "padded"})
"""Ways to hand out arrays of the bucket's size."""


class OutputLeaf(NamedTuple):
    """One output array of a program.

    Attributes:
        name: What errors call it.
        axes: Which of its dimensions follow a size.
        unpad: What the caller gets of it.
        ndim: Its rank.
        comparable: Whether `axes` is known and NumPy can hold it; always so where it is trimmed.
        follows: Further dimensions that follow one size; see `OutputAxes`.
    """

    name: str
    axes: LeafAxes
    unpad: Unpad
    ndim: int
    comparable: bool = True
    follows: tuple[tuple[int, str], ...] = ()


class Outputs(NamedTuple):
    """All outputs of a program: the same for each of its buckets.

    Attributes:
        structure: The pytree that holds them.
        leaves: Each array.
        structure_follows: Whether what is static in that pytree follows the sizes.
        follows: Whether only the function can say what they are at other sizes: for that reason,
            because a dimension follows one in a way of its own, or because it takes few sizes.
        is_tried: Whether it does not take few sizes alone.
        may_spread: Whether it may spread a single element over something longer.
    """

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[OutputLeaf, ...]
    structure_follows: bool
    follows: bool
    is_tried: bool = True
    may_spread: bool = False

    @classmethod
    def of(
        cls,
        structure: jax.tree_util.PyTreeDef,
        leaves: tuple[OutputLeaf, ...],
        *,
        structure_follows: bool = False,
        is_tried: bool = True,
        may_spread: bool = False,
    ) -> Outputs:
        """The outputs that are held by `structure`; see `FoundAxes`."""
        follows = structure_follows or not is_tried or any(leaf.follows for leaf in leaves)
        return cls(structure, leaves, structure_follows, follows, is_tried, may_spread)


class RealOutputs(NamedTuple):
    """The outputs of one call within those of its bucket.

    Attributes:
        structure: The pytree that the plain function gives.
        indices: The index of the real elements in each array.
        shapes: Those of the plain function's arrays; none where the axes alone say it.
    """

    structure: jax.tree_util.PyTreeDef
    indices: tuple[Index, ...]
    shapes: tuple[Shape, ...] = ()


def real_outputs(outputs: Outputs, sizes: Bucket) -> RealOutputs:
    """Those of a call of `sizes`, where the axes alone say it."""
    indices = tuple(real_index(leaf.axes, leaf.ndim, sizes) for leaf in outputs.leaves)
    return RealOutputs(outputs.structure, indices)


def evaluated_outputs(
    outputs: Outputs, tree: PyTree, sizes: Bucket, *, left: Collection[str]
) -> RealOutputs:
    """Those of a call of `sizes`, where `tree` is what the function gives at these sizes.

    Args:
        outputs: The outputs of the bucket.
        tree: Those at these sizes, as `jax.ShapeDtypeStruct`.
        sizes: The sizes of the call.
        left: The axes whose padding stands on the left.

    Raises:
        InputShapeError: It has other arrays than the bucket.
    """
    arrays, structure = jax.tree.flatten(tree)
    if [array.ndim for array in arrays] != [leaf.ndim for leaf in outputs.leaves]:
        raise InputShapeError(
            f"the outputs at {sizes.described} are {structure}, other arrays than in "
            f"the bucket, {outputs.structure}: return the same pytree for every size"
        )
    indices = []
    for leaf, array in zip(outputs.leaves, arrays, strict=True):
        axes = dict(leaf.follows) | {place: length.axis for place, length in leaf.axes.dims}
        indices.append(
            tuple(
                side(count, left=axes.get(place) in left) for place, count in enumerate(array.shape)
            )
        )
    return RealOutputs(structure, tuple(indices), tuple(array.shape for array in arrays))


def outputs_of(
    tree: PyTree, found: FoundAxes, *, unpad: PyTree, left: Collection[str] = ()
) -> Outputs:
    """The outputs of `tree`, whose axes were found.

    Args:
        tree: The outputs as `jax.ShapeDtypeStruct`.
        found: Their axes.
        unpad: A pytree prefix of `Unpad`.
        left: The axes whose padding stands on the left.

    Raises:
        InputShapeError: One must be trimmed and cannot be, or `unpad` does not fit.
    """
    arrays, structure = jax.tree.flatten(tree)
    modes = broadcast_prefix(unpad, tree, name="unpad")
    leaves = tuple(
        _output_leaf(array, axes._replace(axes=axes.axes.padded_left(left)), mode)
        for array, axes, mode in zip(arrays, found.outputs, modes, strict=True)
    )
    return Outputs.of(
        structure,
        leaves,
        structure_follows=found.structure_follows,
        is_tried=found.is_tried,
        may_spread=found.may_spread,
    )


def named_shapes(tree: PyTree) -> list[OutputShape]:
    """The shapes of outputs, with the names that errors call them by."""
    found = []
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        where = jax.tree_util.keystr(path)
        name = f"output {where}" if where else "the output"
        found.append(OutputShape(name, array.shape, array.dtype))
    return found


def outputs_at_size(tree: PyTree) -> OutputsAtSize:
    """The outputs of `tree`, as `infer_output_axes` takes them."""
    return OutputsAtSize(named_shapes(tree), jax.tree.structure(tree))


def untrimmed_outputs(tree: PyTree) -> list[OutputAxes]:
    """Outputs whose axes nobody asks for."""
    return [
        OutputAxes(name, LeafAxes(), f"the axes of {name} were not looked for")
        for name, _, _ in named_shapes(tree)
    ]


def declared_outputs(out_axes: PyTree, tree: PyTree, bucket: Bucket) -> list[OutputAxes]:
    """The axes of outputs as they were declared.

    Raises:
        InputShapeError: They do not fit the shapes at `bucket`.
    """
    patterns = broadcast_prefix(out_axes, tree, name="out_axes")
    found = []
    for pattern, (name, shape, _) in zip(patterns, named_shapes(tree), strict=True):
        axes = (
            AxisPattern.parse(pattern).resolve(len(shape), name=name)
            if isinstance(pattern, str)
            else LeafAxes()
        )
        if axes.resize(shape, bucket) != shape:
            raise InputShapeError(
                f"{name} has the shape {shape} at {bucket.described}, but out_axes "
                f"says {pattern!r}: correct out_axes, or leave it out to have it found"
            )
        found.append(OutputAxes(name, axes))
    return found


def _output_leaf(array: jax.ShapeDtypeStruct, found: OutputAxes, mode: object) -> OutputLeaf:
    unpad = check_unpad(mode)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    if unpad == "none":
        comparable = found.problem is None and not is_key
        return OutputLeaf(
            found.name, found.axes, unpad, len(array.shape), comparable, found.follows
        )
    if unpad in ("host", "padded") and is_key:
        raise InputShapeError(
            f"{found.name} is a PRNG key array, which NumPy cannot hold: "
            'return jax.random.key_data of it, or ask for unpad="device" or "none"'
        )
    found.check()
    return OutputLeaf(found.name, found.axes, unpad, len(array.shape), not is_key, found.follows)


def check_unpad(mode: object) -> Unpad:
    """`mode` as one of the ways to hand out an output.

    Raises:
        InputShapeError: It is none of them.
    """
    if mode == "host" or mode == "device" or mode == "none" or mode == "padded":
        return mode
    raise InputShapeError(f"unpad={mode!r} is unknown: use {UNPADS}")
