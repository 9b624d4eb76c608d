"""Every call counts once, under one outcome and one reason, whatever becomes of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cudagraph_jax import Bucket, CUDAGraphManager, InputShapeError, bucket_jit
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.dispatch.stats import Outcomes
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

X = floats(0, 2, 4)
UNSORTABLE = {1: X, "a": X}


def test_by_reason():
    """Counts are kept by outcome and reason, sorted by reason, until they are cleared."""
    outcomes = Outcomes()
    outcomes.add("eager", Reason.PAUSED, Bucket(2, 4))
    outcomes.add("eager", Reason.MISS, Bucket(2, 4))
    outcomes.add("error", Reason.INPUT)
    outcomes.add("eager", Reason.PAUSED)
    assert list(outcomes.by_reason("eager").items()) == [("miss", 1), ("paused", 2)]
    assert outcomes.by_reason("error") == {"input": 1}
    assert outcomes.by_reason("capture") == {}
    assert outcomes.sizes.counts() == {Bucket(2, 4): 2}
    outcomes.clear()
    assert outcomes.by_reason("eager") == {}
    assert outcomes.restarts == 1


@pytest.mark.parametrize("error", [ValueError, InputShapeError, KeyboardInterrupt])
def test_refused_arguments_are_counted(error):
    """Whatever is raised while a call is read counts as an error, once, and goes through."""
    outcomes = Outcomes()

    def read():
        with outcomes.counting_input_errors():
            raise error("no")

    with pytest.raises(error):
        read()
    with outcomes.counting_input_errors():
        pass
    assert outcomes.by_reason("error") == {"input": 1}


def test_threads():
    """No count is lost between threads."""
    outcomes, start = Outcomes(), threading.Barrier(8)

    def count():
        start.wait(60)
        for _ in range(500):
            outcomes.add("eager", Reason.PAUSED, Bucket(1, 1))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(count) for _ in range(8)]:
            done.result(60)
    assert outcomes.by_reason("eager") == {"paused": 4000}


def test_pytrees_that_jax_cannot_take_apart():
    """A pytree whose keys cannot be sorted is JAX's error, counted wherever it stands."""
    function: Any = bucket_jit(
        lambda params, tree, *, more=None: tree[1] * 2, in_axes=(None, "batch seq"), config=GRID
    )
    for count, (args, kwargs) in enumerate(
        [
            ((None, UNSORTABLE), {}),
            ((UNSORTABLE, {1: X}), {}),
            ((UNSORTABLE, {1: X}), {}),
            ((None, {1: X}), {"more": UNSORTABLE}),
        ],
        start=1,
    ):
        with pytest.raises(ValueError, match="sorting pytree"):
            function(*args, **kwargs)
        stats = stats_of(function)
        assert (stats["calls"], stats["errors_by_reason"]) == (count, {"input": count})
    assert_close(function(None, {1: X}), X * 2)
    with pytest.raises(ValueError, match="sorting pytree"):
        function(UNSORTABLE, {1: X})
    assert stats_of(function)["calls"] == 6


def test_the_specifications_inputs():
    """execute_or_capture counts what it cannot take apart, and outputs that are not as said."""
    manager = CUDAGraphManager(GRID)
    with pytest.raises(ValueError, match="sorting pytree"):
        manager.execute_or_capture(2, 4, lambda tree: tree[1] * 2, UNSORTABLE)
    for _ in range(2):
        with pytest.raises(InputShapeError, match="output_shapes do not match"):
            manager.execute_or_capture(2, 4, double, X, output_shapes=(7, 7))
    stats = stats_of(manager)
    assert (stats["calls"], stats["errors_by_reason"]) == (3, {"input": 3})
    assert manager.registry.num_graphs == 0
    assert_close(manager.execute_or_capture(2, 4, double, X, output_shapes=(2, 4)), X * 2)


def test_replay_graph_counts_how_it_fits():
    """replay_graph counts exact, padded, and, once sealed, larger replays as what they are."""
    manager = CUDAGraphManager(GRID)
    assert manager.capture_graph(3, 5, double, (3, 5)) is not None
    for shape in ((3, 5), (2, 4)):
        assert_close(manager.replay_graph(*shape, floats(0, *shape)), floats(0, *shape) * 2)
    assert manager.replay_graph(1, 2, floats(0, 1, 2)) is None
    manager.seal()
    assert_close(manager.replay_graph(1, 2, floats(0, 1, 2)), floats(0, 1, 2) * 2)
    stats = stats_of(manager)
    assert stats["replays"] == {"exact": 1, "padded": 1, "larger": 1}
    assert (stats["calls"], stats["hits"]) == (3, 3)


def test_an_input_error_in_the_middle_of_hits():
    """A call that is refused after hits of the same function is one error."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    for _ in range(3):
        function(X)
    with pytest.raises(InputShapeError):
        function(np.zeros((2, 4)))
    stats = stats_of(function)
    assert (stats["calls"], stats["hits"], stats["errors_by_reason"]) == (4, 2, {"input": 1})
