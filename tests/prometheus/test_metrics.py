"""Metrics are exactly the manager's counts, with bounded labels."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cudagraph_jax import CUDAGraphConfig, CUDAGraphMode, bucket_jit
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.dispatch.stats import Outcomes
from cudagraph_jax.prometheus import register
from cudagraph_jax.prometheus.metrics import (
    Reading,
    between_resets,
    counts_of_outcomes,
    counts_of_registry,
)
from tests.helpers.functions import floats, stats_of
from tests.helpers.scrapes import bucketed, samples_of


def test_exact_values(registry):
    """After known calls every sample has the value of the manager's statistics."""
    function = bucketed()
    register(function.manager, registry=registry)
    for size in [(2, 4), (2, 4), (3, 5), (3, 5), (9, 9), (0, 3)]:
        function(floats(0, *size))
    with pytest.raises(TypeError):
        function(floats(0, 2))
    function.manager.mode = CUDAGraphMode.REPLAY
    function(floats(0, 1, 1))
    found, stats = samples_of(registry), stats_of(function)
    memory = stats["registry"]["memory_bytes"]
    seconds = stats["registry"]["total_replay_time_ms"] / 1e3
    assert found.pop("replay_seconds_total") == pytest.approx(seconds) != 0
    assert found.pop("compile_seconds_sum") == pytest.approx(stats["compile_seconds"]) != 0
    assert found.pop("compile_seconds_bucket +Inf") == 1
    assert {key: value for key, value in found.items() if "_bucket " not in key} == {
        "calls_total replay exact": 2,
        "calls_total replay padded": 1,
        "calls_total replay larger": 1,
        "calls_total capture miss": 1,
        "calls_total eager overflow": 1,
        "calls_total eager empty": 1,
        "calls_total error input": 1,
        "replays_total exact": 2,
        "replays_total padded": 1,
        "replays_total larger": 1,
        "replays_total piece": 0,
        "real_elements_total": 2 * 15 + 8 + 1,
        "padded_elements_total": 0 + 7 + 14,
        "captures_total": 1,
        "loads_total": 0,
        "evictions_total": 0,
        "compile_seconds_count": 1,
        "graphs": 1,
        "memory_bytes": memory,
        "queued_captures": 0,
        "failed_buckets": 0,
    }
    calls = sum(value for key, value in found.items() if key.startswith("calls_total"))
    assert calls == stats["calls"] == 8


def test_pieces_failures_and_evictions(registry):
    """Pieces of a split batch, failed buckets and evictions are counted."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 2), on_overflow="split", max_graphs=1, warmup_iterations=0
    )
    function = bucketed(config)
    register(function.manager, registry=registry)
    function(floats(0, 4, 3))
    function(floats(0, 1, 3))
    failing = bucket_jit(
        lambda x: x if x.sum() > 0 else -x, in_axes="batch", manager=function.manager
    )
    with pytest.warns(UserWarning, match="runs eagerly"):
        failing(floats(0, 2))
    found = samples_of(registry)
    assert found["calls_total split miss"] == 1
    assert found["calls_total eager failed"] == 1
    assert found["replays_total piece"] == 2
    assert (found["evictions_total"], found["graphs"], found["failed_buckets"]) == (1, 1, 1)


def test_a_scrape_is_never_behind_and_never_double(registry):
    """Each scrape has all calls before it, however often it is asked."""
    function = bucketed()
    register(function.manager, registry=registry)
    for count in range(1, 5):
        function(floats(0, 3, 5))
        for _ in range(2):
            assert samples_of(registry)["calls_total replay exact"] == count - 1


def test_it_is_valid_exposition(registry):
    """What Prometheus reads is parsed back to the same families, each once."""
    for name in ("a", "b"):
        function = bucketed()
        register(function.manager, name=name, registry=registry)
        function(floats(0, 3, 5))
    text = generate_latest(registry).decode()
    families = [metric.name for metric in text_string_to_metric_families(text)]
    kept = [name for name in families if not name.endswith("_created")]
    assert len(kept) == len(set(kept)) == 21


def test_counts_before_the_registration(registry):
    """Calls before the registration are there too; their compile times are not."""
    function = bucketed()
    function(floats(0, 3, 5))
    function(floats(0, 3, 5))
    register(function.manager, registry=registry)
    found = samples_of(registry)
    assert (found["calls_total replay exact"], found["captures_total"]) == (1, 1)
    assert found["compile_seconds_count"] == 0


def test_replay_times_when_asked(registry):
    """The histogram of replays is there when asked for, and costs nothing otherwise."""
    plain, timed = bucketed(), bucketed()
    register(plain.manager, name="plain", registry=registry)
    register(timed.manager, name="timed", registry=registry, replay_times=True)
    for function in (plain, timed):
        for _ in range(3):
            function(floats(0, 3, 5))
    assert not any("duration" in key for key in samples_of(registry, "plain"))
    assert not plain.registry.observers.watches_replays
    assert samples_of(registry, "timed")["replay_duration_seconds_count"] == 2


def test_labels_are_bounded(registry):
    """Whatever sizes come, labels are outcomes, reasons and fits, and the series do not grow."""
    config = CUDAGraphConfig(capture_sizes=(1, 2), on_overflow="exact", warmup_iterations=0)
    function = bucketed(config)
    register(function.manager, registry=registry, replay_times=True)
    numbers = []
    for length in range(1, 8):
        for batch in (1, 2, 3):
            function(floats(0, batch, length))
            function(floats(0, batch, length))
        numbers.append(len(samples_of(registry)))
    assert len(set(numbers)) == 1
    allowed = {
        "manager": {"default"},
        "outcome": {"replay", "capture", "split", "eager", "error"},
        "reason": {reason.value for reason in Reason},
        "fit": {"exact", "padded", "larger", "piece"},
    }
    for metric in registry.collect():
        for sample in metric.samples:
            for label, value in sample.labels.items():
                assert label == "le" or value in allowed[label]


def test_after_a_reset_counters_go_on(registry):
    """A reset sets the manager's counts to zero; the counters keep theirs and add the new ones."""
    function = bucketed()
    register(function.manager, registry=registry)

    def serve():
        for size in [(3, 5), (3, 5), (9, 9)]:
            function(floats(0, *size))

    serve()
    before = samples_of(registry)
    function.manager.reset()
    serve()
    found = samples_of(registry)
    for key in ("calls_total replay exact", "calls_total eager overflow", "captures_total"):
        assert (before[key], found[key], samples_of(registry)[key]) == (1, 2, 2)
    function.manager.reset()
    assert samples_of(registry)["graphs"] == 0
    assert samples_of(registry)["replays_total exact"] == 2


