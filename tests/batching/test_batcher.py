"""The batcher's answers: each row's own, in any company."""

import gc
import threading
import time
import weakref
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies

from cudagraph_jax import (
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphMode,
    InputShapeError,
    bucket_jit,
)
from cudagraph_jax.batching.batcher import Batcher
from cudagraph_jax.batching.lane import Lane
from cudagraph_jax.errors import BucketOverflowError
from cudagraph_jax.testing import assert_no_compiles
from tests.helpers.examples import examples
from tests.helpers.functions import GRID, KINDS, PARAMS, TABLE, WIDTH, floats, tokens

BATCHED = [name for name in KINDS if name not in ("batch summed away", "one number", "pytrees")]


def item_of(kind, args):
    """The arguments of a batch of one without what is passed through, and without the batch."""
    axes = kind.in_axes if isinstance(kind.in_axes, tuple) else (kind.in_axes,) * len(args)
    return tuple(
        np.take(array, 0, axis=entry.split().index("batch"))
        for entry, array in zip(axes, args, strict=True)
        if entry is not None
    )


def passed_of(kind, args):
    axes = kind.in_axes if isinstance(kind.in_axes, tuple) else (kind.in_axes,) * len(args)
    return tuple(array for entry, array in zip(axes, args, strict=True) if entry is None)


@pytest.fixture(scope="module", params=BATCHED)
def served(request):
    kind = KINDS[request.param]
    function = kind.bucketed()
    args = kind.arguments(0, 1, 3)
    function.warmup(*args, progress=False)
    with Batcher(function, *passed_of(kind, args)) as batcher:
        yield kind, batcher


@examples(6, thorough=10)
@given(lengths=strategies.lists(strategies.integers(1, 5), min_size=1, max_size=9))
def test_each_row_as_if_it_were_alone(served, lengths):
    """A row's answer is that of the plain function to it alone, whatever rows are beside it."""
    kind, batcher = served
    calls = [kind.arguments(seed, 1, length) for seed, length in enumerate(lengths)]
    with assert_no_compiles():
        answers = batcher.map([item_of(kind, args) for args in calls])
    for args, length, answer in zip(calls, lengths, answers, strict=True):
        for own, alone in zip(
            jax.tree.leaves(answer), jax.tree.leaves(kind.plain(args, 1, length)), strict=True
        ):
            assert isinstance(own, np.ndarray)
            assert own.ndim == alone.ndim - 1
            expected = np.asarray(alone).reshape(own.shape)
            np.testing.assert_allclose(
                np.asarray(own, np.float32), np.asarray(expected, np.float32), atol=kind.tolerance
            )


@pytest.fixture(scope="module")
def pooled():
    function = KINDS["masked pooling"].bucketed()
    function.warmup(TABLE, tokens(0, 1, 2), progress=False)
    return function


def test_masks_are_each_rows_own():
    """The mask of a call is True where the elements of each row are, not in the whole rectangle."""
    seen = bucket_jit(
        lambda x, *, where, rows: jnp.where(rows[:, None], jnp.cumsum(where, axis=1), -1),
        in_axes="batch seq",
        mask_argname={"where": "batch seq", "rows": "batch"},
        config=GRID,
    )
    seen.warmup(floats(0, 1, 2), progress=False)
    with Batcher(seen) as batcher:
        answers = batcher.map([floats(0, length) for length in (5, 2, 4, 1)])
    assert [answer.tolist() for answer in answers] == [[1, 2, 3, 4, 5], [1, 2], [1, 2, 3, 4], [1]]


def test_arguments_that_are_pytrees():
    """An item may hold pytrees, as the function's arguments do."""
    kind = KINDS["pytrees"]
    function = bucket_jit(
        lambda inputs, bias: kind.function(inputs, bias)["sum"],
        in_axes=kind.in_axes,
        config=GRID,
    )
    function.warmup(*kind.arguments(0, 1, 2), progress=False)
    rows = [{"x": floats(n, n), "lengths": np.int32(n - 1)} for n in (5, 2, 3)]
    with Batcher(function, np.float32(0.5)) as batcher:
        answers = batcher.map(rows)
    expected = [np.sum(np.asarray(row["x"])[:-1]) for row in rows]
    np.testing.assert_allclose(answers, expected, rtol=1e-5)


