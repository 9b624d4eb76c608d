"""Axes by name: images, encoders with decoders; masks over them, and lengths that follow."""

import contextlib
import dataclasses
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import (
    BucketOverflowError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphWarning,
    InputShapeError,
    bucket_jit,
    no_compiles,
    plan_buckets,
)
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.functions import floats

IMAGES = CUDAGraphConfig(
    capture_sizes=(1, 3), capture_axes={"height": (4, 8), "width": (4, 8)}, warmup_iterations=1
)
PAIRS = CUDAGraphConfig(
    capture_sizes=(1, 4),
    capture_axes={"src": (4, 8), "tgt": (4, 6)},
    warmup_iterations=1,
)


def brighten(images, *, mask):
    """Each image less its own mean, and that mean."""
    real = jnp.where(mask[..., None], images, 0)
    mean = real.sum((1, 2)) / mask.sum((1, 2))[:, None]
    return images - mean[:, None, None], mean


def attend(query, keys, *, src_mask, row_mask):
    """Each target's mean over the sources that are real, and how many rows there are."""
    weights = jnp.where(src_mask[:, None, :], 1.0, 0.0) * jnp.ones((1, query.shape[1], 1))
    return query + (weights @ keys) / weights.sum(-1, keepdims=True), row_mask.sum()


@pytest.fixture(scope="module")
def images():
    function = bucket_jit(
        brighten, in_axes="batch height width _", mask_argname="mask", config=IMAGES
    )
    function.warmup(floats(0, 2, 3, 3, 2), progress=False)
    return function


