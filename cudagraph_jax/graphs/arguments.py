"""What of a call's arguments has to be padded into a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Padder, padder
from cudagraph_jax.shapes.pytrees import PyTree


class Pads(NamedTuple):
    """What has to be padded in the positional arguments.

    Attributes:
        arrays: Position and padder of each argument that is an array itself.
        trees: Position of each argument that is a pytree, with a padder for every leaf of it; None
            for those that fit.
        donated: Positions of those of both whose buffers are the callee's to take.
    """

    arrays: tuple[tuple[int, Padder], ...] = ()
    trees: tuple[tuple[int, tuple[Padder | None, ...]], ...] = ()
    donated: tuple[int, ...] = ()


def pads_for(
    program: Program, shapes: Sequence[tuple[int, ...]], *, sizes: Bucket, bucket: Bucket
) -> Pads:
    """What a request of these shapes needs padded."""
    args, _ = jax.tree.unflatten(program.variant.structure, range(len(shapes)))
    arrays: list[tuple[int, Padder]] = []
    trees: list[tuple[int, tuple[Padder | None, ...]]] = []
    for position, value in enumerate(args):
        padders = tuple(
            _leaf_padder(program, index, shapes[index], sizes, bucket)
            for index in jax.tree.leaves(value)
        )
        needed = [pad for pad in padders if pad is not None]
        if isinstance(value, int):
            arrays += [(position, pad) for pad in needed]
        elif needed:
            trees.append((position, padders))
    padded = {position for position, _ in (*arrays, *trees)}
    donated = padded.intersection(program.target.donate_argnums)
    return Pads(tuple(arrays), tuple(trees), tuple(sorted(donated)))


def _leaf_padder(
    program: Program, index: int, shape: tuple[int, ...], sizes: Bucket, bucket: Bucket
) -> Padder | None:
    axes = program.axes[index]
    if axes.passes_through:
        return None
    return padder(
        shape,
        np.dtype(program.variant.leaves[index].dtype),
        axes=axes,
        sizes=sizes,
        bucket=bucket,
        value=program.pad_values[index],
    )


class Numbers(NamedTuple):
    """The numbers that a call passes through: the compiled function does not tell weak ones apart.

    Attributes:
        args: Position of each number among the arguments, and whether it is weak.
        kwargs: Keyword of each, likewise.
        nested: Whether a pytree holds a weak one, which only a walk would find.
    """

    args: tuple[tuple[int, bool], ...] = ()
    kwargs: tuple[tuple[str, bool], ...] = ()
    nested: bool = False


def leading_leaf(tree: PyTree) -> object:
    """The array that says which sizes a pytree has: a NumPy one if it holds any, else the first.

    JAX narrows NumPy's 64-bit floats silently, so that those are looked at.
    """
    leaves = jax.tree.leaves(tree)
    if np.ndarray in map(type, leaves):
        return next(leaf for leaf in leaves if type(leaf) is np.ndarray)
    return leaves[0] if leaves else None


def other_arrays(program: Program) -> tuple[int, ...]:
    """Positions of the arguments that are arrays or numbers, but for the one that leads.

    That is the first that carries all the sizes there are; see `Binder.lead`.
    """
    args, _ = jax.tree.unflatten(program.variant.structure, range(len(program.axes)))
    arrays = [place for place, index in enumerate(args) if isinstance(index, int)]
    for place in arrays:
        axes = program.axes[args[place]]
        if (axes.batch is not None or not program.carries_batch) and (
            axes.seq is not None or not program.carries_seq
        ):
            return tuple(other for other in arrays if other != place)
    return tuple(arrays)


def passed_arrays(program: Program) -> tuple[tuple[int, np.dtype[np.generic]], ...]:
    """Position and dtype of each argument that is an array and is passed through."""
    leaves = program.variant.leaves
    args, _ = jax.tree.unflatten(program.variant.structure, range(len(leaves)))
    return tuple(
        (position, leaves[index].dtype)
        for position, index in enumerate(args)
        if isinstance(index, int) and program.axes[index].passes_through
    )


def numbers_of(program: Program) -> Numbers:
    """The numbers among a program's arguments."""
    leaves = program.variant.leaves
    args, kwargs = jax.tree.unflatten(program.variant.structure, range(len(leaves)))
    bare = {**dict(enumerate(args)), **kwargs}
    found = {
        place: leaves[index].weak_type
        for place, index in bare.items()
        if isinstance(index, int) and not leaves[index].shape
    }
    nested = any(
        leaves[index].weak_type
        for value in bare.values()
        if not isinstance(value, int)
        for index in jax.tree.leaves(value)
    )
    return Numbers(
        tuple((place, weak) for place, weak in found.items() if isinstance(place, int)),
        tuple((place, weak) for place, weak in found.items() if isinstance(place, str)),
        nested,
    )
