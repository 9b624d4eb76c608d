"""Runs without a request: what is run again, with which arguments, and what fails."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cudagraph_jax import CUDAGraphMode, CUDAGraphWarning, bucket_jit
from tests.helpers.faults import Held, busy, by_bucket_jit, by_execute, managed, through_host
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

X = floats(0, 2, 4)
SHORT = dataclasses.replace(GRID, capture_seq_lens=(5,))
DOORS = pytest.mark.parametrize("door", [by_bucket_jit, by_execute])


def warmed(manager, function):
    """`function` with its three buckets captured."""
    served: Any = by_bucket_jit(manager, function)
    served.warmup(X, progress=False)
    return served


def test_a_bucket_that_fails_again_is_dropped_under_its_own_name():
    """A capture is not blamed for another bucket that does not run any more; that one is."""
    trouble: list[str] = []
    manager = managed(SHORT, evicts=True)
    old = warmed(manager, through_host(trouble))
    manager.registry.remove(4, 5)
    manager.registry.remove(1, 5)
    new: Any = by_bucket_jit(manager, lambda x: x + 1)
    trouble.append("the wire is broken")
    with pytest.warns(CUDAGraphWarning, match="doubled runs eagerly at 3x5") as told:
        assert_close(new(X), X + 1)
    assert len(told) == 1
    assert new.explain(X).mode is CUDAGraphMode.REPLAY
    assert "could not be captured before: 3x5 was compiled" in old.explain(X).reason
    assert [entry.variant.name for entry in manager.registry.entries()] == ["lambda"]
    stats = stats_of(manager)
    assert (stats["captures"], stats["recorded_again"], stats["failed_buckets"]) == (1, 1, 1)
    assert_close(old(X), X * 2)


def test_sealing_goes_through_all_buckets():
    """seal() drops those that do not run any more, runs the others, and seals."""
    trouble: list[str] = []
    manager = managed(SHORT, evicts=True)
    _broken = warmed(manager, through_host(trouble))
    sound = warmed(manager, double)
    trouble.append("the wire is broken")
    before = manager.dispatcher.capturer.recorded_again
    with pytest.warns(CUDAGraphWarning, match="doubled runs eagerly"):
        manager.seal()
    assert manager.mode is CUDAGraphMode.REPLAY
    assert {entry.variant.name for entry in manager.registry.entries()} == {"double"}
    assert stats_of(manager)["recorded_again"] == before + 6
    assert stats_of(manager)["failed_buckets"] == 3
    assert_close(sound(X), X * 2)


def test_runs_are_counted_exactly():
    """The count of buckets that were run again is exact whatever the number of threads."""
    manager = managed(SHORT, evicts=True)
    _held = warmed(manager, double)  # or its graphs would go
    start = threading.Barrier(8)

    def record():
        start.wait(60)
        for _ in range(25):
            manager.dispatcher.capturer.record_again()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(record) for _ in range(8)]:
            done.result(60)
    assert stats_of(manager)["recorded_again"] == 8 * 25 * 3


def test_a_second_warm_up_runs_the_first_function_once():
    """What a warm-up throws away is recorded again once at its end, not after each capture."""
    manager = managed(SHORT, evicts=True)
    _held = warmed(manager, double)  # or its graphs would go
    other = warmed(manager, lambda x: x + 1)
    assert stats_of(manager)["recorded_again"] == 3
    other.warmup(X, progress=False)
    assert stats_of(manager)["recorded_again"] == 3


def test_a_capture_of_the_specification_records_again():
    """capture_graph after a warm-up runs the other buckets, as a capture in a request does."""
    manager = managed(SHORT, evicts=True)
    _held = warmed(manager, double)  # or its graphs would go

    def increment(x):
        return x + 1

    entry = manager.capture_graph(2, 5, increment, (2, 5))
    assert entry is not None
    assert stats_of(manager)["recorded_again"] == 3
    assert manager.capture_graph(2, 5, increment, (2, 5)) is entry
    assert stats_of(manager)["recorded_again"] == 3


def seeing(seen: list[float]):
    """A function that tells the host which parameters it runs with."""

    def scaled(params, x):
        if isinstance(x, jax.core.Tracer):
            shape = jax.ShapeDtypeStruct((), np.float32)

            def see(w):
                seen.append(float(np.asarray(w)[0]))
                return np.asarray(w)[0]

            return x * jax.pure_callback(see, shape, params["w"])
        return x * params["w"][0]

    return scaled


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("gone", [False, True])
def test_it_runs_with_the_parameters_of_the_capture(make, gone):
    """Runs borrow the parameters while they are alive, keep none alive, and then take zeros."""
    seen: list[float] = []
    manager = managed(SHORT, evicts=True)
    function: Any = bucket_jit(seeing(seen), in_axes=(None, "batch seq"), manager=manager)
    params = {"w": make(np.full(7, 5, np.float32))}
    known = weakref.ref(params["w"])
    function.warmup(params, X, progress=False)
    assert set(seen) == {5}
    if gone:
        del params
        gc.collect()
        assert known() is None
    seen.clear()
    manager.seal()
    assert seen == ([0] * 3 if gone else [5] * 3)


def test_parameters_that_were_deleted_do_not_fail():
    """Deleted arrays, scalars too, are no reason to drop a bucket."""
    manager = managed(SHORT, evicts=True)
    function: Any = bucket_jit(
        lambda w, by, x: x * w[0] * by, in_axes=(None, None, "batch seq"), manager=manager
    )
    w, by = jnp.full(7, 2, jnp.float32), jnp.float32(3)
    function.warmup(w, by, X, progress=False)
    w.delete()
    by.delete()
    manager.seal()
    assert (manager.registry.num_graphs, stats_of(manager)["failed_buckets"]) == (3, 0)
    assert_close(function(np.full(7, 2, np.float32), np.float32(3), X), X * 6)


def test_captures_in_the_background_run_with_the_parameters():
    """The worker borrows the parameters of the request that queued the capture."""
    seen: list[float] = []
    with managed(dataclasses.replace(SHORT, on_miss="background")) as manager:
        function = bucket_jit(seeing(seen), in_axes=(None, "batch seq"), manager=manager)
        params = {"w": jnp.full(7, 5, jnp.float32)}
        function(params, X)
        manager.wait()
    assert seen == [5]


@pytest.mark.parametrize("make", [float, np.float32, jnp.float32, np.asarray])
def test_scalars_reach_the_worker(make):
    """A loop whose step is an argument ends in the background too: it gets the call's step."""

    def loop(step, x):
        return lax.while_loop(
            lambda state: state[0] < 10,
            lambda state: (state[0] + step, state[1] * 2),
            (jnp.float32(0), x),
        )[1]

    with managed(dataclasses.replace(SHORT, on_miss="background"), evicts=True) as manager:
        function = bucket_jit(loop, in_axes=(None, "batch seq"), manager=manager)
        step = make(np.float32(5))
        for _ in range(2):
            assert_close(function(step, X), X * 4)
            manager.wait()
        manager.seal()
    assert stats_of(manager)["hits"] == 1


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("how", ["positions", "keywords", "specification"])
def test_a_queued_capture_keeps_no_array(make, how):
    """The arrays of a request go with the request, also while its bucket waits for a capture."""

    def scaled(params, x, *, by=None, times=1):
        return x * params["w"][0] * (1 if by is None else by[0]) * times

    def of_one(inputs):
        return scaled(inputs["params"], inputs["x"])

    with managed(dataclasses.replace(SHORT, on_miss="background")) as manager:
        function: Any = bucket_jit(
            scaled, in_axes=(None, "batch seq"), static_argnames="times", manager=manager
        )
        go = busy(manager)
        w, x, by = make(np.ones(7, np.float32)), make(floats(1, 2, 4)), make(np.ones(7, np.float32))
        known = [weakref.ref(w), weakref.ref(x)]
        if how == "positions":
            function({"w": w}, x)
        elif how == "keywords":
            function({"w": w}, x=x, by=by, times=2)
            known.append(weakref.ref(by))
        else:
            manager.execute_or_capture(2, 4, of_one, {"params": {"w": w}, "x": x})
        del w, x, by
        gc.collect()
        assert [reference() for reference in known] == [None] * len(known)
        assert stats_of(manager)["queued"] == 2
        go.set()
        manager.wait()
        assert manager.registry.num_graphs == 1


@DOORS
def test_reset_drops_what_waits(door):
    """After reset() nothing appears that was queued before; what is asked for later does."""
    with managed(dataclasses.replace(SHORT, on_miss="background")) as manager:
        function = door(manager, double)
        go = busy(manager)
        function(X)
        assert stats_of(manager)["queued"] == 2
        manager.reset()
        go.set()
        manager.wait()
        assert (manager.registry.num_graphs, manager.registry.capture_count) == (0, 0)
        function(X)
        manager.wait()
        assert manager.registry.num_graphs == 1


@DOORS
def test_reset_does_not_keep_what_is_running(door):
    """A capture under way when reset() is called is not held when it has ended."""
    held = Held()
    with managed(dataclasses.replace(SHORT, on_miss="background")) as manager:
        function = door(manager, held)
        function(X)
        assert held.entered.wait(60)
        manager.reset()
        held.go.set()
        manager.wait()
        assert manager.registry.num_graphs == 0
        function(X)
        manager.wait()
        assert manager.registry.num_graphs == 1