def test_rows_without_a_sequence():
    """A function of rows alone gets rows of a fixed size, with a mask of rows."""
    kind = KINDS["row reduction"]
    function = kind.bucketed()
    function.warmup(floats(0, 1, WIDTH), progress=False)
    rows = [floats(n, WIDTH) for n in range(7)]
    with Batcher(function) as batcher:
        answers = batcher.map(rows)
        assert sum(batcher.stats()["calls"].values()) < len(rows)
    np.testing.assert_allclose(answers, [np.linalg.norm(row) for row in rows], rtol=1e-5)


def test_lengths_that_are_not_padded():
    """Without capture_seq_lens, items of one length share calls, and no others."""
    function = bucket_jit(
        lambda x: jnp.cumsum(x[:, ::-1], axis=1),
        in_axes="batch seq",
        config=CUDAGraphConfig(capture_sizes=(1, 2)),
    )
    for length in (3, 4):
        function.warmup(floats(0, 1, length), progress=False)
    rows = [floats(n, 3 + n % 2) for n in range(6)]
    with Batcher(function) as batcher:
        for row, answer in zip(rows, batcher.map(rows), strict=True):
            np.testing.assert_allclose(answer, np.cumsum(row[::-1]), rtol=1e-5)
        assert set(batcher.stats()["calls"]) <= {"1x3", "2x3", "1x4", "2x4"}
        with pytest.raises(InputShapeError, match="no bucket is captured for items like"):
            batcher.submit(floats(0, 5))


