"""Calls whose bucket fails: answered eagerly where that is possible, and counted once."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cudagraph_jax import (
    CaptureError,
    CUDAGraphRegistry,
    CUDAGraphWarning,
    bucket_jit,
)
from cudagraph_jax.capture.failures import FIRST_PAUSE_S
from tests.helpers.faults import (
    NO_MEMORY,
    Clock,
    by_bucket_jit,
    by_execute,
    managed,
    through_host,
)
from tests.helpers.functions import GRID, assert_close, floats, stats_of

X = floats(0, 2, 4)
DOORS = pytest.mark.parametrize("door", [by_bucket_jit, by_execute])


@pytest.fixture
def clock():
    return Clock()


@DOORS
@pytest.mark.parametrize("said", [NO_MEMORY, "the wire is broken"])
def test_a_first_run_that_fails_is_answered_eagerly(door, said, clock):
    """A new bucket that does not run is dropped, remembered with a pause, and tried again."""
    trouble = [said]
    manager = managed(clock=clock)
    function = door(manager, through_host(trouble))
    with pytest.warns(CUDAGraphWarning, match=f"(?s)does not run.*{said}") as told:
        assert_close(function(X), X * 2)
    assert len(told) == 1
    assert_close(function(X), X * 2)
    stats = stats_of(manager)
    assert (stats["eager_by_reason"], stats["captures"], stats["calls"]) == ({"failed": 2}, 0, 2)
    assert stats["errors_by_reason"] == {}
    assert (stats["failed_buckets"], manager.registry.num_graphs) == (1, 0)
    assert manager.registry.capture_count == 1
    trouble.clear()
    clock.now += FIRST_PAUSE_S
    for _ in range(2):
        assert_close(function(X), X * 2)
    stats = stats_of(manager)
    assert (stats["captures"], stats["hits"], stats["failed_buckets"]) == (1, 1, 0)


@DOORS
def test_where_the_plain_function_fails_too_its_error_goes_through(door):
    """What fails compiled and eagerly raises the function's own error, and nothing broken stays."""
    compiled = through_host(["the wire is broken"])

    def function(x):
        if isinstance(x, jax.core.Tracer):
            return compiled(x)
        raise LookupError("not today")

    manager = managed()
    served = door(manager, function)
    with pytest.raises(LookupError, match="not today"):
        served(X)
    stats = stats_of(manager)
    assert (stats["failed_buckets"], stats["errors_by_reason"]) == (1, {"run": 1})
    assert (stats["calls"], stats["eager_calls"]) == (1, 0)
    assert manager.registry.num_graphs == 0


def test_donated_inputs_that_are_gone_cannot_be_answered():
    """Where the run that failed has used its inputs up its error goes through; then it is eager."""
    trouble = [NO_MEMORY]
    plain = jnp.asarray(floats(0, 3, 5))
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        jax.block_until_ready(jax.jit(through_host(trouble), donate_argnums=0)(plain))
    if not plain.is_deleted() and jax.default_backend() != "cpu":
        pytest.skip("here a run that fails leaves its inputs alone")
    manager = managed()
    function = bucket_jit(
        through_host(trouble),
        in_axes=("batch seq",),
        donate_argnums=0,
        manager=manager,
    )
    state = jnp.asarray(floats(0, 3, 5))
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        function(state)
    assert state.is_deleted()
    assert manager.registry.num_graphs == 0
    trouble.clear()
    assert_close(function(jnp.asarray(floats(0, 3, 5))), floats(0, 3, 5) * 2)
    stats = stats_of(manager)
    assert (stats["errors_by_reason"], stats["calls"]) == ({"run": 1}, 2)
    assert stats["eager_by_reason"] == {"failed": 1}


@DOORS
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (3, 4)])
def test_a_hit_without_memory_is_answered_eagerly(door, shape):
    """A replay for which there is no memory is answered eagerly, also one decided anew."""
    trouble: list[str] = []
    manager = managed()
    function = door(manager, through_host(trouble))
    function(X)
    function(X)
    trouble.append(NO_MEMORY)
    x = floats(1, *shape)
    for _ in range(2):
        assert_close(function(x), x * 2)
    trouble.clear()
    assert_close(function(x), x * 2)
    stats = stats_of(manager)
    assert stats["eager_by_reason"] == {"memory": 2}
    assert (stats["hits"], stats["captures"], stats["calls"]) == (2, 1, 5)
    assert (stats["failed_buckets"], manager.registry.num_graphs) == (0, 1)


@DOORS
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (3, 4)])
def test_any_other_error_of_a_hit_goes_through(door, shape):
    """What fails in a bucket that ran before is the caller's to know, and counted once."""
    trouble: list[str] = []
    manager = managed()
    function = door(manager, through_host(trouble))
    function(X)
    function(X)
    trouble.append("the wire is broken")
    with pytest.raises(Exception, match="the wire is broken"):
        function(floats(1, *shape))
    stats = stats_of(manager)
    assert (stats["errors_by_reason"], stats["calls"]) == ({"run": 1}, 3)
    assert (stats["failed_buckets"], manager.registry.num_graphs) == (0, 1)


