"""Metrics: exactly the manager's counts, in one process and in several, with bounded labels."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from cudagraph_jax import ConfigError, CUDAGraphConfig, CUDAGraphManager, CUDAGraphMode, bucket_jit
from cudagraph_jax.graphs.decision import Reason
from cudagraph_jax.graphs.outcomes import Outcomes
from cudagraph_jax.prometheus import register
from cudagraph_jax.prometheus.metrics import counts_of_outcomes
from cudagraph_jax.prometheus.registration import Registration
from tests.graphs.functions import GRID, double, floats, stats_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def registry():
    return CollectorRegistry(auto_describe=True)


def bucketed(config=GRID, **options):
    return bucket_jit(double, in_axes=("batch seq",), config=config, **options)


def samples_of(registry, name="default"):
    """The samples of one manager as `{"calls_total replay exact": 2.0}`, without times."""
    found = {}
    for metric in registry.collect():
        for sample in metric.samples:
            labels = dict(sample.labels)
            if labels.pop("manager") == name and not sample.name.endswith("_created"):
                key = " ".join([sample.name.removeprefix("cudagraph_jax_"), *labels.values()])
                assert key not in found
                found[key] = sample.value
    return found


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
    assert found["calls_total split overflow"] == 1
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
    assert len(kept) == len(set(kept)) == 13


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
    for restarts, count, total in [(0, 7, 7), (0, 0, 7), (1, 2, 9), (1, 5, 12), (2, 5, 17)]:
        registration._add("registry", restarts, {("captures", ()): count})
        assert samples_of_counter(registration) == total


def samples_of_counter(registration):
    """The value of one counter, without a scrape."""
    (metric,) = registration._metrics.counters["captures"].collect()
    return metric.samples[0].value


def test_two_managers_side_by_side(registry):
    """Two managers have their own series under their names."""
    functions = {name: bucketed() for name in ("a", "b")}
    for name, function in functions.items():
        register(function.manager, name=name, registry=registry)
    for _ in range(3):
        functions["a"](floats(0, 3, 5))
    assert samples_of(registry, "a")["calls_total replay exact"] == 2
    assert samples_of(registry, "b")["calls_total replay exact"] == 0


def test_a_name_is_taken_once(registry):
    """The same name twice is a ConfigError; after unregister it is free."""
    function = bucketed()
    registration = register(function.manager, name="a", registry=registry)
    assert repr(registration) == "Registration('a')"
    with pytest.raises(ConfigError, match="name='a' is registered already: give each manager"):
        register(CUDAGraphManager(GRID), name="a", registry=registry)
    registration.unregister()
    registration.unregister()
    registration.update()
    assert not registration.is_alive
    assert samples_of(registry, "a") == {}
    assert register(function.manager, name="a", registry=registry).is_alive


def test_unregister_stops_watching(registry):
    """After unregister the manager is watched no more."""
    function = bucketed()
    register(function.manager, registry=registry, replay_times=True).unregister()
    assert not function.registry.observers.watches_replays
    function(floats(0, 3, 5))
    assert samples_of(registry) == {}


def test_a_registration_keeps_no_manager_alive(registry):
    """The manager may go: its series go with the next scrape, and its name is free."""
    function = bucketed()
    function(floats(0, 3, 5))
    registration = register(function.manager, registry=registry, replay_times=True)
    assert samples_of(registry)["graphs"] == 1
    del function
    gc.collect()
    assert not registration.is_alive
    again = bucketed()
    register(again.manager, registry=registry)
    assert samples_of(registry)["graphs"] == 0
    del again
    gc.collect()
    assert samples_of(registry) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name='' is no name"),
        ({"name": 3}, "name=3 is no name"),
        ({"interval_s": 0}, "interval_s=0 is not above 0"),
        ({"replay_times": "all"}, "replay_times='all' is not a bool"),
    ],
)
def test_arguments_are_checked(registry, arguments, message):
    """An argument of another kind is a ConfigError that says what to give."""
    with pytest.raises(ConfigError, match=message):
        register(CUDAGraphManager(GRID), registry=registry, **arguments)
    assert list(registry.collect()) == []


def test_a_function_is_no_manager(registry):
    """A function given for its manager is told so."""
    with pytest.raises(ConfigError, match=r"give one, such as function\.manager"):
        register(bucketed(), registry=registry)


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


def test_the_thread_goes_on_after_an_error(registry, caplog):
    """A thread that cannot write is logged, tries again, and ends when the registration does."""
    function = bucketed()
    registration = register(function.manager, registry=registry, interval_s=1e-4)
    failing = FailingOnce(registration)
    failing._keep_updating()
    assert failing.updates == 3
    assert [record.exc_info[0] for record in caplog.records] == [OSError]
    assert "the metrics of 'default' could not be written" in caplog.text


class FailingOnce(Registration):
    """A registration whose first update fails, and whose third is the last."""

    def __init__(self, other: Registration) -> None:
        vars(self).update(vars(other))
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        if self.updates == 1:
            raise OSError("no space left")
        if self.updates == 3:
            self._over.set()


def python(script, *, directory=None, arguments=()):
    """A script in an interpreter of its own; with a directory in multi-process mode."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env.pop("PROMETHEUS_MULTIPROC_DIR", None)
    if directory is not None:
        env["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def merged(directory, name="default"):
    """What a scrape of all processes gives."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return samples_of(registry, name)


WORKER = """
    import os, sys
    import numpy as np
    from cudagraph_jax import CUDAGraphConfig, bucket_jit
    from cudagraph_jax.prometheus import register

    config = CUDAGraphConfig(capture_sizes=(1, 2), warmup_iterations=0)
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)
    registration = register(function.manager, replay_times=True, interval_s=3600)
    for _ in range(1 + int(sys.argv[1])):
        function(np.ones((2, 3), np.float32))
    function(np.ones((5, 3), np.float32))
    if sys.argv[2] == "update":
        registration.update()
        registration.update()
    print("served", flush=True)
    if sys.argv[2] == "update":
        os._exit(0)  # nothing is pushed at exit then
