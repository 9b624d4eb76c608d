"""Declared shapes: `jax.ShapeDtypeStruct`, arrays, or plain tuples of sizes."""

from __future__ import annotations

import jax
import numpy as np

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.pytrees import PyTree


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
