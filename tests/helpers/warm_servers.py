"""Servers with a store, for tests: a warm function of a new manager, and what came of it."""

from __future__ import annotations

from typing import Any

from cudagraph_jax import (
    CUDAGraphConfig,
    bucket_jit,
)
from tests.helpers.functions import GRID, floats

BUCKETS = len(GRID.buckets())
SMALL = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4,), warmup_iterations=1)
X = floats(0, 2, 3)


class Counted:
    """A function that counts how often it is traced or called."""

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.__name__ = function.__name__

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def warmed(function, store, *args, config=SMALL, in_axes=("batch seq",), **options: Any):
    """A warm function of a new manager in `store`, and its warm-up's report."""
    bucketed = bucket_jit(function, in_axes=in_axes, config=config, store=store, **options)
    report = bucketed.warmup(*(args or (X,)), progress=False)
    assert report.failed == ()
    return bucketed, report


def loaded(function, store, *args, **options: Any) -> bool:
    """Whether a new manager loads the only bucket of `function` instead of compiling it."""
    _, report = warmed(function, store, *args, **options)
    assert report.loaded + report.captured == 1
    return bool(report.loaded)


def closing_over(value):
    def closed(x):
        return x * value

    return closed
