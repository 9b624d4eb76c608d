"""on_overflow="split": a batch in pieces, joined as if it had been one call."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import (
    BucketOverflowError,
    CUDAGraphConfig,
    CUDAGraphMode,
    CUDAGraphWarning,
    InputShapeError,
    PaddingLeakError,
    SealedError,
    bucket_jit,
    no_compiles,
)
from tests.helpers.functions import (
    GRID,
    KINDS,
    assert_close,
    double,
    embed,
    floats,
    pooled,
    stats_of,
    tokens,
)

SPLIT = dataclasses.replace(GRID, on_overflow="split")
WITHOUT_BATCH = ("pytrees", "batch summed away", "one number")
JOINED = [name for name in KINDS if name not in WITHOUT_BATCH]
WARM: dict[str, Any] = {}


def split(function=double, in_axes=("batch seq",), **options):
    config = options.pop("config", SPLIT)
    return bucket_jit(function, in_axes=in_axes, config=config, **options)


def warm(name):
    """One function a kind, so that the grid is compiled once for all examples."""
    if name not in WARM:
        config = dataclasses.replace(SPLIT, capture_sizes=(1, 4), capture_seq_lens=(5,))
        WARM[name] = KINDS[name].bucketed(config)
        WARM[name].warmup(*KINDS[name].arguments(0, 4, 5), progress=False)
    return WARM[name]


@pytest.mark.slow  # grids of eleven functions, and a compile for each plain answer
@given(st.sampled_from(JOINED), st.integers(5, 13), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25)
def test_pieces_equal_the_plain_function(name, batch, seq, seed):
    """Whatever the function and the batch, the joined pieces are the plain answer, in NumPy."""
    kind, function = KINDS[name], warm(name)
    args = kind.arguments(seed, batch, seq)
    if name == "row reduction":
        seq = 1
    before = stats_of(function)
    with no_compiles():
        found = function(*args)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert_close(found, kind.plain(args, batch, seq), kind.tolerance)
    after = stats_of(function)
    assert after["calls"] - before["calls"] == after["splits"] - before["splits"] == 1
    assert after["pieces"] - before["pieces"] == -(-batch // 4)
    assert after["hits"] == before["hits"]


@pytest.mark.parametrize("unpad", ["host", "device", "none"])
@pytest.mark.parametrize("batch", [5, 6, 8, 11])
def test_every_unpad(unpad, batch):
    """Joined pieces are trimmed as one call would be; "none" leaves padding at the end alone."""
    function = split(lambda x: {"twice": x * 2, "rows": [x.sum(1)]}, unpad=unpad)
    x = floats(0, batch, 4)
    for array in (x, jnp.asarray(x)):
        found: Any = function(array)
        kind = np.ndarray if unpad == "host" else jax.Array
        assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(found))
        if unpad == "none":
            assert found["twice"].shape[0] == found["rows"][0].shape[0] >= batch
            assert found["twice"].shape[1] == 5
        else:
            assert found["twice"].shape == x.shape
        assert_close(found["twice"][:batch, :4], x * 2)
        assert_close(found["rows"][0][:batch], x.sum(1))


def test_unpad_none_with_pieces_of_different_buckets():
    """With unpad="none" pieces whose buckets differ in length are joined all the same."""
    function = split(unpad="none")
    for shape in ((4, 5), (1, 2)):
        function(floats(0, *shape))
    function.seal()
    x = floats(1, 5, 2)
    found: Any = function(x)
    assert_close(found[:5, :2], x * 2)


def test_unpad_none_when_a_larger_bucket_serves_the_pieces():
    """Padding of a piece in a larger bucket does not come between the rows of the joined ones."""
    config = dataclasses.replace(SPLIT, max_capture_batch_size=6)
    function = split(config=config, unpad="none")
    function(floats(0, 6, 5))
    function.seal()
    x = floats(1, 8, 5)
    found: Any = function(x)
    assert_close(found[:8], x * 2)


@pytest.mark.parametrize("unpad", ["host", "device", "none"])
def test_the_batch_may_be_any_axis(unpad):
    """Inputs and outputs are cut and joined along their own batch axis."""
    function = split(lambda x, y: (x.T, x + y[0]), ("seq batch", "_ seq batch"), unpad=unpad)
    x, y = floats(0, 5, 11), floats(1, 2, 5, 11)
    found: Any = function(x, y)
    assert_close(np.asarray(found[0])[:11], x.T)
    assert_close(np.asarray(found[1])[:, :11], x + y[0])


def test_pytrees_and_what_is_passed_through():
    """Arguments without a batch go to every piece whole, keywords included."""

    def scaled(params, inputs, *, by):
        return {"all": (inputs["x"] @ params["w"] * by, inputs["n"] + 1)}

    function = split(scaled, (None, {"x": "batch seq _", "n": "batch"}))
    params = {"w": floats(0, 3, 2)}
    inputs = {"x": floats(1, 9, 4, 3), "n": tokens(2, 9)}
    found = function(params, inputs, by=np.float32(2))
    assert_close(found, {"all": (inputs["x"] @ params["w"] * np.float32(2), inputs["n"] + 1)}, 1e-4)
    assert stats_of(function)["pieces"] == 3


@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_an_output_without_the_batch_is_refused(name):
    """Pieces of an output that carries no batch cannot be joined: the error names the output."""
    kind = KINDS[name]
    function = kind.bucketed(SPLIT)
    with pytest.raises(InputShapeError, match=r'carries no batch.*"split".*on_overflow="eager"'):
        function(*kind.arguments(0, 9, 4))
    stats = stats_of(function)
    assert (stats["calls"], stats["splits"], stats["pieces"]) == (1, 0, 0)
    assert sum(stats["errors_by_reason"].values()) == 1
    fits = kind.arguments(0, 3, 5)
    assert_close(function(*fits), kind.plain(fits, 3, 5), kind.tolerance)


def test_the_last_piece_goes_into_the_smallest_bucket_that_fits():
    """A batch of 9 is two pieces of 4 and one of 1, each in its own bucket."""
    function = split()
    function.warmup(floats(0, 4, 5), progress=False)
    assert_close(function(floats(0, 9, 2)), floats(0, 9, 2) * 2)
    counts = {entry.key: entry.replay_count for entry in function.registry.entries()}
    assert {key: n for key, n in counts.items() if n} == {(4, 2): 2, (1, 2): 1}
    function(floats(0, 6, 5))
    counts = {entry.key: entry.replay_count for entry in function.registry.entries()}
    assert (counts[4, 5], counts[3, 5]) == (1, 1)
    stats = stats_of(function)
    assert (stats["splits"], stats["pieces"], stats["hits"], stats["calls"]) == (2, 5, 0, 2)
    assert stats["registry"]["total_replays"] == 5


def test_pieces_are_captured_where_they_are_missing():
    """A first call captures the buckets of its pieces, and is one call."""
    function = split()
    assert_close(function(floats(0, 9, 2)), floats(0, 9, 2) * 2)
    assert {entry.key for entry in function.registry.entries()} == {(4, 2), (1, 2)}
    stats = stats_of(function)
    assert (stats["calls"], stats["splits"], stats["captures"], stats["misses"]) == (1, 1, 0, 1)
    assert stats["splits_by_reason"] == {"miss": 1}
    function(floats(0, 9, 2))
    stats = stats_of(function)
    assert (stats["splits_by_reason"], stats["misses"]) == ({"miss": 1, "overflow": 1}, 1)


@pytest.mark.parametrize("batch", [2, 9])
def test_a_sequence_that_is_too_long_is_an_error(batch):
    """Only the batch is split; a too long sequence is an error that names it."""
    function = split()
    with pytest.raises(BucketOverflowError, match="seq_len=6 is larger than the largest bucket, 5"):
        function(floats(0, batch, 6))
    assert stats_of(function)["errors_by_reason"] == {"overflow": 1}
    assert function.registry.num_graphs == 0


@given(st.integers(5, 13), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=15)
def test_the_mask_is_right_in_each_piece(batch, seq, seed):
    """Each piece sees True exactly where its own elements are real."""
    if "counted" not in WARM:
        WARM["counted"] = split(
            lambda x, *, mask: (mask.sum(1), jnp.broadcast_to(mask.sum(), x.shape[:1]), x * mask),
            mask_argname="mask",
        )
    x = floats(seed, batch, seq)
    length, area, masked = WARM["counted"](x)
    np.testing.assert_array_equal(length, np.full(batch, seq))
    rows = [min(4, batch - start) for start in range(0, batch, 4)]
    np.testing.assert_array_equal(area, np.repeat([n * seq for n in rows], rows))
    assert_close(masked, x)


def test_the_mask_of_a_real_function():
    """Masked pooling in pieces equals masked pooling as a whole."""
    table, ids = floats(4, 11, 2), tokens(0, 7, 3)
    function = split(pooled, (None, "batch seq"), mask_argname="mask")
    assert_close(function(table, ids), pooled(table, ids, mask=np.ones((7, 3), bool)))


def test_pad_values_of_pieces():
    """The last piece is padded with the declared value, as a call of its own would be."""
    function = split(
        lambda x: x + 0 * x.sum(1, keepdims=True), pad_values="edge", out_axes="batch seq"
    )
    x = floats(0, 6, 4)
    assert_close(function(x), x)


@pytest.mark.parametrize("unpad", ["host", "device", "none"])
@pytest.mark.parametrize("seq", [4, 5])
def test_donated_arguments_are_deleted(unpad, seq):
    """Donated arrays are gone after a split call, the others stay, and the answer is right."""
    function = split(
        lambda state, x: (state + x, x * 2),
        ("batch seq", "batch seq"),
        donate_argnums=0,
        unpad=unpad,
    )
    x = floats(1, 9, seq)
    state = jnp.asarray(floats(0, 9, seq))
    keep = jnp.asarray(x)
    found: Any = function(state, keep)
    assert state.is_deleted()
    assert not keep.is_deleted()
    assert_close(np.asarray(found[0])[:9, :seq], floats(0, 9, seq) + x)
    assert_close(np.asarray(keep), x)
    host = floats(2, 9, seq)
    function(host, x)
    assert_close(host, floats(2, 9, seq))


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_a_donated_argument_without_batch_serves_every_piece():
    """What is donated and passed through is there for the last piece too, and gone afterwards."""
    function = split(lambda w, x: x + w, (None, "batch seq"), donate_argnums=0)
    w, x = jnp.asarray(floats(0, 1, 1)), floats(1, 9, 4)
    assert_close(function(w, x), floats(0, 1, 1) + x)
    assert w.is_deleted()


def test_an_untraceable_function_is_served_whole():
    """Where the first piece cannot be captured the call runs eagerly, as one."""
    runs = []

    def branching(x):
        runs.append(x.shape)
        return x * 2 if x.sum() > 0 else x * 3

    function = split(branching)
    ones = np.ones((9, 5), np.float32)
    with pytest.warns(CUDAGraphWarning, match="branching"):
        assert_close(function(ones), ones * 2)
    runs.clear()
    assert_close(function(-ones), -ones * 3)
    assert runs == [(9, 5)]
    stats = stats_of(function)
    assert (stats["calls"], stats["splits"]) == (2, 0)
    assert sum(stats["eager_by_reason"].values()) == 2


def test_a_last_piece_that_cannot_be_captured_runs_eagerly():
    """A piece without a bucket is computed eagerly, and the call is right and counted once."""

    def picky(x):
        if x.shape[0] == 1 and isinstance(x, jax.core.Tracer) and x.shape[1] == 2:
            return x * 2 if x.sum() > 0 else x
        return x * 2

    function = split(picky, out_axes="batch seq")
    x = floats(0, 9, 2)
    with pytest.warns(CUDAGraphWarning, match="picky"):
        assert_close(function(x), x * 2)
    stats = stats_of(function)
    assert (stats["calls"], stats["splits"], stats["pieces"]) == (1, 1, 2)
    with no_compiles():  # but for the piece that runs eagerly, which has its shape by now
        function(x)
    assert stats_of(function)["splits_by_reason"] == {"miss": 2}


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.DISABLED])
def test_paused_calls_are_not_split(mode):
    """Where nothing is replayed nothing is split."""
    function = split()
    function.manager.mode = mode
    assert_close(function(floats(0, 9, 4)), floats(0, 9, 4) * 2)
    stats = stats_of(function)
    assert (stats["splits"], stats["eager_calls"]) == (0, 1)


def test_a_sealed_manager_splits_without_compiling():
    """After seal() no size compiles anything: pieces, padding, trimming and joining included."""
    function = split()
    function.warmup(floats(0, 4, 5), progress=False)
    function.seal()
    with no_compiles():
        for batch in range(1, 14):
            for seq in (1, 2, 3, 5):
                x = floats(batch, batch, seq)
                assert_close(function(x), x * 2)
    assert stats_of(function)["eager_calls"] == 0


def test_sealed_pieces_use_larger_buckets():
    """A piece whose own bucket is missing goes into a larger one; without any it runs eagerly."""
    function = split()
    function(floats(0, 4, 5))
    function.seal()
    x = floats(1, 9, 2)
    with no_compiles():
        assert_close(function(x), x * 2)
    assert stats_of(function)["pieces"] == 3
    function.registry.clear()
    assert_close(function(x), x * 2)
    assert stats_of(function)["splits"] == 1
    assert stats_of(function)["calls"] == 3


def test_sealed_with_misses_forbidden():
    """Where a missing bucket is an error, a piece without one is that error, counted as such."""
    config = dataclasses.replace(SPLIT, on_miss="error")
    function = split(config=config)
    with pytest.raises(SealedError, match="4x2"):
        function(floats(0, 9, 2))
    assert stats_of(function)["calls"] == 1
    assert stats_of(function)["errors_by_reason"] == {"miss": 1}


def test_pieces_are_captured_in_the_background():
    """With on_miss="background" pieces are queued, the call is served, and later replayed."""
    config = dataclasses.replace(SPLIT, on_miss="background")
    function = split(config=config)
    x = floats(0, 9, 2)
    with function.manager:
        for _ in range(4):
            assert_close(function(x), x * 2)
            function.manager.wait()
        assert {entry.key for entry in function.registry.entries()} == {(4, 2), (1, 2)}
        with no_compiles():
            assert_close(function(x), x * 2)
    stats = stats_of(function)
    assert stats["calls"] == 5
    assert stats["splits"] + stats["eager_calls"] == 5


def test_without_copies_only_buckets_are_split():
    """cudagraph_copy_inputs=False splits into whole buckets and refuses a piece that is none."""
    config = dataclasses.replace(SPLIT, cudagraph_copy_inputs=False)
    function = split(config=config)
    x = floats(0, 9, 5)
    assert_close(function(x), x * 2)
    with pytest.raises(InputShapeError, match="cudagraph_copy_inputs"):
        function(floats(0, 6, 4))
    assert stats_of(function)["calls"] == 2


def test_explain_says_how_it_is_split():
    """explain() says the size of the pieces, and runs nothing."""
    function = split()
    assert "in pieces of 4 rows" in str(function.explain(floats(0, 9, 4)))
    assert stats_of(function)["calls"] == 0


def test_static_arguments_in_pieces():
    """Static arguments select the program of every piece."""
    function = split(lambda x, times: x * times, ("batch seq",), static_argnames="times")
    x = floats(0, 6, 4)
    assert_close(function(x, times=3), x * 3)
    assert_close(function(x, times=2), x * 2)
    assert stats_of(function)["splits"] == 2


def test_without_lengths():
    """Without capture_seq_lens pieces keep the length of the call."""
    config = CUDAGraphConfig(capture_sizes=(1, 4), on_overflow="split", warmup_iterations=0)
    function = split(embed, (None, "batch seq"), config=config)
    table = floats(4, 11, 2)
    ids = tokens(0, 10, 7)
    assert_close(function(table, ids), table[ids])
    assert {entry.key for entry in function.registry.entries()} == {(4, 7)}


def test_an_output_of_a_fixed_number_of_rows():
    """What is cut to more rows than any bucket has looks like the batch, and is not joined."""
    function = split(lambda x: x[:9], config=SPLIT)
    for rows in (3, 7, 9):
        assert_close(function(floats(0, rows, 5)), floats(0, rows, 5))
    with pytest.raises(InputShapeError, match=r"9 rows at .*\(11, 5\), so that pieces"):
        function(floats(0, 11, 5))


@pytest.mark.parametrize("function", [lambda x: jnp.repeat(x, 2, 0), lambda x: x[:-1]])
def test_outputs_of_other_numbers_of_rows(function):
    """Twice the batch, or one row less, is not joined, and the error says what is wrong with it."""
    with pytest.raises(InputShapeError, match="has not one row for each of the batch"):
        split(function)(floats(0, 7, 5))


@jax.jit  # as a whole, where the check runs it without a bucket
def centred(x, *, mask):
    return x - jnp.where(mask, x, 0).sum() / mask.sum()


@pytest.mark.parametrize("unpad", ["host", "device", "none", "padded"])
@pytest.mark.parametrize("function", [centred, lambda x, *, mask: jnp.cumsum(x, 0)])
def test_rows_that_depend_on_each_other(function, unpad):
    """In debug_mode no call is split whose rows depend on each other; within the grid it is right.

    Rows that all agree prove nothing, so that the call after them is tried as well.
    """
    config = CUDAGraphConfig(
        capture_sizes=(1, 4), capture_seq_lens=(8,), debug_mode=True, on_overflow="split"
    )
    bucketed = bucket_jit(
        function, in_axes="batch seq", mask_argname="mask", unpad=unpad, config=config
    )
    x, whole = floats(0, 9, 5), np.ones((4, 5), np.bool_)
    assert_close(np.asarray(bucketed(x[:4]))[:4, :5], function(x[:4], mask=whole), 1e-5)
    if function is centred:
        bucketed(np.ones((9, 5), np.float32))
    for array in (x, jnp.asarray(x)):
        with pytest.raises(PaddingLeakError, match=r'at \(9, 5\), in pieces.*"exact"'):
            bucketed(array)
    assert stats_of(bucketed)["errors_by_reason"] == {"leak": 2}


def test_only_the_first_split_is_compared():
    """In debug_mode rows have to prove once at each bucket that they are independent."""
    runs = []

    def noted(x):
        if not isinstance(x, jax.core.Tracer):
            runs.append(x.shape[0])
        return x * 2

    config = dataclasses.replace(SPLIT, debug_mode=True)
    function = split(noted, config=config, donate_argnums=0)
    for seed, batch in enumerate((9, 10, 11)):
        x = floats(seed, batch, 5)
        assert_close(function(jnp.asarray(x)), x * 2)
    assert 9 in runs
    assert 11 not in runs
