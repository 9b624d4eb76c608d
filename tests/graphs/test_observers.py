"""Observers: captures are told of, replays when asked, and an unwatched replay is left alone."""

from __future__ import annotations

import dis
import threading

import jax
import numpy as np
import pytest

from cudagraph_jax import Bucket, ConfigError, CUDAGraphConfig, CUDAGraphManager, bucket_jit
from cudagraph_jax.graphs.observers import Observers
from cudagraph_jax.graphs.route import Route, WatchedRoute
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of


@pytest.fixture
def function():
    return bucket_jit(double, in_axes=("batch seq",), config=GRID)


def only_route(function):
    (route,) = function._routes.table.values()
    return route


def test_captures_are_told_of_once(function):
    """Each new bucket is told of once, when it can be found, whatever way it was captured."""
    seen = []
    registry = function.registry

    def captured(entry):
        seen.append((entry.bucket, registry.find(entry.bucket, entry.variant) is entry))

    registry.observers.on_capture(captured)
    function(floats(0, 2, 4))
    function(floats(0, 2, 4))
    assert seen == [(Bucket(3, 5), True)]
    function.warmup(floats(0, 1, 1), progress=False)
    registry.capture(2, 2, double, (2, 2))
    function.manager.capture_graph(1, 2, double, (1, 2))
    assert len(seen) == registry.capture_count == 8
    assert all(found for _, found in seen)


def test_a_failed_capture_is_not_told_of(function):
    """A capture that fails is none."""
    seen: list[object] = []
    function.registry.observers.on_capture(seen.append)
    failing = bucket_jit(lambda x: x if x.sum() > 0 else -x, in_axes="batch seq", config=GRID)
    failing.registry.observers.on_capture(seen.append)
    with pytest.warns(UserWarning, match="runs eagerly"):
        failing(floats(0, 2, 4))
    assert seen == []


def test_an_unwatched_route_is_no_more_than_before(function):
    """Without a watcher a route is a plain `Route`, and an exact one is called directly."""
    function(floats(0, 3, 5))
    assert type(only_route(function)) is Route
    assert only_route(function).direct is not None
    watching = {"observers", "_observers", "_shown", "annotate_replays"}
    for code in (Route.run, Route.execute, Route.call_padded, type(function).__call__):
        assert not watching & {step.argval for step in dis.get_instructions(code)}


@pytest.mark.parametrize("device", [False, True])
def test_replays_are_told_of_when_asked(function, device):
    """A replay callback gets the bucket and seconds of each replay, also of an exact one."""
    seen = []

    def replayed(bucket, seconds):
        seen.append(bucket)
        assert seconds > 0

    place = jax.device_put if device else np.asarray
    for size in [(3, 5), (2, 4)]:
        function(place(floats(0, *size)))
    function.registry.observers.on_replay(replayed)
    for size in [(3, 5), (2, 4), (3, 5), (1, 1)]:
        assert_close(function(place(floats(0, *size))), floats(0, *size) * 2)
    assert seen == [(3, 5), (3, 5), (3, 5)]  # the last call captures
    assert all(type(route) is WatchedRoute for route in function._routes.table.values())
    function.registry.observers.remove(replayed)
    function(place(floats(0, 3, 5)))
    assert len(seen) == 3
    assert stats_of(function)["hits"] == 5


@pytest.mark.parametrize("annotated", [False, True])
def test_seconds_are_those_of_the_statistics(function, annotated):
    """What a replay callback adds up is the time in the statistics, annotated or not."""
    told: list[float] = []
    function(floats(0, 3, 5))
    function.registry.observers.on_replay(lambda bucket, seconds: told.append(seconds))
    function.manager.annotate(replays=annotated)
    for _ in range(20):
        function(floats(0, 3, 5))
    total_ms = stats_of(function)["registry"]["total_replay_time_ms"]
    assert sum(told) * 1e3 == pytest.approx(total_ms, rel=1e-12)


def test_entries_tell_too():
    """`entry.replay` and the specification's calls are replays like others."""
    manager = CUDAGraphManager(GRID)
    entry = manager.registry.capture(3, 5, double, (3, 5))
    seen: list[Bucket] = []
    manager.registry.observers.on_replay(lambda bucket, seconds: seen.append(bucket))
    entry.replay(floats(0, 2, 2))
    manager.replay_graph(3, 5, floats(0, 3, 5))
    for _ in range(2):
        manager.execute_or_capture(3, 5, double, floats(0, 3, 5))
    assert seen == [(3, 5)] * 4
    assert entry.replay_count == 4


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError])
def test_a_callback_that_raises(function, caplog, error):
    """A callback that raises costs neither the answer nor the other callbacks, and is logged."""

    def failing(*arguments):
        raise error("no room for metrics")

    seen: list[object] = []
    observers = function.registry.observers
    for callback in (failing, seen.append):
        observers.on_capture(callback)
    observers.on_replay(failing)
    observers.on_replay(lambda *arguments: seen.append(arguments))
    x = floats(0, 2, 4)
    for _ in range(3):
        assert_close(function(x), x * 2)
    assert len(seen) == 3
    assert [record.exc_info[0] for record in caplog.records] == [error] * 3
    assert "the observer <function" in caplog.records[0].getMessage()
    stats = stats_of(function)
    assert (stats["calls"], stats["hits"], stats["errors_by_reason"]) == (3, 2, {})


