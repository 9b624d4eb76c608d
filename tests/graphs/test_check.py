"""debug_mode: padding that leaks is caught at the capture, and nothing else is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphManager,
    CUDAGraphWarning,
    PaddingLeakError,
    bucket_jit,
)
from tests.graphs.functions import GRID, KINDS, assert_close, double, floats, stats_of, tokens

DEBUG = dataclasses.replace(GRID, debug_mode=True)
X = floats(0, 2, 4)


def mean_over_batch(x):
    return x - jnp.mean(x, axis=0)


def mean_over_tokens(x):
    return jnp.mean(x, axis=1)


def unmasked_softmax(x):
    return jax.nn.softmax(x, axis=1)


def position_from_the_end(x):
    return x + (x.shape[1] - jnp.arange(x.shape[1], dtype=x.dtype))


def scaled_by_length(x):
    return x / x.shape[1]


def last_token(x):
    return x[:, -1]


def reversed_rows(x):
    return x[::-1]


def total_of_squares(x):
    return x * jnp.sum(x * x + 1)


LEAKS = [
    mean_over_batch,
    mean_over_tokens,
    unmasked_softmax,
    position_from_the_end,
    scaled_by_length,
    last_token,
    reversed_rows,
    total_of_squares,
]


@pytest.mark.parametrize("leaky", LEAKS)
@pytest.mark.parametrize("sizes", [(2, 4), (3, 5)], ids=["padded", "exact"])
def test_leaks_are_caught(leaky, sizes):
    """Real rows that depend on the padding are a PaddingLeakError, and nothing is kept."""
    function = bucket_jit(leaky, in_axes=("batch seq",), config=DEBUG)
    with pytest.raises(PaddingLeakError, match=r"the padding changes the real rows") as caught:
        function(floats(0, *sizes))
    assert leaky.__name__ in str(caught.value)
    assert caught.value.stage == "check"
    assert function.registry.num_graphs == 0
    assert stats_of(function)["errors_by_reason"] == {"leak": 1}


@pytest.mark.parametrize("leaky", [mean_over_batch, mean_over_tokens, unmasked_softmax])
def test_leaks_are_reported_by_warmup(leaky):
    """Warm-up raises at a leaking bucket, and does not keep it."""
    function = bucket_jit(leaky, in_axes=("batch seq",), config=DEBUG)
    with pytest.raises(PaddingLeakError, match="the padding changes the real rows"):
        function.warmup(X, progress=False)
    assert function.registry.num_graphs == 0


def test_leaks_of_integers_are_caught():
    """Integer padding is moved between the ends of the real values' range."""
    function = bucket_jit(
        lambda ids: ids + jnp.max(ids, axis=1, keepdims=True), in_axes=("batch seq",), config=DEBUG
    )
    with pytest.raises(PaddingLeakError):
        function(-tokens(0, 2, 4) - 3)


def test_leaks_in_the_specifications_calls_are_caught():
    """execute_or_capture is checked like any other capture."""
    manager = CUDAGraphManager(DEBUG)
    with pytest.raises(PaddingLeakError):
        manager.execute_or_capture(2, 4, mean_over_batch, X)
    assert_close(manager.execute_or_capture(2, 4, double, X), X * 2)


@pytest.mark.parametrize(
    "name", [name for name in KINDS if "sum" not in name and "one" not in name]
)
def test_what_does_not_leak_is_accepted(name):
    """Masked attention, per-row layers, lookups and the like pass, padded or exact."""
    kind = KINDS[name]
    for batch, seq in [(2, 4), (3, 5)]:
        function = kind.bucketed(DEBUG)
        args = kind.arguments(0, batch, seq)
        assert_close(function(*args), kind.plain(args, batch, seq), kind.tolerance)
        assert_close(function(*args), kind.plain(args, batch, seq), kind.tolerance)
        assert stats_of(function)["captures"] == stats_of(function)["hits"] == 1


