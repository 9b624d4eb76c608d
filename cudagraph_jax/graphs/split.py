"""A batch larger than every bucket, in pieces, joined as if it had been one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.graphs.call import Call
from cudagraph_jax.graphs.program import Outputs
from cudagraph_jax.shapes.prefix import PyTree


def pieces(call: Call, *, largest: int, donate_argnums: Sequence[int] = ()) -> Iterator[Call]:
    """`call` in calls of `largest` rows each, the last one of what is left.

    Arrays are cut on the host, which compiles nothing.

    Args:
        call: A call that carries a batch.
        largest: Rows of a piece.
        donate_argnums: Arguments that a piece would use up: each gets a copy.
    """
    rows = call.sizes.batch_size
    indices, _ = jax.tree.unflatten(call.variant.structure, range(len(call.leaves)))
    donated = set(jax.tree.leaves([indices[position] for position in donate_argnums]))
    on_host: list[Any] = [
        leaf if axes.batch is None and index not in donated else np.asarray(leaf)
        for index, (leaf, axes) in enumerate(zip(call.leaves, call.axes, strict=True))
    ]
    for start in range(0, rows, largest):
        stop = min(rows, start + largest)
        leaves = [
            leaf
            if axes.batch is None
            else leaf[(slice(None),) * axes.batch + (slice(start, stop),)]
            for leaf, axes in zip(on_host, call.axes, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
        yield dataclasses.replace(
            call,
            args=args,
            kwargs=kwargs,
            leaves=tuple(leaves),
            sizes=call.sizes._replace(batch_size=stop - start),
        )


def check_joinable(outputs: Outputs) -> None:
    """Raises unless every output carries the batch.

    Raises:
        InputShapeError: One does not, so that pieces of it cannot be joined.
    """
    for leaf in outputs.leaves:
        if leaf.axes.batch is None:
            raise InputShapeError(
                f'{leaf.name} carries no batch, so on_overflow="split" cannot join it: '
                'return one row per request, or set on_overflow="eager"'
            )


def joined(results: Sequence[PyTree], outputs: Outputs) -> PyTree:
    """The outputs of all pieces as those of one call."""
    columns = zip(*map(jax.tree.leaves, results), strict=True)
    leaves = [
        _join(column, leaf.axes.batch or 0)
        for column, leaf in zip(columns, outputs.leaves, strict=True)
    ]
    return jax.tree.unflatten(outputs.structure, leaves)


def delete_donated(call: Call, donate_argnums: Sequence[int]) -> None:
    """Ends the life of the donated arrays of a call whose pieces were copies."""
    for position in donate_argnums:
        for leaf in jax.tree.leaves(call.args[position]):
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.delete()


def _join(parts: Sequence[PyTree], axis: int) -> PyTree:
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts, axis=axis)
    return jnp.concatenate(parts, axis=axis)
