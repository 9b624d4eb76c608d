"""What of a call's arguments has to be padded into a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Padder, padder


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
