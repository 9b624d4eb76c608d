"""What the processes of a job tell each other by way of `jax.distributed`, within stated times."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax

from cudagraph_jax._base.text import error_line
from cudagraph_jax.errors import DistributedError

_FOLDER = "cudagraph_jax"
_LONGEST = 100
_READY = "ready"
RESTART = "end all processes of the job and start them again"
"""What is left to do where they do not do the same any more."""
LEAD = "have process 0 decide for all: cudagraph_jax.distributed.lead there, follow on the others"
"""What is left to do where each of them cannot decide alone."""

Facts = Mapping[str, str]
"""What must be equal on all processes, by name."""


class Coordinator:
    """The key-value store that the processes of a job share, and their barrier.

    Collectives could do the same, but have no limit of time: a process that does not come would
    have the others wait for ever.

    Args:
        connect: Gives the connection to the coordinator.
    """

    def __init__(self, connect: Callable[[], Any] | None = None) -> None:
        self._connect = _client if connect is None else connect
        self._lock = threading.RLock()  # for a signal handler comes in the middle of its thread
        self._is_inside = False
        self._turn = 0
        self._broken: str | None = None

    def compare(
        self,
        what: str,
        facts: Facts,
        *,
        timeout_s: float,
        said: str = "",
        refused: Exception | None = None,
    ) -> list[str]:
        """What each process says, where all of them are to do the same thing.

        Args:
            what: What this one is to do.
            facts: What must be equal on all of them.
            timeout_s: How long it waits for the others.
            said: What it tells the others besides.
            refused: Why this one does not do it. The others learn that, so that none of them waits.

        Raises:
            DistributedError: One is to do another thing, or refuses it alone, or came too late.
            Exception: `refused`, where all of them refuse it alike.
        """
        with self._in_turn() as crowd:
            refused = refused or crowd
            outcome = _READY if refused is None else error_line(refused)
            own = json.dumps([what, {"outcome": outcome, **facts}, said])
            texts = self.exchange(own, timeout_s=timeout_s)
        told = [json.loads(text) for text in texts]
        for index, (other, others, _) in enumerate(told):
            if [other, others] != told[0][:2]:
                raise DistributedError(_difference(told[0], told[index], index)) from refused
        if refused is not None:
            raise refused
        return [text for _, _, text in told]

    def failure_elsewhere(self) -> str:
        """What another process has failed with, as it says at the next comparison already.

        It is empty where none has; this process need not be there yet.
        """
        told = self._connect().key_value_dir_get_bytes(f"{_FOLDER}/{self._turn}")
        outcomes = [str(json.loads(text)[1]["outcome"]) for _, text in told]
        return next((outcome for outcome in outcomes if outcome != _READY), "")

    def break_off(self, why: str) -> None:
        """Has nothing be compared from now on, for this reason, unless there is one already."""
        self._broken = self._broken or why

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
        if self._broken is not None:
            raise DistributedError(self._broken)
        client, is_over = self._connect(), False
        try:
            told = self._exchange(client, text, timeout_s)
            is_over = True
            return told
        except Exception as error:  # of a class that JAX does not make public
            missing = _missing(client, f"{_FOLDER}/{self._turn}")
            self.break_off(
                f"{missing or 'the coordinator of jax.distributed'} did not come within "
                f"{timeout_s:g} s to what all processes run together ({error_line(error)}): have "
                f"each call the same in one order, or raise process_timeout_s; {RESTART}"
            )
            raise DistributedError(str(self._broken)) from error
        finally:
            if not is_over:  # for another reason than that: the others would go on
                self.break_off(
                    f"this process was interrupted while it waited for the others: {RESTART}"
                )

    def _exchange(self, client: Any, text: str, timeout_s: float) -> list[str]:
        index, turn = jax.process_index(), self._turn
        folder = f"{_FOLDER}/{turn}"
        client.key_value_set_bytes(f"{folder}/{index}", text.encode())
        # All get through, or none does: who would go on alone would wait for the others.
        client.wait_at_barrier(_FOLDER, timeout_in_ms=max(1, round(timeout_s * 1e3)))
        told = dict(client.key_value_dir_get_bytes(folder))
        texts = [told[f"{folder}/{other}"].decode() for other in range(jax.process_count())]
        self._turn += 1
        if turn:  # which all have read by now
            client.key_value_delete(f"{_FOLDER}/{turn - 1}/{index}")
        return texts

    @contextmanager
    def _in_turn(self) -> Iterator[DistributedError | None]:
        """One thread at a time; gives what is raised where another one is here already."""
        is_alone = not self._is_inside
        with self._lock:
            if self._is_inside:
                raise DistributedError(
                    "a signal handler runs what several processes run together, in the middle of "
                    f"that: have it ask the thread to, or {LEAD}"
                )
            self._is_inside = True
            try:
                who = "two threads of this process run what several processes run together"
                yield None if is_alone else crowd_error(who)
            finally:
                self._is_inside = False


def crowd_error(who: str) -> DistributedError:
    """What is raised where several threads run what several processes run together."""
    return DistributedError(
        f"{who}, in an order that may be another one elsewhere: call from one thread, or {LEAD}, "
        "whose calls any thread may make"
    )


def _difference(first: Sequence[Any], other: Sequence[Any], index: int) -> str:
    if first[0] != other[0]:
        return (
            f"process 0 is at {_at(first)}, but process {index} at {_at(other)}: have all "
            f"processes do the same in one order, or {LEAD}"
        )
    facts, others = first[1], other[1]
    # One that has failed does not know all of them.
    names = [name for name in facts if name in others and facts[name] != others[name]]
    parts = [
        f"{name} is {facts[name]!s:.{_LONGEST}} on process 0 and "
        f"{others[name]!s:.{_LONGEST}} on process {index}"
        for name in names[:3]
    ]
    return (
        f"{first[0]} is not the same everywhere: {'; '.join(parts)}. Give all the same, or {LEAD}"
    )


def _at(told: Sequence[Any]) -> str:
    outcome = told[1]["outcome"]
    return str(told[0]) if outcome == _READY else f"{told[0]}, where it has failed ({outcome})"


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
