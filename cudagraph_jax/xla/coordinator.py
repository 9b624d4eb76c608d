"""What the processes of a job tell each other by way of `jax.distributed`, within stated times."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

from cudagraph_jax._base.text import error_line
from cudagraph_jax.errors import DistributedError

_FOLDER = "cudagraph_jax"
RESTART = "end all processes of the job and start them again"
"""What is left to do where they do not do the same any more."""


class Coordinator:
    """The key-value store that the processes of a job share, and their barrier.

    Collectives could do the same, but have no limit of time: a process that does not come would
    have the others wait for ever.

    Args:
        connect: Gives the connection to the coordinator.
    """

    def __init__(self, connect: Callable[[], Any] | None = None) -> None:
        self._connect = _client if connect is None else connect
        self._turn = 0
        self._is_within = False
        self._broken: str | None = None

    def exchange(self, text: str, *, timeout_s: float) -> list[str]:
        """What every process of the job says at this point, by its index.

        All of them call this equally often, one thread at a time. Once it has failed, it fails in
        each of them: who came too late finds nobody to do the next thing with.

        Args:
            text: What this one says.
            timeout_s: How long it waits for the others.

        Raises:
            DistributedError: One did not come in time, now or before.
        """
        if self._is_within:
            self.break_off(
                f"this process was interrupted while it waited for the others: {RESTART}"
            )
        if self._broken is not None:
            raise DistributedError(self._broken)
        client = self._connect()
        self._is_within = True  # and for good where an interrupt comes: the others would go on
        told = self._exchange(client, text, timeout_s)
        self._is_within = False
        return told

    def break_off(self, why: str) -> None:
        """Has every exchange from now on fail for this reason, unless they do already."""
        self._broken = self._broken or why

    def said_next(self) -> list[str]:
        """What other processes say already at the next exchange; this one need not be there yet."""
        told = self._connect().key_value_dir_get_bytes(f"{_FOLDER}/{self._turn}")
        return [text.decode() for _, text in told]

    def _exchange(self, client: Any, text: str, timeout_s: float) -> list[str]:
        index, turn = jax.process_index(), self._turn
        folder = f"{_FOLDER}/{turn}"
        try:
            client.key_value_set_bytes(f"{folder}/{index}", text.encode())
            # All get through, or none does: who would go on alone would wait for the others.
            client.wait_at_barrier(_FOLDER, timeout_in_ms=max(1, round(timeout_s * 1e3)))
            told = dict(client.key_value_dir_get_bytes(folder))
            texts = [told[f"{folder}/{other}"].decode() for other in range(jax.process_count())]
            self._turn += 1
            if turn:  # which all have read by now
                client.key_value_delete(f"{_FOLDER}/{turn - 1}/{index}")
        except Exception as error:  # of a class that JAX does not make public
            missing = _missing(client, folder)
            self.break_off(
                f"{missing or 'the coordinator of jax.distributed'} did not come within "
                f"{timeout_s:g} s to what all processes run together ({error_line(error)}): have "
                f"each call the same in one order, or raise process_timeout_s; {RESTART}"
            )
            raise DistributedError(str(self._broken)) from error
        return texts


def _missing(client: Any, folder: str) -> str:
    """Which processes said nothing, in words; nothing where that cannot be asked for."""
    with suppress(Exception):
        there = {key for key, _ in client.key_value_dir_get_bytes(folder)}
        gone = [
            str(other) for other in range(jax.process_count()) if f"{folder}/{other}" not in there
        ]
        return f"process {', '.join(gone)}" if gone else ""
    return ""


def _client() -> Any:
    """JAX's connection to the coordinator.

    It is private to JAX, and this is the one place that knows it: nothing public tells texts
    between processes, or waits for them, within a time.

    Raises:
        DistributedError: It is not there.
    """
    try:
        from jax._src import distributed

        client = distributed.global_state.client
        names = "key_value_set_bytes key_value_dir_get_bytes key_value_delete wait_at_barrier"
        lacks = [name for name in names.split() if client and not hasattr(client, name)]
    except (ImportError, AttributeError) as error:
        raise DistributedError(
            f"jax {jax.__version__} keeps the coordinator of jax.distributed elsewhere "
            f"({error_line(error)}): use a version that this package is tested with"
        ) from error
    if client is None or lacks:
        raise DistributedError(
            "there are several processes, but no coordinator by which they agree: call "
            "jax.distributed.initialize(coordinator_address, num_processes, process_id) first"
            if client is None
            else f"the coordinator of jax {jax.__version__} lacks {', '.join(lacks)}"
        )
    return client
