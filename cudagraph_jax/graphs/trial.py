"""A call to check a bucket with: real values of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.program.call import AbstractLeaf, Call, copied_key
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import EDGE, UNCHOSEN, Array, PadValue
from cudagraph_jax.shapes.pytrees import PyTree


def example_call(
    program: Program, call: Call, sizes: Bucket, *, zeros_of_rows: bool = False
) -> Call:
    """`call` with real values, brought to `sizes`; what may be donated is a copy.

    Arrays that are too large are cut, those that are too small repeat themselves. One that says
    nothing, because it is abstract or holds nothing but its own padding's value, gets other values:
    features are drawn at random, and integers and what may be a mask are ones, which every function
    takes (a token that is real, a valid index, a length that is not zero).

    Args:
        program: The call's program.
        call: Its arrays may be `jax.ShapeDtypeStruct`.
        sizes: The (batch, seq_len) that it shall have.
        zeros_of_rows: Whether integers for rows stay 0, as positions may be.

    Raises:
        InputShapeError: A PRNG key is abstract.
    """
    draw = np.random.default_rng(0)
    donated = program.donated_leaves
    known = program.known_leaves()
    leaves: list[PyTree] = []
    for index, (leaf, axes) in enumerate(zip(call.leaves, call.axes, strict=True)):
        abstract, pad = program.variant.leaves[index], program.leaf_pads[index]
        if axes.passes_through:
            given = known[index] if _is_abstract(leaf) and index not in donated else leaf
            value = _passed(given, abstract, draw, copies=index in donated)
        else:
            value = _fitted(leaf, abstract, axes, sizes)
            if _says_nothing(leaf, value, pad) and not (zeros_of_rows and _is_of_rows(value, axes)):
                value = _drawn(value, axes, pad, draw)
        may_count = np.ndim(value) == 0 or not axes.passes_through
        leaves.append(behind_no_cut(value, call.sizes, sizes) if may_count else value)
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return dataclasses.replace(call, args=args, kwargs=kwargs, leaves=tuple(leaves), sizes=sizes)


def _is_abstract(leaf: PyTree) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _passed(
    leaf: PyTree, abstract: AbstractLeaf, draw: np.random.Generator, *, copies: bool
) -> PyTree:
    if jnp.issubdtype(abstract.dtype, jax.dtypes.extended):
        if _is_abstract(leaf):
            raise InputShapeError(
                f"{abstract} is a PRNG key: give the key itself to warm-up, not its shape"
            )
        return copied_key(leaf) if copies else leaf
    if _is_abstract(leaf):
        return _drawn(np.zeros(leaf.shape, abstract.dtype), None, 0, draw)
    return np.array(leaf) if copies else leaf


def _fitted(leaf: PyTree, abstract: AbstractLeaf, axes: LeafAxes, sizes: Bucket) -> Array:
    """A copy of `leaf` on the host, of the size wanted; zeros where it is abstract."""
    shape = axes.resize(leaf.shape, sizes)
    if _is_abstract(leaf):
        return np.zeros(shape, abstract.dtype)
    value: Array = np.array(leaf, abstract.dtype)
    for axis in axes:
        if axis is not None and value.shape[axis] != shape[axis]:
            value = np.take(value, np.arange(shape[axis]) % value.shape[axis], axis)
    return value


def _says_nothing(leaf: PyTree, value: Array, pad: PadValue) -> bool:
    padding = 0 if pad == EDGE else pad
    return _is_abstract(leaf) or bool(np.all(value == padding))


def _is_of_rows(value: Array, axes: LeafAxes) -> bool:
    """Whether it has an integer for each row, such as a length or a position."""
    return axes.seq is None and bool(jnp.issubdtype(value.dtype, np.integer))


def _drawn(value: Array, axes: LeafAxes | None, pad: PadValue, draw: np.random.Generator) -> Array:
    besides = (size for axis, size in enumerate(value.shape) if axis not in (axes or ()))
    may_be_mask = axes is not None and all(size == 1 for size in besides)
    if jnp.issubdtype(value.dtype, np.inexact) and not may_be_mask:
        return np.asarray(draw.standard_normal(value.shape)).astype(value.dtype)
    # Padded with 1 it may be a mask of what is padding. Of integers for rows, that is a length.
    may_be_length = axes is not None and _is_of_rows(value, axes)
    return np.full(value.shape, 0 if pad == 1 and not may_be_length else 1, value.dtype)


def behind_no_cut(value: Any, before: Bucket, after: Bucket) -> Any:
    """`value`, where it may hold lengths or positions, with none that reaches behind a cut."""
    dtype = np.result_type(value) if isinstance(value, int) else getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, np.integer) or not np.size(value):
        return value
    for old, new in zip(before, after, strict=True):
        largest = int(np.max(value))
        if new < old and new <= largest <= old:
            # Only lengths are as large as the size; smaller ones may be positions, counted from 0.
            limit = new if largest == old else max(1, new - 1)
            if isinstance(value, int):
                value = min(value, limit)
            else:
                value = np.minimum(value, limit).astype(dtype)
    return value


Poison = Mapping[int, PadValue]
"""The pad value of each leaf, by its index, that is not padded as usual."""


class Poisonable(NamedTuple):
    """The arrays whose padding must not matter, by their index among a call's leaves.

    Attributes:
        data: Arrays that can be no masks.
        doubtful: Arrays of nothing but 0 and 1, which may be data or a mask.
    """

    data: dict[int, Array]
    doubtful: dict[int, Array]


def poisonable(program: Program, call: Call) -> Poisonable:
    """What of `call` may be padded with anything.

    Not so bools, and numbers that look like a mask (ones, then zeros, along the sequence): their
    padding says what is padding. Nor arrays whose pad value was chosen, be it 0, so that the
    function ignores it.
    """
    found = Poisonable({}, {})
    for index, (leaf, axes, usual) in enumerate(
        zip(call.leaves, call.axes, program.pad_values, strict=False)
    ):
        if axes.passes_through or not (usual is UNCHOSEN or usual == EDGE):
            continue
        array = np.asarray(leaf)
        if not array.size or array.dtype == np.bool_ or _looks_like_mask(array, axes):
            continue
        is_doubtful = np.all((array == 0) | (array == 1))
        (found.doubtful if is_doubtful else found.data)[index] = array
    return found


def poison(data: Mapping[int, Array], floating: float, *, largest: bool) -> dict[int, PadValue]:
    """Padding of `floating`, or of an end of the range of integers that are surely valid.

    Between 0 and their real values, integers are what the function may index with.
    """
    values: dict[int, PadValue] = {}
    for index, array in data.items():
        if jnp.issubdtype(array.dtype, np.inexact):
            limits = jnp.finfo(array.dtype)  # type: ignore[no-untyped-call]
            values[index] = float(np.clip(floating, float(limits.min), float(limits.max)))
        elif largest:
            values[index] = max(0, int(array.max()))
        else:
            values[index] = min(0, int(array.min()))
    return values


def _looks_like_mask(array: Array, axes: LeafAxes) -> bool:
    if axes.seq is None:
        return False
    is_one = np.moveaxis(array, axes.seq, -1) == 1
    ends_in_zeros = np.all(is_one[..., :-1] | ~is_one[..., 1:])
    is_binary = np.all((array == 0) | (array == 1))
    return bool(is_binary and ends_in_zeros and np.any(is_one) and not np.all(is_one))
