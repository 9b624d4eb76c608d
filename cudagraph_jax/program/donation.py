"""Donated arguments that are padded: what XLA uses up of the copy, the caller loses too."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from cudagraph_jax.shapes.pytrees import PyTree


def on_device(
    given: Sequence[PyTree], padded: Sequence[PyTree], positions: Sequence[int]
) -> list[PyTree]:
    """`padded`, with those arguments where the given ones are: there it shows what is used up.

    Args:
        given: The arguments of the call.
        padded: The same in the bucket's size, padded ones on the host.
        positions: Those that are donated and padded.
    """
    placed = list(padded)
    with jax.ensure_compile_time_eval():  # also while another function is traced
        for position in positions:
            placed[position] = jax.tree.map(_placed_like, given[position], padded[position])
    return placed


def use_up(given: Sequence[PyTree], padded: Sequence[PyTree], positions: Sequence[int]) -> None:
    """Ends the life of the arrays whose padded copies were used up in their place."""
    for position in positions:
        leaves = map(jax.tree.leaves, (given[position], padded[position]))
        for leaf, copy in zip(*leaves, strict=True):
            stays = isinstance(copy, jax.Array) and not copy.is_deleted()
            if isinstance(leaf, jax.Array) and not stays and not leaf.is_deleted():
                leaf.delete()


def _placed_like(leaf: PyTree, padded: PyTree) -> PyTree:
    """The padded copy of an array, where that is; of a sharded one on the host."""
    if not isinstance(leaf, jax.Array) or len(leaf.devices()) != 1:
        return padded
    return jax.device_put(padded, leaf.sharding if leaf.committed else None)
