"""What explain() says is what happens, and what the counts say afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import CUDAGraphConfig, CUDAGraphError, CUDAGraphMode, InputShapeError
from tests.helpers.faults import busy, by_bucket_jit, managed
from tests.helpers.functions import GRID, KINDS, assert_close, double, floats, stats_of

X = floats(0, 2, 4)
BIG = floats(0, 9, 4)
OUTCOMES = ("hits", "captures", "splits", "eager_calls")
IN_PIECES = 'it is served in pieces of 4 rows, and joined, as on_overflow="split" says'
NO_PIECES = 'its pieces of 4 rows (on_overflow="split") have no captured bucket'


def said(explanation) -> str:
    """The outcome that an explanation announces, as `happened` would call it."""
    if explanation.error:
        return "error"
    if explanation.reason == IN_PIECES:
        return "splits"
    outcomes = {CUDAGraphMode.REPLAY: "hits", CUDAGraphMode.CAPTURE: "captures"}
    return outcomes.get(explanation.mode, "eager_calls")


def happened(function, x) -> str:
    """The outcome that a call is counted under, alone; its answer is checked."""
    before = stats_of(function)
    try:
        assert_close(function(x), x * 2)
    except CUDAGraphError:
        raised = True
    else:
        raised = False
    after = stats_of(function)
    assert after["calls"] == before["calls"] + 1
    counted = [name for name in OUTCOMES if after[name] != before[name]]
    assert len(counted) == (0 if raised else 1), counted
    return "error" if raised else counted[0]


CONFIGS = st.builds(
    CUDAGraphConfig,
    capture_sizes=st.just((1, 3, 4)),
    capture_seq_lens=st.sampled_from([None, (2, 5)]),
    max_capture_seq_len=st.just(5),
    max_capture_batch_size=st.sampled_from([None, 4, 6]),
    on_miss=st.sampled_from(["capture", "background", "eager", "error"]),
    on_overflow=st.sampled_from(["eager", "split", "exact", "error"]),
    cudagraph_copy_inputs=st.booleans(),
    max_graphs=st.sampled_from([None, 2]),
    warmup_iterations=st.just(0),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from([None, None, None, None, "seal", "NONE", "CAPTURE", "REPLAY", "close"]),
        st.integers(0, 9),
        st.integers(0, 6),
    ),
    min_size=4,
    max_size=8,
)


@given(config=CONFIGS, steps=STEPS)
@settings(max_examples=40)
def test_what_it_says_happens(config, steps):
    """In any state and for any size the outcome is the one that was announced."""
    with managed(config) as manager:
        function: Any = by_bucket_jit(manager, double)
        for action, batch, seq in steps:
            if action == "seal":
                manager.seal()
            elif action == "close":
                manager.close()
            elif action is not None:
                manager.mode = CUDAGraphMode[action]
            x = floats(batch, batch, seq)
            explanation = function.explain(x)
            assert happened(function, x) == said(explanation), str(explanation)
            manager.wait()


@pytest.mark.parametrize(
    ("on_miss", "sealed", "mode", "words"),
    [
        ("capture", False, "CAPTURE", IN_PIECES),
        ("eager", False, "NONE", NO_PIECES),
        ("background", False, "NONE", NO_PIECES),
        ("capture", True, "NONE", NO_PIECES),
    ],
)
def test_a_cold_batch_to_split(on_miss, sealed, mode, words):
    """Pieces that have no buckets are no pieces: explain() and the counts say eager."""
    config = dataclasses.replace(GRID, on_overflow="split", on_miss=on_miss)
    with managed(config) as manager:
        function: Any = by_bucket_jit(manager, double)
        if sealed:
            manager.seal()
        explanation = function.explain(BIG)
        assert (explanation.mode.name, explanation.error) == (mode, False)
        assert words in explanation.reason
        assert happened(function, BIG) == said(explanation)
        manager.wait()
        explanation = function.explain(BIG)
        assert happened(function, BIG) == said(explanation)


def test_a_cold_batch_to_split_where_misses_are_errors():
    """A piece that may not be captured is the error that explain() announces."""
    config = dataclasses.replace(GRID, on_overflow="split", on_miss="error")
    function: Any = by_bucket_jit(managed(config), double)
    explanation = function.explain(BIG)
    assert explanation.error
    assert "bucket 4x5 is not captured" in explanation.reason
    assert happened(function, BIG) == "error"


def test_a_last_piece_to_capture():
    """Where only the last piece lacks its bucket the call captures, and that is announced."""
    function: Any = by_bucket_jit(managed(dataclasses.replace(GRID, on_overflow="split")), double)
    function(floats(0, 4, 4))
    assert function.explain(BIG).mode is CUDAGraphMode.CAPTURE
    assert happened(function, BIG) == "splits"
    assert function.explain(BIG).mode is CUDAGraphMode.REPLAY


@pytest.mark.parametrize("name", ["batch summed away", "one number"])
def test_outputs_without_a_batch(name):
    """Where the pieces cannot be joined explain() announces the error of the call."""
    kind = KINDS[name]
    function: Any = kind.bucketed(dataclasses.replace(GRID, on_overflow="split"))
    function.warmup(*kind.arguments(0, 4, 5), progress=False)
    explanation = function.explain(BIG)
    assert explanation.error
    assert "carries no batch" in explanation.reason
    with pytest.raises(InputShapeError, match="carries no batch"):
        function(BIG)
    assert stats_of(function)["errors_by_reason"] == {"input": 1}


@pytest.mark.parametrize("larger", [False, True])
def test_a_queue_that_takes_no_more(larger):
    """A closed manager queues nothing, and both explain() and the counts say so."""
    config = dataclasses.replace(GRID, on_miss="background")
    with managed(config) as manager:
        function: Any = by_bucket_jit(manager, double)
        if larger:
            function(floats(0, 4, 5))
        manager.wait()
        before = stats_of(manager)["eager_calls"]
        manager.close()
        explanation = function.explain(X)
        assert happened(function, X) == said(explanation)
        stats = stats_of(manager)
    if larger:
        assert "the queue is full or closed" in explanation.reason
        assert (stats["replays"]["larger"], stats["eager_calls"]) == (1, before)
    else:
        assert "the queue of captures is full or closed" in explanation.reason
        assert stats["eager_by_reason"] == {"refused": 1}
        assert stats["misses"] == 1


def test_a_full_queue():
    """A queue that is full refuses what is new, and knows what waits already."""
    config = dataclasses.replace(GRID, on_miss="background")
    with managed(config) as manager:
        function: Any = by_bucket_jit(manager, double)
        background = manager.dispatcher.capturer.background
        go = busy(manager)
        function(X)
        number = 0
        while background.submit(number, lambda: None):
            number += 1
        assert "captured in the background" in function.explain(X).reason
        other = floats(0, 1, 2)
        assert "full or closed" in function.explain(other).reason
        function(X)
        function(other)
        assert stats_of(manager)["eager_by_reason"] == {"queued": 2, "refused": 1}
        go.set()
