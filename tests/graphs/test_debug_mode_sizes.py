"""debug_mode: each axis is padded alone and both are, at odd and even sizes."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, PaddingLeakError, bucket_jit
from cudagraph_jax.graphs.check import trial_sizes
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import as_a_whole
from tests.helpers.functions import assert_close, double, floats, stats_of

CONFIG = CUDAGraphConfig(
    capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0, debug_mode=True
)
WIDE = CUDAGraphConfig(
    capture_sizes=(2,), capture_seq_lens=(32,), warmup_iterations=0, debug_mode=True
)
BOTH = ("batch seq", "batch seq")


@as_a_whole
def packed(x, rows):
    """Sums of tokens by the row that they belong to; -1 is the last row, and not none."""
    return jnp.zeros(x.shape[0], x.dtype).at[rows].add(jnp.cos(x))


def packed_arguments(batch, seq):
    return floats(0, batch, seq), np.arange(batch * seq, dtype=np.int32).reshape(batch, seq) % batch


def convolution(x, padding, stride):
    kernel = jnp.asarray([[[1.0, 2.0, 3.0]]])
    steps = jax.lax.conv_general_dilated(x[:, None], kernel, (stride,), padding)[:, 0]
    return jnp.repeat(steps, stride, axis=1)[:, : x.shape[1]]


@by_numpy
def first_tokens_of_next(x):
    """Each row's first token beside that of the row before, the first's beside the last's."""
    return x + xp(x).roll(x[:, :1], 1, axis=0)


def said_of(function, *args, match="the padding changes the real rows"):
    with pytest.raises(PaddingLeakError, match=match) as caught:
        function(*args)
    assert function.registry.num_graphs == 0
    return str(caught.value)


@pytest.mark.parametrize("sizes", [(3, 5), (4, 5), (1, 1), (4, 8), (2, 7)])
def test_a_leak_of_full_batches_is_caught_from_any_call(sizes):
    """What is wrong only where the batch is full is refused also where the call's is not."""
    function = bucket_jit(packed, in_axes=BOTH, pad_values=(0, -1), config=CONFIG)
    message = said_of(function, *packed_arguments(*sizes))
    assert "packed at (4, " in message
    assert "(the sequence is padded from " in message
    assert "that of the sequence, where the batch is full and not at (3, " in message
    assert "as a negative index does" in message


def test_the_advice_for_full_batches():
    """A pad value out of range, which the message advises, is accepted and right at every size."""
    function = bucket_jit(packed, in_axes=BOTH, pad_values=(0, 2**31 - 1), config=CONFIG)
    for batch in (3, 4, 1, 2):
        args = packed_arguments(batch, 5)
        assert_close(function(*args), np.asarray(packed(*map(jnp.asarray, args))))


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("length", [20, 32])
def test_strides_are_tried_at_every_remainder(stride, length):
    """A SAME convolution that agrees at the call's length is refused for what it does at others."""

    @as_a_whole
    def same(x):
        return convolution(x, "SAME", stride)

    function = bucket_jit(same, in_axes="batch seq", pad_values=0, config=WIDE)
    said_of(function, floats(0, 2, length))


def test_the_advice_for_strides():
    """The message says that odd and even lengths differ, and explicit padding is accepted."""

    @as_a_whole
    def same(x):
        return convolution(x, "SAME", 2)

    message = said_of(
        bucket_jit(same, in_axes="batch seq", pad_values=0, config=WIDE), floats(0, 2, 20)
    )
    assert "same at (2, 19) in the bucket 2x32" in message
    assert "not so where the sequence is one more or one less: odd and even sizes" in message
    assert "explicit padding" in message

    @as_a_whole
    def explicit(x):
        return convolution(x, [(1, 1)], 2)

    function = bucket_jit(explicit, in_axes="batch seq", pad_values=0, config=WIDE)
    for length in (20, 27, 31, 32):
        x = floats(1, 2, length)
        assert_close(function(x), np.asarray(explicit(jnp.asarray(x))))