"""


def test_processes_add_up(tmp_path):
    """In multi-process mode a scrape has the sum of all workers, pushed by update or at exit."""
    workers = [
        python(WORKER, directory=tmp_path, arguments=(str(hits), how))
        for hits, how in ((3, "update"), (4, "exit"))
    ]
    for worker in workers:
        out, err = worker.communicate()
        assert (out, err, worker.returncode) == ("served\n", "", 0)
    found = merged(tmp_path)
    assert found["calls_total replay exact"] == found["replays_total exact"] == 7
    assert found["calls_total capture miss"] == found["calls_total eager overflow"] == 2
    assert found["captures_total"] == found["compile_seconds_count"] == 2
    assert found["replay_duration_seconds_count"] == 7
    assert found["real_elements_total"] == 42
    assert found["graphs"] == 2


TICKING = """
    import gc, threading
    import numpy as np
    from cudagraph_jax import CUDAGraphConfig, bucket_jit
    from cudagraph_jax.prometheus import register
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    def value(name):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return registry.get_sample_value("cudagraph_jax_" + name, {"manager": "default"})

    def thread():
        found = [one for one in threading.enumerate() if one.name == "cudagraph-jax-metrics"]
        return found[0] if found else None

    config = CUDAGraphConfig(capture_sizes=(1, 2), warmup_iterations=0)
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)
    registration = register(function.manager, interval_s=0.001)
    assert thread().daemon
    function(np.ones((2, 3), np.float32))
    while value("captures_total") != 1:
        pass
    {then}
"""

ENDINGS = {
    "unregister": "registration.unregister()\nassert value('graphs') == 0",
    "gone": "del function\ngc.collect()",
    "exit": "raise SystemExit",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_thread(tmp_path, ending):
    """A daemon thread pushes every so often, and ends with the registration and its manager."""
    checks = (
        "\nwhile thread() is not None: thread().join(10)\n"
        "assert value('captures_total') == 1\nassert value('graphs') == 0"
    )
    then = textwrap.indent(ENDINGS[ending] + checks, "    ").strip()
    worker = python(TICKING.replace("{then}", then), directory=tmp_path)
    out, err = worker.communicate(timeout=120)
    assert (out, err, worker.returncode) == ("", "", 0)
    assert merged(tmp_path)["captures_total"] == 1


FORKING = """
    import os, sys, warnings
    import numpy as np
    warnings.simplefilter("ignore")  # the interpreter warns of forks beside threads
    from cudagraph_jax import CUDAGraphConfig, bucket_jit
    from cudagraph_jax.graphs.decision import Reason
    from cudagraph_jax.prometheus import register

    config = CUDAGraphConfig(capture_sizes=(1, 2), warmup_iterations=0)
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)
    register(function.manager, interval_s=3600)
    function.manager.dispatcher.outcomes.add("eager", Reason.OVERFLOW)  # before JAX is used
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            function(np.ones((2, 3), np.float32))
            sys.exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""


def test_forked_workers(tmp_path):
    """Workers forked after the registration push their own counts, and none of the parent's."""
    parent = python(FORKING, directory=tmp_path)
    out, err = parent.communicate(timeout=120)
    assert (out, err, parent.returncode) == ("", "", 0)
    found = merged(tmp_path)
    assert found["captures_total"] == found["compile_seconds_count"] == 2
    assert found["calls_total eager overflow"] == 1


def test_the_missing_package_is_named():
    """Without prometheus_client the import says what to install, word for word."""
    script = """
        import sys
        sys.modules["prometheus_client"] = None
        import cudagraph_jax
        try:
            import cudagraph_jax.prometheus
        except ImportError as error:
            print(error)
    """
    out, err = python(script).communicate()
    assert err == ""
    assert out == (
        "cudagraph_jax.prometheus needs the package prometheus_client, which is not installed: "
        "run pip install 'cudagraph-jax[prometheus]'\n"
    )


def test_the_package_does_not_import_it():
    """Importing the package imports no prometheus_client."""
    script = "import sys, cudagraph_jax; print('prometheus_client' in sys.modules)"
    assert python(script).communicate() == ("False\n", "")