@pytest.fixture(scope="module")
def attention():
    function = bucket_jit(
        attend,
        in_axes=("batch tgt _", "batch src _"),
        mask_argname={"src_mask": "batch src", "row_mask": "batch"},
        config=PAIRS,
    )
    function.warmup(floats(0, 2, 3, 2), floats(1, 2, 5, 2), progress=False)
    return function


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8))
def test_images_of_any_size(images, batch, height, width):
    """Images of any height and width have the plain function's answer, and nothing compiles."""
    x = floats(batch + 10 * height + 100 * width, batch, height, width, 2)
    with no_compiles():
        found = images(x)
    mean = x.mean((1, 2))  # by NumPy: JAX would compile each operation for each size
    expected = x - mean[:, None, None], mean
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_masks_over_axes_of_their_own(attention, batch, tgt, src):
    """Each mask is True where its own axes are real."""
    query, keys = floats(tgt, batch, tgt, 2), floats(src, batch, src, 2)
    with no_compiles():
        found, rows = attention(query, keys)
    assert rows == batch
    expected = query + keys.mean(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_everything_that_speaks_of_buckets(images):
    """Statistics, explanations, sizes and reports know the axes."""
    assert images.stats()["registry"]["graphs"].keys() >= {"1x1,height=4,width=8"}
    explanation = images.explain(floats(0, 2, 3, 5, 2))
    assert explanation.bucket == Bucket(3, 1, height=4, width=8)
    assert explanation.mode is CUDAGraphMode.REPLAY
    assert "height=3" in str(explanation)
    too_high = images.explain(floats(0, 2, 9, 5, 2))
    assert too_high.mode is CUDAGraphMode.NONE
    assert "height" in str(too_high)
    images(floats(0, 2, 3, 5, 2))
    assert Bucket(2, 1, height=3, width=5) in images.manager.sizes()
    assert "height=4" in str(images.manager.report())
    assert "height=4" in images.manager.report().html()


def test_a_nearest_larger_bucket_and_pieces():
    """A sealed manager serves from what holds the request; a large batch is cut along the rows."""
    config = CUDAGraphConfig(
        capture_sizes=(2,),
        capture_axes={"height": (4, 8)},
        on_overflow="split",
        warmup_iterations=0,
    )
    function = bucket_jit(lambda x: x * 2, in_axes="batch height", config=config)
    function(floats(0, 2, 7))
    function.seal()
    x = floats(1, 5, 3)
    np.testing.assert_allclose(function(x), x * 2, rtol=1e-6)
    assert function.stats()["pieces"] == 3
    with pytest.raises(BucketOverflowError, match="height=9 is larger than the largest bucket, 8"):
        function(floats(0, 5, 9))


def test_an_axis_twice_in_an_argument():
    """Attention biases of (batch, seq, seq) are padded along both dimensions."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(8,), warmup_iterations=0)
    function = bucket_jit(
        lambda x, bias: (bias @ x[..., None])[..., 0] + jnp.trace(bias, axis1=1, axis2=2)[:, None],
        in_axes=("batch seq", "batch seq seq"),
        config=config,
    )
    x, bias = floats(0, 2, 5), floats(1, 2, 5, 5)
    expected = (bias @ x[..., None])[..., 0] + np.trace(bias, axis1=1, axis2=2)[:, None]
    np.testing.assert_allclose(function(x, bias), expected, rtol=1e-5)
    with pytest.raises(InputShapeError, match=r"seq=5 but bias has seq=4"):
        function(x, bias[:, :, :4])


@pytest.mark.parametrize(
    ("rule", "length"),
    [
        ("seq+1", lambda n: n + 1),
        ("seq-1", lambda n: n - 1),
        ("2*seq", lambda n: 2 * n),
        ("seq//2", lambda n: n // 2),
        ("3*seq//2+1", lambda n: 3 * n // 2 + 1),
    ],
)
def test_lengths_of_arguments_that_follow(rule, length):
    """An argument whose length follows from another one's is padded, and checked at each call."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4, 8), warmup_iterations=0)
    function = bucket_jit(
        lambda x, y: (x * 2, y * 3, y.sum(1)), in_axes=("batch seq", f"batch {rule}"), config=config
    )
    for seq in (3, 7, 8):
        for _ in range(2):
            x, y = floats(0, 2, seq), floats(1, 2, length(seq))
            twice, thrice, total = function(x, y)
            np.testing.assert_allclose(twice, x * 2, rtol=1e-6)
            np.testing.assert_allclose(thrice, y * 3, rtol=1e-6)
            np.testing.assert_allclose(total, y.sum(1), atol=1e-5)
            with pytest.raises(InputShapeError, match=r"from which .* follows"):
                function(x, floats(1, 2, length(seq) + 1))


def test_out_axes_by_rule():
    """A rule in `out_axes` says how long an output is."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(8,), warmup_iterations=0)
    function = bucket_jit(
        lambda x: x[:, 1:] - x[:, :-1], in_axes="batch seq", out_axes="batch seq-1", config=config
    )
    x = floats(0, 2, 5)
    np.testing.assert_allclose(function(x), np.diff(x), rtol=1e-5, atol=1e-6)


def test_a_store_keeps_them(tmp_path):
    """A restarted server loads buckets of named axes, and trims by them."""
    for _ in range(2):
        function = bucket_jit(
            lambda x: (x * 2, x.sum(1)),
            in_axes="batch height width",
            config=IMAGES,
            store=tmp_path,
            fingerprint="v1",
        )
        x = floats(0, 2, 3, 5)
        found = function(x)
        np.testing.assert_allclose(found[0], x * 2, rtol=1e-6)
        np.testing.assert_allclose(found[1], x.sum(1), rtol=1e-5, atol=1e-5)
    assert function.stats()["registry"]["load_count"] == 1


def test_debug_mode_tries_each_axis():
    """Padding that is counted in along one named axis is found, and that axis is named."""
    config = CUDAGraphConfig(
        capture_sizes=(2,), capture_axes={"height": (8,), "width": (8,)}, debug_mode=True
    )
    function = bucket_jit(lambda x: x.mean(2), in_axes="batch height width", config=config)
    with pytest.raises(Exception, match=r"width is padded from 5 to 8") as caught:
        function(floats(0, 2, 8, 5))
    assert type(caught.value).__name__ == "PaddingLeakError"
    fine = bucket_jit(lambda x: x.sum(2), in_axes="batch height width", pad_values=0, config=config)
    assert fine(floats(0, 2, 3, 5)).shape == (2, 3)


def test_a_plan_over_them():
    """The grid is planned from what was asked for on every axis, and put in place."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 4), capture_axes={"height": (4, 16), "width": (8, 16)}
    )
    function = bucket_jit(lambda x: x * 2, in_axes="batch height width", config=config)
    for height in (5, 5, 5, 9):
        function(floats(0, 3, height, 7))
    plan = function.replan(max_graphs=4, headroom={"height": 9})
    function.manager.wait()
    assert plan.sizes["height"] == (5, 9)
    assert function.manager.config.capture_axes["height"] == (5, 9)
    assert function.manager.config.capture_axes["width"] == (7,)
    with no_compiles():
        np.testing.assert_allclose(function(floats(0, 3, 5, 7)), floats(0, 3, 5, 7) * 2, rtol=1e-6)
    assert function.explain(floats(0, 3, 5, 7)).bucket == Bucket(3, 1, height=5, width=7)