def test_outputs_whose_length_follows():
    """An output of half the length is cut to what the function itself gives for the row."""
    function = bucket_jit(lambda x: x[:, : x.shape[1] // 2] * 2, in_axes="batch seq", config=GRID)
    function.warmup(floats(0, 1, 4), progress=False)
    rows = [floats(n, n) for n in (5, 2, 4)]
    with Batcher(function) as batcher:
        for row, answer in zip(rows, batcher.map(rows), strict=True):
            np.testing.assert_allclose(answer, row[: len(row) // 2] * 2, rtol=1e-6)


def test_what_is_submitted_may_change_afterwards(pooled):
    """A row is copied, so that its buffer may be used again at once."""
    buffer = tokens(1, 4)
    expected = TABLE[buffer].mean(axis=0)
    with Batcher(pooled, TABLE) as batcher:
        future = batcher.submit(buffer)
        buffer[:] = 0
        np.testing.assert_allclose(future.result(), expected, rtol=1e-5)


def test_jax_arrays_and_wide_integers(pooled):
    """Items may be JAX arrays, and integers of 64 bits, as calls of the function may."""
    row = tokens(1, 4)
    with Batcher(pooled, TABLE) as batcher:
        answers = batcher.map([row, jnp.asarray(row), row.astype(np.int64)])
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ((np.int32(1),), InputShapeError, r"shape \(\), .*map takes a sequence of rows"),
        (([1, 2],), InputShapeError, r"of type int where its axes .*: pass .*numpy.asarray\(row"),
        ((tokens(0, 1, 3),), InputShapeError, r"shape \(1, 3\), but one row of 'batch seq'"),
        ((tokens(0, 0),), InputShapeError, "no elements"),
        ((floats(0, 3),), InputShapeError, "no bucket is captured for items like"),
        ((tokens(0, 6),), BucketOverflowError, "seq_len=6, which no .*: seq_len fits up to 5: cut"),
        (
            (tokens(0, 2), tokens(0, 2)),
            InputShapeError,
            r"is 1 array\(s\).*but 2 came.*; mask is built for each row; what is passed through",
        ),
        ((), InputShapeError, r"is 1 array\(s\).*but 0 came"),
    ],
)
def test_items_that_do_not_fit(pooled, item, error, message):
    """What does not fit is refused at once, and harms no other."""
    with Batcher(pooled, TABLE) as batcher:
        beside = batcher.submit(tokens(1, 3))
        with pytest.raises(error, match=message):
            batcher.submit(*item)
        assert beside.result().shape == (2,)
        assert batcher.stats()["items"]["refused"] == 1


def test_items_that_fit_no_more():
    """What was accepted before is refused once its bucket has gone, or under other JAX settings."""
    function = KINDS["lookup"].bucketed()
    function.warmup(TABLE, tokens(0, 1, 2), progress=False)
    with Batcher(function, TABLE) as batcher:
        for length in (2, 5):
            batcher.submit(tokens(1, length)).result()
        with jax.default_matmul_precision("float32"), pytest.raises(InputShapeError):
            batcher.submit(tokens(1, 2))
        for entry in function.registry.entries():
            if entry.seq_len == 5:
                function.registry.remove(*entry.key)
        with pytest.raises(BucketOverflowError, match="seq_len=5"):
            batcher.submit(tokens(1, 5))
        assert batcher.submit(tokens(1, 2)).result().shape == (2, 2)


def test_an_item_of_nothing():
    """None has no array, and is told from an array that the function was captured without."""
    function = bucket_jit(
        lambda x, y: x * 2, in_axes=("batch seq", {"a": "batch seq"}), config=GRID, name="two"
    )
    optional = bucket_jit(
        lambda x, y: x * 2 if y is None else x + y, in_axes="batch seq", config=GRID
    )
    optional.warmup(floats(0, 1, 3), None, progress=False)
    with Batcher(function) as batcher, pytest.raises(InputShapeError):
        batcher.submit(floats(0, 3), None)
    with Batcher(optional) as batcher:
        row = floats(0, 3)
        for _ in range(2):
            np.testing.assert_array_equal(batcher.submit(row, None).result(), row * 2)


def test_a_row_whose_answer_nobody_knows():
    """A size that the function itself does not take is refused, and harms no other."""
    function = bucket_jit(
        lambda x: x.reshape(x.shape[0], x.shape[1] // 2, 2).sum(-1),
        in_axes="batch seq",
        config=CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(4, 8)),
        name="pairs",
    )
    function.warmup(floats(0, 1, 4), progress=False)
    with Batcher(function) as batcher:
        batcher.submit(floats(0, 2)).result()
        with pytest.raises(InputShapeError, match="pairs does not take a call"):
            batcher.submit(floats(0, 3))
        assert batcher.stats()["items"]["refused"] == 1


def test_nothing_is_captured_for_an_item():
    """A batcher captures nothing: a function that is not warm is said to be so."""
    function = KINDS["lookup"].bucketed()
    with Batcher(function, TABLE) as batcher, pytest.raises(InputShapeError, match="call warmup"):
        batcher.submit(tokens(0, 3))


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (lambda x, y: x, {"in_axes": ("batch seq", "seq")}, "has no row for each item"),
        (lambda x: x, {"in_axes": ({"a": "batch seq", "b": None},)}, "batched in part"),
        (lambda p, x: x, {"donate_argnums": 0}, "donate_argnums of .* has 0, which all items"),
        (lambda p, x, *, m: x, {"mask_argname": {"m": "seq"}}, "the mask m of .* has no rows"),
        (lambda p, x: x, {"unpad": "none"}, "nobody to know the rows .*: name their axes in out_"),
        (lambda p, x: x, {"unpad": ("none", ["none"])}, "nobody to know the rows"),
        (lambda p, x: x[0], {"out_axes": "seq"}, "out_axes of .* has 'seq', an output without a"),
        (lambda p, x: x, {"out_axes": {"y": "2*batch seq"}}, r"has '2\*batch seq', an output"),
        (lambda p, x, *, by: x, {"static_argnames": "by"}, r"a value for 'by', .*partial\(f, by="),
        (lambda p, x, *, by: x, {"in_axes": "batch ..."}, "a value for 'by', and a batcher passes"),
        (lambda p, x, y: x, {}, "needs a value for 'y'"),
        (lambda p, x, y, /, *more, z=1, **others: x, {}, "needs a value for 'y'"),
    ],
)
def test_functions_that_cannot_be_batched(fn, options, message):
    """What no item can ever be answered by is refused when the batcher is made."""
    function = bucket_jit(fn, **{"in_axes": (None, "batch seq"), "config": GRID, **options})
    with pytest.raises(ConfigError, match=message):
        Batcher(function)