def test_odd_and_even_batches_of_functions_without_a_sequence():
    """A function of one axis is tried at odd and even sizes of it."""
    config = CUDAGraphConfig(capture_sizes=(32,), warmup_iterations=0, debug_mode=True)

    @as_a_whole
    def same(x):
        return convolution(x[None], "SAME", 2)[0]

    for size in (20, 32):
        message = said_of(
            bucket_jit(same, in_axes="batch", pad_values=0, config=config), floats(0, size)
        )
        assert "(the batch is padded from " in message


def test_which_axis_is_to_blame():
    """The message says which of the padded axes is counted in, and what may be taken for it."""
    sizes = {
        "that of the batch;": lambda x: x - x.mean(axis=0),
        "that of the sequence;": lambda x: x - x.mean(axis=1, keepdims=True),
        "that of the batch and that of the sequence;": lambda x: x - x.mean(),
        "such as x.shape[0] taken for the number of rows;": lambda x: x / x.shape[0],
        "such as x.shape[1] taken for a length or a position;": lambda x: x / x.shape[1],
        "x.shape[0] taken for the number of rows and x.shape[1] taken for": (
            lambda x: x / (x.shape[0] * x.shape[1])
        ),
    }
    for part, leaky in sizes.items():
        function = bucket_jit(by_numpy(leaky), in_axes="batch seq", config=CONFIG)
        message = said_of(function, floats(0, 3, 5))
        assert part in message
        assert "(the batch is padded from 3 to 4 and the sequence is padded from 5 to 8)" in message


def test_an_axis_is_told_where_it_stands():
    """What is taken for a size is named by the argument and the dimension that carries it."""

    @by_numpy
    def leaky(inputs):
        return inputs["tokens"] / inputs["tokens"].shape[2]

    function = bucket_jit(leaky, in_axes="_ batch seq", config=CONFIG)
    message = said_of(function, {"tokens": floats(0, 1, 3, 5)})
    assert "inputs['tokens'].shape[2] taken for a length or a position" in message


def test_a_chosen_pad_value_that_matters_is_told():
    """Other padding than was chosen is not tried, and the chosen one is the cause where it is."""
    function = bucket_jit(
        by_numpy(lambda x: x.sum(axis=1)), in_axes="batch seq", pad_values=1.0, config=CONFIG
    )
    message = said_of(function, floats(0, 3, 5))
    assert "with its usual padding" in message
    assert "the answer moves with what the padding holds" in message