def test_what_follows_from_the_batch_is_not_cut():
    """A call whose argument has a length of batch + 1 is refused in pieces, and says what to do."""
    config = CUDAGraphConfig(
        capture_sizes=(2,), capture_seq_lens=(8,), on_overflow="split", warmup_iterations=0
    )

    def lengths(x, offsets):
        return x * (offsets[1:] - offsets[:-1])[:, None]

    function = bucket_jit(lengths, in_axes=("batch seq", "batch+1"), config=config)
    for rows in (1, 2):
        x, offsets = floats(0, rows, 5), np.arange(rows + 1, dtype=np.float32) * 3
        np.testing.assert_allclose(function(x, offsets), x * 3, rtol=1e-6)
    with pytest.raises(InputShapeError, match=r'is batch\+1, .*set on_overflow="eager"'):
        function(floats(0, 5, 5), np.arange(6, dtype=np.float32))
    eager = dataclasses.replace(config, on_overflow="eager")
    function = bucket_jit(lengths, in_axes=("batch seq", "batch+1"), config=eager)
    np.testing.assert_allclose(
        function(floats(0, 5, 5), np.arange(6, dtype=np.float32)), floats(0, 5, 5), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("in_axes", "shapes"),
    [
        (("batch seq", "batch+1 _"), [((3, 6), (4, 4)), ((3, 6), (4, 1))]),
        (("batch seq", "seq+1 _"), [((3, 6), (7, 4)), ((3, 6), (7, 1))]),
        (("batch seq//2 _", "batch seq"), [((3, 3, 4), (3, 6)), ((3, 3, 1), (3, 6))]),
    ],
)
def test_other_shapes_of_what_follows(in_axes, shapes):
    """A call in which what follows has another shape is another call, whatever came before."""
    config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0)

    def total(x, y):
        return x.sum() + 10 * y.sum()

    function = bucket_jit(total, in_axes=in_axes, config=config)
    for pair in (*shapes, shapes[0]):
        x, y = (np.ones(shape, np.float32) for shape in pair)
        for _ in range(2):
            assert function(x, y) == total(x, y)
            assert function(x, y=y) == total(x, y)
    x, y = (np.ones(shape, np.float32) for shape in shapes[0])
    follower = 0 if "//" in in_axes[0] else 1
    broken = [x, y]
    broken[follower] = broken[follower][:, :1] if follower == 0 else broken[follower][:1]
    with pytest.raises(InputShapeError, match="follows"):
        function(*broken)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rules_below_nothing(side):
    """A rule that goes below 0 leaves nothing, as the function itself does."""
    config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0)
    for less in (3, 4):
        function = bucket_jit(
            lambda x, less=less: x[:, less:],
            in_axes=("batch seq", None),
            out_axes=f"batch seq-{less}",
            pad_side=(side, "right"),
            config=config,
        )
        for seq in (1, 2, 3, 5, 8):
            assert function(floats(0, 4, seq)).shape == (4, max(0, seq - less))


def test_a_manager_of_functions_of_other_axes():
    """The specification's calls of a manager that also serves named axes find none of theirs."""
    manager = CUDAGraphManager(
        CUDAGraphConfig(capture_sizes=(4, 8), capture_seq_lens=(8,), capture_axes={"w": (4, 8)})
    )
    function = bucket_jit(lambda x: x * 2, in_axes="batch w", manager=manager)
    function(floats(0, 3, 3))
    manager.seal()
    assert manager.get_mode_for_batch(3, 1) is CUDAGraphMode.NONE
    assert manager.replay_graph(3, 1, floats(0, 3, 1)) is None


