"""Batchers of functions of any axes: named ones, pairs, rules, padding on the left, rows alone."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies

from cudagraph_jax import (
    BucketOverflowError,
    CUDAGraphConfig,
    CUDAGraphMode,
    InputShapeError,
    PaddingLeakError,
    bucket_jit,
)
from cudagraph_jax.batching.batcher import Batcher
from cudagraph_jax.batching.lane import put_ahead
from cudagraph_jax.testing import assert_no_compiles
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import examples
from tests.helpers.functions import floats
from tests.helpers.held_clock import HeldClock

LENGTHS = CUDAGraphConfig(capture_sizes=(1, 3), capture_seq_lens=(2, 5), warmup_iterations=1)
PAIRS = CUDAGraphConfig(
    capture_sizes=(1, 3), capture_axes={"src": (2, 5), "tgt": (3, 4)}, warmup_iterations=1
)
IMAGES = CUDAGraphConfig(
    capture_sizes=(1, 3), capture_axes={"height": (2, 5), "width": (3, 4)}, warmup_iterations=1
)
BUDGET = CUDAGraphConfig(
    capture_sizes=(1, 3),
    capture_axes={"height": (2, 5), "width": (3, 5)},
    max_bucket_elements=18,  # no 5x5, and of 2x5 and 5x3 a single row alone
    warmup_iterations=1,
)


@by_numpy
def attended(src, tgt, *, src_mask, tgt_mask):
    """An encoder and a decoder: each target row sees its own source row."""
    scores = tgt @ src.swapaxes(1, 2)
    weights = softmax(xp(src).where(src_mask[:, None, :], scores, -1e30))
    return weights @ src, xp(tgt).where(tgt_mask, tgt[..., 0], 0).sum(1)


@by_numpy
def spread(image):
    """Neighbours within an image, whose padding is 0."""
    return image[..., 0] + image.sum((1, 2))[:, None, None, 0], image.sum((1, 2))


@by_numpy
def pairs(x, bias):
    return xp(x).einsum("bij,bj->bi", bias, x), bias + x[:, None, :] * x[:, :, None]


@by_numpy
def steps(x, bounds, *, mask):
    """Differences of the bounds, of which there is one more than of the values."""
    widths = bounds[:, 1:] - bounds[:, :-1]
    return xp(x).where(mask, x * widths, 0).cumsum(1), bounds * 2


@by_numpy
def last(x, *, mask):
    """What is real stands at the end of a row that is padded in front."""
    return x[:, -1], xp(x).where(mask, x, 0).cumsum(1)


@dataclass(frozen=True)
class Model:
    """A function, and an item of any sizes for it, by their axes."""

    function: Callable[..., Any]
    in_axes: Any
    config: CUDAGraphConfig
    item: Callable[..., tuple[np.ndarray, ...]]
    sizes: Any
    masks: Any = field(default_factory=dict)
    options: Any = field(default_factory=dict)

    def alone(self, item, sizes):
        """The plain function's answer to one item."""
        masks = {
            name: np.ones([1, *map(sizes.get, axes)], bool) for name, axes in self.masks.items()
        }
        answer = by_numpy(self.function)(*(array[None] for array in item), **masks)
        return jax.tree.map(lambda array: np.asarray(array)[0], answer)


def of(*axes):
    """Sizes that are drawn, by their axes."""
    return strategies.fixed_dictionaries(
        {axis: strategies.integers(1, most) for axis, most in axes}
    )


