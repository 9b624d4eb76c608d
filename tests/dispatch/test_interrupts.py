"""Ctrl-C in a call: it reaches the caller, and the call is counted all the same."""

from __future__ import annotations

import inspect
import linecache
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from cudagraph_jax import bucket_jit
from cudagraph_jax._base.lru import SingleFlightLRU
from cudagraph_jax.capture.capturer import CaptureGate
from tests.helpers.faults import managed
from tests.helpers.functions import assert_close, floats, stats_of

X = floats(0, 2, 4)


class Weights:
    """A pytree; taking it apart is interrupted after so many times."""

    def __init__(self, value):
        self.value = value
        self.interrupted_after = -1

    def flatten(self):
        self.interrupted_after -= 1
        if self.interrupted_after == -1:
            raise KeyboardInterrupt
        return (self.value,), None


jax.tree_util.register_pytree_node(
    Weights, lambda weights: weights.flatten(), lambda _, values: Weights(*values)
)


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("how", ["hit", "keyword", "specification", "new"])
def test_an_interrupt_goes_through(how, after):
    """Ctrl-C reaches the caller wherever it comes, and the call is counted once."""
    manager = managed()

    def scaled(weights, x):
        return x * weights.value

    def of_one(inputs):
        return scaled(inputs["weights"], inputs["x"])

    function: Any = bucket_jit(scaled, in_axes=(None, "batch seq"), manager=manager)

    def call(weights):
        if how == "specification":
            return manager.execute_or_capture(2, 4, of_one, {"weights": weights, "x": X})
        return function(weights, x=X) if how == "keyword" else function(weights, X)

    weights = Weights(np.float32(2))
    before = 0 if how == "new" else 2
    for _ in range(before):
        assert_close(call(weights), X * 2)
    weights.interrupted_after = after
    try:
        call(weights)
        interrupted = 0
    except KeyboardInterrupt:
        interrupted = 1
    stats = stats_of(manager)
    assert sum(stats["errors_by_reason"].values()) == interrupted
    assert stats["calls"] == before + 1
    assert interrupted or after
    weights.interrupted_after = -1
    assert_close(call(weights), X * 2)
    assert stats_of(manager)["calls"] == before + 2


class InterruptedAt:
    """Raises KeyboardInterrupt at the so-manieth line that runs of some functions."""

    def __init__(self, number, functions):
        self.left = number
        self.codes = {inspect.unwrap(function).__code__ for function in functions}

    def __call__(self, frame, event, argument):
        return self.line if frame.f_code in self.codes else None

    def line(self, frame, event, argument):
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # Python looks for signals in calls. A `with` is looked at again when it is left, where it
        # lets none in before `__exit__`.
        if event == "line" and "(" in source and not source.startswith("with "):
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self.line


def traced(trace, call):
    """What `call` does in a thread of its own under `trace`; coverage traces this one."""

    def run():
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(None)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).exception(60)


@pytest.mark.parametrize("number", range(20))
def test_an_interrupt_at_any_line_leaves_nothing_behind(number):
    """Whatever line Ctrl-C cuts short, others capture the bucket, and sealing waits for nobody."""
    manager = managed()
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", manager=manager)
    cuts = InterruptedAt(
        number,
        [
            SingleFlightLRU.get_or_make,
            SingleFlightLRU._landing,
            SingleFlightLRU._land,
            SingleFlightLRU._admit,
            CaptureGate.admission,
            CaptureGate._leave,
        ],
    )
    error = traced(cuts, lambda: function(X))
    assert error is None or isinstance(error, KeyboardInterrupt)
    assert (error is None) == (cuts.left >= 0)
    with ThreadPoolExecutor(1) as pool:
        assert_close(pool.submit(function, X).result(60), X * 2)
        pool.submit(manager.seal).result(60)
    assert manager.registry.num_graphs == 1
