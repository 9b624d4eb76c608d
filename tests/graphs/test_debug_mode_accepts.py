"""debug_mode: what has no padding, or ignores it, is served."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from tests.helpers.examples import as_a_whole
from tests.helpers.functions import GRID, KINDS, WIDTH, assert_close, floats, stats_of, tokens

DEBUG = dataclasses.replace(GRID, debug_mode=True)
ONE = dataclasses.replace(DEBUG, capture_sizes=(3,), capture_seq_lens=(5,))
FEATURES, TOKENS = "batch seq _", "batch seq"


def attended(x, allowed):
    scores = x @ jnp.swapaxes(x, 1, 2)
    return jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1) @ x


@pytest.mark.parametrize(
    "name", [name for name in KINDS if "sum" not in name and "one" not in name]
)
def test_what_does_not_leak_is_accepted(name):
    """Masked attention, per-row layers, lookups and the like pass, padded or exact."""
    kind = dataclasses.replace(KINDS[name], function=as_a_whole(KINDS[name].function))
    for batch, seq in [(2, 4), (3, 5)]:
        function = kind.bucketed(DEBUG)
        args = kind.arguments(0, batch, seq)
        assert_close(function(*args), kind.plain(args, batch, seq), kind.tolerance)
        assert_close(function(*args), kind.plain(args, batch, seq), kind.tolerance)
        assert stats_of(function)["captures"] == stats_of(function)["hits"] == 1


def test_sequences_that_are_never_padded_may_be_reduced():
    """Without capture_seq_lens a sequence has no padding to leak."""
    config = CUDAGraphConfig(capture_sizes=(3,), warmup_iterations=1, debug_mode=True)
    x = floats(0, 2, 4)
    function = bucket_jit(lambda x: x.mean(axis=1), in_axes=("batch seq",), config=config)
    assert_close(function(x), x.mean(1))
    assert_close(function(floats(0, 3, 4)), floats(0, 3, 4).mean(1))


@pytest.mark.parametrize("sizes", [(3, 5), (2, 4)])
def test_nothing_is_padded_without_copies(sizes):
    """Without copies inputs have a bucket's size; an example of another size is repeated."""
    config = dataclasses.replace(ONE, cudagraph_copy_inputs=False)
    function = bucket_jit(lambda x: x - jnp.mean(x), in_axes=("batch seq",), config=config)
    assert not function.warmup(floats(0, *sizes), progress=False).failed
    x = floats(1, 3, 5)
    assert_close(function(x), x - x.mean())


def test_lengths_do_not_reach_behind_a_cut():
    """An exact call is cut to make room for padding, and its lengths and counts with it."""
    x = floats(0, 3, 5)

    @as_a_whole
    def counted(x, lengths, count):
        real = jnp.arange(x.shape[1]) < jnp.minimum(lengths[:, None], count)
        return jnp.sum(jnp.where(real, x, 0), axis=1)

    function = bucket_jit(counted, in_axes=("batch seq", "batch", None), config=ONE)
    lengths = np.full(3, 5, np.int32)
    assert_close(function(x, lengths, 5), x.sum(1))
    assert_close(function(x, lengths, np.int32(4)), x[:, :4].sum(1))


def test_pad_values_that_the_function_ignores_are_the_remedy():
    """An array with a pad value of its own keeps it."""
    x = floats(0, 2, 4)
    function = bucket_jit(
        lambda x: jnp.max(x, axis=1), in_axes=("batch seq",), pad_values=-np.inf, config=ONE
    )
    assert_close(function(x), x.max(1))

    @as_a_whole
    def segments(x, ids):
        return attended(x, ids[:, :, None] == ids[:, None, :])

    segmented = bucket_jit(segments, in_axes=(FEATURES, TOKENS), pad_values=(0, -1), config=ONE)
    features, ids = floats(0, 2, 4, WIDTH), np.array([[0, 0, 1, 2], [1, 1, 1, 3]], np.int32)
    assert_close(segmented(features, ids), np.asarray(segments(features, ids)))


@pytest.mark.parametrize("dtype", [np.complex64, np.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_the_tolerance_is_that_of_the_dtype(dtype):
    """Buckets agree to half of the digits that the output's dtype has."""

    @as_a_whole
    def transformed(x):
        y = jnp.fft.fft(jnp.tanh(x * 1.7) * jnp.exp(1j * x), axis=-1) / 3
        return y if dtype == np.complex64 else (y.real / 8).astype(dtype)

    function = bucket_jit(transformed, in_axes=("batch _",), config=ONE)
    assert function(floats(0, 2, 64)).dtype == dtype


def test_declared_masks_may_say_one_for_padding():
    """Padding of 1 says that a position is none: an example of it gets positions that are."""

    @as_a_whole
    def ignoring(x, is_padding):
        return attended(x, ~is_padding[:, None, :])

    for example in (np.zeros, np.ones, jax.ShapeDtypeStruct):
        function = bucket_jit(
            ignoring, in_axes=(FEATURES, TOKENS), pad_values=(0, True), config=ONE
        )
        args = floats(0, 2, 4, WIDTH), example((2, 4), np.bool_)
        assert not function.warmup(*args, progress=False).failed


def test_random_keys_pass_through():
    """A PRNG key among the arguments is used as it is."""
    function = bucket_jit(
        lambda key, x: x + jax.random.uniform(key), in_axes=(None, "batch"), config=DEBUG
    )
    key = jax.random.key(3)
    assert_close(function(key, floats(0, 2)), floats(0, 2) + np.asarray(jax.random.uniform(key)))


def test_outputs_that_cannot_be_compared_are_left_out():
    """Padded outputs with unclear axes are not compared; the others are."""

    def pairs(x):
        return x[:, :, None] * x[:, None, :], x * 2

    function = bucket_jit(pairs, in_axes=("batch seq",), unpad="none", config=DEBUG)
    x = floats(0, 2, 4)
    found = function(x)
    assert found[0].shape == (3, 5, 5)
    assert_close(np.asarray(found[1])[:2, :4], x * 2)


def test_a_table_of_two_rows_is_enough_for_abstract_indices():
    """Abstract integers are indices that the smallest table has."""
    two = floats(0, 2, WIDTH)
    function = bucket_jit(
        lambda ids: jnp.take(two, ids, axis=0, mode="fill"), in_axes=(TOKENS,), config=ONE
    )
    assert not function.warmup(jax.ShapeDtypeStruct((2, 4), np.int32), progress=False).failed
    assert_close(function(tokens(0, 2, 4) % 2), two[tokens(0, 2, 4) % 2])