MODELS = {
    "encoder and decoder": Model(
        attended,
        ("batch src _", "batch tgt _"),
        PAIRS,
        lambda seed, src, tgt: (floats(seed, src, 2), floats(seed + 1, tgt, 2)),
        of(("src", 5), ("tgt", 4)),
        {"src_mask": ["src"], "tgt_mask": ["tgt"]},
        {"mask_argname": {"src_mask": "batch src", "tgt_mask": "batch tgt"}},
    ),
    "decoder on the left": Model(
        lambda src, tgt, *, mask: (src * 2, tgt[:, -1] + xp(tgt).where(mask, tgt, 0).sum(1)),
        ("batch src", "batch tgt"),
        PAIRS,
        lambda seed, src, tgt: (floats(seed, src), floats(seed + 1, tgt)),
        of(("src", 5), ("tgt", 4)),
        {"mask": ["tgt"]},
        {"mask_argname": {"mask": "batch tgt"}, "pad_side": ("right", "left")},
    ),
    "images": Model(
        spread,
        "batch height width _",
        IMAGES,
        lambda seed, height, width: (floats(seed, height, width, 2),),
        of(("height", 5), ("width", 4)),
    ),
    "a budget of elements": Model(
        spread,
        "batch height width _",
        BUDGET,
        lambda seed, height, width: (floats(seed, height, width, 2),),
        of(("height", 5), ("width", 3)),
    ),
    "pairs": Model(
        pairs,
        ("batch seq", "batch seq seq"),
        LENGTHS,
        lambda seed, seq: (floats(seed, seq), floats(seed + 1, seq, seq)),
        of(("seq", 5)),
    ),
    "one more": Model(
        steps,
        ("batch seq", "batch seq+1"),
        LENGTHS,
        lambda seed, seq: (floats(seed, seq), floats(seed + 1, seq + 1)),
        of(("seq", 5)),
        {"mask": ["seq"]},
        {"mask_argname": "mask", "pad_values": (0, "edge")},
    ),
    "on the left": Model(
        last,
        "batch seq",
        LENGTHS,
        lambda seed, seq: (floats(seed, seq),),
        of(("seq", 5)),
        {"mask": ["seq"]},
        {"mask_argname": "mask", "pad_side": "left"},
    ),
    "edges on the left": Model(
        lambda x, bounds: (xp(x).maximum(x[:, :1], x), bounds[:, -1]),
        ("batch seq", "batch seq+1"),
        LENGTHS,
        lambda seed, seq: (floats(seed, seq), floats(seed + 1, seq + 1)),
        of(("seq", 5)),
        {},
        {"pad_side": "left", "pad_values": "edge"},
    ),
    "pixels and tokens": Model(
        lambda image, ids: (
            image.sum((1, 2)) + ids.sum(1),
            ids[:, :, None] + image[:, :1],
        ),
        ("batch height width", "batch seq"),
        CUDAGraphConfig(
            capture_sizes=(2,),
            capture_seq_lens=(4,),
            capture_axes={"height": (3,), "width": (2,)},
            warmup_iterations=1,
        ),
        lambda seed, height, width, seq: (floats(seed, height, width), floats(seed + 1, seq)),
        of(("height", 3), ("width", 2), ("seq", 4)),
    ),
    "rows alone": Model(
        lambda x, *, mask: x * 2 + mask[:, None],
        "batch _",
        CUDAGraphConfig(capture_sizes=(1, 3), warmup_iterations=1),
        lambda seed: (floats(seed, 3),),
        of(),
        {"mask": []},
        {"mask_argname": "mask"},
    ),
}


def served_by(model):
    function = bucket_jit(
        model.function, in_axes=model.in_axes, config=model.config, **model.options
    )
    axes = list(inspect.signature(model.item).parameters)[1:]
    item = model.item(0, **dict.fromkeys(axes, 1))
    function.warmup(*(array[None] for array in item), progress=False)
    return Batcher(function)


@pytest.fixture(scope="module", params=MODELS)
def served(request):
    model = MODELS[request.param]
    with served_by(model) as batcher:
        yield model, batcher


