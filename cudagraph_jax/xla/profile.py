"""Reads a profile of `jax.profiler`: which command buffers ran in which replay."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

REPLAY = "replay"
"""The first word of a replay's annotation; its `watcher` and `graph_id` tell which entry it is."""

_COMMAND_BUFFER = "command_buffer::"
# XLA's `CommandBufferThunk`; "initialize" records what has to be recorded before the run.
_KINDS = {
    "execute": "executed",
    "update": "updated",
    "record": "recorded",
    "initialize": "recorded",
}
# XLA's `ThreadpoolListener`: who hands work over names it by the stats `_pt` and `_p`, who takes
# it by `_ct` and `_c`.
_BEGINS, _ENDS = "ThreadpoolListener::StartRegion", "ThreadpoolListener::StopRegion"


class Event(NamedTuple):
    """Something that a profile shows.

    Attributes:
        line: The thread.
        name: What it is.
        start: Nanoseconds.
        end: Nanoseconds.
        stats: What else is known of it.
    """

    line: Hashable
    name: str
    start: float
    end: float
    stats: Mapping[str, Any]


@dataclass(slots=True)
class Shown:
    """What happened in the replays of one entry: numbers of replays and of command buffers."""

    replays: int = 0
    counts: Counter[str] = field(default_factory=Counter)


def read_events(directory: Path) -> list[Event]:
    """The events of all threads of the host that a profile in `directory` shows."""
    with warnings.catch_warnings():
        # jaxlib 0.12 warns while it makes the types of what it read, and where warnings are
        # errors it ends the process (nanobind: "type construction failed").
        warnings.simplefilter("ignore", DeprecationWarning)
        return [event for path in sorted(directory.rglob("*.xplane.pb")) for event in _events(path)]


def _events(path: Path) -> Iterator[Event]:
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/host:"):
            continue
        for number, line in enumerate(plane.lines):
            for event in line.events:
                yield Event(
                    (path.name, plane.name, number),
                    event.name,
                    event.start_ns,
                    event.start_ns + event.duration_ns,
                    dict(event.stats),
                )


def attribute(events: Sequence[Event], *, watcher: int) -> tuple[dict[int, Shown], int]:
    """What happened in each entry's replays, and how many command buffers are nobody's.

    An event belongs to the replay that it lies in, in its own thread or in one that was handed
    work from there. Where one entry alone was replayed, everything between its first and its last
    replay is its own.

    Args:
        events: What a profile shows, in any order.
        watcher: The number of the `Observers` whose replays count.

    Returns:
        By graph_id what is known of its replays, and the number of events that are left over.
    """
    replays: dict[tuple[int, int], Shown] = {}
    strays: list[tuple[str, float]] = []
    # By thread what the moment is inside of: until when, and which replay; None: no replay.
    inside: dict[Hashable, list[tuple[float, Shown | None]]] = {}
    handed: dict[tuple[object, object], Shown | None] = {}
    # Of two that begin together the outer comes first.
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        around = inside.setdefault(event.line, [])
        while around and around[-1][0] <= event.start:
            around.pop()
        owner = around[-1][1] if around else None
        if "graph_id" in event.stats and event.name.startswith(f"{REPLAY} "):
            number = (int(event.stats["watcher"]), int(event.stats["graph_id"]))
            replay = replays.setdefault(number, Shown())
            replay.replays += 1
            around.append((event.end, replay))
        elif event.name == _BEGINS:
            taken = (event.stats.get("_ct"), event.stats.get("_c"))
            around.append((math.inf, handed.get(taken)))
        elif event.name == _ENDS:
            while around and around.pop()[0] != math.inf:
                pass
        elif "_p" in event.stats:
            handed[event.stats.get("_pt"), event.stats["_p"]] = owner
        elif (kind := _kind(event.name)) is not None:
            if owner is None:
                strays.append((kind, event.start))
            else:
                owner.counts[kind] += 1
    if len(replays) == 1:
        (only,) = replays.values()
        start, end = _span(events)
        only.counts.update(kind for kind, moment in strays if start <= moment <= end)
        strays = [stray for stray in strays if not start <= stray[1] <= end]
    own = {graph_id: shown for (number, graph_id), shown in replays.items() if number == watcher}
    return own, len(strays)


def _span(events: Iterable[Event]) -> tuple[float, float]:
    """From the beginning of the first replay to the end of the last."""
    replays = [event for event in events if event.name.startswith(f"{REPLAY} ")]
    return min(event.start for event in replays), max(event.end for event in replays)


def _kind(name: str) -> str | None:
    if not name.startswith(_COMMAND_BUFFER):
        return None
    # `record_for_va_remapping` records, too.
    return _KINDS.get(name.removeprefix(_COMMAND_BUFFER).partition("_")[0])
