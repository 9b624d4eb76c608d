"""Where padded arguments are: on their device, and used up where the caller donated them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from cudagraph_jax.program.padded import is_padded
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.shardings import put


def on_device(
    given: Sequence[PyTree],
    padded: Sequence[PyTree],
    positions: Sequence[int],
    *,
    homes: Sequence[Sequence[Sharding | None]] = (),
) -> list[PyTree]:
    """`padded`, with those arguments where the given ones are: there it shows what is used up.

    Args:
        given: The arguments of the call.
        padded: The same in the bucket's size, padded ones on the host.
        positions: Those to be placed.
        homes: Where the leaves of each argument go, wherever the given ones are; None, or empty:
            there.
    """
    placed = list(padded)
    for position in positions:
        own = jax.tree.leaves(given[position], is_leaf=is_padded)
        copies, structure = jax.tree.flatten(padded[position])
        places = homes[position] if homes else [None] * len(copies)
        placed[position] = jax.tree.unflatten(structure, map(_placed, own, copies, places))
    return placed


def refuses_transfer(error: BaseException) -> bool:
    """Whether `jax.transfer_guard` has refused an implicit transfer."""
    # JAX has no class of its own for this.
    return "Disallowed" in str(error) and "transfer" in str(error)


def use_up(given: Sequence[PyTree], padded: Sequence[PyTree], positions: Sequence[int]) -> None:
    """Ends the life of the arrays whose padded copies were used up in their place."""
    for position in positions:
        leaves = map(jax.tree.leaves, (given[position], padded[position]))
        for leaf, copy in zip(*leaves, strict=True):
            stays = isinstance(copy, jax.Array) and not copy.is_deleted()
            if isinstance(leaf, jax.Array) and not stays and not leaf.is_deleted():
                leaf.delete()


def _placed(leaf: PyTree, padded: PyTree, home: Sharding | None) -> PyTree:
    """The padded copy of an array, at home, or else where that is; of a sharded one on the host."""
    if home is not None:
        return put(padded, home)
    leaf = leaf.array if is_padded(leaf) else leaf
    if isinstance(padded, jax.Array):
        return padded  # it has never left
    if not isinstance(leaf, jax.Array) or len(leaf.devices()) != 1:
        return padded
    return put(padded, leaf.sharding if leaf.committed else None)


def copied_key(key: jax.Array) -> jax.Array:
    """The same key in another buffer, which a run may use up."""
    with jax.ensure_compile_time_eval():
        data = jax.device_put(np.array(jax.random.key_data(key)))
        copy: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
        return copy
