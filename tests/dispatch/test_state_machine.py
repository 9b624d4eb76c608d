"""One manager, two functions, any order of events: every answer is right, every call counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cudagraph_jax import (
    BucketOverflowError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    InputShapeError,
    bucket_jit,
)
from tests.helpers.examples import as_a_whole
from tests.helpers.functions import assert_close, floats

CONFIG = CUDAGraphConfig(
    capture_sizes=(1, 2, 4),
    capture_seq_lens=(2, 5),
    max_graphs=4,
    on_overflow="split",
    warmup_iterations=1,
)
MODES = list(CUDAGraphMode)


@as_a_whole
def scaled(x):
    return x * 3 - 1


@as_a_whole
def summed(x, *, mask):
    return (x * mask).sum(1), mask.sum(1)


class OneManager(RuleBasedStateMachine):
    """Calls, captures, removals and modes, against the plain functions."""

    def __init__(self):
        super().__init__()
        self.manager = CUDAGraphManager(CONFIG)
        self.scaled: Any = bucket_jit(scaled, in_axes=("batch seq",), manager=self.manager)
        self.summed: Any = bucket_jit(
            summed, in_axes=("batch seq",), manager=self.manager, mask_argname="mask"
        )
        self.calls = 0
        self.captures = 0

    @rule(batch=st.integers(0, 9), seq=st.integers(0, 7), seed=st.integers(0, 9))
    def call_scaled(self, batch, seq, seed):
        """A call of any size."""
        self.calls += 1
        x = floats(seed, batch, seq)
        try:
            assert_close(np.asarray(self.scaled(x)), x * 3 - 1)
        except BucketOverflowError:
            assert seq > 5
            assert batch

    @rule(batch=st.integers(1, 9), seq=st.integers(1, 5), seed=st.integers(0, 9))
    def call_summed(self, batch, seq, seed):
        """A call of the function with a mask."""
        self.calls += 1
        x = floats(seed, batch, seq)
        rows, lengths = self.summed(x)
        assert_close(np.asarray(rows), x.sum(1), 1e-4)
        np.testing.assert_array_equal(lengths, np.full(batch, seq))

    @rule()
    def call_wrongly(self):
        """A call that is refused."""
        self.calls += 1
        try:
            self.scaled(floats(0, 3))
        except InputShapeError:
            return
        raise AssertionError("a vector was taken for a batch of sequences")

    @rule(batch=st.sampled_from((1, 2, 4)), seq=st.sampled_from((2, 5)))
    def capture(self, batch, seq):
        """A single bucket through the specification's door."""
        entry = self.manager.capture_graph(batch, seq, scaled, (batch, seq))
        if self.manager.mode is CUDAGraphMode.CAPTURE:
            assert entry is not None
            assert entry.key == (batch, seq)

    @rule(batch=st.sampled_from((1, 2, 4)), seq=st.sampled_from((2, 5)))
    def remove(self, batch, seq):
        """A bucket is dropped."""
        held = self.manager.registry.num_graphs
        assert self.manager.registry.remove(batch, seq) == (self.manager.registry.num_graphs < held)

    @rule()
    def clear(self):
        """All buckets are dropped."""
        self.manager.registry.clear()

    @rule()
    def seal(self):
        """No captures from now on, until the mode is set."""
        self.manager.seal()

    @rule(mode=st.sampled_from(MODES))
    def set_mode(self, mode):
        """Sealed, unsealed, paused, switched off."""
        self.manager.mode = mode

    @rule()
    def reset(self):
        """Everything from zero."""
        self.manager.reset()
        self.calls = self.captures = 0

    @rule(batch=st.integers(1, 9), seq=st.integers(1, 5))
    def explain(self, batch, seq):
        """What is said to happen happens, and saying it counts nothing."""
        x = floats(0, batch, seq)
        explanation = self.scaled.explain(x)
        before = self.manager.stats()
        self.calls += 1
        assert_close(np.asarray(self.scaled(x)), x * 3 - 1)
        after = self.manager.stats()
        happened = {
            CUDAGraphMode.REPLAY: "hits",
            CUDAGraphMode.CAPTURE: "captures",
        }.get(explanation.mode, "eager_calls")
        if "in pieces" in explanation.reason:
            happened = "splits"
        assert after[happened] == before[happened] + 1

    @invariant()
    def limits_hold(self):
        """Counts add up, sealed managers do not capture, and no more is held than allowed."""
        stats = self.manager.stats()
        assert stats["calls"] == self.calls
        assert stats["registry"]["num_graphs"] <= 4
        captures = stats["registry"]["capture_count"]
        if self.manager.mode is not CUDAGraphMode.CAPTURE:
            assert captures == self.captures
        self.captures = captures


TestOneManager = pytest.mark.slow(OneManager.TestCase)  # compiles in any order of events
TestOneManager.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
