"""What a failure that is remembered means for later calls, policy by policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from cudagraph_jax import (
    CaptureError,
    CUDAGraphWarning,
    PaddingLeakError,
    SealedError,
    bucket_jit,
)
from cudagraph_jax.capture.failures import FIRST_PAUSE_S
from tests.helpers.faults import Clock, by_bucket_jit, by_execute, managed
from tests.helpers.functions import GRID, assert_close, floats, stats_of

X = floats(0, 2, 4)
DOORS = pytest.mark.parametrize("door", [by_bucket_jit, by_execute])


@pytest.fixture
def clock():
    return Clock()


def centred(x):
    return x - x.mean()


@DOORS
def test_a_leak_is_remembered(door):
    """A function whose padding leaks raises at once the next time, without another capture."""
    manager = managed(dataclasses.replace(GRID, debug_mode=True))
    function = door(manager, centred)
    for _ in range(3):
        with pytest.raises(PaddingLeakError, match="mask_argname"):
            function(X)
    assert manager.registry.capture_count == 1
    stats = stats_of(manager)
    assert (stats["errors_by_reason"], stats["calls"]) == ({"leak": 3}, 3)


@DOORS
def test_a_leak_found_in_the_background_is_raised_by_the_next_call(door):
    """The call that queued the capture is served; the next one raises what was found."""
    config = dataclasses.replace(GRID, debug_mode=True, on_miss="background")
    with managed(config) as manager:
        function = door(manager, centred)
        assert_close(function(X), X - X.mean())
        manager.wait()
        for _ in range(2):
            with pytest.raises(PaddingLeakError):
                function(X)
        assert manager.registry.capture_count == 1
        stats = stats_of(manager)
    assert (stats["eager_by_reason"], stats["errors_by_reason"]) == ({"queued": 1}, {"leak": 2})


def branching(x):
    return x if x.sum() > 0 else -x


def test_a_failed_bucket_where_misses_are_errors():
    """on_miss="error" does not run a bucket that failed eagerly: the error says why it failed."""
    function = by_bucket_jit(managed(dataclasses.replace(GRID, on_miss="error")), branching)
    warmed: Any = function
    with pytest.warns(CUDAGraphWarning):
        warmed.warmup(X, progress=False)
    with pytest.raises(SealedError, match=r"3x5 could not be captured .cannot trace branching"):
        function(X)
    stats = stats_of(function)
    assert (stats["errors_by_reason"], stats["eager_calls"]) == ({"failed": 1}, 0)


def test_a_failed_bucket_is_served_in_a_larger_one_for_now(clock):
    """on_miss="background" serves it in a larger bucket until it may be tried again."""
    trouble = ["no luck"]

    def picky(x):
        if trouble and isinstance(x, jax.core.Tracer) and x.shape[0] == 3:
            raise CaptureError(trouble[0], stage="compile")
        return x * 2

    config = dataclasses.replace(GRID, on_miss="background")
    with managed(config, clock=clock) as manager:
        function = bucket_jit(picky, in_axes=("batch seq",), out_axes="batch seq", manager=manager)
        function(floats(0, 4, 5))
        manager.wait()
        with pytest.warns(CUDAGraphWarning, match="no luck"):  # noqa: PT031
            function(X)
            manager.wait()
        for _ in range(2):
            assert_close(function(X), X * 2)
        assert stats_of(manager)["replays"] == {"exact": 0, "padded": 0, "larger": 3}
        trouble.clear()
        clock.now += FIRST_PAUSE_S
        function(X)
        manager.wait()
        assert_close(function(X), X * 2)
        stats = stats_of(manager)
    assert stats["replays"] == {"exact": 0, "padded": 1, "larger": 4}
    assert stats["eager_by_reason"] == {"queued": 1}
