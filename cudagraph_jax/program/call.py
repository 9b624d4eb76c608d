"""One call, described: its sizes, the axes of its arrays, and the program that would serve it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.program.variant import (
    AbstractLeaf,
    Variant,
    abstract_bucketed,
    abstract_passed,
)
from cudagraph_jax.shapes.axes import PASS_THROUGH, AxisPattern, Leaf, LeafAxes, sizes_of
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import PadValue, check_pad_value
from cudagraph_jax.shapes.pytrees import PyTree, leaf_names

Args = tuple[PyTree, ...]
Statics = tuple[tuple[str, type, Hashable], ...]


class Declared(NamedTuple):
    """How the leaves of a call's positional arguments were declared, in their order.

    Attributes:
        patterns: The pattern of each leaf, its axes, or None where it is passed through.
        pad_values: What each leaf is padded with.
        argument_names: What errors call the arguments.
    """

    patterns: Sequence[AxisPattern | LeafAxes | None]
    pad_values: Sequence[PadValue]
    argument_names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Call:
    """One call as the manager sees it.

    Attributes:
        args: The positional arguments without the static ones.
        kwargs: The keyword arguments, likewise; they are passed through.
        leaves: The arrays of `args`, then those of `kwargs`.
        axes: The axes of each of them.
        declared: What was declared for those of `args`.
        sizes: The call's (batch, seq_len).
        variant: What identifies its program.
    """

    args: Args
    kwargs: dict[str, PyTree]
    leaves: tuple[object, ...]
    axes: tuple[LeafAxes, ...]
    declared: Declared
    sizes: Bucket
    variant: Variant

    @property
    def carries_batch(self) -> bool:
        """Whether any array carries the batch."""
        return any(axes.batch is not None for axes in self.axes)

    @property
    def carries_seq(self) -> bool:
        """Whether any array carries the sequence."""
        return any(axes.seq is not None for axes in self.axes)


def describe_call(
    function: Hashable,
    args: Args,
    kwargs: Mapping[str, PyTree],
    *,
    declared: Declared,
    name: str,
    statics: Statics = (),
) -> Call:
    """The description of one call.

    Args:
        function: What identifies the function among others.
        args: Its positional arguments: arrays or `jax.ShapeDtypeStruct`.
        kwargs: Its keyword arguments.
        declared: The declarations for the leaves of `args`.
        name: The function's name.
        statics: The static arguments.

    Raises:
        InputShapeError: An array does not fit its axes, disagrees with another one about a size,
            or has a dtype that would not survive.
    """
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    undeclared = len(leaves) - len(declared.patterns)
    patterns = [*declared.patterns, *[None] * undeclared]
    pads = [*declared.pad_values, *[0] * undeclared]
    try:
        described = _describe_leaves(leaves, patterns, pads, [""] * len(leaves))
    except InputShapeError:
        # Names cost a second walk, so only the error, which is raised again here, has them.
        names = argument_leaf_names(declared.argument_names, args, kwargs)
        described = _describe_leaves(leaves, patterns, pads, names)
    sizes, axes, abstract = described
    variant = Variant(function, name, structure, abstract, statics)
    return Call(args, dict(kwargs), tuple(leaves), axes, declared, sizes, variant)


def refuse_abstract(call: Call) -> None:
    """Raises unless all leaves of `call` are values.

    Raises:
        InputShapeError: One is a `jax.ShapeDtypeStruct`.
    """
    for index, leaf in enumerate(call.leaves):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            names = argument_leaf_names(call.declared.argument_names, call.args, call.kwargs)
            raise InputShapeError(
                f"{names[index]} is a jax.ShapeDtypeStruct, which has no values: "
                "pass an array (warmup and explain take shapes alone)"
            )


def argument_leaf_names(
    argument_names: Sequence[str], args: Args, kwargs: Mapping[str, PyTree]
) -> list[str]:
    """What errors call each leaf of `(args, kwargs)`, in the order in which JAX flattens them."""
    ordered = dict(sorted(kwargs.items()))
    return list(leaf_names((*argument_names, *ordered), (*args, *ordered.values())))


def abstract_call(call: Call) -> Call:
    """`call` with shapes for its arrays, so that holding it keeps none of them alive.

    Scalars stay: they cost nothing, and a loop may never end without theirs.
    """
    leaves = tuple(map(_abstract, call.leaves))
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return replace(call, args=args, kwargs=kwargs, leaves=leaves)


def _abstract(leaf: object) -> object:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    if isinstance(leaf, np.ndarray | jax.Array) and leaf.ndim:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def traced_sizes(args: Args, declared: Declared) -> Bucket:
    """The (batch, seq_len) of arguments among which are tracers.

    Raises:
        InputShapeError: An array does not fit its axes, or disagrees with another one.
    """
    names = leaf_names(declared.argument_names, args)
    return sizes_of(
        Leaf(name, _axes(leaf, pattern, name), leaf.shape)
        for leaf, pattern, name in zip(jax.tree.leaves(args), declared.patterns, names, strict=True)
        if pattern is not None
    )


def _describe_leaves(
    leaves: Sequence[object],
    patterns: Sequence[AxisPattern | LeafAxes | None],
    pads: Sequence[PadValue],
    names: Sequence[str],
) -> tuple[Bucket, tuple[LeafAxes, ...], tuple[AbstractLeaf, ...]]:
    all_axes: list[LeafAxes] = []
    abstract: list[AbstractLeaf] = []
    sized: list[Leaf] = []
    for leaf, pattern, pad, name in zip(leaves, patterns, pads, names, strict=True):
        axes = _axes(leaf, pattern, name)
        all_axes.append(axes)
        if axes.passes_through:
            abstract.append(abstract_passed(leaf, name=name))
            continue
        described = abstract_bucketed(leaf, axes, name=name)
        check_pad_value(pad, described.dtype, name=name)
        abstract.append(described)
        sized.append(Leaf(name, axes, leaf.shape))  # type: ignore[attr-defined]  # an array now
    return sizes_of(sized), tuple(all_axes), tuple(abstract)


def _axes(leaf: object, pattern: AxisPattern | LeafAxes | None, name: str) -> LeafAxes:
    if pattern is None:
        return PASS_THROUGH
    if isinstance(pattern, LeafAxes):
        ndim = len(getattr(leaf, "shape", ()))
        if ndim <= max(-1 if axis is None else axis for axis in pattern):
            raise InputShapeError(f"{name} has {ndim} dimension(s), too few for its axes {pattern}")
        return pattern
    # What is no array at all is refused by abstract_bucketed, in better words than "0 dimensions".
    ndim = len(leaf.shape) if hasattr(leaf, "shape") else len(pattern.names)
    return pattern.resolve(ndim, name=name)
