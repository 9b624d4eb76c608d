"""What is exported: the metrics by name, and where their values are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar

from prometheus_client import Counter, Gauge, Histogram, Metric

from cudagraph_jax.batching.batcher import Batcher
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.dispatch.manager import CUDAGraphManager
from cudagraph_jax.dispatch.stats import Outcomes
from cudagraph_jax.xla.memory import pool_bytes

_PREFIX = "cudagraph_jax_"
_TRIES = 3


class Family(NamedTuple):
    """The metrics of one kind of source, by name without the prefix.

    Attributes:
        label: What tells the sources apart.
        counters: What each says, and its further labels.
        gauges: What each says.
        histograms: What each says, and its bounds.
    """

    label: str
    counters: Mapping[str, tuple[str, tuple[str, ...]]]
    gauges: Mapping[str, str]
    histograms: Mapping[str, tuple[str, tuple[float, ...]]]


_REPLAY_BOUNDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "calls": ("Calls by what was done with them, and why.", ("outcome", "reason")),
    "replays": ("Replays by how the request fits its bucket.", ("fit",)),
    "replay_seconds": ("Seconds of all replays, from the inputs to the trimmed outputs.", ()),
    "real_elements": ("Elements (the product of all sizes) of requests that replays served.", ()),
    "padded_elements": (
        "Elements (the product of all sizes) of padding that replays computed.",
        (),
    ),
    "captures": ("Buckets that were compiled.", ()),
    "loads": ("Buckets that were loaded from the store instead.", ()),
    "evictions": ("Buckets that had to leave because of a limit.", ()),
}
_GAUGES = {
    "graphs": "Buckets that are captured.",
    "memory_bytes": "Code of the captured buckets, and the largest of their temporary memory.",
    "queued_captures": "Captures that wait or run in the background.",
    "failed_buckets": "Buckets that could not be captured.",
}
_HISTOGRAMS = {
    "compile_seconds": (
        "Seconds to trace, lower and compile a bucket.",
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
    ),
    "replay_duration_seconds": (
        "Seconds of a replay, where asked for.",
        _REPLAY_BOUNDS,
    ),
}
OF_MANAGERS = Family("manager", _COUNTERS, _GAUGES, _HISTOGRAMS)
OF_BATCHERS = Family(
    "batcher",
    {
        "batcher_items": ("Items by what became of them.", ("outcome",)),
        "batcher_calls": ("Calls by the bucket that they ran in.", ("bucket",)),
        "batcher_real_elements": ("Lengths of all rows that ran, summed.", ()),
        "batcher_computed_elements": ("Elements of the buckets that they ran in.", ()),
    },
    {"batcher_waiting": "Items that wait."},
    {
        "batcher_queue_seconds": (
            "Seconds from an item's arrival to its call.",
            _REPLAY_BOUNDS,
        ),
        "batcher_service_seconds": (
            "Seconds from the start of a call to its answers.",
            _REPLAY_BOUNDS,
        ),
    },
)

Counts = dict[tuple[str, tuple[str, ...]], float]
"""Values by counter and its labels but for the source's name."""


class Reading(NamedTuple):
    """Counts that belong together.

    Attributes:
        restarts: How often they had been set to zero.
        counts: What was counted since.
    """

    restarts: int
    counts: Counts


class Restarting(Protocol):
    """What can set its counts to zero, and says how often it did."""

    @property
    def restarts(self) -> int:
        """How often; counted on when it is done."""


S = TypeVar("S", bound=Restarting)


class Metrics:
    """The metrics of any number of sources of one kind.

    Args:
        family: Which metrics.

    Attributes:
        counters: By name, without the prefix; so are the others.
        gauges: Levels.
        histograms: Times.
    """

    def __init__(self, family: Family) -> None:
        self._label = family.label
        name = (family.label,)
        self.counters = {
            key: Counter(_PREFIX + key, text, (*name, *labels), registry=None)
            for key, (text, labels) in family.counters.items()
        }
        self.gauges = {
            key: Gauge(_PREFIX + key, text, name, registry=None, multiprocess_mode="livesum")
            for key, text in family.gauges.items()
        }
        self.histograms = {
            key: Histogram(_PREFIX + key, text, name, registry=None, buckets=bounds)
            for key, (text, bounds) in family.histograms.items()
        }

    def _all(self) -> tuple[Counter | Gauge | Histogram, ...]:
        return (*self.counters.values(), *self.gauges.values(), *self.histograms.values())

    def describe(self) -> Iterator[Metric]:
        """The metrics without values."""
        for metric in self._all():
            yield from metric.describe()

    def collect(self) -> Iterator[Metric]:
        """The metrics with their values."""
        for metric in self._all():
            yield from metric.collect()

    def forget(self, name: str) -> None:
        """Drops the series of one source; in multi-process mode its gauges become 0.

        There prometheus_client can drop no series, and what was counted has happened.
        """
        if is_multiprocess():
            for gauge in self.gauges.values():
                gauge.labels(name).set(0)
            return
        for metric in self._all():
            samples = [sample for found in metric.collect() for sample in found.samples]
            # "le" is a histogram's own, not a label of the series.
            series = {
                tuple(value for label, value in sample.labels.items() if label != "le")
                for sample in samples
                if sample.labels[self._label] == name
            }
            for values in series:
                metric.remove(*values)


def between_resets(source: S, read: Callable[[S], Counts]) -> Reading | None:
    """What `read` gives of `source` while no reset ends; None where they come too fast for that."""
    for _ in range(_TRIES):
        restarts = source.restarts
        counts = read(source)
        if source.restarts == restarts:
            return Reading(restarts, counts)
    return None


def counts_of_registry(registry: CUDAGraphRegistry) -> Counts:
    """What `registry` has counted."""
    totals = registry.totals
    fits = {"exact": totals.exact, "padded": totals.padded, "larger": totals.larger}
    return {
        **{("calls", ("replay", fit)): count for fit, count in fits.items()},
        **{("replays", (fit,)): count for fit, count in fits.items()},
        ("replays", ("piece",)): totals.pieces,
        ("replay_seconds", ()): totals.seconds,
        ("real_elements", ()): totals.real_elements,
        ("padded_elements", ()): totals.computed_elements - totals.real_elements,
        ("captures", ()): registry.capture_count,
        ("loads", ()): registry.load_count,
        ("evictions", ()): registry.evictions,
    }


def counts_of_outcomes(outcomes: Outcomes) -> Counts:
    """The calls that were no replays."""
    return {
        ("calls", (outcome, reason)): count
        for outcome in ("capture", "split", "eager", "error")
        for reason, count in outcomes.by_reason(outcome).items()
    }


def levels(manager: CUDAGraphManager) -> dict[str, float]:
    """The values of all gauges."""
    entries, capturer = manager.registry.entries(), manager.dispatcher.capturer
    return {
        "graphs": len(entries),
        "memory_bytes": pool_bytes(entry.memory for entry in entries),
        "queued_captures": len(capturer.background),
        "failed_buckets": len(capturer.failures),
    }


def counts_of_batcher(batcher: Batcher) -> Counts:
    """What `batcher` has counted."""
    figures = batcher.figures
    return {
        **{("batcher_items", (key,)): count for key, count in figures.items().items()},
        **{("batcher_calls", (str(key),)): count for key, count in figures.calls.copy().items()},
        ("batcher_real_elements", ()): figures.real_elements,
        ("batcher_computed_elements", ()): figures.computed_elements,
    }


def is_multiprocess() -> bool:
    """Whether prometheus_client is in its multi-process mode, which it asks the environment for."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ
