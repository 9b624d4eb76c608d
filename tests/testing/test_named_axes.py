"""The testing kit for axes by name: what is drawn, what is found, and what is not accused."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from cudagraph_jax import Bucket, CUDAGraphConfig, bucket_jit
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.testing import (
    assert_bucketing_preserves,
    assert_padding_does_not_leak,
    inputs,
    sizes,
)
from tests.helpers.axis_mistakes import ACTS, KINDS
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import ANY, IS_THOROUGH, examples

CONFIG = CUDAGraphConfig(capture_sizes=(2,), capture_axes={"height": (100, 200), "src": (7,)})
ASSERTIONS = (assert_bucketing_preserves, assert_padding_does_not_leak)
FEW = examples(8, thorough=20, database=None)
MANY = hypothesis.settings(max_examples=10_000, database=None)
# Each act with each kind by one of the assertions, which take turns; thoroughly by both.
CROSSED = [
    pytest.param(check, act, kind, id=f"{check.__name__}-{act.__name__}-{kind}")
    for place, (check, act, kind) in enumerate(itertools.product(ASSERTIONS, ACTS, KINDS))
    if IS_THOROUGH or place % 2 == 0
]
by_kind = pytest.mark.parametrize("kind", KINDS)
crossed = pytest.mark.parametrize(("check", "act", "kind"), CROSSED)


@crossed
def test_planted_mistakes_are_found(check, act, kind):
    """Padding that counts as real is found for each kind of axis, and the axis is named."""
    axis, options, model = KINDS[kind]
    with pytest.raises(AssertionError) as caught:
        check(model(act, is_right=False), settings=ANY, **options)
    message = str(caught.value)
    assert f"{axis} is padded from " in message
    assert "padding is counted in, that of " in message or "its size is counted in" in message
    blamed = message.partition("counted in, ")[2]
    others = {kind.axis for kind in KINDS.values()} - {axis}
    assert not any(f"that of {other}" in blamed for other in others | {"the batch", "width"})


@crossed
def test_their_twins_are_not_accused(check, act, kind):
    """The same models pass where they leave the padding out."""
    _, options, model = KINDS[kind]
    check(model(act, is_right=True), settings=FEW, **options)


@by_kind
def test_failures_are_the_simplest(kind):
    """What is found is shrunk to one row and the shortest size that is padded."""
    axis, options, model = KINDS[kind]
    with pytest.raises(AssertionError) as caught:
        assert_bucketing_preserves(model(ACTS[1], is_right=False), **options)
    found = caught.value.__notes__[0]
    assert f"{axis} is padded from 2 to 4" in str(caught.value)
    shapes = {
        "a named axis": "images=array([[[",
        "an axis twice": "pairs=array([[[",
        "a length that follows": "edges=array([[",
        "a mask over its own axes": "keys=array([[[",
        "rows padded in front": "prompts=array([[",
    }
    assert shapes[kind] in found


def test_a_bucketed_function():
    """What `bucket_jit` made of a function of named axes is tested as it is."""
    _, options, model = KINDS["a mask over its own axes"]
    function = bucket_jit(model(ACTS[1], is_right=True), **options)
    for check in ASSERTIONS:
        check(function, settings=FEW)


def test_without_a_configuration():
    """A plain function has a small grid for the axes that it names."""
    with pytest.raises(AssertionError, match="width is padded from 1 to 4"):
        assert_bucketing_preserves(lambda x: x.mean(2), in_axes="batch height width", settings=FEW)
    assert_bucketing_preserves(lambda x: x * 2, in_axes="batch height width", settings=FEW)


def test_where_a_mask_of_the_callers_is_true():
    """`compare_where="mask"` goes by a mask over some of the axes, for pairs of them as well."""

    @by_numpy
    def pairs(x, src_mask):
        allowed = src_mask[:, :, None] & src_mask[:, None, :]
        return softmax(xp(x).where(allowed, x[:, :, None] * x[:, None, :], -1e30))

    @by_numpy
    def leaky(x, src_mask):
        return pairs(x, src_mask) + x.mean(1)[:, None, None]

    options: dict[str, Any] = {
        "in_axes": ("batch src", "batch src"),
        "dtypes": (None, "bool"),
        "values": (None, "mask"),
        "config": CUDAGraphConfig(capture_sizes=(2,), capture_axes={"src": (1, 4)}),
    }
    for check in ASSERTIONS:
        with pytest.raises(AssertionError, match="differs only where src_mask is false"):
            check(pairs, settings=ANY, **options)
        check(pairs, compare_where="mask", settings=FEW, **options)
        with pytest.raises(AssertionError, match="that of src"):
            check(leaky, compare_where="mask", settings=ANY, **options)


@examples(25, thorough=100)
@given(st.data())
def test_sizes_of_named_axes(data):
    """All axes are drawn, inside their limits and inside narrower ones."""
    size = data.draw(sizes(CONFIG))
    assert list(size.sizes) == ["batch", "seq", "height", "src"]
    assert CONFIG.admits(size)
    limits = {"height": 32, "batch": 1}
    small = data.draw(sizes(CONFIG, max_batch_size=2, max_sizes=limits))
    assert small.batch_size == 1
    assert small.size("height") <= 32


@pytest.mark.parametrize("height", [1, 100, 101, 200])
@pytest.mark.parametrize("src", [1, 7])
def test_every_edge_may_be_drawn(height, src):
    """1, a bucket's size, one above it and the largest one, along each named axis."""
    wanted = {"height": height, "src": src}
    found = find(sizes(CONFIG), lambda size: wanted.items() <= size.sizes.items(), settings=MANY)
    assert found == Bucket(1, 1, height=height, src=src)


