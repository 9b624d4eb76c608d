"""Sealing: whoever is inside a capture is waited for, and nothing is captured afterwards."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cudagraph_jax import CUDAGraphMode, SealedError, bucket_jit, no_compiles
from cudagraph_jax.capture.capturer import CaptureGate
from tests.helpers.faults import Held, Interrupted, Told, by_bucket_jit, by_execute, managed
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

X = floats(0, 2, 4)
DOORS = pytest.mark.parametrize("door", [by_bucket_jit, by_execute])


def capturing():
    return CaptureGate(CUDAGraphMode.CAPTURE)


@pytest.mark.parametrize("mode", CUDAGraphMode)
def test_only_one_mode_admits(mode):
    """Captures are admitted in the mode CAPTURE alone."""
    assert CaptureGate(mode).within(bool) == (mode is CUDAGraphMode.CAPTURE)


def test_settling_waits_for_those_inside():
    """`settle` returns when the last block of another thread has ended, nested ones included."""
    gate, inside, leave = capturing(), threading.Event(), threading.Event()
    log: list[str] = []

    def wait(is_admitted):
        inside.set()
        assert leave.wait(60)

    def nested(is_admitted):
        gate.within(wait)
        log.append("captured")

    def capture():
        gate.within(nested)

    def settle():
        gate.change(CUDAGraphMode.REPLAY)
        leave.set()
        gate.settle()
        log.append("settled")

    with ThreadPoolExecutor(2) as pool:
        captured = pool.submit(capture)
        assert inside.wait(60)
        pool.submit(settle).result(60)
        captured.result(60)
    assert log == ["captured", "settled"]


def test_a_block_that_raises_has_ended():
    """Nobody waits for a capture that failed, nor for one that was not admitted."""
    gate = capturing()

    def fail(is_admitted):
        raise LookupError

    with ThreadPoolExecutor(2) as pool:
        assert isinstance(pool.submit(gate.within, fail).exception(60), LookupError)
        gate.settle()
        gate.change(CUDAGraphMode.NONE)

        def settle_elsewhere(is_admitted):
            pool.submit(gate.settle).result(60)
            return is_admitted

        assert not gate.within(settle_elsewhere)


def test_settling_from_inside():
    """A thread does not wait for itself, and two that settle from inside not for each other."""
    gate = capturing()
    gate.within(lambda _: gate.settle())
    both = threading.Barrier(2)

    def capture(is_admitted):
        both.wait(60)
        gate.settle()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(gate.within, capture) for _ in range(2)]:
            done.result(60)
    gate.settle()


def test_a_child_has_nobody_inside():
    """A forked child has no thread to wait for."""
    gate = capturing()

    def fork(is_admitted):
        gate.after_fork()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(gate.settle).result(60)
        assert gate.within(bool)

    gate.within(fork)


@pytest.mark.parametrize("policy", ["capture", "background"])
@DOORS
def test_sealing_waits_for_a_request(door, policy):
    """seal() returns when a capture under way is there; its request gets its answer."""
    held = Held()
    manager = managed(dataclasses.replace(GRID, on_miss=policy))
    function = door(manager, held)
    with manager, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(function, X)
        assert held.entered.wait(60)
        # The capture goes on as soon as the mode has changed: while seal() waits for it.
        told = Told(held.go.set)
        manager.registry.watch(told)
        manager.seal()
        assert (manager.registry.capture_count, manager.registry.num_graphs) == (1, 1)
        assert_close(answer.result(60), X * 2)
        with no_compiles():
            assert_close(function(X), X * 2)
        assert manager.registry.capture_count == 1
    stats = stats_of(manager)
    assert (stats["calls"], stats["hits"]) == (2, 1)


def test_sealing_waits_for_a_warm_up():
    """seal() returns when the warm-up that another thread has begun has captured its whole grid."""
    held = Held()
    manager = managed()
    function: Any = by_bucket_jit(manager, held)
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(lambda: function.warmup(X, progress=False))
        assert held.entered.wait(60)
        told = Told(held.go.set)
        manager.registry.watch(told)
        manager.seal()
        assert manager.registry.capture_count == manager.registry.num_graphs == 6
        assert report.result(60).failed == ()
    with pytest.raises(SealedError, match="warm up before seal"):
        function.warmup(X, progress=False)


@pytest.mark.parametrize("stop", range(1, 13))
def test_sealing_in_a_warm_up(stop):
    """seal() called by a warm-up's own progress callback ends, and the warm-up with it."""
    manager = managed(evicts=True)
    function: Any = by_bucket_jit(manager, double)
    steps = []

    def progress(done, total, bucket):
        steps.append(bucket)
        if len(steps) == stop:
            manager.seal()

    function.warmup(X, progress=progress)
    assert manager.mode is CUDAGraphMode.REPLAY
    assert_close(function(X), X * 2)


