"""The first eager call that nobody chose: what it cost, beside a bucket, and how to change it."""

from __future__ import annotations

import dataclasses
import logging
import re

import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, CUDAGraphMode, bucket_jit
from tests.helpers.functions import GRID, assert_close, double, floats

LARGE = floats(0, 2, 9)


@pytest.fixture
def told(caplog):
    """What was said of overflows, so far."""
    caplog.set_level(logging.WARNING, "cudagraph_jax")
    return lambda: [text for text in caplog.messages if "outside the limits" in text]


def test_the_first_overflow_says_what_it_cost(told):
    """One warning has the time of the call, that of the nearest bucket, and the remedy."""
    function = bucket_jit(double, in_axes="batch seq", config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    function(floats(0, 4, 5))
    for _ in range(3):
        assert_close(function(LARGE), LARGE * 2)
    (text,) = told()
    assert re.match(
        r"double ran eagerly at 2x9, outside the limits, batch 4 and seq_len 5: [\d.]+ ms, .*"
        r"its nearest bucket, 4x5, took [\d,]+ ms to capture, once, and takes [\d.]+ ms to replay"
        r".*set on_overflow=\"exact\"",
        text,
    )


@pytest.mark.parametrize(
    ("shape", "beyond"), [((7,), "batch 4"), ((7, 4), "batch 4 and seq_len 5")]
)
def test_the_limits_of_sizes_that_no_array_carries(told, shape, beyond):
    """What is too large is named also where the caller alone says that it is."""
    CUDAGraphManager(GRID).execute_or_capture(9, 4, double, floats(0, *shape))
    (text,) = told()
    assert re.search(rf"outside the limits, {beyond}: [\d.]+ ms", text)


def test_following_the_advice_works(told):
    """With on_overflow="exact" such a call is captured, then replayed, and nothing is said."""
    config = dataclasses.replace(GRID, on_overflow="exact")
    function = bucket_jit(double, in_axes="batch seq", config=config)
    for _ in range(2):
        assert_close(function(LARGE), LARGE * 2)
    assert function.stats()["replays"]["exact"] == 1
    assert told() == []


def test_each_function_is_told_of_once(told):
    """Two functions of one manager have a warning each, also where nothing is captured."""
    first = bucket_jit(double, in_axes="batch seq", config=GRID)
    other = bucket_jit(lambda x: x + 1, in_axes="batch seq", manager=first.manager, name="other")
    for function in (first, other, first, other):
        function(LARGE)
    assert [text.split(" ran ")[0] for text in told()] == ["double", "other"]
    assert "none of its buckets is captured to compare with" in told()[0]


def test_the_time_of_a_dispatch_is_not_compared(told):
    """Where outputs stay on the device, what a replay takes is not known, and not said."""
    function = bucket_jit(double, in_axes="batch seq", config=GRID, unpad="none")
    for x in (floats(0, 4, 5), floats(0, 4, 5), LARGE):
        np.asarray(function(x))
    assert "ms to capture." in told()[0]


@pytest.mark.parametrize("mode", [CUDAGraphMode.CAPTURE, CUDAGraphMode.REPLAY])
def test_explain_says_that_it_runs_eagerly(mode):
    """Beyond the grid `explain` names on_overflow, and a remedy that the mode allows."""
    function = bucket_jit(double, in_axes="batch seq", config=GRID)
    function.manager.mode = mode
    explanation = function.explain(LARGE)
    assert explanation.mode is CUDAGraphMode.NONE
    assert 'on_overflow="eager" runs it eagerly' in explanation.reason
    assert ('"exact"' in explanation.remedy) == (mode is CUDAGraphMode.CAPTURE)


def test_a_sealed_miss_is_told_of_once(caplog):
    """What a sealed manager runs eagerly is said once for each function, with what is captured."""
    caplog.set_level(logging.WARNING, "cudagraph_jax")
    function = bucket_jit(double, in_axes="batch seq", config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    other = bucket_jit(lambda x: x + 1, in_axes="batch seq", manager=function.manager, name="other")
    function.seal()
    for _ in range(2):
        assert_close(function(np.ones((2, 3), np.int32)), np.full((2, 3), 2, np.int32))
        other(floats(0, 2, 3))
    told, cold = caplog.messages
    assert re.match(
        r"double ran eagerly at 2x3, since 3x5 is not captured and the manager is sealed: "
        r"[\d.]+ ms, .*; the nearest captured bucket is 3x5, with x of dtype float32, not int32\. "
        r".*warm up with arguments like these before seal\(\)",
        told,
    )
    assert "other ran eagerly" in cold
    assert "none of its buckets is captured" in cold


def test_pieces_without_a_bucket_are_told_of_once_sealed(caplog):
    """So is a split call whose pieces have none; the bucket that is named is that of a piece."""
    caplog.set_level(logging.WARNING, "cudagraph_jax")
    config = dataclasses.replace(GRID, on_overflow="split")
    function = bucket_jit(double, in_axes="batch seq", config=config)
    function.seal()
    for _ in range(2):
        function(floats(0, 9, 3))
    (told,) = caplog.messages
    assert "double ran eagerly at 9x3, since 4x5 is not captured" in told


def test_a_chosen_eager_run_is_not_told_of(caplog):
    """With on_miss="eager" nothing is said."""
    caplog.set_level(logging.WARNING, "cudagraph_jax")
    function = bucket_jit(
        double, in_axes="batch seq", config=dataclasses.replace(GRID, on_miss="eager")
    )
    function(floats(0, 2, 3))
    assert caplog.messages == []


@pytest.mark.parametrize("on_miss", ["capture", "background"])
def test_lengths_that_are_compiled_one_by_one(caplog, on_miss):
    """Without capture_seq_lens each new length compiles when it comes: said once, with why."""
    caplog.set_level(logging.WARNING, "cudagraph_jax")
    config = CUDAGraphConfig(capture_sizes=(2,), warmup_iterations=0, on_miss=on_miss)
    function = bucket_jit(double, in_axes="batch seq", config=config)
    function.warmup(floats(0, 1, 3), progress=False)
    assert "give capture_seq_lens" in function.explain(floats(0, 1, 4)).remedy
    for length in (3, 4, 5):
        function(floats(0, 1, length))
    function.manager.wait()
    (told,) = caplog.messages
    assert told.startswith("double has 2x4 captured for a call, beside 1 other length(s)")
    rows = bucket_jit(double, in_axes="batch _", config=config, name="rows")
    for length in (3, 4):
        rows(floats(0, 1, length))
    rows.manager.wait()
    assert len(caplog.messages) == 1, "of a function without the axis nothing is said"