def test_limits_that_do_not_fit():
    """A limit below 1, or of an axis that there is not, is refused when it is asked for."""
    with pytest.raises(ConfigError, match=r"max_sizes\['height'\]=0 is below 1: a call has"):
        sizes(CONFIG, max_sizes={"height": 0})
    with pytest.raises(ConfigError, match=r"max_sizes\['hight'\]=3: .*did you mean 'height'"):
        inputs("batch height", config=CONFIG, max_sizes={"hight": 3})
    with pytest.raises(ConfigError, match="no size of height up to 2 leaves an element in all"):
        inputs(("batch height", "height-2"), config=CONFIG, max_sizes={"height": 2})


@given(
    inputs(
        ("batch src tgt", "batch src src", "tgt+1 2*src", "src//2 tgt-1"),
        max_sizes={"tgt": 5},
    )
)
def test_arrays_of_named_axes(args):
    """Arrays of one call have the same sizes, and lengths that follow are those of the call."""
    x, pairs, longer, shorter = args
    batch, src, tgt = x.shape
    assert pairs.shape == (batch, src, src)
    assert longer.shape == (tgt + 1, 2 * src)
    assert shorter.shape == (src // 2, tgt - 1)
    assert shorter.size > 0
    assert tgt <= 5


@given(inputs(("batch src", "batch"), dtypes="int32", values=("positions src", "lengths src")))
def test_lengths_of_a_named_axis(args):
    """Lengths and positions may be those of another axis than the sequence."""
    positions, lengths = args
    src = positions.shape[1]
    assert 0 <= positions.min() <= positions.max() < src
    assert 1 <= lengths.min() <= lengths.max() <= src


@pytest.mark.parametrize(
    "axes", ["batch src", "src batch", "batch tgt src", "batch src src", "src"]
)
def test_masks_of_named_axes(axes):
    """A mask is ones and then zeros along the last axis that is not the batch."""

    @given(inputs((axes,), dtypes="bool", values="mask"))
    def check(args):
        last = max(place for place, name in enumerate(axes.split()) if name != "batch")
        rows = np.moveaxis(args[0], last, -1).astype(int)
        assert (rows[..., 0] == 1).all()
        assert (np.diff(rows, axis=-1) <= 0).all()

    check()


def test_words_of_axes_that_there_are_not():
    """An axis that the configuration does not have is refused, and the nearest one is named."""
    with pytest.raises(ConfigError, match=r"values='lengths scr' of argument 0.*mean 'src'"):
        inputs("src", dtypes="int32", values="lengths scr")


def test_masks_of_rows_that_are_padded_in_front():
    """The kit draws masks that begin with zeros where a function is padded on the left."""
    seen: list[np.ndarray] = []

    def last(x, mask):
        if not isinstance(mask, jax.core.Tracer):
            seen.append(np.asarray(mask))
        return jnp.where(mask, x, 0).sum(1)

    assert_bucketing_preserves(
        last,
        in_axes=("batch seq", "batch seq"),
        pad_side="left",
        dtypes=(None, "bool"),
        values=(None, "mask"),
        config=CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4,)),
        settings=examples(25, thorough=100),
    )
    assert any(not mask.all() for mask in seen)
    assert all(mask[:, -1].all() for mask in seen)

    @given(inputs(("batch src", "batch tgt"), pad_side=("right", "left"), values="mask"))
    def sides(arguments):
        source, target = arguments
        assert source[:, 0].all()
        assert target[:, -1].all()

    sides()