@DOORS
def test_an_eager_answer_that_fails_is_counted_once(door):
    """A hit without memory whose eager answer fails as well is one error."""
    trouble: list[str] = []
    compiled = through_host(trouble)

    def function(x):
        if isinstance(x, jax.core.Tracer):
            return compiled(x)
        raise LookupError("not today")

    manager = managed()
    served = door(manager, function)
    served(X)
    trouble.append(NO_MEMORY)
    with pytest.raises(LookupError, match="not today"):
        served(X)
    stats = stats_of(manager)
    assert (stats["errors_by_reason"], stats["calls"]) == ({"run": 1}, 2)


class Awaited(CUDAGraphRegistry):
    """A registry that tells when so many threads have asked for a capture."""

    def __init__(self, config, threads):
        super().__init__(config)
        self.all_here = threading.Barrier(threads)

    def capture_program(self, *args, **kwargs):
        self.all_here.wait(60)
        return super().capture_program(*args, **kwargs)


def ask_at_once(function, threads):
    """Calls of so many threads, all of them answered."""
    with ThreadPoolExecutor(threads) as pool:
        answers = [pool.submit(function, X) for _ in range(threads)]
    for answer in answers:
        assert_close(answer.result(), X * 2)


@DOORS
def test_many_that_wait_for_one_failure_are_one_attempt(door, clock):
    """Ten requests for a bucket that fails count as one try: the pause is the first one."""

    def failing(x):
        if isinstance(x, jax.core.Tracer):
            raise CaptureError("no luck", stage="compile")
        return x * 2

    manager = managed(clock=clock, registry=Awaited(GRID, 10))
    function = door(manager, failing)
    with pytest.warns(CUDAGraphWarning, match="no luck") as told:
        ask_at_once(function, 10)
    assert len(told) == 1
    (bucket, variant, _), *others = manager.dispatcher.capturer.failures.snapshot()
    assert others == []
    failures = manager.dispatcher.capturer.failures
    clock.now += FIRST_PAUSE_S * 0.999
    assert failures.get(bucket, variant) is not None
    clock.now += FIRST_PAUSE_S * 0.002
    assert failures.get(bucket, variant) is None
    assert stats_of(manager)["eager_by_reason"] == {"failed": 10}


def test_those_that_waited_are_answered_eagerly_too(clock):
    """Requests that waited for a bucket which then does not run get the eager answer."""
    manager = managed(clock=clock, registry=Awaited(GRID, 4))
    function = by_bucket_jit(manager, through_host(["the wire is broken"]))
    with pytest.warns(CUDAGraphWarning, match="does not run"):
        ask_at_once(function, 4)
    stats = stats_of(manager)
    assert (stats["eager_by_reason"], stats["calls"]) == ({"failed": 4}, 4)
    failures = manager.dispatcher.capturer.failures
    ((bucket, variant, _),) = failures.snapshot()
    clock.now += FIRST_PAUSE_S
    assert failures.get(bucket, variant) is None


def test_a_piece_that_does_not_run_is_computed_eagerly():
    """A split call whose new buckets do not run is right, and they are dropped and remembered."""
    trouble = ["the wire is broken"]
    manager = managed(dataclasses.replace(GRID, on_overflow="split"))
    function = by_bucket_jit(manager, through_host(trouble))
    x = floats(0, 9, 4)
    with pytest.warns(CUDAGraphWarning, match="does not run"):
        assert_close(function(x), x * 2)
    assert_close(function(x), x * 2)
    stats = stats_of(manager)
    assert (stats["splits"], stats["eager_by_reason"], stats["calls"]) == (1, {"overflow": 1}, 2)
    assert (stats["failed_buckets"], manager.registry.num_graphs) == (2, 0)


def test_a_piece_without_memory_is_computed_eagerly():
    """A split call for whose pieces there is no memory is right; other errors go through."""
    trouble: list[str] = []
    manager = managed(dataclasses.replace(GRID, on_overflow="split"))
    function = by_bucket_jit(manager, through_host(trouble))
    x = floats(0, 9, 4)
    function(x)
    trouble.append(NO_MEMORY)
    assert_close(function(x), x * 2)
    trouble[0] = "the wire is broken"
    with pytest.raises(Exception, match="the wire is broken"):
        function(x)
    stats = stats_of(manager)
    assert (stats["splits"], stats["errors_by_reason"], stats["calls"]) == (2, {"run": 1}, 3)


def failing(compiles, error):
    """A compiler that never compiles anything, and counts how often it was asked to."""

    def compile_it(wanted, lowering, *, clock):
        compiles.append(wanted.bucket)
        raise error

    return compile_it


def asked_to_compile(error, function=lambda x: x * 2, *, on_miss="capture"):
    """A bucketed function that cannot be compiled, and the list of what was tried."""
    compiles: list[object] = []
    config = dataclasses.replace(GRID, on_miss=on_miss)
    registry = CUDAGraphRegistry(config, compiler=failing(compiles, error))
    manager = managed(config, registry=registry)
    return by_bucket_jit(manager, function), manager, compiles


