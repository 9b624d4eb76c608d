"""What a server writes down while it serves: which buckets are hot, and which files are in use."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

from cudagraph_jax.errors import StoreError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.shelf import Shelf
from cudagraph_jax.log import logger

INTERVAL_S = 60.0


class Held(Protocol):
    """A registry."""

    def entries(self) -> list[CUDAGraphEntry]:
        """What it holds."""


class Upkeep:
    """Keeps the hot buckets of one registry written down in its store, for the next start.

    That happens every minute in a daemon thread, and at the end: a server that is killed loses a
    minute of it. Files that are in use are marked so that pruning spares them.

    Args:
        shelf: Where.
        registry: What is replayed; held weakly.
        interval_s: Seconds between two times.
    """

    def __init__(self, shelf: Shelf, registry: Held, *, interval_s: float = INTERVAL_S) -> None:
        self._shelf = shelf
        self._registry = weakref.ref(registry)
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._at_exit: Callable[[], object] | None = None
        self._seen: Counter[int] = Counter()

    def begin(self) -> None:
        """Starts the thread, once, where the store may be written."""
        if self._shelf.store.mode == "ro" or self._at_exit is not None:
            return
        with self._lock:
            if self._at_exit is None and not self._ended.is_set():
                self._at_exit = partial(_write, weakref.ref(self))
                atexit.register(self._at_exit)
                weakref.finalize(self, atexit.unregister, self._at_exit).atexit = False
                arguments = (weakref.ref(self), self._ended, self._interval_s)
                threading.Thread(
                    target=_work, args=arguments, name="cudagraph_jax upkeep", daemon=True
                ).start()

    def end(self) -> None:
        """Writes for the last time."""
        self._ended.set()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self.write()

    def write(self) -> None:
        """Writes what was replayed since the last time, if anything was."""
        registry = self._registry()
        if registry is None:
            return
        replays = {entry: entry.replay_count for entry in registry.entries()}
        with self._lock:
            used = [entry for entry, n in replays.items() if n != self._seen[entry.graph_id]]
            self._seen = Counter({entry.graph_id: n for entry, n in replays.items()})
        if not used:
            return
        hot: dict[str, Counter[str]] = {}
        for entry, count in replays.items():
            if count:
                hot.setdefault(entry.variant.name, Counter())[str(entry.bucket)] += count
        try:
            self._shelf.store.remember_hot(hot)
            for entry in used:
                self._shelf.touch(entry.executable)
        except StoreError as error:
            logger.warning("the hot buckets are not written down: %s", error)


def _write(upkeep: weakref.ref[Upkeep]) -> bool:
    """Whether there is still somebody to write for."""
    found = upkeep()
    if found is not None:
        found.write()
    return found is not None


def _work(upkeep: weakref.ref[Upkeep], ended: threading.Event, interval_s: float) -> None:
    while not ended.wait(interval_s) and _write(upkeep):
        pass
