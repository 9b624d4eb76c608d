"""Packing: rows that share rows of a call, and the way back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from cudagraph_jax import BucketOverflowError, CUDAGraphConfig, InputShapeError, pack
from cudagraph_jax.testing import assert_packing_preserves

GRID = CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(8, 16, 32))
TABLE = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
PLACES = np.random.default_rng(1).standard_normal((32, 4)).astype(np.float32)
SEGMENTS = 4


@given(
    strategies.lists(strategies.integers(1, 32), min_size=1, max_size=30),
    strategies.integers(1, 5),
)
def test_nothing_is_lost(lengths, most):
    """Each row stands in one piece, with its positions, apart from all others, and comes back."""
    rows = [
        np.arange(1, length + 1, dtype=np.int32) + index for index, length in enumerate(lengths)
    ]
    packed = pack(rows, config=GRID, max_segments=most)
    assert packed.ids.shape[1] in (8, 16, 32)
    assert packed.segments.max() <= most
    assert np.count_nonzero(packed.segments) == sum(lengths)
    assert (packed.ids[packed.segments == 0] == 0).all()
    for row, ids, positions in zip(
        rows, packed.unpack_tokens(packed.ids), packed.unpack_tokens(packed.positions), strict=True
    ):
        np.testing.assert_array_equal(ids, row)
        np.testing.assert_array_equal(positions, np.arange(len(row)))
    assert len({(at.row, at.segment) for at in packed.places}) == len(rows)
    for segments, at in zip(packed.unpack_tokens(packed.segments), packed.places, strict=True):
        assert (segments == at.segment + 1).all()


def test_the_shortest_rows_that_fit_the_batch():
    """Rows of the call are as short as the longest row allows, unless the batch is too large."""
    assert pack([np.ones(5, np.int32)] * 3, config=GRID).ids.shape == (3, 8)
    assert pack([np.ones(5, np.int32)] * 9, config=GRID).ids.shape == (3, 16)
    assert repr(pack([np.ones(9, np.int32)], config=GRID)) == "Packed(1 rows in 1x16)"
    assert pack([np.ones(7, np.int32), np.ones(3, np.int32)]).ids.shape == (2, 7)


@given(
    strategies.lists(strategies.integers(1, 32), min_size=1, max_size=60),
    strategies.integers(1, 40),
)
def test_rows_for_a_batcher(lengths, row_len):
    """Rows are as long as asked for, or as their longest text needs, however many there are."""
    packed = pack([np.ones(n, np.int32) for n in lengths], config=GRID, row_len=row_len)
    items = packed.items()
    assert sum(len(ids) for ids, _, _ in items) == sum(lengths)
    least = next((rung for rung in (8, 16, 32) if rung >= row_len), 32)
    for ids, positions, segments in items:
        assert ids.shape == positions.shape == segments.shape
        longest = np.bincount(segments)[1:].max()
        assert len(ids) <= max(least, next(rung for rung in (8, 16, 32) if rung >= longest))
        assert segments.min() == 1
        assert positions[0] == 0
    room = [len(ids) for ids, _, segments in items if segments.max() < 8]
    assert all(some + others > least for some, others in itertools.combinations(room, 2))


def test_rows_of_one_dtype():
    """Rows of two dtypes are refused, where the one would cut the other's digits off."""
    with pytest.raises(InputShapeError, match="dtypes float32, int32: give all of them one"):
        pack([np.ones(3, np.int32), np.full(2, 0.5, np.float32)])


def model(ids, positions, segments, *, stays_inside=True):
    """Attention, and the mean of each segment."""
    x = jnp.asarray(TABLE)[ids] + jnp.asarray(PLACES)[positions]
    same = (segments[:, :, None] == segments[:, None, :]) | (not stays_inside)
    x = jax.nn.softmax(jnp.where(same, x @ jnp.swapaxes(x, 1, 2), -1e30)) @ x
    here = segments[:, None, :] == jnp.arange(1, SEGMENTS + 1)[None, :, None]
    return {"mean": here @ x / jnp.maximum(here.sum(-1, keepdims=True), 1)}


def test_a_model_that_stays_within_segments():
    """Each row gets what it gets alone, whatever it shares a row with."""
    few = settings(max_examples=20)
    assert_packing_preserves(jax.jit(model), max_segments=SEGMENTS, settings=few)
    assert_packing_preserves(lambda ids, *_: TABLE[ids], tokens=True, config=GRID, settings=few)


def test_a_model_that_does_not():
    """Attention beyond a segment is found, and the message says what to do."""
    with pytest.raises(AssertionError, match="attend within a segment alone"):
        assert_packing_preserves(
            jax.jit(lambda *args: model(*args, stays_inside=False)), max_segments=SEGMENTS
        )


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], InputShapeError, "rows is empty"),
        ([np.ones((2, 3), np.int32)], InputShapeError, r"rows\[0\] is \(2, 3\)"),
        ([np.ones(2, np.int32), [1]], InputShapeError, r"rows\[1\] is list"),
        ([np.ones(0, np.int32)], InputShapeError, r"rows\[0\] is \(0,\)"),
        ([np.ones(33, np.int32)], BucketOverflowError, "a row has seq_len=33, longer than"),
    ],
)
def test_rows_that_cannot_be_packed(rows, error, message):
    """What is no row, or too long, is refused."""
    with pytest.raises(error, match=message):
        pack(rows, config=GRID)


def test_outputs_of_another_call():
    """Outputs of another shape are refused."""
    packed = pack([np.ones(5, np.int32)], config=GRID, max_segments=3)
    with pytest.raises(InputShapeError, match=r"\(batch, max_segments, …\)=\(1, 3, …\)"):
        packed.unpack(np.zeros((1, 8, 2)))
    assert packed.unpack((np.ones((1, 3, 2)), np.ones((1, 3))))[0][0].shape == (2,)
