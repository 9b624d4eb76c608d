"""Pytree prefixes: one declaration for a whole subtree, as in `jax.vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import InputShapeError

PyTree: TypeAlias = Any


def is_declaration(value: object) -> bool:
    """Whether `value` declares something for all below it: text, a scalar or None."""
    return value is None or jax.tree_util.all_leaves((value,))


def broadcast_prefix(
    prefix: PyTree,
    tree: PyTree,
    *,
    name: str,
    leaf: Callable[[object], bool] = is_declaration,
) -> list[Any]:
    """The declaration for each leaf of `tree`, in the order of `jax.tree.leaves`.

    Args:
        prefix: A pytree whose leaves declare something for the subtree of `tree` at their place.
        tree: Any pytree.
        name: What error messages call the prefix.
        leaf: What counts as a leaf of the prefix.

    Raises:
        InputShapeError: `prefix` does not have the structure of the upper part of `tree`.
    """
    declarations, structure = jax.tree.flatten(prefix, is_leaf=leaf)
    try:
        subtrees = structure.flatten_up_to(tree)  # type: ignore[attr-defined]  # JAX's stubs
    except ValueError as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise InputShapeError(
            f"{name}={prefix!r} does not match the structure of what it describes: {reason}"
        ) from None
    return [
        declaration
        for declaration, subtree in zip(declarations, subtrees, strict=True)
        for _ in jax.tree.leaves(subtree)
    ]


def for_positions(prefix: PyTree, count: int, *, name: str) -> Sequence[PyTree]:
    """The prefix of each of `count` positional arguments.

    A single declaration stands for all of them; a tuple or list has one for each, and arguments
    that a call leaves out are the last ones.

    Raises:
        InputShapeError: The call has more arguments than the prefix has entries.
    """
    if not isinstance(prefix, tuple | list):
        return [prefix] * count
    if count > len(prefix):
        raise InputShapeError(
            f"{name} has {len(prefix)} entries, but the call has {count} positional arguments: "
            "give one entry for each argument (None for what is passed through)"
        )
    return prefix[:count]


class ArgumentLeaves(NamedTuple):
    """Which of a call's leaves belong to one argument.

    Attributes:
        indices: Their places among all leaves.
        is_array: Whether the argument is itself a leaf.
    """

    indices: range
    is_array: bool


def leaves_of_arguments(
    structure: jax.tree_util.PyTreeDef,
) -> tuple[tuple[ArgumentLeaves, ...], dict[str, ArgumentLeaves]]:
    """The leaves of each positional and of each keyword argument.

    Read off the structure: a pytree class may refuse to hold anything but arrays.

    Args:
        structure: That of `(args, kwargs)`.
    """
    args, kwargs = structure.children()
    data = kwargs.node_data()
    names = [] if data is None else data[1]
    found: list[ArgumentLeaves] = []
    start = 0
    for argument in (*args.children(), *kwargs.children()):
        stop = start + argument.num_leaves
        is_array = jax.tree_util.treedef_is_leaf(argument) and stop > start
        found.append(ArgumentLeaves(range(start, stop), is_array))
        start = stop
    count = len(found) - len(names)
    return tuple(found[:count]), dict(zip(names, found[count:], strict=True))


def unflatten_shapes(
    structure: jax.tree_util.PyTreeDef,
    leaves: Sequence[jax.ShapeDtypeStruct | jax.stages.ArgInfo],
) -> PyTree:
    """The pytree of `leaves`; with arrays in their place where a class of it takes nothing else."""
    try:
        return jax.tree.unflatten(structure, leaves)
    except Exception:  # whatever the class raises; what is wrong otherwise is raised below
        return jax.tree.unflatten(structure, list(map(_weightless, leaves)))


def _weightless(leaf: PyTree) -> PyTree:
    """An array in the place of a shape, which takes the memory of one element."""
    is_shape = type(leaf) in (jax.ShapeDtypeStruct, jax.stages.ArgInfo)
    if not is_shape or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def leaf_names(
    argument_names: Sequence[str],
    args: Sequence[PyTree],
    *,
    is_leaf: Callable[[object], bool] | None = None,
) -> list[str]:
    """What errors call each leaf of `args`: `ids`, `batch['mask']`, `states[0].cache`."""
    return [
        argument + jax.tree_util.keystr(path)
        for argument, value in zip(argument_names, args, strict=True)
        for path, _ in jax.tree_util.tree_flatten_with_path(value, is_leaf=is_leaf)[0]
    ]


def is_shape(value: object) -> bool:
    """Whether `value` is a shape: a tuple or list of integers, also an empty tuple."""
    if isinstance(value, list) and not value:
        return False
    return isinstance(value, tuple | list) and all(
        isinstance(size, int | np.integer) and not isinstance(size, bool) for size in value
    )


def as_structs(shapes: PyTree, *, name: str) -> PyTree:
    """`shapes` with a `jax.ShapeDtypeStruct` at each leaf.

    Args:
        shapes: A pytree of `jax.ShapeDtypeStruct`, of arrays, or of tuples of sizes (float32).
        name: What errors call it.

    Raises:
        InputShapeError: A leaf is none of these.
    """
    return jax.tree.map(lambda leaf: _struct(leaf, name), shapes, is_leaf=is_shape)


def _struct(leaf: PyTree, name: str) -> jax.ShapeDtypeStruct:
    if is_shape(leaf):
        return jax.ShapeDtypeStruct(tuple(leaf), np.float32)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
        )
    raise InputShapeError(
        f"{name} has the leaf {leaf!r}: give jax.ShapeDtypeStruct(shape, dtype), an array, "
        "or a tuple of sizes (float32)"
    )


def describe_mismatch(expected: PyTree, found: PyTree) -> str | None:
    """The first difference in structure, shape or dtype of two pytrees of structs, or None."""
    structures = [jax.tree.structure(tree) for tree in (expected, found)]
    if len(set(structures)) > 1:
        return f"{structures[0]} was declared, {structures[1]} came"
    declared = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, want), have in zip(declared, jax.tree.leaves(found), strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            where = jax.tree_util.keystr(path) or "the array"
            return (
                f"{where}: {want.dtype}{list(want.shape)} was declared, "
                f"{have.dtype}{list(have.shape)} came"
            )
    return None
