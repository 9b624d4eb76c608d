"""Failures: remembered, told once, tried again after a growing pause, and never kept alive."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    Bucket,
    CaptureError,
    CUDAGraphManager,
    CUDAGraphWarning,
    bucket_jit,
)
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.capture.failures import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MAX_REMEMBERED,
    Failures,
)
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.program.call import Variant
from cudagraph_jax.program.function_ref import FunctionRef
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

X = floats(0, 2, 4)
BUCKET = Bucket(3, 5)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@functools.cache
def function(name: str) -> FunctionRef:
    return FunctionRef(name.upper)


def variant(name: str) -> Variant:
    return Variant(function(name), name, jax.tree.structure(0), ())


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def failures(clock):
    return Failures(clock=clock)


def fail(failures, stage="compile", bucket=BUCKET, name="f"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CUDAGraphWarning)
        failures.remember(bucket, variant(name), CaptureError("no luck", stage=stage))


@pytest.mark.parametrize("stage", ["compile", "warm-up"])
def test_the_pause_doubles_up_to_the_longest(failures, clock, stage):
    """A bucket is tried again after a pause that doubles up to the limit."""
    expected = FIRST_PAUSE_S
    for _ in range(14):
        fail(failures, stage)
        clock.now += expected - 1e-3
        assert failures.get(BUCKET, variant("f")) is not None
        clock.now += 2e-3
        assert failures.get(BUCKET, variant("f")) is None
        expected = min(2 * expected, LONGEST_PAUSE_S)
    assert expected == LONGEST_PAUSE_S


@pytest.mark.parametrize("stage", ["trace", "lower", "check", "budget"])
def test_mistakes_are_final(failures, clock, stage):
    """What fails for the function's own sake is never tried again, until it is forgotten."""
    fail(failures, stage)
    clock.now += 1e12
    assert failures.get(BUCKET, variant("f")) is not None
    failures.clear()
    assert failures.get(BUCKET, variant("f")) is None


def test_success_starts_over(failures, clock):
    """After a success the pause is the first one again."""
    for _ in range(5):
        fail(failures)
    failures.forget(BUCKET, variant("f"))
    assert len(failures) == 0
    fail(failures)
    clock.now += FIRST_PAUSE_S
    assert failures.get(BUCKET, variant("f")) is None


def test_failures_are_told_apart(failures):
    """Each bucket and each function has its own."""
    fail(failures)
    assert failures.get(Bucket(1, 5), variant("f")) is None
    assert failures.get(BUCKET, variant("g")) is None


def test_one_warning_for_each_cause(failures):
    """A function that fails alike in many buckets warns once; another stage is another cause."""
    with pytest.warns(CUDAGraphWarning) as told:  # noqa: PT031
        for batch in range(1, 6):
            for stage in ("compile", "trace"):
                failures.remember(
                    Bucket(batch, 5), variant("f"), CaptureError("no luck", stage=stage)
                )
    assert len(told) == 2
    assert "tried again later" in str(told[0].message)
    assert "not tried again" in str(told[1].message)


def test_the_number_remembered_is_bounded(failures):
    """The oldest failures are forgotten, however many there are."""
    for batch in range(1, MAX_REMEMBERED + 50):
        fail(failures, "trace", Bucket(batch, 1), name=f"f{batch}")
    assert len(failures) == MAX_REMEMBERED
    assert failures.get(Bucket(1, 1), variant("f1")) is None
    last = MAX_REMEMBERED + 49
    assert failures.get(Bucket(last, 1), variant(f"f{last}")) is not None


def with_clock(clock):
    """A manager whose pauses run by `clock`."""
    manager = CUDAGraphManager(GRID)
    capturer = Capturer(manager.registry, clock=clock)
    manager.dispatcher = Dispatcher(manager.registry, capturer=capturer)
    return manager