def test_values_that_have_a_default_or_are_passed():
    """A static argument with a default, or with an entry in `in_axes`, is no reason to refuse, nor
    is an output that is None."""
    function = bucket_jit(
        lambda by, x, *, plus=0.0: (x * by + plus, None),
        in_axes=(None, "batch seq"),
        static_argnames=("by", "plus"),
        unpad="none",
        out_axes=("batch seq", None),
        config=GRID,
    )
    function.warmup(2, floats(0, 1, 2), progress=False)
    with Batcher(function, 2) as batcher:
        doubled, nothing = batcher.submit(np.ones(2, np.float32)).result()
        assert (doubled.tolist(), nothing) == ([2, 2], None)


@pytest.mark.parametrize(
    "fn",
    [lambda p, x: jnp.sum(x, 0) * p, lambda p, x: (x * p, p), lambda p, x: jnp.tile(x, (2, 1))],
)
def test_outputs_that_have_no_rows(fn):
    """What an output is like shows when it is traced: one without rows is refused by `submit`."""
    function = bucket_jit(fn, in_axes=(None, "batch seq"), config=GRID)
    function.warmup(np.float32(1), floats(0, 1, 2), progress=False)
    with (
        Batcher(function, np.float32(1)) as batcher,
        pytest.raises(ConfigError, match="has no row"),
    ):
        batcher.submit(floats(0, 2))


def test_what_it_is_made_of():
    """A plain function, the wrong number of parameters and times that are none are refused."""
    function = KINDS["dense"].bucketed()
    with pytest.raises(ConfigError, match="not what bucket_jit makes"):
        Batcher(lambda x: x)  # type: ignore[arg-type]  # as who forgets to decorate it
    with pytest.raises(ConfigError, match=r"passes 1 argument\(s\) through"):
        Batcher(function)
    with pytest.raises(ConfigError, match="max_waiting=0"):
        Batcher(function, PARAMS, max_waiting=0)
    with pytest.raises(ConfigError, match="max_wait_ms=-1"):
        Batcher(function, PARAMS, max_wait_ms=-1)
    with pytest.raises(TypeError, match=r"'max_wating'.*max_waiting"):
        Batcher(function, PARAMS, max_wating=3)  # type: ignore[call-arg]


def test_within_a_transformation(pooled):
    """A row that is traced has no values to wait with: it is refused."""
    with Batcher(pooled, TABLE) as batcher:
        with pytest.raises(InputShapeError, match=r"is traced, .*: call the function itself there"):
            jax.jit(batcher.submit)(tokens(1, 3))
        batcher.submit(tokens(1, 3)).result()
        with pytest.raises(InputShapeError, match="is traced"):
            jax.jit(batcher.submit)(tokens(1, 3))


def test_repr():
    """One line says whose it is, and how many wait."""
    assert repr(Batcher(KINDS["dense"].bucketed(), PARAMS)) == "Batcher(dense, 0 waiting)"