def test_additive_masks_are_accepted():
    """A weight of exactly zero stops large finite padding, though never NaN."""

    def pooled(x, mask):
        weights = jax.nn.softmax(jnp.where(mask, 0.0, -1e30), axis=1)
        return jnp.sum(weights * x, axis=1)

    function = bucket_jit(pooled, in_axes=("batch seq", "batch seq"), config=DEBUG)
    assert_close(function(X, np.ones((2, 4), bool)), X.mean(1))


def test_a_masked_multiplication_that_lets_large_values_through_is_caught():
    """A mask that only damps the padding is a leak."""

    def pooled(x, mask):
        return jnp.sum(jnp.where(mask, 1.0, 0.1) * x, axis=1)

    function = bucket_jit(pooled, in_axes=("batch seq", "batch seq"), config=DEBUG)
    with pytest.raises(PaddingLeakError):
        function(X, np.ones((2, 4), bool))


def test_impure_functions_are_caught():
    """A function whose compiled answer is not its eager one is named."""
    state = []

    def impure(x):
        state.append(x)
        return x * len(state)

    function = bucket_jit(impure, in_axes=("batch",), config=DEBUG)
    with pytest.warns(CUDAGraphWarning, match="is it pure"):
        function(floats(0, 1))
    assert function.registry.num_graphs == 0


def test_donated_inputs_survive_the_check():
    """The check works on copies: donated arrays are still there for the call itself."""
    function = bucket_jit(double, in_axes=("batch",), donate_argnums=0, config=DEBUG)
    for size in (2, 3):
        x = jnp.asarray(floats(0, size))
        assert_close(function(x), floats(0, size) * 2)
        assert x.is_deleted()


@pytest.mark.parametrize("unpad", ["device", "none", "host"])
def test_every_unpad_is_checked(unpad):
    """A leak is found however outputs are handed out."""
    fine = bucket_jit(double, in_axes=("batch seq",), unpad=unpad, config=DEBUG)
    fine(X)
    leaky = bucket_jit(mean_over_tokens, in_axes=("batch seq",), unpad=unpad, config=DEBUG)
    with pytest.raises(PaddingLeakError):
        leaky(X)


def test_outputs_that_cannot_be_compared_are_left_out():
    """Padded outputs with unclear axes are not compared; the others are."""

    def pairs(x):
        return x[:, :, None] * x[:, None, :], x * 2

    function = bucket_jit(pairs, in_axes=("batch seq",), unpad="none", config=DEBUG)
    found = function(X)
    assert found[0].shape == (3, 5, 5)
    assert_close(np.asarray(found[1])[:2, :4], X * 2)


def test_random_keys_pass_through():
    """A PRNG key among the arguments is used as it is."""
    function = bucket_jit(
        lambda key, x: x + jax.random.uniform(key), in_axes=(None, "batch"), config=DEBUG
    )
    key = jax.random.key(3)
    assert_close(function(key, floats(0, 2)), floats(0, 2) + np.asarray(jax.random.uniform(key)))


def test_abstract_warmup_is_checked_with_drawn_values():
    """Warm-up from shapes alone finds leaks as well."""
    function = bucket_jit(mean_over_batch, in_axes=("batch seq",), config=DEBUG)
    shape = jax.ShapeDtypeStruct((2, 4), np.float32)
    with pytest.raises(PaddingLeakError):
        function.warmup(shape, progress=False)
    ids = bucket_jit(lambda ids: ids + 1, in_axes=("batch seq",), config=DEBUG)
    struct = jax.ShapeDtypeStruct((2, 4), np.int32)
    assert not ids.warmup(struct, progress=False).failed


def test_declared_out_axes_that_are_wrong_are_caught():
    """Outputs of another shape than the eager ones are an error that says so."""
    function = bucket_jit(
        lambda x: jnp.sum(x, axis=1), in_axes=("batch seq",), out_axes="_", config=DEBUG
    )
    with pytest.warns(CUDAGraphWarning, match="declare out_axes"):
        assert_close(function(X), X.sum(1))
