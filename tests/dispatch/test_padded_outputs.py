"""`unpad="padded"`: outputs stay on the device, and other bucketed functions take them there."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import pickle
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import (
    Batcher,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    InputShapeError,
    Padded,
    PaddingLeakError,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.testing import FakeCompiler
from tests.helpers.functions import CHAINED as CONFIG
from tests.helpers.functions import ONE_BUCKET as ONE
from tests.helpers.functions import floats, tokens

SIZES = [(3, 5), (4, 8), (1, 1), (2, 13)]


def hidden(table, ids):
    """Of padding it makes what a later mean would notice."""
    return table[ids] + 1


def mixed(x, *, mask):
    """Padding is left out by weights of 0, whose product with NaN is NaN."""
    weights = jax.nn.softmax(jnp.where(mask, 0.0, -1e9))
    return x + jnp.einsum("bsd,bs->bd", x, weights)[:, None], jnp.log(x[..., 0] * mask)


def scores(x, weights):
    """It relies on zeros in the padding, as a sum does."""
    return jnp.sum(x, 1) + jnp.where(jnp.isfinite(weights), weights, 0).sum(1)[:, None]


class Chain:
    """Three functions, one after the other."""

    def __init__(self, config=CONFIG, **options):
        self.table = jnp.asarray(floats(0, 11, 3))
        self.hidden = bucket_jit(
            hidden, in_axes=(None, "batch seq"), unpad="padded", config=config, **options
        )
        self.mixed = bucket_jit(
            mixed, in_axes="batch seq _", mask_argname="mask", unpad="padded", config=config
        )
        self.scores = bucket_jit(scores, in_axes=("batch seq _", "batch seq"), config=config)

    def warmup(self, ids):
        self.hidden.warmup(self.table, ids, progress=False)
        x = self.hidden(self.table, ids)
        self.mixed.warmup(x, progress=False)
        self.scores.warmup(*self.mixed(x), progress=False)

    def __call__(self, ids):
        return self.scores(*self.mixed(self.hidden(self.table, ids)))

    def plain(self, ids):
        x = np.asarray(self.table)[np.asarray(ids)] + 1
        with np.errstate(invalid="ignore"):
            weights = np.log(x[..., 0])
        x = x + x.mean(1, keepdims=True)
        return x.sum(1) + np.where(np.isfinite(weights), weights, 0).sum(1)[:, None]


@pytest.fixture(scope="module")
def chain():
    made = Chain()
    made.warmup(tokens(0, 2, 3))
    return made


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 16))
def test_a_chain(chain, batch, seq):
    """Three functions give the plain ones' answer; nothing compiles, or goes through the host."""
    ids = tokens(batch + 10 * seq, batch, seq)
    with no_compiles():
        ahead = chain.hidden.pad(chain.table, ids)
        with jax.transfer_guard("disallow"):
            answer = chain(ahead[1])
        np.testing.assert_allclose(answer, chain.plain(ids), rtol=1e-4, atol=1e-4)
        # By now the sizes are known on the device: not even an explicit copy is made for them. What
        # would leave the device would have to come back.
        x = chain.hidden(*ahead)
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            assert isinstance(chain.hidden(*ahead), Padded)
        first, weights = chain.mixed(x)
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            np.testing.assert_allclose(chain.scores(first, weights), answer)


def test_what_is_handed_out(chain):
    """The array is the bucket's, as the executable gave it, and the sizes are the real ones."""
    whole = bucket_jit(hidden, in_axes=(None, "batch seq"), unpad="none", config=CONFIG)
    for shape in SIZES:
        ids = tokens(0, *shape)
        x = chain.hidden(chain.table, ids)
        assert x.shape == (*shape, 3)
        np.testing.assert_array_equal(x.array, whole(chain.table, ids))
        np.testing.assert_array_equal(x, np.asarray(chain.table)[ids] + 1)
    assert repr(chain.hidden(chain.table, tokens(0, 3, 5))) == "Padded(float32[3,5,3] in [4,8,3])"


def test_watched_replays():
    """So it is where replays are shown in profiles, and a replay by it is counted like others."""
    first = bucket_jit(lambda x: x + 1, in_axes="batch seq", unpad="padded", config=ONE)
    first.manager.annotate(replays=True)
    x = floats(0, 3, 5)
    for _ in range(3):
        np.testing.assert_allclose(first(first(x)), x + 2, rtol=1e-6)
    assert "on the device" in first.explain(first(x)).reason
    stats = first.stats()
    assert (stats["captures"], stats["hits"]) == (1, 6)