@pytest.mark.filterwarnings("ignore::cudagraph_jax.CUDAGraphWarning")
@pytest.mark.parametrize("on_miss", ["capture", "background"])
def test_whatever_a_compiler_raises_is_a_failed_capture(on_miss):
    """Also an error of no known kind is remembered, and the calls are answered."""
    function, manager, compiles = asked_to_compile(LookupError("no compiler"), on_miss=on_miss)
    for _ in range(4):
        assert_close(function(X), X * 2)
        manager.wait()
    assert len(compiles) == 1
    assert stats_of(manager)["failed_buckets"] == 1


@pytest.mark.filterwarnings("ignore::cudagraph_jax.CUDAGraphWarning")
def test_a_failing_bucket_is_not_tried_while_the_answer_is_computed():
    """Requests that come while the first one is still answered eagerly compile nothing."""
    begun, go = threading.Event(), threading.Event()

    def slow(x):
        if not isinstance(x, jax.core.Tracer) and not begun.is_set():
            begun.set()
            assert go.wait(60)
        return x * 2

    function, manager, compiles = asked_to_compile(CaptureError("no", stage="compile"), slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(function, X)
        assert begun.wait(60)
        for _ in range(3):
            assert_close(function(X), X * 2)
        go.set()
        assert_close(first.result(60), X * 2)
    assert len(compiles) == 1
    assert stats_of(manager)["eager_by_reason"] == {"failed": 4}


def test_a_failing_bucket_whose_answer_fails_too_has_its_pause():
    """Where the plain function raises as well, the bucket is not compiled with each call."""

    def broken(x):
        if isinstance(x, jax.core.Tracer):
            return x * 2
        raise LookupError("not today")

    function, _, compiles = asked_to_compile(CaptureError("no", stage="compile"), broken)
    for _ in range(5):
        with pytest.raises(LookupError, match="not today"):
            function(X)
    assert len(compiles) == 1


@pytest.mark.filterwarnings("ignore::cudagraph_jax.CUDAGraphWarning")
@pytest.mark.parametrize("on_miss", ["capture", "background"])
def test_output_shapes_of_a_function_that_cannot_be_traced(on_miss):
    """They cannot be checked; the call is answered eagerly, also in the background."""
    manager = managed(dataclasses.replace(GRID, on_miss=on_miss))

    def untraceable(x):
        return x * 2 if x.sum() < 1e9 else x

    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for _ in range(2):
        found = manager.execute_or_capture(2, 4, untraceable, X, output_shapes=shapes)
        assert_close(found, X * 2)
        manager.wait()
    assert stats_of(manager)["failed_buckets"] == 1


def test_a_function_that_exits_is_not_tried_with_each_call():
    """SystemExit while it is traced in the background is remembered like other failures."""
    traces = []

    def leave(x):
        if isinstance(x, jax.core.Tracer):
            traces.append(1)
            raise SystemExit
        return x * 2

    manager = managed(dataclasses.replace(GRID, on_miss="background"))
    function = by_bucket_jit(manager, leave)
    for _ in range(4):
        assert_close(function(X), X * 2)
        manager.wait()
    assert len(traces) == 1


def test_closing_from_within_a_capture():
    """A signal handler that closes while its thread captures does not wait for the worker."""
    manager = managed(dataclasses.replace(GRID, on_miss="background"))
    traced, queued, closed = threading.Event(), threading.Event(), threading.Event()

    def waited_for(x):
        if isinstance(x, jax.core.Tracer) and threading.current_thread() is warming:
            traced.set()
            # The worker waits for this very bucket.
            if queued.wait(60) and not closed.is_set():
                manager.close()
                closed.set()
        return x * 2

    function: Any = by_bucket_jit(manager, waited_for)
    warming = threading.Thread(target=lambda: function.warmup(X, progress=False))
    warming.start()
    assert traced.wait(60)
    function(floats(0, 4, 5))
    queued.set()
    warming.join(60)
    assert not warming.is_alive()
    assert closed.is_set()


class SpeechlessError(Exception):
    """An error that fails when it is asked what it says."""

    def __str__(self) -> str:
        raise LookupError("no words")

    __repr__ = __str__


def speechless(x):
    """Doubles, but cannot be traced."""
    if isinstance(x, jax.core.Tracer):
        raise SpeechlessError
    return x * 2


def test_an_error_without_words():
    """Whatever an error's own text does, it is reported, and the call answered eagerly."""
    said = r"cannot trace .*: SpeechlessError: \(its own text fails with LookupError\)"
    function = bucket_jit(speechless, in_axes="batch seq", config=GRID)
    with pytest.warns(CUDAGraphWarning, match=said):
        assert_close(function(X), X * 2)
    report = function.warmup(X, progress=False)
    assert all("SpeechlessError: (its own" in str(bucket.error) for bucket in report.buckets)
    assert "SpeechlessError" in str(function.explain(X))
