"""Who watches: captures always, replays when asked; an unwatched replay knows nothing of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

import jax

from cudagraph_jax._base.log import logger
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.stages import compiled_so_far

if TYPE_CHECKING:
    from cudagraph_jax.graphs.addresses import AddressBook
    from cudagraph_jax.graphs.entry import CUDAGraphEntry

OnReplay = Callable[[Bucket, float], None]


class Observers:
    """Tells the log and the callbacks of one registry what happens to its buckets.

    A callback that raises is logged and costs neither the request nor the other callbacks. All
    methods are safe to call from many threads.

    Args:
        changed: Called when replays begin or cease to be watched: a route is made for either, so
            that an unwatched one has nothing to ask (`WatchedRoute`).

    Attributes:
        number: What a profile tells replays of different registries by.
        watches_replays: Whether a route that is made now has to be watched.
    """

    _numbers = itertools.count()

    def __init__(self, changed: Callable[[], None]) -> None:
        self.number = next(self._numbers)
        self._changed = changed
        self._on_capture: list[Callable[[CUDAGraphEntry], None]] = []
        self._on_replay: list[OnReplay] = []
        self._annotate_replays = False
        self._addresses: AddressBook | None = None
        self.watches_replays = False
        self._replaying: frozenset[int] = frozenset()
        self._seen_at = -1

    @property
    def annotate_replays(self) -> bool:
        """Whether a profile shows the function and the bucket of each replay; can be set."""
        return self._annotate_replays

    @annotate_replays.setter
    def annotate_replays(self, annotate: bool) -> None:
        if annotate != self._annotate_replays:
            self._annotate_replays = annotate
            self._rewatch()

    @property
    def addresses(self) -> AddressBook | None:
        """Where the addresses of arguments are written down; None: nowhere; can be set."""
        return self._addresses

    @addresses.setter
    def addresses(self, addresses: AddressBook | None) -> None:
        self._addresses = addresses
        self._rewatch()

    def saw_replaying(self, graph_ids: frozenset[int]) -> None:
        """A profile showed these entries, and no others, replay what was recorded."""
        self._replaying, self._seen_at = graph_ids, compiled_so_far()

    def is_replaying(self, graph_id: int) -> bool:
        """Whether the last profile showed it for an entry, and nothing was compiled since.

        What this package compiles anywhere in the process may throw recorded graphs away
        (docs/xla.md, "Command buffers").
        """
        return graph_id in self._replaying and self._seen_at == compiled_so_far()

    def on_capture(self, callback: Callable[[CUDAGraphEntry], None]) -> None:
        """Calls `callback(entry)` after each capture from now on, in the thread that captured."""
        self._on_capture.append(callback)

    def on_replay(self, callback: OnReplay) -> None:
        """Calls `callback(bucket, seconds)` after each replay from now on, in its thread.

        The seconds are those of the statistics: from the inputs to the trimmed outputs.
        """
        self._on_replay.append(callback)
        self._rewatch()

    def remove(self, callback: Callable[..., None]) -> None:
        """Calls `callback` no more; nothing happens if it is unknown."""
        _remove(self._on_capture, callback)
        if _remove(self._on_replay, callback):
            self._rewatch()

    def _rewatch(self) -> None:
        self.watches_replays = bool(self._annotate_replays or self._on_replay or self._addresses)
        self._changed()

    def captured(self, entry: CUDAGraphEntry) -> None:
        """Tells of a new entry, which anybody can find by now."""
        how = "loaded" if entry.is_loaded else "captured"
        logger.info(
            "%s %s of %s in %.0f ms", how, entry.bucket, entry.variant, entry.capture_time_ms
        )
        tell(self._on_capture, entry)

    def evicted(self, entries: list[CUDAGraphEntry]) -> None:
        """Tells of entries that had to leave because of a limit."""
        for entry in entries:
            logger.info(
                "evicted %s of %s after %d replays, for max_graphs or memory_pool_size_mb",
                entry.bucket,
                entry.variant,
                entry.replay_count,
            )

    def replayed(self, bucket: Bucket, seconds: float) -> None:
        """Tells of a replay."""
        tell(self._on_replay, bucket, seconds)


def _remove(callbacks: list[Callable[..., None]], callback: Callable[..., None]) -> bool:
    """Takes `callback` out, however often it is there; whether it was."""
    was_there = False
    while callback in callbacks:
        with suppress(ValueError):  # another thread was faster
            callbacks.remove(callback)
        was_there = True
    return was_there


def tell(callbacks: Sequence[Callable[..., None]], *arguments: object) -> None:
    """Calls all of them; one that raises is logged, and costs nobody anything."""
    for callback in tuple(callbacks):
        try:
            callback(*arguments)
        except Exception:
            # The answer is there, and whoever asked for it has no part in what watches.
            logger.exception("the observer %r failed", callback)


def annotation(
    what: str, name: str, bucket: Bucket, **stats: int
) -> AbstractContextManager[object]:
    """A context manager that a profile of `jax.profiler` shows, such as `replay embed 8x128`.

    Outside a profile it costs next to nothing.

    Args:
        what: What is done.
        name: The function's name.
        bucket: The bucket.
        **stats: What the profile also tells of it.
    """
    return jax.profiler.TraceAnnotation(f"{what} {name} {bucket}", **stats)