def test_update_between_two_calls():
    """Other parameters of the same shapes are used from then on; nothing is captured anew."""
    function = KINDS["lookup"].bucketed()
    function.warmup(TABLE, tokens(0, 1, 2), progress=False)
    row = tokens(3, 4)
    with assert_no_compiles(), Batcher(function, TABLE) as batcher:
        np.testing.assert_array_equal(batcher.submit(row).result(), TABLE[row])
        batcher.update(TABLE * 2)
        np.testing.assert_array_equal(batcher.submit(row).result(), TABLE[row] * 2)
        with pytest.raises(InputShapeError, match="other shapes or dtypes than before"):
            batcher.update(TABLE[:-1])
        with pytest.raises(ConfigError, match=r"passes 1 argument\(s\) through"):
            batcher.update()
        np.testing.assert_array_equal(batcher.submit(row).result(), TABLE[row] * 2)


def test_errors_say_what_differs():
    """Programs that look alike are told apart: weak types, and JAX's settings."""
    function = bucket_jit(lambda scale, x: x * scale, in_axes=(None, "batch seq"), config=GRID)
    function.warmup(2.0, floats(0, 1, 3), progress=False)
    strong = Batcher(function, np.float32(2))
    with strong, pytest.raises(InputShapeError, match="with scale of a weak type"):
        strong.submit(floats(0, 3))
    with Batcher(function, 2.0) as batcher:
        batcher.submit(floats(0, 3)).result()
        with pytest.raises(InputShapeError, match=r"before, .* \(scale of a weak type\): give"):
            batcher.update(np.float32(3))
        with jax.default_matmul_precision("float32"):
            with pytest.raises(InputShapeError, match="jax_default_matmul_precision=None, not 'f"):
                batcher.submit(floats(0, 3))
            batcher.update(3.0)  # whose thread runs nothing
        assert batcher.submit(np.ones(3, np.float32)).result().tolist() == [3, 3, 3]


def test_update_before_the_first_item():
    """What nothing is captured for is said of the first item, and may be mended."""
    function = KINDS["lookup"].bucketed()
    function.warmup(TABLE, tokens(0, 1, 2), progress=False)
    with Batcher(function, TABLE) as batcher:
        batcher.update(TABLE[:-1])
        with pytest.raises(InputShapeError, match="of shape"):
            batcher.submit(tokens(3, 4))
        batcher.update(TABLE)
        assert batcher.submit(tokens(3, 4)).result().shape == (4, 2)


def test_what_was_passed_before_is_not_kept():
    """After `update` nothing holds the parameters of before, also while no item comes."""
    function = KINDS["lookup"].bucketed()
    tables = [jnp.asarray(TABLE), jnp.asarray(TABLE * 2)]
    function.warmup(tables[0], tokens(0, 1, 2), progress=False)
    with Batcher(function, tables[0]) as batcher:
        batcher.submit(tokens(3, 4)).result()
        before = weakref.ref(tables.pop(0))
        batcher.update(tables[0])
        gc.collect()
        assert before() is None


def test_what_is_refused_leaves_nothing_behind():
    """However many shapes are refused, no more is kept of them than before."""
    function = bucket_jit(
        lambda x: x * 2, in_axes="batch seq", config=CUDAGraphConfig(capture_sizes=(1,))
    )
    function.warmup(floats(0, 1, 3), progress=False)

    def lanes():
        gc.collect()
        return sum(isinstance(each, Lane) for each in gc.get_objects())

    with Batcher(function) as batcher:
        batcher.submit(floats(0, 3)).result()
        before = lanes()
        for length in range(4, 20):
            with pytest.raises(InputShapeError):
                batcher.submit(floats(0, length))
        assert lanes() == before


@pytest.mark.parametrize("step", range(5))
def test_first_items_that_come_together(pooled, step):
    """Whoever comes while another one's first item is looked at finds the same buckets."""
    futures: list[Future] = []
    main, left = threading.current_thread(), [step]

    def clock():
        if threading.current_thread() is main and left and not left[0]:
            left.clear()
            futures.append(batcher.submit(tokens(1, 3)))
        elif threading.current_thread() is main and left:
            left[0] -= 1
        return time.perf_counter()

    with Batcher(pooled, TABLE, clock=clock) as batcher:
        futures.append(batcher.submit(tokens(1, 3)))
        for future in futures:
            np.testing.assert_allclose(future.result(60), TABLE[tokens(1, 3)].mean(0), rtol=1e-5)


