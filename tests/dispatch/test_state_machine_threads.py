"""One manager under traffic from threads, any order of events: right answers, exact counts."""

from __future__ import annotations

import dataclasses
import random
import threading
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cudagraph_jax import (
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphWarning,
    SealedError,
    bucket_jit,
)
from cudagraph_jax.testing import FakeCompiler
from tests.dispatch.test_state_machine import CONFIG, MODES, scaled
from tests.helpers.functions import floats

THREADS = 3
PATIENCE_S = 60


def untraceable(x):
    """Runs eagerly alone."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError("nothing for a compiler")
    return x * 2


class Traffic(threading.Thread):
    """Calls of random sizes, each answer compared, until it is told to stop."""

    def __init__(self, seed, functions, is_over, called):
        super().__init__(daemon=True)
        self.called = called
        self.random = random.Random(seed)
        self.functions = functions
        self.is_over = is_over
        self.calls = self.refused = 0
        self.wrong: list[object] = []

    def run(self):
        while not self.is_over.is_set():
            x = floats(0, self.random.randint(1, 9), self.random.randint(1, 5))
            function, expected = self.random.choice(self.functions)
            with self.called:
                self.calls += 1
                self.called.notify_all()
            try:
                found = np.asarray(function(x))
            except SealedError:
                self.refused += 1
            except BaseException as error:
                self.wrong.append(error)
            else:
                if not np.allclose(found, expected(x), 1e-5, 1e-5):
                    self.wrong.append((x.shape, found))


class Served(RuleBasedStateMachine):
    """A manager is changed in every way while threads call."""

    @initialize(
        on_miss=st.sampled_from(("capture", "background", "eager", "error")),
        on_overflow=st.sampled_from(("split", "eager", "exact")),
    )
    def begin(self, on_miss, on_overflow):
        """Traffic begins; captures that fail are warned of, and nobody minds."""
        self.warned = warnings.catch_warnings()
        self.warned.__enter__()
        warnings.simplefilter("ignore", CUDAGraphWarning)
        config = dataclasses.replace(CONFIG, on_miss=on_miss, on_overflow=on_overflow)
        self.on_miss = on_miss
        # Threads drop buckets all the time, and XLA would take seconds to compile them again.
        self.manager = CUDAGraphManager(config, compiler=FakeCompiler(runs=True))
        self.scaled: Any = bucket_jit(scaled, in_axes="batch seq", manager=self.manager)
        failing: Any = bucket_jit(untraceable, in_axes="batch seq", manager=self.manager)
        functions = [(self.scaled, lambda x: x * 3 - 1)] * 3 + [(failing, lambda x: x * 2)]
        self.is_over = threading.Event()
        self.called = threading.Condition()
        self.traffic = [
            Traffic(seed, functions, self.is_over, self.called) for seed in range(THREADS)
        ]
        for thread in self.traffic:
            thread.start()

    @rule()
    def warm_up(self):
        """The grid is captured as far as it fits, where that is allowed."""
        if self.manager.mode is CUDAGraphMode.CAPTURE:
            self.manager.capture_graph(2, 5, scaled, (2, 5))

    @rule(batch=st.sampled_from((1, 2, 4)), seq=st.sampled_from((2, 5)))
    def remove(self, batch, seq):
        """A bucket is dropped."""
        self.manager.registry.remove(batch, seq)

    @rule()
    def clear(self):
        """All buckets are dropped."""
        self.manager.registry.clear()

    @rule()
    def seal(self):
        """No captures from now on."""
        self.manager.seal()

    @rule(mode=st.sampled_from(MODES))
    def set_mode(self, mode):
        """Sealed, unsealed, paused, switched off."""
        self.manager.mode = mode

    @rule()
    def wait(self):
        """What is queued is captured."""
        self.manager.wait()

    @rule()
    def close(self):
        """Nothing is captured in the background any more."""
        self.manager.close()

    @rule(batch=st.integers(1, 9), seq=st.integers(1, 5))
    def explain(self, batch, seq):
        """What would happen can be asked at any time."""
        assert self.scaled.explain(floats(0, batch, seq)).reason

    @rule()
    def let_pass(self):
        """Each thread calls some times, whatever was changed."""
        with self.called:
            goals = [thread.calls + 5 for thread in self.traffic]
            assert self.called.wait_for(
                lambda: all(
                    thread.calls >= goal for thread, goal in zip(self.traffic, goals, strict=True)
                ),
                PATIENCE_S,
            )

    @rule()
    def look(self):
        """Reports and sizes are read."""
        assert str(self.manager.report())
        assert self.manager.sizes() is not None

    @invariant()
    def limits_hold(self):
        """No more is held than allowed, whoever captures."""
        if hasattr(self, "manager"):
            assert self.manager.stats()["registry"]["num_graphs"] <= CONFIG.max_graphs

    def teardown(self):
        """Every thread ends, every answer was right, every call is counted once."""
        if not hasattr(self, "manager"):
            return
        self.is_over.set()
        for thread in self.traffic:
            thread.join(PATIENCE_S)
        self.warned.__exit__(None, None, None)
        assert not any(thread.is_alive() for thread in self.traffic)
        assert [thread.wrong for thread in self.traffic] == [[]] * THREADS
        self.manager.close()
        stats = self.manager.stats()
        assert stats["calls"] == sum(thread.calls for thread in self.traffic)
        refused = sum(thread.refused for thread in self.traffic)
        assert sum(stats["errors_by_reason"].values()) == refused
        assert not refused or self.on_miss == "error" or self.manager.config.on_overflow == "exact"


TestServed = pytest.mark.slow(Served.TestCase)  # threads that compete for the interpreter
TestServed.settings = settings(max_examples=8, stateful_step_count=15, deadline=None)
