"""Ctrl-C in a call: it reaches the caller, and the call is counted all the same."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphManager, bucket_jit
from tests.helpers.examples import IS_THOROUGH
from tests.helpers.faults import managed
from tests.helpers.functions import GRID, assert_close, floats, stats_of
from tests.helpers.processes import said_by
from tests.helpers.signals import SignalAt, elsewhere, under_signals

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


def interrupt():
    raise KeyboardInterrupt


PLACES = {
    "flights": ("/_base/lru.py", "/_base/changes.py", "/capture/capturer.py", "/contextlib.py"),
    "counts": ("/graphs/replay_counts.py", "/dispatch/stats.py", "/capture/build.py"),
    "decisions": ("/dispatch/dispatcher.py", "/dispatch/decision.py", "/capture/registry.py"),
}


@pytest.mark.filterwarnings("ignore:Exception ignored in")  # Python swallows those in `__del__`
@pytest.mark.parametrize("policy", ["capture", "background"])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_at_any_point_leaves_nothing_behind(place, policy):
    """Whatever step Ctrl-C cuts short, others are served, and sealing and closing wait for nobody.

    The error is kept, as a notebook does, and with it all frames that it went through.
    """
    kept: list[BaseException | None] = []
    for number in itertools.count(step=2 if IS_THOROUGH else 5):
        manager = CUDAGraphManager(dataclasses.replace(GRID, on_miss=policy))
        function = bucket_jit(lambda x: x * 2, in_axes="batch seq", manager=manager)
        trace = SignalAt(interrupt, number=number, files=PLACES[place])
        error = under_signals(trace, partial(function, X))
        assert error is None or isinstance(error, KeyboardInterrupt), error
        kept.append(error)
        assert_close(elsewhere(partial(function, X)), X * 2)
        elsewhere(manager.wait)
        assert_close(elsewhere(partial(function, X)), X * 2)
        elsewhere(manager.seal)
        elsewhere(manager.close)
        assert manager.registry.num_graphs == 1
        if trace.points <= number:
            break
    assert len(kept) > 3


def test_an_interrupt_while_a_worker_starts():
    """Ctrl-C while a thread is started leaves it started: the process ends, and jobs are done."""
    said = said_by(
        """
        import itertools, sys, threading
        from cudagraph_jax._base.worker import Background
        from tests.helpers.signals import SignalAt

        def interrupt():
            raise KeyboardInterrupt

        for number in itertools.count():
            jobs, done = Background("jobs"), threading.Event()
            trace = SignalAt(interrupt, number=number, files=("/threading.py", "/_base/"))
            sys._getframe().f_trace_opcodes = True
            sys.settrace(trace)
            try:
                jobs.submit("a", lambda: None)
            except KeyboardInterrupt as error:
                kept = error
            finally:
                sys.settrace(None)
            assert jobs.submit("b", done.set)
            assert done.wait(60)
            jobs.drain()
            if trace.points <= number:
                break
        print(number > 20)
        """
    )
    assert said == "True\n"