def test_the_cause_is_found_with_padding_that_ends_loops():
    """Looking for the cause tries no padding but values that are real elsewhere."""

    @as_a_whole
    def steps(n):
        def body(state):
            n, count = state
            live = n != 1
            return jnp.where(live, jnp.where(n % 2 == 0, n // 2, 3 * n + 1), n), count + live

        _, counts = jax.lax.while_loop(lambda s: jnp.any(s[0] != 1), body, (n, jnp.zeros_like(n)))
        return counts / n.shape[1]

    function = bucket_jit(steps, in_axes="batch seq", pad_values=1, config=CONFIG)
    message = said_of(function, np.array([[6, 7, 3], [1, 2, 9]], np.int32))
    assert "n.shape[1] taken for a length" in message


def test_sizes_that_the_function_refuses_are_left_out(caplog):
    """Pairs of tokens take even lengths alone: nobody is accused for odd ones."""

    def pairs(x):
        return x.reshape(x.shape[0], -1, 2)[:, :, ::-1].reshape(x.shape)

    function = bucket_jit(pairs, in_axes="batch seq", config=CONFIG)
    with caplog.at_level(logging.INFO, logger="cudagraph_jax"):
        for sizes in [(3, 4), (4, 8)]:
            x = floats(0, *sizes)
            assert_close(function(x), np.asarray(pairs(x)))
    assert stats_of(function)["hits"] == 2 - stats_of(function)["captures"]
    assert "debug_mode leaves out a size: pairs at (" in caplog.text


def test_a_function_of_one_size_is_compared_there():
    """Where the plain function takes no smaller size, the bucket's own is checked."""

    def only_four(x):
        if not isinstance(x, jax.core.Tracer) and x.shape[0] != 4:
            raise ValueError("four rows")
        return x * 2

    x = floats(0, 4)
    config = CUDAGraphConfig(capture_sizes=(4,), warmup_iterations=0, debug_mode=True)
    assert_close(bucket_jit(only_four, in_axes="batch", config=config)(x), x * 2)


def test_five_sizes_at_most():
    """A bucket is tried with both axes padded, with each alone, and at four lengths of a row."""
    function = bucket_jit(double, in_axes="batch seq", config=CONFIG)
    x = floats(0, 3, 6)
    function(x)
    entry = function.registry.get(4, 8)
    assert entry is not None
    call = function.describe(x)
    assert trial_sizes(entry, call, pads_seq=True) == [(3, 6), (2, 8), (4, 5), (4, 4), (3, 3)]
    assert trial_sizes(entry, call, pads_seq=False) == [(3, 8), (2, 8)]


def test_one_eager_run_for_each_size():
    """A sound function runs eagerly once for each size that is tried."""
    shapes = []

    def model(x):
        if not isinstance(x, jax.core.Tracer):
            shapes.append(x.shape)
        return x * 2

    function = bucket_jit(model, in_axes="batch seq", config=CONFIG)
    function.warmup(floats(0, 3, 6), progress=False)
    assert shapes == [(3, 6), (2, 8), (4, 5), (4, 4), (3, 3)]


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.float32])
def test_masks_that_pad_on_the_left_survive_a_cut(dtype):
    """Where a shorter call would have rows of which nothing is real, it keeps their ends."""

    @by_numpy
    def attended(x, mask):
        return softmax(xp(x).where(mask[:, None] != 0, x @ x.swapaxes(1, 2), -1e30)) @ x

    mask = (np.arange(7) >= np.array([5, 0, 6])[:, None]).astype(dtype)
    function = bucket_jit(attended, in_axes=("batch seq _", "batch seq"), config=CONFIG)
    x = floats(0, 3, 7, 4)
    assert_close(function(x, mask), np.asarray(attended(x, mask)), 1e-5)


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_indices_of_rows_survive_a_cut(nodes):
    """Edges between nodes go between those that are left."""

    @as_a_whole
    def collect(x, senders, receivers):
        return jnp.zeros_like(x).at[receivers].add(x[senders])

    axes = ("batch", "seq", "seq")
    function = bucket_jit(collect, in_axes=axes, pad_values=(0, 0, 2**31 - 1), config=CONFIG)
    senders = np.arange(5, dtype=np.int32) % nodes
    args = floats(0, nodes), senders, senders[::-1].copy()
    assert_close(function(*args), np.asarray(collect(*map(jnp.asarray, args))))


def test_chosen_edges_are_left_alone():
    """Sorted values that repeat their last one are padded with nothing else."""
    axes = ("batch", "seq", "seq")
    interp = as_a_whole(jnp.interp)
    function = bucket_jit(interp, in_axes=axes, pad_values="edge", config=CONFIG, name="interp")
    queries, times = np.array([0.5, 2, 8], np.float32), np.array([0, 1, 3, 4, 9], np.float32)
    values = floats(0, 5)
    expected = np.interp(queries, times, values).astype(np.float32)
    assert_close(function(queries, times, values), expected)
    short = bucket_jit(interp, in_axes=axes, pad_values="edge", config=CONFIG, name="interp")
    assert_close(short(queries, times[:1], values[:1]), np.full(3, values[0]))


def test_rows_that_see_others_are_caught_where_they_do():
    """A roll over the rows is a leak of the batch's padding alone."""
    function = bucket_jit(first_tokens_of_next, in_axes="batch seq", config=CONFIG)
    assert "that of the batch;" in said_of(function, floats(0, 4, 8))
