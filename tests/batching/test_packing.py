"""Packing: rows that share rows of a call, and the way back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from cudagraph_jax import (
    Batcher,
    BucketOverflowError,
    CUDAGraphConfig,
    InputShapeError,
    bucket_jit,
    pack,
)
from cudagraph_jax.testing import assert_packing_preserves
from tests.helpers.examples import examples

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
    """Outputs of other rows, or of another shape, are refused; what is expected is said."""
    packed = pack([np.ones(5, np.int32)] * 2, config=GRID, max_segments=3, row_len=8)
    for outputs, message in (
        (np.zeros((2, 8, 2)), r"row 0 .* \(8, 2\), expected \(max_segments, …\)=\(3, …\)"),
        (np.zeros((3, 3, 2)), "outputs of 3 rows, but 2 are packed"),
        ((np.zeros((2, 3)), np.float32(1)), "outputs of 0 rows, but 2 are packed"),
        ([np.zeros(3)], "outputs of 1 rows, but 2 are packed"),
        ([np.zeros(3), np.zeros(2)], r"row 1 has an output of the shape \(2,\), expected"),
        ([np.zeros(3), np.float32(1)], r"row 1 has an output of the shape \(\), expected"),
    ):
        with pytest.raises(InputShapeError, match=message):
            packed.unpack(outputs)
    with pytest.raises(InputShapeError, match=r"row 1 .* \(6,\), expected \(seq, …\)=\(8, …\)"):
        packed.unpack_tokens([np.zeros(5), np.zeros(6)])
    assert packed.unpack((np.ones((2, 3, 2)), np.ones((2, 3))))[0][0].shape == (2,)


@pytest.fixture(scope="module")
def packing():
    """A batcher of a model that gives a vector for each segment, and something for each token."""

    def both(ids, positions, segments, *, mask):
        vectors = model(ids, positions, segments)["mean"]
        return {"mean": vectors, "tokens": (ids * 2, jnp.where(mask, positions, -1))}

    config = CUDAGraphConfig.from_dict({**GRID.to_dict(), "warmup_iterations": 1})
    function = bucket_jit(both, in_axes="batch seq", mask_argname="mask", config=config)
    function.warmup(*[np.ones((1, 8), np.int32)] * 3, progress=False)
    with Batcher(function) as batcher:
        yield batcher


@examples(10, thorough=40)
@given(
    strategies.lists(strategies.integers(1, 32), min_size=1, max_size=12),
    strategies.integers(1, 32),
)
def test_the_way_through_a_batcher(packing, lengths, row_len):
    """What a batcher gives for packed rows is taken apart as the outputs of one call of them are:
    each row has its own tokens, and the vector that it gets alone."""
    rows = [np.arange(n, dtype=np.int32) + place for place, n in enumerate(lengths)]
    packed = pack(rows, config=GRID, max_segments=SEGMENTS, row_len=row_len)
    answers = packing.map(packed.items())
    vectors = packed.unpack([answer["mean"] for answer in answers])
    tokens = packed.unpack_tokens([answer["tokens"] for answer in answers])
    for row, vector, (doubled, positions) in zip(rows, vectors, tokens, strict=True):
        np.testing.assert_array_equal(doubled, row * 2)
        np.testing.assert_array_equal(positions, np.arange(len(row)))
        alone = packing.submit(row, positions, np.ones_like(row)).result()
        np.testing.assert_allclose(vector, alone["mean"][0], rtol=1e-4, atol=1e-5)
    whole = {"ids": packed.ids, "positions": packed.positions}
    one_by_one = [
        {name: array[row] for name, array in whole.items()} for row in range(len(answers))
    ]
    jax.tree.map(
        np.testing.assert_array_equal,
        packed.unpack_tokens(one_by_one),
        packed.unpack_tokens(whole),
    )
