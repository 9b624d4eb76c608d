"""Where the arguments of replays lie on the device: an array that moves has its graph updated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax

from cudagraph_jax._base.changes import counted
from cudagraph_jax.program.call import argument_leaf_names
from cudagraph_jax.report.replay_profile import ArgumentMoves
from cudagraph_jax.shapes.pytrees import PyTree


class AddressBook:
    """The last address of each argument of each entry, and how often it changed.

    All methods are safe to call from many threads.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, str], int] = {}
        self._moves: dict[int, dict[str, itertools.count[int] | None]] = {}

    def noting(
        self, graph_id: int, names: Sequence[str], call: Callable[..., PyTree]
    ) -> Callable[..., PyTree]:
        """`call`, with the addresses of its arguments written down before each run.

        Args:
            graph_id: The number of the entry.
            names: The names of its positional arguments.
            call: Its compiled function.
        """

        def noted(*args: PyTree, **kwargs: PyTree) -> PyTree:
            self._note(graph_id, names, args, kwargs)
            return call(*args, **kwargs)

        return noted

    def moves(self, graph_id: int) -> tuple[ArgumentMoves, ...]:
        """What is known of an entry's arguments."""
        return tuple(
            ArgumentMoves(argument, None if moves is None else counted(moves))
            for argument, moves in list(self._moves.get(graph_id, {}).items())
        )

    def _note(
        self, graph_id: int, names: Sequence[str], args: Sequence[PyTree], kwargs: PyTree
    ) -> None:
        arguments = argument_leaf_names(names[: len(args)], tuple(args), kwargs)
        addresses = map(address_of, jax.tree.leaves((args, kwargs)))
        moves = self._moves.setdefault(graph_id, {})
        for argument, address in zip(arguments, addresses, strict=True):
            if address is None:
                moves[argument] = None
                continue
            last = self._last.get((graph_id, argument), address)
            self._last[graph_id, argument] = address
            count = moves.setdefault(argument, itertools.count())
            if count is not None and address != last:
                next(count)


def address_of(leaf: object) -> int | None:
    """Where an array lies on its device; None for what comes from the host, or is sharded."""
    if not isinstance(leaf, jax.Array) or len(leaf.devices()) != 1:
        return None
    return int(leaf.unsafe_buffer_pointer())
