"""The log: one logger, captures at INFO, decisions at DEBUG, nothing for a replay."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from cudagraph_jax import (
    BucketOverflowError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphRegistry,
    bucket_jit,
)
from cudagraph_jax._base.log import logger
from tests.helpers.functions import GRID, double, floats
from tests.helpers.processes import run_script

ROOT = Path(__file__).parents[1]


def lines_of(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_one_logger_without_handlers():
    """The package has one logger, its server two below it; it installs no handler and no level."""
    assert (logger.name, logger.handlers, logger.level) == ("cudagraph_jax", [], logging.NOTSET)
    below = [name for name in logging.root.manager.loggerDict if name.startswith("cudagraph_jax.")]
    assert set(below) <= {"cudagraph_jax.access", "cudagraph_jax.server"}
    assert all(not logging.getLogger(name).handlers for name in below)


@pytest.mark.parametrize(
    "capture",
    [
        lambda: CUDAGraphRegistry(GRID).capture(3, 5, double, (3, 5)),
        lambda: CUDAGraphManager(GRID).capture_graph(3, 5, double, (3, 5)),
        lambda: CUDAGraphManager(GRID).execute_or_capture(3, 5, double, floats(0, 3, 5)),
        lambda: bucket_jit(double, in_axes=("batch seq",), config=GRID)(floats(0, 3, 5)),
    ],
)
def test_each_capture_is_one_line(caplog, capture):
    """Every way to capture a bucket logs it once, at INFO."""
    with caplog.at_level(logging.INFO, logger="cudagraph_jax"):
        capture()
    (line,) = lines_of(caplog, logging.INFO)
    assert line.startswith("captured 3x5 of double(float32[·,·]) in ")


def test_a_capture_in_the_background_is_logged(caplog):
    """So is one in the background."""
    config = CUDAGraphConfig(capture_sizes=(2,), on_miss="background", warmup_iterations=0)
    with caplog.at_level(logging.INFO, logger="cudagraph_jax"):
        function = bucket_jit(double, in_axes=("batch",), config=config)
        function(floats(0, 2))
        function.manager.wait()
    assert len(lines_of(caplog, logging.INFO)) == 1


def test_each_decision_is_one_line(caplog):
    """A call that is decided is logged at DEBUG with what, where and why; a replay is not."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    with caplog.at_level(logging.DEBUG, logger="cudagraph_jax"):
        for size in [(2, 4), (2, 4), (2, 4), (3, 5), (9, 9), (0, 3)]:
            function(floats(0, *size))
        function.manager.mode = CUDAGraphMode.REPLAY
        function(floats(0, 1, 1))
        function(floats(0, 4, 5))
    assert lines_of(caplog, logging.DEBUG) == [
        "double at 2x4: CAPTURE, bucket 3x5, miss",
        "double at 3x5: REPLAY, bucket 3x5, exact",
        "double at 9x9: NONE, no bucket, overflow",
        "double at 0x3: NONE, no bucket, empty",
        "double at 1x1: REPLAY, bucket 3x5, larger",
        "double at 4x5: NONE, bucket 4x5, sealed",
    ]


def test_decisions_with_consequences(caplog):
    """What is raised, and what is captured in the background, stands in the line."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 2), on_miss="background", on_overflow="error", warmup_iterations=0
    )
    function = bucket_jit(double, in_axes=("batch",), config=config)
    with caplog.at_level(logging.DEBUG, logger="cudagraph_jax"):
        function(floats(0, 2))
        function.manager.wait()
        function(floats(0, 1))
        with pytest.raises(BucketOverflowError):
            function(floats(0, 3))
        function.manager.wait()
    assert lines_of(caplog, logging.DEBUG) == [
        "double at 2x1: NONE, bucket 2x1, queued, captured in the background",
        "double at 1x1: REPLAY, bucket 2x1, larger, captured in the background",
        "double at 3x1: NONE, no bucket, overflow, raises BucketOverflowError",
    ]


def test_nothing_is_formatted_while_debug_is_off(caplog):
    """At INFO a decision makes no log record."""
    config = dataclasses.replace(GRID, on_miss="eager")
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    with caplog.at_level(logging.INFO, logger="cudagraph_jax"):
        function(floats(0, 2, 2))
    assert caplog.records == []


def test_silent_unless_configured():
    """A program that configures no logging prints nothing of captures."""
    script = (
        "import numpy as np; from cudagraph_jax import bucket_jit\n"
        "bucket_jit(lambda x: x, in_axes='batch')(np.ones(2, np.float32))"
    )
    done = run_script(script, warnings="error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