def test_removing_what_is_unknown(function):
    """Removing a callback that was never there changes nothing, routes included."""
    function(floats(0, 3, 5))
    route = only_route(function)
    function.registry.observers.remove(print)
    assert only_route(function) is route


def test_changes_are_told_once():
    """Routes are forgotten when watching begins or ends, and only then."""
    changes: list[str] = []
    observers: Observers = Observers(lambda: changes.append("changed"))
    observers.on_capture(print)
    observers.annotate_replays = False
    assert (changes, observers.watches_replays) == ([], False)
    observers.annotate_replays = True
    observers.annotate_replays = True
    assert (len(changes), observers.watches_replays) == (1, True)
    observers.on_replay(print)
    observers.annotate_replays = False
    assert (len(changes), observers.watches_replays) == (3, True)
    observers.remove(print)
    assert (len(changes), observers.watches_replays) == (4, False)


def test_an_entry_does_not_keep_the_registry():
    """Holding one entry keeps no other one alive."""
    manager = CUDAGraphManager(GRID)
    entry = manager.registry.capture(3, 5, double, (3, 5))
    held = vars(entry.observers)["_changed"].__self__
    assert not any(value is manager.registry for value in vars(held).values())


def profile_of(path):
    """All that a profile wrote, as bytes."""
    return b"".join(file.read_bytes() for file in path.rglob("*.xplane.pb"))


def test_a_profile_shows_captures_and_replays(tmp_path):
    """A real profile has each capture by function and bucket, and replays after `annotate`."""

    def embed(x):
        return x + 1

    function = bucket_jit(embed, in_axes=("batch seq",), config=GRID)
    exact, padded = jax.device_put(floats(0, 3, 5)), floats(0, 4, 1)
    with jax.profiler.trace(tmp_path / "quiet"):
        function(exact)
        function(exact)
    function.manager.annotate(replays=True)
    with jax.profiler.trace(tmp_path / "replays"):
        function(exact)
        function(padded)
        function(padded)
    function.manager.annotate(replays=False)
    with jax.profiler.trace(tmp_path / "off"):
        function(exact)
    quiet, replays, off = (profile_of(tmp_path / name) for name in ("quiet", "replays", "off"))
    assert b"capture embed 3x5" in quiet
    assert b"replay embed" not in quiet
    assert b"replay embed 3x5" in replays
    assert b"capture embed 4x2" in replays
    assert b"replay embed 4x2" in replays
    assert b"replay embed" not in off


def test_annotating_is_yes_or_no():
    """`annotate` takes True or False."""
    with pytest.raises(ConfigError, match="replays='yes' is not a bool"):
        CUDAGraphManager().annotate(replays="yes")  # type: ignore[arg-type]


def test_switching_while_others_call(function):
    """Switching in mid-traffic loses and doubles no replay."""
    x = floats(0, 2, 4)
    function(x)
    told: list[float] = []

    def replayed(bucket, seconds):
        told.append(seconds)

    def serve():
        for _ in range(200):
            function(x)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        function.registry.observers.on_replay(replayed)
        function.registry.observers.remove(replayed)
    for thread in threads:
        thread.join()
    assert stats_of(function)["hits"] == 800
    assert len(told) <= 800


def test_evictions_reach_the_observers(caplog):
    """What leaves because of a limit is told of; what is removed or cleared is not."""
    config = CUDAGraphConfig(capture_sizes=(1, 2, 3), max_graphs=1, warmup_iterations=0)
    manager = CUDAGraphManager(config)
    with caplog.at_level("INFO", logger="cudagraph_jax"):
        entry = manager.registry.capture(1, 2, double, (1, 2))
        entry.replay(floats(0, 1, 2))
        manager.capture_graph(2, 2, double, (2, 2))
        manager.registry.remove(2, 2)
        manager.capture_graph(3, 2, double, (3, 2))
        manager.registry.clear()
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("evicted")] == [
        "evicted 1x2 of double(float32[·,·]) after 1 replays, for max_graphs or memory_pool_size_mb"
    ]