def test_a_plan_of_what_a_manager_was_asked_for():
    """`plan_buckets` takes `manager.sizes()` over named axes, and says which it lacks."""
    config = CUDAGraphConfig(capture_sizes=(4,), capture_axes={"height": (8,), "width": (8,)})
    function = bucket_jit(lambda x: x * 2, in_axes="batch height width", config=config)
    for height in (2, 3):
        function(floats(0, 2, height, 5))
    asked = function.manager.sizes()
    for axes in (("batch", "height", "width"), ("batch", "seq", "height", "width")):
        plan = plan_buckets(asked, axes=axes, max_graphs=4)
        assert plan.sizes["height"] == (2, 3)
    with pytest.raises(ConfigError, match=r"height=2, which is none of the axes batch, seq"):
        plan_buckets(asked, max_graphs=4)


def test_sizes_that_the_plain_function_refuses():
    """What `out_axes` alone says of a function of few sizes is checked at those of each call."""
    config = CUDAGraphConfig(
        capture_sizes=(2,), capture_axes={"height": (8,), "width": (8,)}, warmup_iterations=0
    )

    def swapped(x, *, mask):
        return jnp.where(mask, x, 0).sum(2)

    function = bucket_jit(
        swapped,
        in_axes="batch height width",
        out_axes="batch height",
        mask_argname={"mask": "batch width height"},
        config=config,
    )
    square = floats(0, 2, 7, 7)
    np.testing.assert_allclose(function(square), square.sum(2), atol=1e-5)
    with pytest.raises(InputShapeError, match=r"does not take a call of .*height, width"):
        function(floats(0, 2, 5, 7))


@pytest.mark.parametrize("name", ["cls", "self", "batch2"])
def test_names_of_axes(name):
    """Any word is a name, also one that Python uses; what no pattern can hold is none."""
    bucket = CUDAGraphConfig(capture_axes={name: (4,)}).buckets()[0]
    assert pickle.loads(pickle.dumps(bucket)) == bucket
    assert bucket.size(name) == 4
    for other in ("_", "\u00f6he", "a b", "2a"):
        with pytest.raises(ConfigError, match="use a word that in_axes can hold"):
            CUDAGraphConfig(capture_axes={other: (4,)})


@pytest.mark.parametrize("ladders", [((8,), (8,)), ((1, 8), (8,)), ((1, 8), (1, 8))])
@pytest.mark.parametrize("out_axes", ["batch src", "batch"])
def test_one_element_that_is_spread_over_another_axis(ladders, out_axes):
    """Where two axes have to be equal, a size of 1 is served as the plain function does or refused.

    So it is in any order of calls: what the first bucket shows of the outputs serves the others.
    """

    def added(x, y):
        return x + y if out_axes == "batch src" else (x * y).sum(1)

    pairs = [(5, 5), (8, 8), (1, 1), (5, 1), (1, 5), (8, 1), (1, 8)]
    for order in (pairs, pairs[::-1]):
        config = CUDAGraphConfig(
            capture_sizes=(4,),
            capture_axes=dict(zip(("src", "tgt"), ladders, strict=True)),
            warmup_iterations=0,
        )
        function = bucket_jit(
            added, in_axes=("batch src", "batch tgt"), out_axes=out_axes, config=config
        )
        served = []
        for rows, (source, target) in itertools.product((1, 3), order):
            x, y = floats(0, rows, source), floats(1, rows, target)
            with contextlib.suppress(InputShapeError):
                np.testing.assert_allclose(function(x, y), added(x, y), atol=1e-5)
                served.append((source, target))
        assert {(5, 5), (8, 8)} <= {*served}
        if ladders[0] == ladders[1]:  # else the bucket of 1 by 8 has no output "batch src"
            assert (1, 1) in served
        if ladders == ((8,), (8,)):
            for source in (5, 8):
                with pytest.raises(InputShapeError, match="spreads the one element of tgt over"):
                    function(floats(0, 3, source), floats(1, 3, 1))