def test_sealing_in_two_warm_ups_at_once():
    """Warm-ups of two threads whose callbacks both seal do not wait for each other for ever."""
    manager = managed()
    both = threading.Barrier(2)

    def warm(function):
        first = threading.Event()

        def progress(done, total, bucket):
            if not first.is_set():
                first.set()
                both.wait(60)
                manager.seal()

        return function.warmup(X, progress=progress)

    functions = [by_bucket_jit(manager, double), by_bucket_jit(manager, lambda x: x + 1)]
    with ThreadPoolExecutor(2) as pool:
        for report in [pool.submit(warm, function) for function in functions]:
            assert report.result(60).captured == 6


def test_sealing_in_two_on_capture_callbacks_at_once():
    """A worker and a warm-up that both seal when told of a capture do not wait for each other."""
    config = dataclasses.replace(GRID, on_miss="background")
    with managed(config) as manager:
        warmed: Any = by_bucket_jit(manager, double)
        missed = by_bucket_jit(manager, lambda x: x + 1)
        both, sealed = threading.Barrier(2), set()

        def seal(entry):
            thread = threading.get_ident()
            if thread not in sealed:
                sealed.add(thread)
                both.wait(60)
                manager.seal()

        manager.registry.observers.on_capture(seal)
        with ThreadPoolExecutor(1) as pool:
            report = pool.submit(warmed.warmup, X, progress=False)
            assert_close(missed(X), X + 1)
            assert report.result(60).captured == 6
        manager.wait()
    assert len(sealed) == 2


OVERFLOWING = {"exact": floats(1, 9, 4), "split": floats(1, 9, 4)}


@pytest.mark.parametrize("after", range(10))
@pytest.mark.parametrize("on_overflow", ["eager", "exact", "split"])
@pytest.mark.parametrize("on_miss", ["capture", "background"])
@DOORS
def test_sealed_at_any_moment(door, on_miss, on_overflow, after):
    """Wherever seal() comes between a decision and what it leads to, nothing is captured after."""
    config = dataclasses.replace(GRID, on_miss=on_miss, on_overflow=on_overflow)
    registry = Interrupted(config)
    manager = managed(config, registry=registry)
    captured = []

    def seal():
        manager.seal()
        captured.append(registry.capture_count)

    function = door(manager, double)
    registry.after, registry.happen = after, seal
    calls, refused = 0, 0
    with manager:
        for shape in ((2, 4), (9, 4), (3, 5)):
            x = floats(1, *shape)
            calls += 1
            try:
                assert_close(function(x), x * 2)
            except SealedError:
                assert on_overflow == "exact"
                assert shape == (9, 4)
                refused += 1
        manager.wait()
        stats = stats_of(manager)
    assert all(count == registry.capture_count for count in captured)
    assert stats["calls"] == calls
    assert stats["errors_by_reason"] == ({"sealed": refused} if refused else {})


def test_a_capture_that_was_decided_is_answered_as_sealed():
    """A request that decided to capture before seal() is served by what is there then."""
    registry = Interrupted(GRID)
    manager = managed(registry=registry)
    function = by_bucket_jit(manager, double)
    function(floats(0, 4, 5))
    registry.after, registry.happen = 0, manager.seal
    with no_compiles():
        assert_close(function(X), X * 2)
    stats = stats_of(manager)
    assert stats["replays"] == {"exact": 0, "padded": 0, "larger": 1}
    assert (stats["calls"], registry.capture_count) == (2, 1)


def test_what_the_specification_captures_is_sealed_too():
    """capture_graph captures nothing in a sealed manager, and seal() waits for it before."""
    held = Held()
    manager = managed()
    with ThreadPoolExecutor(1) as pool:
        entry = pool.submit(manager.capture_graph, 2, 4, held, (2, 4))
        assert held.entered.wait(60)
        told = Told(held.go.set)
        manager.registry.watch(told)
        manager.seal()
        assert manager.registry.num_graphs == 1
        assert entry.result(60) is manager.registry.entries()[0]
    assert manager.capture_graph(2, 4, double, (2, 4)) is None


def test_a_bucketed_function_captured_inside_another_while_sealing():
    """A function that calls another one while it is captured ends, also when seal() waits."""
    held = Held()
    manager = managed()
    inner = by_bucket_jit(manager, double)
    inner(np.ones((1, 2), np.float32))

    def outer(x):
        return held(x) + inner(np.ones((1, 2), np.float32)).sum()

    function = bucket_jit(outer, in_axes=("batch seq",), out_axes="batch seq", manager=manager)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(function, X)
        assert held.entered.wait(60)
        told = Told(held.go.set)
        manager.registry.watch(told)
        manager.seal()
        assert_close(answer.result(60), X * 2 + 4)
    assert [entry.variant.name for entry in manager.registry.entries()] == ["double", "outer"]