def test_counts_read_in_the_middle_of_a_reset(registry):
    """Counts that are gone while the reset is not yet told of make no counter fall or jump."""
    function = bucketed()
    registration = register(function.manager, registry=registry)
    for restarts, count, total in [(0, 7, 7), (0, 0, 7), (0, 2, 7), (1, 2, 9), (1, 5, 12)]:
        registration._add("registry", Reading(restarts, {("captures", ()): count}))
        assert samples_of_counter(registration) == total
    registration._add("registry", None)
    registration._add("registry", Reading(2, {("captures", ()): 5}))
    assert samples_of_counter(registration) == 17


def samples_of_counter(registration):
    """The value of one counter, without a scrape."""
    (metric,) = registration._metrics.counters["captures"].collect()
    return metric.samples[0].value


def test_a_reset_between_the_restarts_and_the_counts(registry):
    """Counts are read again where a reset came while they were read: nothing is added twice."""
    function = bucketed()
    registration = register(function.manager, registry=registry)
    function(floats(0, 3, 5))
    registration.update()
    resets = iter([function.manager.reset])

    def read(source):
        for reset in resets:
            reset()
            function(floats(0, 3, 5))
        return counts_of_registry(source)

    reading = between_resets(function.registry, read)
    assert reading is not None
    assert (reading.restarts, reading.counts["captures", ()]) == (1, 1)
    registration._add("registry", reading)
    assert samples_of(registry)["captures_total"] == 2


def test_resets_without_end():
    """Where each reading is overtaken by a reset there is none, and the next update tries again."""
    registry = bucketed().registry

    def read(source):
        source.reset()
        return counts_of_registry(source)

    assert between_resets(registry, read) is None
    assert registry.restarts <= 5


def test_two_managers_side_by_side(registry):
    """Two managers have their own series under their names."""
    functions = {name: bucketed() for name in ("a", "b")}
    for name, function in functions.items():
        register(function.manager, name=name, registry=registry)
    for _ in range(3):
        functions["a"](floats(0, 3, 5))
    assert samples_of(registry, "a")["calls_total replay exact"] == 2
    assert samples_of(registry, "b")["calls_total replay exact"] == 0


def test_scrapes_in_many_threads(registry):
    """Scrapes and calls at the same time count each call once."""
    function = bucketed()
    register(function.manager, registry=registry)
    function(floats(0, 3, 5))

    def serve():
        for _ in range(200):
            function(floats(0, 3, 5))

    def scrape():
        for _ in range(20):
            list(registry.collect())

    threads = [threading.Thread(target=work) for work in (serve, scrape) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples_of(registry)["calls_total replay exact"] == 600


def test_outcomes_are_those_that_are_exported():
    """The metrics know every outcome that calls are counted under."""
    outcomes = Outcomes()
    for outcome in ("capture", "split", "eager", "error"):
        outcomes.add(outcome, Reason.MISS)
    assert sum(counts_of_outcomes(outcomes).values()) == 4


def test_named_axes_are_no_labels(registry):
    """Axes by name make no series of their own, and their elements are counted."""
    config = CUDAGraphConfig(
        capture_sizes=(2,), capture_axes={"height": (4,), "width": (4,)}, warmup_iterations=0
    )
    function = bucket_jit(lambda x: x * 2, in_axes="batch height width", config=config)
    register(function.manager, registry=registry)
    for _ in range(2):
        function(floats(0, 1, 3, 3))
    found = samples_of(registry)
    assert found["real_elements_total"] == 9
    assert found["padded_elements_total"] == 2 * 4 * 4 - 9
    assert not any("height" in series for series in found)