@pytest.mark.parametrize("rule", ["2*src", "src+1"])
def test_one_element_that_is_spread_over_a_length_that_follows(rule):
    """The same where two axes have to be equal to each other by a rule that nobody declared."""
    target = eval(rule, {"src": 4})
    config = CUDAGraphConfig(
        capture_sizes=(4,), capture_axes={"src": (4,), "tgt": (target,)}, warmup_iterations=0
    )

    def added(x, y):
        longer = jnp.repeat(x, 2, 1) if rule == "2*src" else jnp.pad(x, ((0, 0), (1, 0)))
        return (longer * y).sum(1)

    function = bucket_jit(
        added, in_axes=("batch src", "batch tgt"), out_axes="batch", config=config
    )
    x, y = floats(0, 3, 4), floats(1, 3, target)
    np.testing.assert_allclose(function(x, y), added(x, y), atol=1e-5)
    for source in (1, 4):
        with pytest.raises(InputShapeError, match="spreads the one element of"):
            function(floats(0, 3, source), floats(1, 3, 1))


@pytest.mark.parametrize(
    ("strict", "out_axes"),
    [
        (lambda x, y: jnp.stack([x, y], 1), "batch _ src"),
        (lambda x, y: jax.lax.select(x > y, x, y), "batch src"),
        (lambda x, y: jnp.concatenate([x[:, None], y[:, None]], 1).sum(1), "batch tgt"),
    ],
)
@pytest.mark.parametrize("ladders", [((2, 4), (2, 4)), ((8,), (8,))])
def test_two_axes_of_one_element_each(strict, out_axes, ladders):
    """Where two axes have to be equal and nothing is spread, two single elements are served."""
    config = CUDAGraphConfig(
        capture_sizes=(2,),
        capture_axes=dict(zip(("src", "tgt"), ladders, strict=True)),
        warmup_iterations=1,
    )
    function = bucket_jit(
        strict, in_axes=("batch src", "batch tgt"), out_axes=out_axes, config=config
    )
    for rows, length in itertools.product((1, 2), (1, 2)):
        x, y = floats(0, rows, length), floats(1, rows, length)
        np.testing.assert_allclose(function(x, y), strict(x, y))
    with pytest.raises(InputShapeError, match="does not take a call of"):
        function(floats(0, 2, 2), floats(1, 2, 1))


def test_one_element_in_a_larger_bucket_that_is_captured():
    """What a bucket of single elements shows of the outputs is no proof that none is spread."""
    config = CUDAGraphConfig(
        capture_sizes=(4,), capture_axes={"src": (1, 8), "tgt": (1, 8)}, warmup_iterations=0
    )
    function = bucket_jit(
        lambda x, y: (x * y).sum(1), in_axes=("batch src", "batch tgt"), config=config
    )
    for length in (1, 8):
        function(floats(0, 4, length), floats(1, 4, length))
    function.seal()
    with pytest.raises(InputShapeError, match="spreads the one element of tgt over"):
        function(floats(0, 4, 8), floats(1, 4, 1))


def test_one_element_that_is_spread_by_a_stored_function(tmp_path):
    """A server that loads its buckets refuses what the one that stored them does."""
    config = CUDAGraphConfig(
        capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0, store=str(tmp_path)
    )
    for _ in range(2):
        function = bucket_jit(
            lambda x: (x * np.arange(8.0)).sum(1),
            in_axes="batch seq",
            out_axes="batch",
            config=config,
        )
        function(floats(0, 4, 8))
        with pytest.raises(InputShapeError, match="spreads the one element of seq over"):
            function(floats(0, 4, 1))
    assert function.stats()["registry"]["capture_count"] == 0  # it was loaded


def test_one_element_that_is_spread_over_a_constant():
    """A function of one length alone, which spreads a single element over its constant."""
    config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(5,), warmup_iterations=0)
    weights = floats(0, 5)
    function = bucket_jit(
        lambda x: x + weights, in_axes="batch seq", out_axes="batch seq", config=config
    )
    for rows in (1, 3):
        np.testing.assert_allclose(function(floats(1, rows, 5)), floats(1, rows, 5) + weights)
        with pytest.raises(InputShapeError, match="spreads the one element of seq"):
            function(floats(1, rows, 1))
    summed = bucket_jit(
        lambda x: (x * weights).sum(1), in_axes="batch seq", out_axes="batch", config=config
    )
    for rows in (1, 3):
        x = floats(1, rows, 5)
        np.testing.assert_allclose(summed(x), (x * weights).sum(1), rtol=1e-6)
        with pytest.raises(InputShapeError, match="spreads the one element of seq"):
            summed(floats(1, rows, 1))