@examples(6, thorough=12)
@given(data=strategies.data())
def test_each_item_as_if_it_were_alone(served, data):
    """An item's answer is the plain function's to it alone, in any company; nothing compiles."""
    model, batcher = served
    sizes = data.draw(strategies.lists(model.sizes, min_size=1, max_size=8))
    items = [model.item(seed, **each) for seed, each in enumerate(sizes)]
    with assert_no_compiles():
        answers = batcher.map(items)
    for item, each, answer in zip(items, sizes, answers, strict=True):
        jax.tree.map(
            lambda own, alone: np.testing.assert_allclose(own, alone, rtol=1e-5, atol=1e-5),
            answer,
            model.alone(item, each),
        )
        assert all(isinstance(part, np.ndarray) for part in jax.tree.leaves(answer))


@pytest.fixture
def images():
    with served_by(MODELS["images"]) as batcher:
        yield batcher


@pytest.fixture
def budgeted():
    with served_by(MODELS["a budget of elements"]) as batcher:
        yield batcher


def image(height, width):
    return floats(height, height, width, 2)


def test_elements_are_the_product_of_each_rows_sizes(images):
    """Real elements are those of each row, at its own height and width; computed, the buckets'."""
    sizes = [(1, 1), (2, 3), (5, 4), (2, 2), (5, 1)]
    images.map([image(*size) for size in sizes])
    stats = images.stats()
    assert stats["real_elements"] == sum(height * width for height, width in sizes)
    buckets = {str(bucket): bucket.elements for bucket in IMAGES.buckets()}
    assert stats["computed_elements"] == sum(
        buckets[bucket] * count for bucket, count in stats["calls"].items()
    )


def test_the_functions_own_counts_stay_true(images):
    """For the function a call of the batcher is a replay of its rows at their own sizes."""
    images.map([image(1 + n % 5, 1 + n % 4) for n in range(20)])
    own, stats = images.stats(), images._function.stats()
    assert stats["real_elements"] == own["real_elements"]
    assert stats["real_elements"] + stats["padded_elements"] == own["computed_elements"]
    assert stats["hits"] == sum(own["calls"].values())


def test_like_shares_calls_with_like():
    """Tall rows and wide ones are not padded to each other's size where that costs more."""
    config = CUDAGraphConfig(
        capture_sizes=(4,), capture_axes={"height": (2, 50), "width": (2, 50)}, warmup_iterations=0
    )
    function = bucket_jit(lambda x: x * 2, in_axes="batch height width", config=config)
    function.warmup(np.ones((1, 1, 1), np.float32), progress=False)
    clock = HeldClock()
    with Batcher(function, clock=clock) as batcher:
        clock.hold()
        futures = [batcher.submit(np.ones(sizes, np.float32)) for sizes in [(1, 50), (50, 1)] * 4]
        clock.release()
        assert [future.result().shape for future in futures] == [(1, 50), (50, 1)] * 4
        assert batcher.stats()["calls"] == {"4x1,height=2,width=50": 1, "4x1,height=50,width=2": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 4), "has height=6, width=4, which no captured bucket holds: height fits up to 5: cut"),
        ((6, 9), "height=6, width=9, which .*: height fits up to 5 and width fits up to 4: cut it"),
    ],
)
def test_items_outside_the_grid(images, sizes, message):
    """An item larger than all buckets is refused at once; what came and what fits is said."""
    with pytest.raises(BucketOverflowError, match=message):
        images.submit(image(*sizes))
    assert images.stats()["items"]["refused"] == 1


def test_sizes_that_no_bucket_holds_at_once(budgeted):
    """Where the budget leaves out the largest buckets, it is said which axis to cut."""
    message = "height=5, width=5, which no .*: height fits up to 2 or width fits up to 3: cut it"
    with pytest.raises(BucketOverflowError, match=message):
        budgeted.submit(image(5, 5))


def test_only_buckets_that_there_are(budgeted):
    """Rows whose joint size has no bucket share no call."""
    sizes = [(5, 1), (1, 5), (5, 3), (2, 5), (1, 1)] * 4
    answers = budgeted.map([image(*size) for size in sizes])
    assert [answer[0].shape for answer in answers] == sizes
    assert set(budgeted.stats()["calls"]) <= {str(bucket) for bucket in BUDGET.buckets()}


