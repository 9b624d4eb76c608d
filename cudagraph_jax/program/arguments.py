"""What a call passes through, and the compiled function would take for something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from cudagraph_jax.program.call import Variant
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.pytrees import PyTree


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


class ArgumentChecks(NamedTuple):
    """What a call's arguments must be, that the compiled function itself does not see to.

    Attributes:
        numbers: The numbers among them.
        passed: Position and dtype of each argument that is an array and is passed through.
        others: Positions of those that are arrays or numbers, but for the one that leads: the first
            that carries all the sizes there are; see `Binder.lead`.
    """

    numbers: Numbers
    passed: tuple[tuple[int, np.dtype[np.generic]], ...]
    others: tuple[int, ...]


def checks_of(variant: Variant, axes: Sequence[LeafAxes]) -> ArgumentChecks:
    """What the arguments of a program's calls must be."""
    args, kwargs = jax.tree.unflatten(variant.structure, range(len(axes)))
    arrays = {place: index for place, index in enumerate(args) if isinstance(index, int)}
    passed = tuple(
        (place, variant.leaves[index].dtype)
        for place, index in arrays.items()
        if axes[index].passes_through
    )
    sizes = _sizes(axes)
    lead = next((place for place in arrays if _sizes([axes[arrays[place]]]) == sizes), None)
    others = tuple(place for place in arrays if place != lead)
    return ArgumentChecks(_numbers(variant, args, kwargs), passed, others)


def _sizes(axes: Sequence[LeafAxes]) -> tuple[bool, bool]:
    """Whether any of them carries the batch, and the sequence."""
    return (
        any(leaf.batch is not None for leaf in axes),
        any(leaf.seq is not None for leaf in axes),
    )


def _numbers(variant: Variant, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> Numbers:
    leaves = variant.leaves
    bare: dict[int | str, PyTree] = dict(enumerate(args))
    bare.update(kwargs)
    weak = {
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
        tuple((place, is_weak) for place, is_weak in weak.items() if isinstance(place, int)),
        tuple((place, is_weak) for place, is_weak in weak.items() if isinstance(place, str)),
        nested,
    )