def test_nothing_waits():
    """A call returns before its output is there, and so does the one that takes it."""

    def slow(x):
        square = jnp.ones((600, 600)) * x[0, 0]
        return x + jax.lax.fori_loop(0, 40, lambda _, y: jnp.tanh(y @ square), square).sum() * 0

    first, second = (
        bucket_jit(slow, in_axes="batch seq", unpad="padded", config=ONE) for _ in range(2)
    )
    x = floats(0, 3, 5)
    first.warmup(x, progress=False)
    second.warmup(first(x), progress=False)
    padded = first(x)
    was_ready = padded.is_ready()
    following = second(padded)
    assert not was_ready
    assert not following.is_ready()
    np.testing.assert_allclose(following, x, rtol=1e-6)


PADDINGS = {"NaN": np.nan, "inf": np.inf, "seven": 7.0}
ASKED = [None, 0, -0.0, -1, 0.5, "edge", "any"]


def expected_padding(x, asked, made, *, left):
    if asked == "edge":
        return np.pad(x, ((0, 1), (3, 0) if left else (0, 3)), mode="edge")
    whole = np.full((4, 8), {"any": made, None: 0}.get(asked, asked), np.float32)
    whole[:3, slice(-5, None) if left else slice(5)] = x
    return whole


@functools.cache
def filling(made, side):
    """A function whose padding is `made`, for all that take it from there."""
    return bucket_jit(
        lambda x, *, mask: jnp.where(mask, x, made),
        in_axes="batch seq",
        pad_side=side,
        mask_argname="mask",
        unpad="padded",
        config=ONE,
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("asked", ASKED, ids=repr)
@pytest.mark.parametrize("made", PADDINGS.values(), ids=PADDINGS)
def test_what_stands_in_the_padding(made, asked, side):
    """A function finds in the padding what it asks for, whatever the one before has left there."""
    second = bucket_jit(
        lambda x: x + 0,
        in_axes="batch seq",
        pad_side=side,
        unpad="none",
        pad_values=asked,
        config=ONE,
    )
    x = floats(0, 3, 5)
    second.warmup(x, progress=False)
    padded: Any = filling(made, side)(x)
    np.testing.assert_array_equal(
        padded.array, expected_padding(x, "any", made, left=side == "left")
    )
    ways = {"any": "x is passed on as it is", "edge": 'which waits for it: pad_values="edge" is'}
    filled = f"x has its padding filled with {0 if asked is None else asked} on the device"
    assert ways.get(asked, filled) in second.explain(padded).reason
    for _ in range(2):
        with no_compiles():
            found = np.asarray(second(padded))
        expected = expected_padding(x, asked, made, left=side == "left")
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_copies():
    """A copy is filled anew on the device as it is itself; one that was pickled on the host."""
    first = bucket_jit(lambda x: x + 1, in_axes="batch seq", unpad="padded", config=ONE)
    second = bucket_jit(lambda x: x * 1, in_axes="batch seq", unpad="none", config=ONE)
    x = floats(0, 3, 5)
    padded: Any = first(x)
    second(padded)
    for same in (copy.copy(padded), copy.deepcopy(padded), copy.copy(copy.deepcopy(padded))):
        assert "x has its padding filled with 0 on the device" in second.explain(same).reason
        with no_compiles():
            found = np.asarray(second(same))
        np.testing.assert_array_equal(found, np.pad(x + 1, ((0, 1), (0, 3))))
    pickled = pickle.loads(pickle.dumps(padded))
    assert "x goes through the host" in second.explain(pickled).reason
    np.testing.assert_array_equal(second(pickled), found)
    filled = Padded(jnp.asarray(x), (2, 3), fill=7)
    for same in (copy.copy(filled), copy.deepcopy(filled)):
        assert same.layout.of(same.array).fill == 7
    assert copy.copy(filled).array is filled.array
    assert copy.deepcopy(filled).array is not filled.array


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "bool", "complex64", "float8_e4m3fn"])
def test_dtypes(dtype):
    """Of any dtype: one that the device does not compute with goes through the host."""
    first = bucket_jit(lambda x: x, in_axes="batch seq", unpad="padded", config=ONE)
    second = bucket_jit(lambda x: x, in_axes="batch seq", unpad="none", config=ONE)
    x = tokens(0, 3, 5).astype(jnp.dtype(dtype))
    ones = np.ones((4, 8), x.dtype)
    ones[:3, :5] = x
    whole = jnp.asarray(ones)
    padded = Padded(first(whole).array, (3, 5))
    made = Padded.laid_out(whole, first(x).layout)
    for argument in (padded, made):
        found = np.asarray(second(argument))
        np.testing.assert_array_equal(found[:3, :5], x)
        assert not np.any(found[3:].astype(np.complex64))