def test_items_of_other_shapes(images):
    """What is no axis must be as captured; the number of dimensions is that of a row."""
    with pytest.raises(InputShapeError, match="no bucket is captured for items like"):
        images.submit(floats(0, 2, 2, 3))
    with pytest.raises(InputShapeError, match=r"one row of 'batch height width _'"):
        images.submit(floats(0, 1, 2, 2, 2))
    with pytest.raises(InputShapeError, match="no elements"):
        images.submit(floats(0, 0, 2, 2))


def test_arrays_that_disagree():
    """Of an item, too, the arrays agree in their sizes and in what follows from them."""
    pairs, bounds = served_by(MODELS["pairs"]), served_by(MODELS["one more"])
    with pytest.raises(InputShapeError, match=r"seq=2 but .* has seq=3"):
        pairs.submit(floats(0, 2), floats(0, 3, 3))
    with pytest.raises(InputShapeError, match=r"seq\+1=4 follows"):
        bounds.submit(floats(0, 3), floats(0, 3))


def test_a_mode_that_runs_no_bucket(images):
    """While the manager is paused, items of several axes are answered one by one."""
    images._function.manager.mode = CUDAGraphMode.NONE
    for sizes in ((1, 3), (5, 4)):
        own, total = images.submit(image(*sizes)).result()
        np.testing.assert_allclose(total, image(*sizes).sum((0, 1)), rtol=1e-5)
        assert own.shape == sizes


def test_an_answer_that_is_larger_than_the_buckets():
    """A row whose answer the bucket does not have is refused, and its answer not cut short."""
    function = bucket_jit(
        lambda x: jnp.zeros((len(x), x.shape[1] % 5)) + x[:, :1],
        in_axes="batch seq",
        config=CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=1),
    )
    function.warmup(floats(0, 1, 2), progress=False)
    with Batcher(function) as batcher:
        assert batcher.submit(floats(0, 2)).result().shape == (2,)
        with pytest.raises(InputShapeError, match=r"seq_len\)=\(1, 4\), more than in the bucket"):
            batcher.submit(floats(0, 4))


def test_inputs_that_are_put_ahead_and_donated():
    """Inputs that are on the device before their call are donated, and answers are each row's."""
    function = bucket_jit(
        lambda x, *, mask: jnp.where(mask, x * 2, 0),
        in_axes="batch height width",
        mask_argname="mask",
        donate_argnums=0,
        config=IMAGES,
    )
    function.warmup(floats(0, 1, 1, 1), progress=False)
    put = partial(put_ahead, platform=lambda: "gpu")
    rows = [floats(n, 1 + n % 5, 1 + n % 4) for n in range(40)]
    with assert_no_compiles(), Batcher(function, put=put) as batcher:
        for row, answer in zip(rows, batcher.map(rows), strict=True):
            np.testing.assert_array_equal(answer, row * 2)


@pytest.mark.parametrize("own", [True, False])
def test_debug_mode_tries_rows_of_several_sizes(own):
    """In debug_mode rows of several heights and widths share a call before one is answered."""

    @by_numpy
    def mean(image, *, mask):
        size = mask.sum((1, 2)) if own else mask[0].sum()
        return (image * mask).sum((1, 2)) / size

    config = CUDAGraphConfig.from_dict({**IMAGES.to_dict(), "debug_mode": True})
    function = bucket_jit(mean, in_axes="batch height width", mask_argname="mask", config=config)
    function.warmup(floats(0, 1, 4, 3), progress=False)
    with Batcher(function) as batcher:
        if own:
            answer = batcher.submit(floats(1, 4, 3)).result()
            np.testing.assert_allclose(answer, floats(1, 4, 3).mean(), rtol=1e-5)
        else:
            with pytest.raises(PaddingLeakError, match="another answer in company than alone"):
                batcher.submit(floats(1, 4, 3))