def test_a_capture_is_tried_again_after_the_pause(clock):
    """Failures of the compiler are retried only when the pause is over, then all is well."""
    tries: list[int] = []
    broken = True

    def function(x):
        if isinstance(x, jax.core.Tracer) and x.shape == (3, 5):
            tries.append(1)
            if broken:
                raise CaptureError("out of memory", stage="compile")
        return x * 2

    manager = with_clock(clock)
    bucketed = bucket_jit(function, in_axes=("batch seq",), out_axes="batch seq", manager=manager)
    with pytest.warns(CUDAGraphWarning, match="tried again later") as told:  # noqa: PT031
        for pause in (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S):
            seen = len(tries)
            assert_close(bucketed(X), X * 2)
            assert len(tries) > seen
            seen = len(tries)
            clock.now += pause - 0.01
            for _ in range(3):
                assert_close(bucketed(X), X * 2)
            assert len(tries) == seen
            clock.now += 0.02
    assert len(told) == 1
    broken = False
    assert_close(bucketed(X), X * 2)
    assert_close(bucketed(X), X * 2)
    stats = stats_of(bucketed)
    assert stats["eager_by_reason"] == {"failed": 12}
    assert (stats["captures"], stats["hits"], stats["failed_buckets"]) == (1, 1, 0)


def test_an_untraceable_function_is_never_tried_again(clock):
    """However long one waits, a function that cannot be traced is not traced again."""
    traced: list[int] = []

    def branching(x):
        traced.append(isinstance(x, jax.core.Tracer))
        return x if x.sum() > 0 else -x

    bucketed = bucket_jit(branching, in_axes=("batch seq",), manager=with_clock(clock))
    with pytest.warns(CUDAGraphWarning, match="not tried again"):
        bucketed(X)
    before = sum(traced)
    for _ in range(3):
        clock.now += 1e9
        bucketed(X)
    assert sum(traced) == before


def test_failures_keep_nothing_alive():
    """Neither arrays nor tracebacks of a failed call outlive it."""

    class Payload:
        pass

    references: list[Any] = []

    def refusing(x):
        payload = Payload()
        references.append(weakref.ref(payload))
        if isinstance(x, jax.core.Tracer):
            raise LookupError(payload)
        return x * 2

    bucketed = bucket_jit(refusing, in_axes=("batch seq",), config=GRID)
    x = jnp.asarray(X)
    array = weakref.ref(x)
    with pytest.warns(CUDAGraphWarning) as told:
        bucketed(x)
    del x, told
    gc.collect()
    assert array() is None
    assert [reference() for reference in references] == [None] * len(references)
    assert stats_of(bucketed)["failed_buckets"] == 1


def test_an_interrupted_capture_loses_nobody():
    """Who waits for a capture that is interrupted is served; the next call works."""
    entered, interrupt = threading.Event(), threading.Event()
    armed = [True]

    def function(x):
        if isinstance(x, jax.core.Tracer) and armed:
            armed.clear()
            entered.set()
            assert interrupt.wait(60)
            raise KeyboardInterrupt
        return x * 2

    bucketed = bucket_jit(function, in_axes=("batch seq",), out_axes="batch seq", config=GRID)
    ended: list[object] = []

    def first():
        try:
            bucketed(X)
        except KeyboardInterrupt as error:
            ended.append(type(error))

    def wait():
        try:
            ended.append(np.array_equal(bucketed(X), X * 2))
        except CaptureError as error:
            ended.append(type(error))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CUDAGraphWarning)
        threads = [threading.Thread(target=first)]
        threads[0].start()
        assert entered.wait(60)
        threads += [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads[1:]:
            thread.start()
        interrupt.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert ended.count(KeyboardInterrupt) == 1
        assert len(ended) == 5
        assert set(ended) <= {KeyboardInterrupt, CaptureError, True}
        assert_close(bucketed(X), X * 2)
    assert stats_of(bucketed)["calls"] == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_through_and_leaves_nothing(error):
    """An interrupt in a capture reaches the caller, is no failure of the bucket, and is counted."""
    armed = [True]

    def function(x):
        if isinstance(x, jax.core.Tracer) and armed:
            armed.clear()
            raise error
        return double(x)

    bucketed = bucket_jit(function, in_axes=("batch seq",), out_axes="batch seq", config=GRID)
    with pytest.raises(error):
        bucketed(X)
    assert (bucketed.registry.num_graphs, stats_of(bucketed)["failed_buckets"]) == (0, 0)
    assert_close(bucketed(X), X * 2)
    assert_close(bucketed(X), X * 2)
    stats = stats_of(bucketed)
    assert (stats["calls"], stats["captures"], stats["hits"]) == (3, 1, 1)
    assert stats["errors_by_reason"] == {"run": 1}
