"""A source whose counts are exported: by each scrape or, in multi-process mode, by a thread."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize

from prometheus_client import REGISTRY, CollectorRegistry, Metric

from cudagraph_jax._base.checks import names_nearest, require_bool
from cudagraph_jax._base.log import logger
from cudagraph_jax.batching.batcher import Batcher
from cudagraph_jax.dispatch.manager import CUDAGraphManager
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.prometheus.metrics import (
    OF_BATCHERS,
    OF_MANAGERS,
    Family,
    Metrics,
    Reading,
    between_resets,
    counts_of_batcher,
    counts_of_outcomes,
    counts_of_registry,
    is_multiprocess,
    levels,
)
from cudagraph_jax.shapes.ladder import Bucket

Source = CUDAGraphManager | Batcher


@names_nearest
def register(
    manager: CUDAGraphManager | Batcher,
    *,
    name: str = "default",
    registry: CollectorRegistry = REGISTRY,
    replay_times: bool = False,
    interval_s: float = 5.0,
) -> Registration:
    """Exports the counts of `manager` from now on; call it before the warm-up.

    The manager is held weakly. When it is gone, its series go with the next scrape, and its name
    is free again.

    Args:
        manager: Whose counts: a manager's, or a batcher's.
        name: The label `manager`, or `batcher`, of all its series.
        registry: Where Prometheus looks for them.
        replay_times: Whether to keep a histogram of replay times. It costs each replay a few
            microseconds; the sum and the count are there without it. Of a batcher it means nothing:
            the two histograms of its items are always kept.
        interval_s: Seconds between two updates in multi-process mode; without meaning otherwise.

    Raises:
        ConfigError: Another manager has this name, or an argument is not of its kind.
    """
    if not isinstance(manager, CUDAGraphManager | Batcher):
        raise ConfigError(
            f"manager={manager!r:.80} is no CUDAGraphManager or Batcher: give one, such as "
            "function.manager"
        )
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name={name!r:.80} is no name: give a text that tells managers apart")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"name={name!r} cannot be written in UTF-8: give another") from None
    require_bool("replay_times", replay_times)
    if not isinstance(registry, CollectorRegistry):
        raise ConfigError(
            f"registry={registry!r:.80} is no CollectorRegistry: give one of prometheus_client's, "
            "or leave it out"
        )
    _check_interval(interval_s)
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = _Collector()
            registry.register(collector)
            _collectors[registry] = collector
        made = collector.add(manager, name)
    made._begin(replay_times=replay_times, interval_s=interval_s)
    return made


def _check_interval(interval_s: object) -> None:
    # No thread can wait for longer than TIMEOUT_MAX, which is centuries.
    if (
        isinstance(interval_s, bool)
        or not isinstance(interval_s, int | float)
        or not 0 < interval_s <= threading.TIMEOUT_MAX
    ):
        raise ConfigError(
            f"interval_s={interval_s!r:.80} is no time to wait: give seconds, a number above 0"
        )


class Registration:
    """A manager or a batcher whose counts are exported; made by `register`.

    Attributes:
        name: The label of its series.
    """

    def __init__(self, source: Source, name: str, group: _Group) -> None:
        self.name = name
        self._source = weakref.ref(source)
        self._group = group
        self._metrics = group.metrics
        self._seen: dict[str, Reading] = {}
        self._is_updating = False
        self._over = threading.Event()
        self._interval_s = 0.0
        self._ignore: Callable[[], None] = lambda: None
        self._at_exit: Finalize | None = None

    def __repr__(self) -> str:
        return f"Registration({self.name!r})"

    @property
    def is_alive(self) -> bool:
        """Whether the counts are exported still; False once what they are of is gone."""
        return not self._over.is_set() and self._source() is not None

    def update(self) -> None:
        """Brings the metrics up to date, as each scrape does, or in multi-process mode a thread."""
        with _lock:
            self._update()

    def unregister(self) -> None:
        """Exports the counts no more, and frees the name.

        The series are dropped; in multi-process mode, where prometheus_client cannot drop them,
        counters stay as they are and gauges become 0.
        """
        self._ignore()
        with _lock:
            self._update()
            self._drop()

    def _begin(self, *, replay_times: bool, interval_s: float) -> None:
        self._interval_s = interval_s
        source = self._source()
        if isinstance(source, Batcher):
            self._ignore = self._watch_batcher(source)
        elif source is not None:
            self._ignore = self._watch_manager(source, replay_times=replay_times)
        self.update()
        if is_multiprocess():
            atexit.register(self.update)
            # The workers of multiprocessing end without `atexit`.
            self._at_exit = Finalize(None, self.update, exitpriority=0)
            self._start_thread()

    def _watch_manager(
        self, manager: CUDAGraphManager, *, replay_times: bool
    ) -> Callable[[], None]:
        """Fills the histograms of a manager from now on; what ends that."""
        compile_seconds = self._metrics.histograms["compile_seconds"].labels(self.name)
        observers = weakref.ref(manager.registry.observers)

        def captured(entry: CUDAGraphEntry) -> None:
            if not entry.is_loaded:
                compile_seconds.observe(entry.capture_time_ms / 1e3)

        callbacks: list[Callable[..., None]] = [captured]
        manager.registry.observers.on_capture(captured)
        if replay_times:
            replay_seconds = self._metrics.histograms["replay_duration_seconds"].labels(self.name)

            def replayed(bucket: Bucket, seconds: float) -> None:
                replay_seconds.observe(seconds)

            manager.registry.observers.on_replay(replayed)
            callbacks.append(replayed)

        def ignore() -> None:
            if (watched := observers()) is not None:
                for callback in callbacks:
                    watched.remove(callback)

        return ignore

    def _watch_batcher(self, batcher: Batcher) -> Callable[[], None]:
        """Fills the histograms of a batcher from now on; what ends that."""
        figures = batcher.figures
        watched = [(figures.queued, "queue"), (figures.served, "service")]
        added = []
        for times, what in watched:
            observe = self._metrics.histograms[f"batcher_{what}_seconds"].labels(self.name).observe
            times.observers.append(observe)
            added.append((times.observers, observe))

        def ignore() -> None:
            for observers, observe in added:
                if observe in observers:
                    observers.remove(observe)

        return ignore

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._keep_updating, name="cudagraph-jax-metrics")
        thread.daemon = True  # it ends with the manager, or with the interpreter
        thread.start()

    def _keep_updating(self) -> None:
        while not self._over.wait(self._interval_s):
            try:
                self.update()
            except Exception:
                logger.exception("the metrics of %r could not be written", self.name)

    def _update(self) -> None:
        """The same with the lock held."""
        source = self._source()
        if source is None:
            self._drop()
        if source is None or self._over.is_set() or self._is_updating:
            return  # the last of the three: a signal handler, in the middle of an update
        self._is_updating = True
        try:
            self._bring_up_to_date(source)
        finally:
            self._is_updating = False

    def _bring_up_to_date(self, source: Source) -> None:
        if isinstance(source, Batcher):
            self._add("batcher", Reading(0, counts_of_batcher(source)))
            gauges: dict[str, float] = {"batcher_waiting": source.waiting}
        else:
            self._add("registry", between_resets(source.registry, counts_of_registry))
            self._add("outcomes", between_resets(source.dispatcher.outcomes, counts_of_outcomes))
            gauges = levels(source)
        for key, value in gauges.items():
            self._metrics.gauges[key].labels(self.name).set(value)

    def _add(self, source: str, found: Reading | None) -> None:
        """Adds to the counters what the counts have grown by since the last time."""
        if found is None:
            return
        seen = self._seen.get(source)
        before = seen.counts if seen is not None and seen.restarts == found.restarts else {}
        # Less than before: a reset is under way, or threads raced for the time of a replay. What
        # was added stays added, so that nothing is added again.
        counts = {
            series: max(value, before.get(series, 0)) for series, value in found.counts.items()
        }
        self._seen[source] = Reading(found.restarts, counts)
        for series, value in counts.items():
            key, labels = series
            grown = value - before.get(series, 0)
            self._metrics.counters[key].labels(self.name, *labels).inc(grown)

    def _drop(self) -> None:
        """Ends it; with the lock held."""
        if self._over.is_set():
            return
        self._over.set()
        atexit.unregister(self.update)
        if self._at_exit is not None:
            self._at_exit.cancel()
        del self._group.registrations[self.name]
        self._metrics.forget(self.name)


class _Group:
    """All sources of one kind in a Prometheus registry.

    Attributes:
        metrics: The metrics.
        registrations: Whose values they have, by name.
    """

    def __init__(self, family: Family) -> None:
        self.metrics = Metrics(family)
        self._label = family.label
        self.registrations: dict[str, Registration] = {}

    def add(self, source: Source, name: str) -> Registration:
        """A registration under a free name; with the lock held."""
        known = self.registrations.get(name)
        if known is not None and known.is_alive:
            raise ConfigError(
                f"name={name!r} is registered already: give each {self._label} a name of its own, "
                "or call unregister() first"
            )
        if known is not None:
            known._drop()
        made = self.registrations[name] = Registration(source, name, self)
        return made


class _Collector:
    """What a Prometheus registry asks for the metrics of all that is registered there.

    Attributes:
        managers: The managers.
        batchers: The batchers.
    """

    def __init__(self) -> None:
        self.managers, self.batchers = _Group(OF_MANAGERS), _Group(OF_BATCHERS)

    def add(self, source: Source, name: str) -> Registration:
        """A registration under a free name; with the lock held."""
        group = self.batchers if isinstance(source, Batcher) else self.managers
        return group.add(source, name)

    def registrations(self) -> list[Registration]:
        """All of them."""
        groups = (self.managers.registrations, self.batchers.registrations)
        return [registration for group in groups for registration in list(group.values())]

    def describe(self) -> Iterator[Metric]:
        """The metrics without values: prometheus_client asks which names are taken."""
        yield from self.managers.metrics.describe()
        yield from self.batchers.metrics.describe()

    def collect(self) -> Iterator[Metric]:
        """The metrics of all, up to date."""
        for registration in self.registrations():
            registration.update()
        yield from self.managers.metrics.collect()
        yield from self.batchers.metrics.collect()


def _before_fork() -> None:
    # With the lock held nothing is half done in the child, and what was counted up to here is
    # not counted there again.
    _lock.acquire()
    if is_multiprocess():
        for registration in _registrations():
            registration._update()


def _after_fork_in_child() -> None:
    _lock.release()
    if is_multiprocess():
        for registration in _registrations():
            registration._start_thread()


def _registrations() -> list[Registration]:
    return [one for collector in _collectors.values() for one in collector.registrations()]


# A Prometheus registry takes each name once, so that its managers share their metrics; and a
# process forks as a whole, so that there is one lock.
_collectors: weakref.WeakKeyDictionary[CollectorRegistry, _Collector] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
os.register_at_fork(
    before=_before_fork, after_in_parent=_lock.release, after_in_child=_after_fork_in_child
)
