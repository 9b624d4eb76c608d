"""What a server writes down while it serves: which buckets are hot, and which files are in use."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from cudagraph_jax._base.changes import start_thread
from cudagraph_jax._base.log import logger
from cudagraph_jax.errors import StoreError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.store.folder import is_refused
from cudagraph_jax.store.outcomes import fence

if TYPE_CHECKING:
    from cudagraph_jax.capture.persistent import Shelf

INTERVAL_S = 60.0


class HasEntries(Protocol):
    """A registry."""

    def entries(self) -> list[CUDAGraphEntry]:
        """What it holds."""


class Upkeep:
    """Keeps the hot buckets of one registry written down in its store, for the next start.

    That happens every minute in a daemon thread, and at the end: a server that is killed loses a
    minute of it. Files that are in use are marked so that pruning spares them. A forked child
    writes nothing: what was replayed, its parent writes.

    Args:
        shelf: Where.
        registry: What is replayed; held weakly.
        interval_s: Seconds between two times.
        thread: Makes the thread. Where it does not start, as while the interpreter exits or where
            the system has no more threads, there is the end alone.
    """

    def __init__(
        self,
        shelf: Shelf,
        registry: HasEntries,
        *,
        interval_s: float = INTERVAL_S,
        thread: Callable[..., threading.Thread] = threading.Thread,
    ) -> None:
        self._shelf = shelf
        self._registry = weakref.ref(registry)
        self._interval_s = interval_s
        self._thread = thread
        self._is_ended = False
        self._is_writing = False
        # Unlike an event, it may be told by a finalizer that interrupts the thread that waits.
        self._told: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._at_exit: Callable[[], object] | None = None
        self._process: int | None = None
        self._seen: Counter[int] = Counter()
        self._has_told = False
        self.is_begun = shelf.store.mode == "ro"

    def begin(self) -> None:
        """Starts the thread, once, where the store may be written."""
        if self.is_begun or self._is_ended:
            return
        self.is_begun = True
        self._at_exit = partial(_write, weakref.ref(self))
        self._process = os.getpid()
        arguments = (weakref.ref(self), self._told, self._interval_s)
        with suppress(RuntimeError):  # the interpreter exits
            atexit.register(self._at_exit)
            weakref.finalize(self, atexit.unregister, self._at_exit).atexit = False
            weakref.finalize(self, self._told.put, None).atexit = False
        start_thread(  # unless there are no more threads
            self._thread(target=_work, args=arguments, name="cudagraph_jax upkeep", daemon=True)
        )

    def end(self) -> None:
        """Writes for the last time."""
        self._is_ended = True
        self._told.put(None)
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self.write()

    def write(self) -> None:
        """Writes what was replayed since the last time, if anything was, unless somebody does."""
        if self._is_writing:
            return
        self._is_writing = True
        try:
            self._write()
        finally:
            self._is_writing = False

    def _write(self) -> None:
        registry = self._registry()
        if registry is None or self._process != os.getpid():
            return
        replays = [(entry, entry.replay_count) for entry in registry.entries()]
        fresh = {
            entry: count - self._seen[entry.graph_id]
            for entry, count in replays
            if count > self._seen[entry.graph_id]
        }
        self._seen = Counter({entry.graph_id: count for entry, count in replays})
        if not fresh:
            return
        hot: dict[str, Counter[str]] = {}
        for entry, count in fresh.items():
            hot.setdefault(entry.variant.name, Counter())[str(entry.bucket)] += count
        try:
            with fence("they cannot be added"):
                self._shelf.store.remember_hot(hot)
        except StoreError as error:
            # Once, or it would come every minute; of a directory that is only read never.
            is_told = self._has_told or is_refused(error.__cause__)
            self._has_told = self._has_told or not is_told
            level = logging.DEBUG if is_told else logging.WARNING
            logger.log(level, "the hot buckets are not written down: %s", error)
            self._seen.subtract({entry.graph_id: count for entry, count in fresh.items()})
            return
        self._has_told = False
        for entry in fresh:
            self._shelf.touch(entry.executable)


def _write(upkeep: weakref.ref[Upkeep]) -> bool:
    """Whether there is still somebody to write for."""
    found = upkeep()
    if found is not None:
        found.write()
    return found is not None


def _work(upkeep: weakref.ref[Upkeep], end: queue.SimpleQueue[None], interval_s: float) -> None:
    while True:
        try:
            return end.get(timeout=interval_s)
        except queue.Empty:
            if not _write(upkeep):
                return
