"""`profile_replays`: command buffers by bucket, arguments that move, and states with evidence."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
import pytest
from jax.stages import Compiled

from cudagraph_jax import (
    Bucket,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphManager,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.graphs.route import Route, WatchedRoute
from tests.helpers.functions import GRID, double, floats


class Graphics:
    """Compiles with XLA; each run shows in a profile what XLA shows of one on a GPU."""

    def __init__(self, *kinds):
        self.kinds = kinds

    def __call__(self, wanted, lowering, *, clock):
        executable = lowering.compile(compiler_options=wanted.options, clock=clock)

        def run(*args, **kwargs):
            for kind in self.kinds:
                with jax.profiler.TraceAnnotation(f"command_buffer::{kind}", num_commands=3):
                    pass
            return executable.call(*args, **kwargs)

        return replace(executable, call=cast("Compiled", run))


def function_on(compiler, config=GRID):
    manager = CUDAGraphManager(config, compiler=compiler)
    return bucket_jit(double, in_axes="batch seq", manager=manager)


def states(function):
    graphs = function.stats()["registry"]["graphs"]
    return {key: graph["state"] for key, graph in graphs.items()}


def calls(function, *sizes):
    def run():
        for size in sizes:
            function(floats(0, *size))

    return run


def test_by_bucket():
    """Each bucket's replays and command buffers are counted, from all threads."""
    function = function_on(Graphics("execute", "execute"))
    function.warmup(floats(0, 1, 1), progress=False)

    def run():
        thread = threading.Thread(target=calls(function, (1, 2), (2, 4)))
        thread.start()
        calls(function, (3, 5), (3, 5), (1, 1))()
        thread.join()

    with no_compiles():
        profile = function.manager.profile_replays(run)
    assert {found.bucket: (found.replays, found.executed) for found in profile.buckets} == {
        Bucket(3, 5): (3, 6),
        Bucket(1, 2): (2, 4),
    }
    assert profile.buckets[0].bucket == Bucket(3, 5)
    assert all(found.is_replaying for found in profile.buckets)
    assert profile.unattributed == 0


def test_states():
    """A bucket is compiled, warmed after three runs, and replaying only when it was seen to."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(4,), warmup_iterations=2)
    compiler = Graphics("execute")
    function = function_on(compiler, config)
    function.warmup(floats(0, 1, 1), progress=False)
    assert states(function) == {"4x4": "compiled", "2x4": "compiled"}
    calls(function, (2, 4))()
    assert states(function) == {"4x4": "compiled", "2x4": "warmed"}
    function.manager.profile_replays(calls(function, (1, 1), (2, 3)))
    assert states(function) == {"4x4": "compiled", "2x4": "replaying"}
    assert function.registry.get(2, 4).state.value == "replaying"
    assert "replaying" in str(function.report())
    # The last profile decides.
    function.manager.profile_replays(calls(function, (4, 4)))
    assert states(function) == {"4x4": "replaying", "2x4": "warmed"}
    compiler.kinds = ("update", "execute")
    function.manager.profile_replays(calls(function, (4, 4)))
    assert states(function)["4x4"] == "warmed"


def test_a_capture_ends_the_evidence():
    """A new command buffer may throw recorded graphs away, so that nothing is known any more."""
    function = function_on(Graphics("execute"))
    function(floats(0, 1, 2))
    function.manager.profile_replays(calls(function, (1, 2)))
    assert states(function) == {"1x2": "replaying"}
    function(floats(0, 3, 2))
    assert states(function) == {"1x2": "compiled", "3x2": "compiled"}


def test_a_capture_of_another_registry_ends_the_evidence():
    """What XLA has recorded is the process's, so that any registry's capture may throw it away."""
    function = function_on(Graphics("execute"))
    function(floats(0, 1, 2))
    function.manager.profile_replays(calls(function, (1, 2)))
    assert states(function) == {"1x2": "replaying"}
    bucket_jit(double, in_axes="batch seq", config=GRID)(floats(0, 1, 2))
    assert "replaying" not in states(function).values()


def test_a_capture_meanwhile_leaves_no_evidence():
    """What was captured while the profile ran may have thrown graphs away after it was seen."""
    function = function_on(Graphics("execute"))
    function(floats(0, 1, 2))
    profile = function.manager.profile_replays(calls(function, (1, 2), (3, 2), (3, 2)))
    assert len(profile.buckets) == 2
    assert "replaying" not in states(function).values()


def test_on_a_cpu():
    """Without command buffers nothing is ever called replaying, and the profile says why."""
    function = bucket_jit(double, in_axes="batch seq", config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    profile = function.manager.profile_replays(calls(function, *[(1, 2)] * 4))
    assert [(found.replays, found.executed) for found in profile.buckets] == [(4, 0)]
    assert "replaying" not in states(function).values()
    if jax.default_backend() == "cpu":
        assert "no command buffers on cpu" in str(profile)


def test_arguments_that_move():
    """Parameters lie still, state that is replaced moves, and what the host gives is not known."""
    step = bucket_jit(
        lambda params, state, x, *, scale: (params["w"] * x * scale, {"k": state["k"] + 1}),
        in_axes=(None, None, "batch seq"),
        unpad="none",
        config=GRID,
    )
    params = {"w": jax.device_put(np.float32(2))}
    kept = [{"k": jax.device_put(np.full(64, number, np.float32))} for number in range(5)]
    place = jax.device_put(floats(0, 1, 2))
    scale = jax.device_put(np.float32(3))
    step(params, kept[0], place, scale=scale)

    def run():
        for state in kept:
            step(params, state, place, scale=scale)
        step(params, kept[-1], place, scale=scale)

    (found,) = step.manager.profile_replays(run).buckets
    moves = {argument.argument: argument.moves for argument in found.arguments}
    assert moves == {"params['w']": 0, "state['k']": 4, "x": 0, "scale": 0}

    (found,) = step.manager.profile_replays(
        lambda: step(params, kept[0], floats(0, 1, 2), scale=scale)
    ).buckets
    assert [argument.moves for argument in found.moved] == [None]


def test_nothing_is_watched_afterwards():
    """Routes are plain again, the user's annotations stay, also when the run fails."""
    function = bucket_jit(double, in_axes="batch seq", config=GRID)
    function(floats(0, 3, 5))

    def only_route():
        function(floats(0, 3, 5))
        (route,) = function._routes.table.values()
        return type(route)

    function.manager.profile_replays(calls(function, (3, 5)))
    assert only_route() is Route
    with pytest.raises(ZeroDivisionError):
        function.manager.profile_replays(lambda: 1 / 0)
    assert only_route() is Route
    function.manager.annotate(replays=True)
    function.manager.profile_replays(calls(function, (3, 5)))
    assert only_route() is WatchedRoute
    # And another profile can be made.
    assert len(function.manager.profile_replays(calls(function, (3, 5))).buckets) == 1


def test_what_cannot_be_profiled(tmp_path):
    """A run that is no function, and a profile within another, say what to do."""
    function = bucket_jit(double, in_axes="batch seq", config=GRID)
    with pytest.raises(ConfigError, match="pass a function"):
        function.manager.profile_replays(cast("Any", 3))
    with jax.profiler.trace(tmp_path), pytest.raises(CUDAGraphError, match="Stop the one"):
        function.manager.profile_replays(lambda: None)
    assert "Nothing was replayed" in str(function.manager.profile_replays(lambda: None))
    function(floats(0, 3, 5))
    assert len(function._routes.table) == 1