def test_debug_mode_holds_a_function_to_its_word():
    """What is said to ignore any padding is tried with NaN, which a product lets through."""
    config = dataclasses.replace(ONE, debug_mode=True)
    options: dict[str, Any] = {"in_axes": "batch seq", "mask_argname": "mask", "config": config}

    @jax.jit  # as a whole, where the check runs it without a bucket
    def by_product(x, *, mask):
        return jnp.einsum("bs,bs->b", x, jax.nn.softmax(jnp.where(mask, 0.0, -1e9)))

    @jax.jit
    def by_choice(x, *, mask):
        return jnp.sum(jnp.where(mask, x, 0), 1)

    x = floats(0, 3, 5)
    for pads in (None, 0):
        np.testing.assert_allclose(
            bucket_jit(by_product, pad_values=pads, **options)(x), x.mean(1), rtol=1e-4
        )
    for ids in (x, (x > 0).astype(np.float32), tokens(0, 3, 5)):
        np.testing.assert_allclose(
            bucket_jit(by_choice, pad_values="any", **options)(ids), ids.sum(1), rtol=1e-5
        )
    with pytest.raises(PaddingLeakError, match="with nan in the padding of x"):
        bucket_jit(by_product, pad_values="any", **options)(x)


def host_way(function, *arguments):
    """Whether a call goes through the host, and its answer, for which nothing compiles."""
    reason = function.explain(*arguments).reason
    with no_compiles():
        return "goes through the host" in reason, function(*arguments)


def test_another_grid(caplog):
    """Where the sizes of the buckets differ it goes through the host: right, and said once."""
    coarse = CUDAGraphConfig(capture_sizes=(3,), capture_seq_lens=(6, 16), warmup_iterations=0)
    first = bucket_jit(lambda x: x * 2, in_axes="batch seq", unpad="padded", config=CONFIG)
    second = bucket_jit(lambda h: h + 1, in_axes="batch seq", config=coarse, name="second")
    second.warmup(floats(0, 3, 5), progress=False)
    with caplog.at_level(logging.WARNING, "cudagraph_jax"):
        for shape in ((3, 5), (3, 6), (2, 9), (1, 15), (3, 5)):
            x = floats(0, *shape)
            goes, answer = host_way(second, first(x))
            assert goes
            np.testing.assert_allclose(answer, 2 * x + 1, rtol=1e-6)
    assert caplog.messages == [
        "second at 3x5: h goes through the host, which waits for it: it is [4, 8], and the bucket "
        "takes [3, 6]. Said once"
    ]


