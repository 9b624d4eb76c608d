"""Ragged micro-batches, and how they were served."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.demo.traffic import (
    MicroBatch,
    ServedBatch,
    Traffic,
    drive,
    drive_in_turn,
    micro_batches,
)

rows_strategy = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), max_size=40)


@given(rows_strategy, st.integers(1, 16), st.integers(0, 2**32))
def test_every_row_once(rows, max_size, seed):
    """Each row is in one micro-batch, none of which is empty or too large."""
    batches = micro_batches(rows, max_size=max_size, seed=seed)
    assert sorted(place for batch in batches for place in batch.places) == list(range(len(rows)))
    assert all(1 <= len(batch.places) <= max_size for batch in batches)
    for batch in batches:
        assert batch.shape == (len(batch.places), max(len(rows[place]) for place in batch.places))
        for place, ids, mask in zip(batch.places, batch.ids, batch.mask, strict=True):
            assert list(ids[mask == 1]) == rows[place]


@given(rows_strategy, st.integers(0, 2**32))
def test_seed(rows, seed):
    """The same seed gives the same stream."""
    first, second = (micro_batches(rows, max_size=16, seed=seed) for _ in range(2))
    assert [batch.places for batch in first] == [batch.places for batch in second]


def test_ragged():
    """The stream has many different sizes."""
    rows = [[1] * (1 + place % 50) for place in range(200)]
    assert len({batch.shape for batch in micro_batches(rows, max_size=16)}) > 10


def test_drive():
    """Answers return to their texts' places, with the latency of each call."""
    rows = [[1], [2, 2], [3, 3, 3], [4], [5]]
    seconds = itertools.chain.from_iterable((10.0 * call, 10.0 * call + 2) for call in range(5))
    batches = micro_batches(rows, max_size=2)
    steps: list[object] = []
    traffic = drive(
        lambda ids, mask: ids[:, :1] * 1.0, batches, step=steps.append, clock=lambda: next(seconds)
    )
    np.testing.assert_array_equal(traffic.vectors(6)[:, 0], [1, 2, 3, 4, 5, 0])
    assert [one.latency_ms for one in traffic.served] == [2000.0] * len(batches)
    assert steps == [f"{batch.shape[0]}x{batch.shape[1]}" for batch in batches]
    assert traffic.passages == 5
    assert traffic.compiles == 0
    assert traffic.seconds == 2 * len(batches)
    assert traffic[:1].served == traffic.served[:1]


def test_in_turn():
    """Each micro-batch is served by all models before the next one, the first of them changing."""
    order: list[tuple[str, int]] = []

    def model(name, factor):
        def serve(ids, mask):
            order.append((name, int(ids[0, 0])))
            return ids[:, :1] * factor

        return serve

    batches = micro_batches([[1], [2], [3]], max_size=1)
    first, second, third = (int(batch.ids[0, 0]) for batch in batches)
    steps: list[object] = []
    streams = drive_in_turn([model("a", 1.0), model("b", 2.0)], batches, step=steps.append)
    assert order == [
        ("a", first),
        ("b", first),
        ("b", second),
        ("a", second),
        ("a", third),
        ("b", third),
    ]
    assert steps == ["1x1"] * 3
    for stream, factor in zip(streams, (1.0, 2.0), strict=True):
        assert [one.batch for one in stream.served] == batches
        np.testing.assert_array_equal(stream.vectors(3)[:, 0], np.array([1, 2, 3]) * factor)


def test_compiles_belong_to_their_call():
    """A compile is counted for the micro-batch that had to wait for it."""
    function = jax.jit(lambda ids: ids * 2.5)
    sizes = [3, 3, 4, 3]
    batches = [
        MicroBatch(
            places=(place,), ids=np.ones((1, size), np.int32), mask=np.ones((1, size), np.int32)
        )
        for place, size in enumerate(sizes)
    ]
    traffic = drive(lambda ids, mask: np.asarray(function(ids), np.float32)[:, :1], batches)
    assert [one.compiles for one in traffic.served] == [1, 0, 1, 0]


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (1, 1)])
def test_percentiles(percent, expected):
    """A percentile is a latency that was measured."""
    batch = MicroBatch(places=(0,), ids=np.ones((1, 1), np.int32), mask=np.ones((1, 1), np.int32))
    served = tuple(
        ServedBatch(
            batch=batch, vectors=np.zeros((1, 1), np.float32), latency_ms=float(latency), compiles=0
        )
        for latency in range(100, 0, -1)
    )
    assert Traffic(served=served).percentile_ms(percent) == expected