def test_the_functions_own_counts_stay_true():
    """Each call is a replay of its bucket, whose real elements are those of the rows."""
    function = KINDS["lookup"].bucketed()
    function.warmup(TABLE, tokens(0, 1, 2), progress=False)
    rows = [tokens(n, 1 + n % 5) for n in range(40)]
    with Batcher(function, TABLE) as batcher:
        batcher.map(rows)
        stats, own = function.stats(), batcher.stats()
    assert stats["real_elements"] == own["real_elements"] == sum(map(len, rows))
    assert stats["real_elements"] + stats["padded_elements"] == own["computed_elements"]
    assert stats["hits"] == stats["calls"] == sum(own["calls"].values())
    replays = {key: graph["replay_count"] for key, graph in stats["registry"]["graphs"].items()}
    assert own["calls"] == {key: count for key, count in replays.items() if count}
    assert own["items"]["answered"] == len(rows)
    assert sum(function.manager.sizes().values()) == stats["calls"]


def pause(function):
    function.manager.mode = CUDAGraphMode.NONE


def pause_and_reset(function):
    function.manager.reset()
    pause(function)


def disable(function):
    function.manager.mode = CUDAGraphMode.DISABLED


EAGER = {"paused": pause, "paused, nothing captured": pause_and_reset, "disabled": disable}


@pytest.mark.parametrize("name", EAGER)
def test_a_mode_that_runs_no_bucket(name):
    """While the manager runs calls eagerly, so are items, one by one, whatever is captured."""
    function = KINDS["lookup"].bucketed()
    function.warmup(TABLE, tokens(0, 1, 2), progress=False)
    rows = [tokens(n, n) for n in (3, 2, 9)]  # of which the last is larger than every bucket
    with Batcher(function, TABLE) as batcher:
        EAGER[name](function)
        for row, answer in zip(rows, batcher.map(rows), strict=True):
            np.testing.assert_array_equal(answer, TABLE[row])
        with pytest.raises(CUDAGraphError):
            batcher.submit(tokens(1, 1, 2))
    assert function.stats()["eager_by_reason"] == {name.split(",")[0]: 3}


def test_a_configuration_that_is_switched_off():
    """With `enabled=False`, or while JAX's jit is off, the plain function answers items."""
    off = KINDS["lookup"].bucketed(config=CUDAGraphConfig(enabled=False, capture_seq_lens=(5,)))
    row = tokens(3, 4)
    with Batcher(off, TABLE) as batcher:
        np.testing.assert_array_equal(batcher.submit(row).result(), TABLE[row])
    on = KINDS["lookup"].bucketed()
    jax.config.update("jax_disable_jit", True)
    try:
        with Batcher(on, TABLE) as batcher:
            np.testing.assert_array_equal(batcher.submit(row).result(), TABLE[row])
    finally:
        jax.config.update("jax_disable_jit", False)


def test_numpy_parameters_are_put_on_the_device_once():
    """NumPy arrays that all items share are copied when they are given, and not at each call."""
    config = CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(4,), warmup_iterations=1)
    function = bucket_jit(lambda p, x: x * p[0], in_axes=(None, "batch seq"), config=config)
    params = np.full(3, 2.0, np.float32)
    function.warmup(params, np.ones((1, 2), np.float32), progress=False)
    row = np.ones(2, np.float32)
    with Batcher(function, params) as batcher:
        params[:] = 7
        np.testing.assert_array_equal(batcher.submit(row).result(), row * 2)
        batcher.update(params)
        params[:] = 9
        np.testing.assert_array_equal(batcher.submit(row).result(), row * 7)
        assert all(isinstance(value, jax.Array) for value in batcher._shared.now.values)
    for ask in (lambda: batcher.update(params), batcher.replan):
        with pytest.raises(CUDAGraphError, match="is closed: make a new one"):
            ask()