def test_the_other_side():
    """What is padded on one side goes through the host to one that is padded on the other."""
    first = bucket_jit(lambda x: x * 2, in_axes="batch seq", unpad="padded", config=ONE)
    second = bucket_jit(
        lambda x: x[:, -1], in_axes="batch seq", pad_side="left", config=ONE, pad_values="any"
    )
    second.warmup(floats(0, 3, 5), progress=False)
    for shape, way in (((3, 5), True), ((3, 8), False)):
        x = floats(0, *shape)
        goes, answer = host_way(second, first(x))
        assert goes is way
        np.testing.assert_allclose(answer, 2 * x[:, -1], rtol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("out_axes", [None, "batch seq-1"])
def test_lengths_that_follow(side, out_axes):
    """A length that follows from a size is real up to what the function itself has there."""
    config = CUDAGraphConfig(
        capture_sizes=(4,), capture_seq_lens=(8,), capture_axes={"less": (7,)}, warmup_iterations=0
    )
    first = bucket_jit(
        lambda x: x[:, 1:],
        in_axes="batch seq",
        out_axes=out_axes,
        pad_side=side,
        unpad="padded",
        config=config,
    )
    same, other = (
        bucket_jit(lambda x: x.sum(1), in_axes=axes, pad_side=side, config=config)
        for axes in ("batch less", "batch seq")
    )
    for function in (same, other):
        function.warmup(floats(0, 3, 4), progress=False)
    for seq in (5, 8, 2):
        x = floats(0, 3, seq)
        padded = first(x)
        assert padded.shape == (3, seq - 1)
        np.testing.assert_array_equal(padded, x[:, 1:])
        for function, way in ((same, False), (other, True)):
            goes, answer = host_way(function, padded)
            assert goes is way
            np.testing.assert_allclose(answer, x[:, 1:].sum(1), rtol=1e-5)


def test_named_axes_and_pytrees():
    """Any axes, in any pytree: each `Padded` in it is one array."""
    config = CUDAGraphConfig(
        capture_sizes=(2,), capture_axes={"src": (8,), "tgt": (4,)}, warmup_iterations=0
    )

    def first(source, target):
        return {"pair": source[:, :, None] * target[:, None, :], "rows": [target + 1, 2.0]}

    def second(inputs, scale, target):
        return inputs["pair"].sum((1, 2)) * scale + (inputs["rows"][0] * target).sum(1)

    made = bucket_jit(
        first,
        in_axes=("batch src", "batch tgt"),
        unpad={"pair": "padded", "rows": ["padded", "host"]},
        config=config,
    )
    taken = bucket_jit(
        second,
        in_axes=({"pair": "batch src tgt", "rows": ["batch tgt", None]}, None, "batch tgt"),
        config=config,
    )
    for rows, src, tgt in ((1, 5, 3), (2, 8, 3), (2, 8, 4), (1, 5, 3)):
        source, target = floats(0, rows, src), floats(1, rows, tgt)
        outputs = made(source, target)
        assert isinstance(outputs["rows"][1], np.ndarray)
        assert isinstance(outputs["pair"], Padded)
        expected = source.sum(1) * target.sum(1) * 3 + ((target + 1) * target).sum(1)
        for last in (target, jnp.asarray(target)):
            np.testing.assert_allclose(taken(outputs, 3.0, last), expected, rtol=1e-4)
        plain = jax.tree.map(np.asarray, outputs, is_leaf=lambda x: isinstance(x, Padded))
        np.testing.assert_allclose(taken(plain, 3.0, target), expected, rtol=1e-4)
        np.testing.assert_allclose(taken(outputs, 3.0, target), expected, rtol=1e-4)


def test_calls_that_alternate(chain):
    """The same sizes come as NumPy arrays, JAX arrays and `Padded`; each is answered right."""
    for shape in SIZES * 2:
        x = floats(0, *shape, 3)
        (ahead,) = chain.mixed.pad(x)
        unknown = Padded(ahead.array, ahead.shape)
        weights = floats(1, *shape)
        for argument in (x, ahead, unknown, jnp.asarray(x), jax.device_put(ahead), x):
            for others in (weights, chain.scores.pad(x, weights)[1]):
                answer = chain.scores(argument, others)
                np.testing.assert_allclose(
                    answer, x.sum(1) + weights.sum(1)[:, None], rtol=1e-4, atol=1e-5
                )


def test_one_that_was_on_the_host(chain):
    """What comes from the host does not send those of its sizes there that come from the device."""
    second = bucket_jit(lambda x: x.sum((1, 2)), in_axes="batch seq _", config=CONFIG)
    x = chain.hidden(chain.table, tokens(0, 3, 5))
    expected = np.asarray(x).sum((1, 2))
    for argument in (jax.device_get(x), Padded(x.array, x.shape), x):
        np.testing.assert_allclose(second(argument), expected, rtol=1e-5)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        np.testing.assert_allclose(second(x), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["as it is", "filled", "host", "exact"])
def test_donation(kind):
    """What is donated is used up, whichever way it takes, and a second use of it says so."""
    first = bucket_jit(lambda x: x + 1, in_axes="batch seq", unpad="padded", config=ONE)
    second = bucket_jit(
        lambda x, y: x * y,
        in_axes="batch seq",
        pad_values={"as it is": "any", "host": "edge"}.get(kind, 0),
        donate_argnums=0,
        unpad="padded",
        config=dataclasses.replace(ONE, capture_sizes=(3,), capture_seq_lens=(5,))
        if kind == "exact"
        else ONE,
    )
    for _ in range(3):
        x, y = floats(0, 3, 5), floats(1, 3, 5)
        padded = first(x)
        answer = second(padded, y)
        assert padded.is_deleted()
        np.testing.assert_allclose(answer, (x + 1) * y, rtol=1e-6)
        with pytest.raises(InputShapeError, match="x is deleted, as an array is that was donated"):
            second(padded, y)
        with pytest.raises(RuntimeError, match="deleted"):
            np.asarray(padded)
    whole, other = jnp.ones((4, 8)), jnp.ones((3, 5))
    for padded in (Padded(first(whole).array, (3, 5)), Padded.laid_out(whole + 1, first(x).layout)):
        with jax.transfer_guard("disallow"):
            answer = second(padded, other)
        assert padded.is_deleted()
        np.testing.assert_allclose(answer, np.full((3, 5), 2.0))


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.DISABLED, "overflow"])
def test_eager_answers(chain, mode):
    """An eager answer has no padding; an eager call takes the real part of what has some."""
    made = Chain(dataclasses.replace(ONE, on_overflow="eager"))
    ids = tokens(0, 3, 9 if mode == "overflow" else 5)
    if isinstance(mode, CUDAGraphMode):
        for function in (made.hidden, made.mixed, made.scores):
            function.manager.mode = mode
    x = made.hidden(made.table, ids)
    assert x.shape == x.array.shape == (*ids.shape, 3)
    answer = made(ids)
    np.testing.assert_allclose(answer, made.plain(ids), rtol=1e-4, atol=1e-4)
    padded = chain.hidden(chain.table, ids)
    assert not padded.is_whole
    if mode != "overflow":
        assert "the real part of x goes through the host" in made.mixed.explain(padded).reason
    np.testing.assert_allclose(
        made.scores(*made.mixed(padded)), made.plain(ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("unpad", "kind"), [("host", np.ndarray), ("none", jax.Array), ("padded", Padded)]
)
def test_a_bucketed_function_within_another(unpad, kind):
    """What runs eagerly gives what it would in a bucket, also by way of a bucketed function."""
    inner = bucket_jit(lambda x: x + 1, in_axes="batch seq", unpad="padded", config=ONE)
    outer = bucket_jit(lambda x: {"x": inner(x)}, in_axes="batch seq", unpad=unpad, config=ONE)
    x = floats(0, 3, 5)
    for mode in (CUDAGraphMode.CAPTURE, CUDAGraphMode.NONE):
        outer.manager.mode = mode
        found = outer(x)["x"]
        assert isinstance(found, kind)
        array = found.array if isinstance(found, Padded) else found
        assert not isinstance(array, Padded)
        np.testing.assert_allclose(np.asarray(found)[:3, :5], x + 1, rtol=1e-6)
    assert array.shape == (3, 5)


def test_pieces():
    """Pieces of a batch that is too large are joined on the host, to an array without padding."""
    made = Chain(dataclasses.replace(ONE, on_overflow="split"))
    ids = tokens(0, 11, 5)
    x = made.hidden(made.table, ids)
    assert x.shape == x.array.shape == (11, 5, 3)
    np.testing.assert_allclose(made(ids), made.plain(ids), rtol=1e-4, atol=1e-4)
    large = Padded(jnp.pad(x.array, ((0, 1), (0, 3), (0, 0)), constant_values=np.nan), x.shape)
    assert "the real part of x goes through the host" in made.mixed.explain(large).reason
    first, _ = made.mixed(large)
    np.testing.assert_allclose(first, made.mixed(np.asarray(x))[0], rtol=1e-5)
    halves = bucket_jit(
        lambda x: x[:, ::2],
        in_axes="batch seq",
        unpad="padded",
        config=dataclasses.replace(ONE, on_overflow="split"),
    )
    with pytest.raises(InputShapeError, match='ask for unpad="host"'):
        halves(floats(0, 11, 5))


def test_what_is_passed_through():
    """One with padding is refused where no axes are named; one without is an array like others."""
    function = bucket_jit(
        lambda x, weights: x + weights.sum(), in_axes=("batch seq", None), config=ONE
    )
    x = floats(0, 3, 5)
    whole, padded = Padded(jnp.ones(4), (4,)), Padded(jnp.ones(4), (3,))
    np.testing.assert_allclose(function(x, whole), x + 4, rtol=1e-6)
    np.testing.assert_allclose(function(x, weights=whole), x + 4, rtol=1e-6)
    for _ in range(2):
        with pytest.raises(
            InputShapeError, match=r"weights is a Padded.*numpy\.asarray\(weights\)"
        ):
            function(x, padded)
    with pytest.raises(InputShapeError, match=r"weights\['a'\] is a Padded"):
        bucket_jit(lambda x, weights: x, in_axes=("batch seq", None), config=ONE)(x, {"a": padded})
    np.testing.assert_allclose(function(x, whole), x + 4, rtol=1e-6)


TWICE = bucket_jit(lambda x: x * 2, in_axes="batch seq", unpad="padded", config=ONE)
TOTAL = bucket_jit(lambda x: x.sum(1), in_axes="batch seq", config=ONE)


@pytest.mark.parametrize("make", [TOTAL.pad, lambda x: [TWICE(x / 2)]], ids=["pad", "output"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: jax.tree.map(lambda array: array + 1, x),
        jax.jit(lambda x: jax.tree.map(lambda array: array + 1, x)),
        lambda x: jax.tree.map(lambda array: (array + 1).astype(jnp.bfloat16), x),
        lambda x: jax.device_get(jax.tree.map(lambda array: (array + 1).astype(np.int32), x)),
    ],
)
def test_what_a_function_of_trees_makes(change, make):
    """What is made of one has its real sizes, and other padding, which is not taken for the old."""
    x = tokens(0, 3, 5).astype(np.float32)
    (made,) = make(x)
    for _ in range(2):
        np.testing.assert_allclose(TOTAL(change(made)), (x + 1).sum(1))
        np.testing.assert_allclose(TOTAL(made), x.sum(1))


def test_the_same_array():
    """Of the same array in another tree the padding is still known."""
    ahead = TOTAL.pad(floats(0, 3, 5))
    for same in (jax.device_put(ahead), jax.tree.map(lambda array: array, ahead)):
        assert "x is passed on as it is" in TOTAL.explain(*same).reason


@pytest.mark.parametrize(
    "change", [lambda x: x[:1], lambda x: x[:, :4], jnp.sum, lambda x: jnp.stack([x, x])]
)
def test_an_array_of_another_shape(change):
    """One whose array has no part of its sizes any more is refused, not stretched to them."""
    changed: Any = jax.tree.map(change, TWICE(floats(0, 3, 5)))
    with pytest.raises(InputShapeError, match=r"x has the real sizes \(3, 5\), which are no part"):
        TOTAL(changed)
    with pytest.raises(InputShapeError, match=r"no part.*make a new Padded"):
        np.asarray(changed)


def test_what_has_no_padding():
    """One without padding may stand wherever an array may: in pytrees, and under keywords."""
    config = dataclasses.replace(ONE, warmup_iterations=1, debug_mode=True)
    prefill = bucket_jit(
        lambda x: {"k": x, "steps": jnp.int32(2), "scale": 3.0, "bias": jnp.ones(4)},
        in_axes="batch seq",
        unpad="padded",
        config=config,
    )

    def decode(cache, token, *, other):
        bias = cache["bias"][0] + other["bias"][0]
        answer = cache["k"].sum(1) * cache["steps"] * cache["scale"] + token + bias
        return {**cache, "steps": cache["steps"] + 1}, answer

    cache_axes = {"k": "batch seq", "steps": None, "scale": None, "bias": None}
    step = bucket_jit(
        decode,
        in_axes=(cache_axes, "batch"),
        pad_values=0,
        donate_argnums=0,
        unpad=("padded", "host"),
        config=config,
    )
    x, token = floats(0, 3, 5), np.arange(3, dtype=np.float32)
    step.warmup(prefill(x), token, other={"bias": prefill(x)["bias"]}, progress=False)
    cache = prefill(x)
    for steps in (2, 3, 4):
        cache, answer = step(cache, token, other={"bias": prefill(x)["bias"]})
        np.testing.assert_allclose(answer, x.sum(1) * 3 * steps + token + 2, rtol=1e-4)
    assert step.stats()["hits"] == 3
    padded = {**prefill(x), "bias": Padded(jnp.ones(4), (3,))}
    with pytest.raises(InputShapeError, match=r"cache\['bias'\] is a Padded"):
        step(padded, token, other={"bias": jnp.ones(4)})
    with pytest.raises(InputShapeError, match=r"other\['bias'\] is a Padded"):
        step(prefill(x), token, other={"bias": Padded(jnp.ones(4), (3,))})


def test_numbers_are_taken_at_once():
    """A number that another function gave is never given to an executable, which refuses slowly."""
    refusals = []

    def compile_noting(request, lowering, *, clock):
        made: Any = FakeCompiler(runs=True)(request, lowering, clock=clock)

        def call(*args, **kwargs):
            try:
                return made.call(*args, **kwargs)
            except TypeError as error:
                refusals.append(error)
                raise

        return dataclasses.replace(made, call=call)

    scaled = bucket_jit(
        lambda x, by: x * by,
        in_axes=("batch seq", None),
        manager=CUDAGraphManager(ONE, compiler=compile_noting),
    )
    x, number = jnp.ones((4, 8)), jnp.float32(3)
    for by in (number, Padded(number, ())) * 3:
        np.testing.assert_array_equal(scaled(x, by), 3 * x)
    assert refusals == []


@jax.tree_util.register_pytree_node_class
class Rows:
    """Refuses what has no rows when it is made."""

    def __init__(self, rows):
        assert len(rows.shape) == 2
        self.rows = rows

    def tree_flatten(self):
        return (self.rows,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_class_that_checks_what_it_holds():
    """Outputs of such a class stay on the device, too."""
    made = bucket_jit(lambda x: Rows(x + 1), in_axes="batch seq", unpad="padded", config=ONE)
    taken = bucket_jit(lambda rows: rows.rows.sum(1), in_axes="batch seq", config=ONE)
    x = floats(0, 3, 5)
    for _ in range(2):
        rows: Any = made(x)
        np.testing.assert_allclose(taken(rows), (x + 1).sum(1), rtol=1e-6)
    assert "on the device" in taken.explain(rows).reason


def test_errors_name_the_argument(chain):
    """Sizes that disagree are the real ones, and the advice of others speaks of it."""
    x = chain.hidden(chain.table, tokens(0, 3, 5))
    with pytest.raises(InputShapeError, match="x has batch=3 but weights has batch=4"):
        chain.scores(x, floats(0, 4, 5))
    with pytest.raises(InputShapeError, match='ask for unpad="padded"'):
        chain.scores(x.array, floats(0, 3, 5))
    with pytest.raises(InputShapeError, match=r"x has 3 dimension\(s\)"):
        bucket_jit(lambda x: x, in_axes="batch seq", config=ONE)(x)
    with pytest.raises(InputShapeError, match=r"x is a jax\.ShapeDtypeStruct"):
        chain.mixed(jax.eval_shape(lambda x: x, x))
    keys = bucket_jit(
        lambda x: jax.random.split(jax.random.key(0), len(x)),
        in_axes="batch seq",
        unpad="padded",
        config=ONE,
    )
    with pytest.raises(InputShapeError, match="PRNG key array"):
        keys(floats(0, 3, 5))


def test_shapes_alone(chain):
    """`warmup` and `explain` take one of shapes alone, as they take shapes."""
    shapes = jax.eval_shape(lambda x: x, chain.hidden(chain.table, tokens(0, 3, 5)))
    assert isinstance(shapes, Padded)
    function = bucket_jit(lambda x: x.sum(2), in_axes="batch seq _", config=CONFIG)
    assert function.warmup(shapes, progress=False).captured == 6
    assert "padded to 4x8" in function.explain(shapes).reason


def test_transformations(chain):
    """Under `jit` and `grad` a bucketed function is the plain one, of the real part."""
    ids = tokens(0, 3, 5)
    x = chain.hidden(chain.table, ids)
    inner, outer = (
        bucket_jit(lambda x: x.sum(1), in_axes="batch seq _", config=CONFIG) for _ in range(2)
    )
    expected = np.asarray(x).sum(1)
    np.testing.assert_allclose(jax.jit(inner)(x), expected, rtol=1e-5)
    slope = jax.grad(lambda x: outer(x).sum())(x)
    np.testing.assert_array_equal(slope.array[:3, :5], 1)
    assert not np.any(slope.array[3:])
    with pytest.raises(InputShapeError, match=r"no part of its array's shape.*jax\.vmap"):
        jax.vmap(inner)(x)


def test_batchers(chain):
    """A batcher hands out rows on the host whatever `unpad` says, and takes no `Padded`."""
    with Batcher(chain.hidden, chain.table) as batcher:
        ids = [tokens(n, n) for n in (3, 5, 9)]
        for row, answer in zip(ids, batcher.map(ids), strict=True):
            assert isinstance(answer, np.ndarray)
            np.testing.assert_allclose(answer, np.asarray(chain.table)[row] + 1)
        with pytest.raises(InputShapeError, match=r"of type Padded where its axes are"):
            batcher.submit(Padded(jnp.zeros(8, jnp.int32), (5,)))
        chain.hidden.manager.mode = CUDAGraphMode.NONE
        try:
            answer = batcher.submit(ids[0]).result()
        finally:
            chain.hidden.manager.mode = CUDAGraphMode.CAPTURE
        np.testing.assert_allclose(answer, np.asarray(chain.table)[ids[0]] + 1)


def test_threads(chain):
    """Several threads give each other's outputs to the same functions."""
    failures: list[BaseException] = []

    def work(seed):
        try:
            for draw in np.random.default_rng(seed).integers((1, 1), (5, 17), (60, 2)):
                ids = tokens(int(draw.sum()), *draw)
                np.testing.assert_allclose(chain(ids), chain.plain(ids), rtol=1e-4, atol=1e-4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_restart(tmp_path):
    """What is loaded from a store hands out the same, and nothing compiles in its requests."""
    for loads in (0, 1):
        made = Chain(ONE, store=tmp_path, fingerprint="v1")
        made.warmup(tokens(0, 2, 3))
        assert made.hidden.stats()["registry"]["load_count"] == loads
        ids = tokens(0, 3, 5)
        with no_compiles():
            x = made.hidden(made.table, ids)
            assert "on the device" in made.mixed.explain(x).reason
            np.testing.assert_allclose(made(ids), made.plain(ids), rtol=1e-4, atol=1e-4)


def test_a_compiler_that_compiles_nothing():
    """A test's compiler compiles nothing to fill padding with: then it goes through the host."""
    manager = CUDAGraphManager(ONE, compiler=FakeCompiler(runs=True))
    first = bucket_jit(lambda x: x + 1, in_axes="batch seq", unpad="padded", manager=manager)
    second = bucket_jit(lambda x: x.sum(1), in_axes="batch seq", manager=manager)
    x = floats(0, 3, 5)
    padded = first(x)
    assert "nothing is compiled that fills its padding" in second.explain(padded).reason
    np.testing.assert_allclose(second(padded), (x + 1).sum(1), rtol=1e-5)


def test_without_copies():
    """`cudagraph_copy_inputs=False` takes what is at the bucket's size and need not be filled."""
    config = dataclasses.replace(ONE, cudagraph_copy_inputs=False)
    function = bucket_jit(
        lambda x, y: x + y, in_axes="batch seq", pad_values=("any", 0), config=config
    )
    x, y = floats(0, 3, 5), floats(1, 3, 5)
    first, second = function.pad(x, y)
    for _ in range(2):
        unknown = Padded(first.array, (3, 5))
        np.testing.assert_allclose(function(unknown, second), x + y, rtol=1e-6)
        (entry,) = function.registry.entries()
        np.testing.assert_allclose(entry.replay((unknown, second)), x + y, rtol=1e-6)
    with pytest.raises(InputShapeError, match="forbids to copy"):
        entry.replay((x, second))
    for arguments in ((x, second), (first, y), (first, Padded(second.array, (3, 5)))):
        with pytest.raises(InputShapeError, match="as the function's own pad does"):
            function(*arguments)


def test_the_calls_of_the_specification(chain):
    """`execute_or_capture` and `entry.replay` take one as they take an array of the real sizes."""
    manager = CUDAGraphManager(CONFIG)

    def total(inputs):
        return inputs["x"].sum((1, 2)) * inputs["scale"]

    ids = tokens(0, 3, 5)
    inputs = {"x": chain.hidden(chain.table, ids), "scale": jnp.float32(2)}
    expected = np.asarray(inputs["x"]).sum((1, 2)) * 2
    for _ in range(2):
        found = manager.execute_or_capture(3, 5, total, inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    (entry,) = manager.registry.entries()
    np.testing.assert_allclose(entry.replay(inputs), expected, rtol=1e-5)
    assert (entry.bucket, entry.replay_count) == ((4, 8), 2)


@pytest.mark.parametrize("unpad", ["none", "padded", ("none", "padded")])
@pytest.mark.parametrize("how", ["overflow", "paused", "debug_mode"])
def test_within_another_function_that_runs_eagerly(unpad, how):
    """It hands out no padding there, as where it is traced; outside of it, it does again."""
    inner = bucket_jit(lambda x: (x * 2, x + 1), in_axes="batch seq", unpad=unpad, config=ONE)

    def summed(x):
        twice, more = inner(x)
        return twice.sum(axis=1) + more.sum(axis=1)

    config = dataclasses.replace(ONE, debug_mode=how == "debug_mode")
    outer = bucket_jit(
        lambda x, *, mask: summed(jnp.where(mask, x, 0)) - jnp.sum(~mask, axis=1),
        in_axes="batch seq",
        mask_argname="mask",
        config=config,
    )
    if how == "paused":
        outer.manager.mode = CUDAGraphMode.NONE
    x = floats(0, 3, 5) if how != "overflow" else floats(0, 7, 5)
    inner.warmup(x[:1], progress=False)
    for _ in range(2):
        np.testing.assert_allclose(outer(x), (x * 3 + 1).sum(axis=1), rtol=1e-5)
        assert [leaf.shape for leaf in jax.tree.leaves(inner(x[:3]))] == [(4, 8)] * 2
