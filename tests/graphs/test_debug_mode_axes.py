"""debug_mode for axes by name: what is tried, and where outputs are real under masks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import Bucket, CUDAGraphConfig, PaddingLeakError, bucket_jit
from cudagraph_jax.graphs.check import trial_sizes
from cudagraph_jax.graphs.trial import Masks, masks_of
from cudagraph_jax.program.outputs import OutputLeaf
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import AxisPattern
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import as_a_whole
from tests.helpers.functions import assert_close, floats

CONFIG = CUDAGraphConfig(
    capture_sizes=(2,),
    capture_seq_lens=(8,),
    capture_axes={"height": (8, 16), "src": (8,), "tgt": (6,)},
    warmup_iterations=0,
    debug_mode=True,
)
WHERE_TRUE = dataclasses.replace(CONFIG, compare_where="mask")
AXES = ("batch", "seq", "src", "tgt")


def entry_and_call(*args, in_axes):
    config = dataclasses.replace(CONFIG, debug_mode=False)
    function = bucket_jit(lambda *args: args[0] * 2, in_axes=in_axes, config=config)
    function(*args)
    return function.registry.entries()[0], function.describe(*args)


def remainders(sizes, step):
    return {size % step for size in sizes}


@pytest.mark.parametrize("shape", [(2, 15, 7, 5), (1, 12, 8, 6), (2, 16, 8, 6)])
def test_each_axis_is_tried_alone_and_all_are(shape):
    """Every axis is padded alone, and all but the batch at every remainder of two, three, four."""
    entry, call = entry_and_call(np.ones(shape, np.float32), in_axes="batch height src tgt")
    tried, bucket = trial_sizes(entry, call, pads_seq=True), entry.bucket
    assert len(tried) <= 9
    padded = [
        {axis for axis, size in sizes.sizes.items() if size != bucket.size(axis)} for sizes in tried
    ]
    assert {"batch", "height", "src", "tgt"} in padded
    assert all({axis} in padded for axis in ("batch", "height", "src", "tgt"))
    for axis in ("height", "src", "tgt"):
        sizes = {size.size(axis) for size in tried if size.size(axis) != bucket.size(axis)}
        assert remainders(sizes, 2) == {0, 1}
        assert remainders(sizes, 3) == {0, 1, 2}
        assert remainders(sizes, 4) == {0, 1, 2, 3}


RULES = {
    "seq-3": lambda n: n - 3,
    "seq//2": lambda n: n // 2,
    "3*seq//4-1": lambda n: n * 3 // 4 - 1,
}
CALLS = [(rule, n) for rule, length in RULES.items() for n in (2, 3, 4, 5, 8) if length(n) >= 0]


@pytest.mark.parametrize(("rule", "seq"), CALLS)
def test_lengths_that_follow_never_vanish(rule, seq):
    """No size is tried at which an argument that follows it would have no element."""
    length = RULES[rule]
    x, y = np.ones((2, seq), np.float32), np.ones((2, length(seq)), np.float32)
    entry, call = entry_and_call(x, y, in_axes=("batch seq", f"batch {rule}"))
    tried = trial_sizes(entry, call, pads_seq=True)
    assert tried
    assert all(length(size.seq_len) > 0 for size in tried)


@pytest.mark.parametrize(("rule", "seq"), CALLS)
def test_functions_of_lengths_that_follow(rule, seq):
    """Sound ones are accepted and leaks are found, also from a call whose array is empty."""
    axes: dict[str, Any] = {"in_axes": ("batch seq", f"batch {rule}"), "config": CONFIG}
    x, y = floats(0, 1, seq), floats(1, 1, RULES[rule](seq))
    found = bucket_jit(by_numpy(lambda x, y: (x * 2, y * 3)), **axes)(x, y)
    assert_close(found[1], y * 3)
    leaky = bucket_jit(by_numpy(lambda x, y: (x, y - y.mean(1, keepdims=True))), **axes)
    with pytest.raises(PaddingLeakError, match="the sequence is padded from"):
        leaky(x, y)


@as_a_whole
def strided(x):
    """Means of three rows at each second one: from another one on where there are an odd number."""
    kernel = jnp.ones((1, 1, 3, 1)) / 3
    y = jax.lax.conv_general_dilated(x[:, None], kernel, (2, 1), "SAME")[:, 0]
    return jnp.repeat(y, 2, axis=1)[:, : x.shape[1]]


@pytest.mark.parametrize("height", [12, 16])
def test_strides_along_a_named_axis(height):
    """What starts elsewhere in an odd size is found along an axis that is not the last one."""
    function = bucket_jit(strided, in_axes="batch height src", pad_values=0, config=CONFIG)
    with pytest.raises(PaddingLeakError, match="height is padded from"):
        function(floats(0, 2, height, 8))


@by_numpy
def attended(query, keys, src_mask, tgt_mask):
    """Of each target, and pairs of them, under masks of both; what is masked sees all alike."""
    allowed = (tgt_mask[:, :, None] != 0) & (src_mask[:, None, :] != 0)
    found = softmax(xp(keys).where(allowed, query @ keys.swapaxes(1, 2), -1e30)) @ keys
    return found, found @ found.swapaxes(1, 2)


SRC_MASK = np.arange(5) < np.array([[3], [5]])
TGT_MASK = np.arange(4) < np.array([[4], [2]])


@pytest.mark.parametrize("dtype", [np.bool_, np.int32])
def test_masks_over_some_of_the_axes(dtype):
    """Outputs of targets, and of pairs of targets, are compared where their own mask is true."""
    axes = ("batch tgt _", "batch src _", "batch src", "batch tgt")
    args = floats(0, 2, 4, 3), floats(1, 2, 5, 3), SRC_MASK.astype(dtype), TGT_MASK.astype(dtype)
    with pytest.raises(PaddingLeakError, match="only where src_mask or tgt_mask is false"):
        bucket_jit(attended, in_axes=axes, config=CONFIG)(*args)
    found, pairs = bucket_jit(attended, in_axes=axes, config=WHERE_TRUE)(*args)
    expected = jax.tree.map(np.asarray, attended(*args))
    assert_close(found[TGT_MASK], expected[0][TGT_MASK])
    both = TGT_MASK[:, :, None] & TGT_MASK[:, None, :]
    assert_close(pairs[both], expected[1][both])


def test_what_is_no_mask():
    """Bools with an axis twice, or whose length follows from one, leave out nothing."""
    function = bucket_jit(
        lambda x, pairs, longer: x * pairs.any(2) * longer.any(),
        in_axes=("batch seq", "batch seq seq", "batch seq+1"),
        config=CONFIG,
    )
    for seq in (1, 3):
        pairs, longer = np.zeros((2, seq, seq), bool), np.zeros((2, seq + 1), bool)
        call = function.describe(floats(0, 2, seq), pairs, longer)
        assert masks_of(Program(call), call) is None


SUBSETS = [c for n in range(1, 4) for c in itertools.combinations(AXES, n)]


@given(st.data())
def test_where_outputs_are_real(data):
    """An output is real where masks allow any of the axes that it lacks, at all its places."""
    sizes = {axis: data.draw(st.integers(1, 3), label=axis) for axis in AXES}
    kinds = data.draw(st.lists(st.sampled_from(SUBSETS), min_size=1, max_size=3))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = [(random.random([sizes[a] for a in axes]) < 0.6, axes) for axes in kinds]
    names = data.draw(st.lists(st.sampled_from(AXES), min_size=1, max_size=3))
    leaf = OutputLeaf(
        "y", AxisPattern.parse(" ".join(names)).resolve(len(names), name="y"), "host", len(names)
    )
    masks = Masks(("m",) * len(arrays), tuple(arrays))
    whole = np.ones([sizes[axis] for axis in AXES], bool)
    for is_true, axes in arrays:
        whole &= is_true.reshape([sizes[axis] if axis in axes else 1 for axis in AXES])
    assert masks.any_real == whole.any()
    found = masks.over(leaf)
    carried = {axis for axes in kinds for axis in axes}
    if not carried & set(names):
        assert found is None
        return
    turns = max(map(names.count, set(names) & carried))
    expected = np.ones([sizes[name] for name in names], bool)
    for turn in range(turns):
        own = {}
        for axis in dict.fromkeys(names):
            places = [place for place, name in enumerate(names) if name == axis]
            own[axis] = places[min(turn, len(places) - 1)]
        for at in np.ndindex(*expected.shape):
            index = tuple(at[own[axis]] if axis in own else slice(None) for axis in AXES)
            expected[at] &= whole[index].any()
    assert found is not None
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


def test_sizes_of_a_named_axis_alone():
    """A function of named axes alone is tried along them, and never along the batch."""
    entry, call = entry_and_call(np.ones((5, 7), np.float32), in_axes="height src")
    tried = trial_sizes(entry, call, pads_seq=True)
    assert {size.batch_size for size in tried} == {1}
    assert Bucket(1, 1, height=8, src=6) in tried