@pytest.mark.parametrize("rule", ["tgt+1", "2*tgt", "3*tgt-2"])
def test_a_size_that_a_rule_tells(rule):
    """An axis that no array carries itself has the size that a sum or a multiple tells."""
    config = CUDAGraphConfig(
        capture_sizes=(2, 4), capture_axes={"tgt": (4, 8)}, warmup_iterations=0, debug_mode=True
    )

    @jax.jit  # as a whole, where the check runs it without a bucket
    def real(x, *, mask):
        return jnp.where(mask.sum(1)[:, None] > 0, x * 2, 0), mask.sum(1)

    function = bucket_jit(
        real, in_axes=f"batch {rule}", mask_argname={"mask": "batch tgt"}, config=config
    )
    lengths = {size: eval(rule, {"tgt": size}) for size in range(1, 9)}
    function.warmup(floats(0, 2, lengths[8]), progress=False)
    function.seal()
    for size, length in [*lengths.items(), *lengths.items()]:
        x = floats(size, 3, length)
        doubled, counts = function(x)
        np.testing.assert_allclose(doubled, x * 2)
        assert counts.tolist() == [size] * 3
    assert function.stats()["eager_calls"] == 0
    others = set(range(1, max(lengths.values()))).difference(lengths.values(), [1])
    for length in others:
        with pytest.raises(InputShapeError, match=r"which is .*tgt.* for no size of tgt"):
            function(floats(0, 3, length))


@pytest.mark.parametrize("teller", ["batch tgt+1", "batch tgt"])
def test_a_call_without_the_array_that_tells_a_size(teller):
    """A length that is rounded says no size: without another array the error names what lacks."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_axes={"tgt": (4,)})
    function = bucket_jit(
        lambda x, y: y if x is None else (x, y), in_axes=(teller, "batch tgt//2"), config=config
    )
    with pytest.raises(InputShapeError, match=r"y has 2 .* tgt//2 for more than one size of tgt"):
        function(None, floats(0, 2, 2))


def test_a_rule_that_tells_a_size_beside_an_array_that_carries_it():
    """Arrays that carry a size come before those that tell it, and all have to agree."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_axes={"tgt": (4,), "src": (4,)})
    function = bucket_jit(
        lambda x, y, z: x[:, :-1] + y + z[:, ::2],
        in_axes=("batch tgt+1", "batch tgt", "batch 2*tgt"),
        config=config,
    )
    assert function(floats(0, 2, 4), floats(0, 2, 3), floats(0, 2, 6)).shape == (2, 3)
    with pytest.raises(InputShapeError, match=r"x has 5 .*, but y has tgt=3, from which tgt\+1=4"):
        function(floats(0, 2, 5), floats(0, 2, 3), floats(0, 2, 6))
    left = bucket_jit(
        lambda x: x.reshape(len(x), -1, 2).sum(2),
        in_axes="batch 2*tgt",
        pad_side="left",
        config=config,
    )
    for size in (3, 4, 1):
        x = floats(0, 2, 2 * size)
        np.testing.assert_allclose(left(x), x.reshape(2, -1, 2).sum(2), atol=1e-6)
    with pytest.raises(ConfigError, match=r"no argument carries 'tgt' itself, or a sum"):
        bucket_jit(lambda x: x, in_axes="batch tgt//2", config=config)


def test_a_rule_below_zero():
    """A bucket in which a length would be negative fails with the argument and its rule."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4, 8), warmup_iterations=0)
    function = bucket_jit(
        lambda x, late: x.sum(1) + late.sum(1), in_axes=("batch seq", "batch seq-5"), config=config
    )
    x, late = floats(0, 2, 7), floats(1, 2, 2)
    with pytest.warns(CUDAGraphWarning, match="late has no bucket 2x4, where seq-5 in dimension 1"):
        report = function.warmup(x, late, progress=False)
    assert [one.bucket for one in report.failed] == [(2, 4)]
    np.testing.assert_allclose(function(x, late), x.sum(1) + late.sum(1), rtol=1e-5)
    with pytest.raises(InputShapeError, match=r"from which seq-5=-1 follows: give more of seq"):
        function(floats(0, 2, 4), floats(1, 2, 0))
