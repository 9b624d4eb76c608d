"""debug_mode: padding that leaks is caught at the capture, and nothing else is."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CaptureError,
    CUDAGraphManager,
    CUDAGraphWarning,
    PaddingLeakError,
    bucket_jit,
)
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import IS_THOROUGH, as_a_whole
from tests.helpers.functions import GRID, TABLE, assert_close, double, floats, stats_of, tokens

DEBUG = dataclasses.replace(GRID, debug_mode=True)
X = floats(0, 2, 4)


@by_numpy
def mean_over_batch(x):
    return x - x.mean(axis=0)


@by_numpy
def mean_over_tokens(x):
    return x.mean(axis=1)


@by_numpy
def unmasked_softmax(x):
    return softmax(x, axis=1)


@by_numpy
def position_from_the_end(x):
    return x + (x.shape[1] - xp(x).arange(x.shape[1], dtype=x.dtype))


@by_numpy
def scaled_by_length(x):
    return x / x.shape[1]


@by_numpy
def last_token(x):
    return x[:, -1]


@by_numpy
def reversed_rows(x):
    return x[::-1]


@by_numpy
def total_of_squares(x):
    return x * (x * x + 1).sum()


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


@by_numpy
def share_of_batch(x):
    return x / (1 + abs(x).sum(axis=0))


@by_numpy
def sum_over_tokens(x):
    return x.sum(axis=1)


@by_numpy
def sum_of_numbers(x):
    return xp(x).nansum(x, axis=1)


@by_numpy
def near_zero(x):
    return (x * xp(x).exp(-x * x)).sum(axis=1)


@by_numpy
def sum_of_embeddings(ids):
    return xp(ids).asarray(TABLE)[ids].sum(axis=1)


@by_numpy
def embedding_off_mean(ids):
    found = xp(ids).asarray(TABLE)[ids]
    return found - found.mean(axis=0)


EXAMPLES = {
    "zeros": lambda dtype: np.zeros((2, 4), dtype),
    "ones": lambda dtype: np.ones((2, 4), dtype),
    "constant": lambda dtype: np.full((2, 4), 5, dtype),
    "random": lambda dtype: tokens(0, 2, 4).astype(dtype),
    "abstract": lambda dtype: jax.ShapeDtypeStruct((2, 4), dtype),
}


LEAKS_OF_DTYPES = [
    *[(leaky, np.float32) for leaky in LEAKS],
    *[(leaky, np.float32) for leaky in (share_of_batch, sum_over_tokens, sum_of_numbers)],
    (sum_over_tokens, jnp.bfloat16),
    (sum_over_tokens, np.int32),
    (sum_of_embeddings, np.int32),
    (embedding_off_mean, np.int32),
]


@pytest.mark.parametrize(
    ("leaky", "dtype", "example"),
    [
        pytest.param(leaky, dtype, example, id=f"{leaky.__name__}-{dtype.__name__}-{example}")
        for place, ((leaky, dtype), example) in enumerate(
            itertools.product(LEAKS_OF_DTYPES, EXAMPLES)
        )
        if IS_THOROUGH or place % 2 == 0  # by turns: there are five examples
    ],
)
def test_leaks_are_reported_by_warmup(leaky, dtype, example):
    """Warm-up from any example raises at a leaking bucket, and does not keep it."""
    function = bucket_jit(leaky, in_axes=("batch seq",), config=DEBUG)
    with pytest.raises(PaddingLeakError, match="the padding changes the real rows"):
        function.warmup(EXAMPLES[example](dtype), progress=False)
    assert function.registry.num_graphs == 0


@pytest.mark.parametrize("leaky", [sum_of_numbers, near_zero])
def test_what_ignores_nan_or_huge_values_is_caught(leaky):
    """Ordinary values find the leaks that NaN or huge ones do not."""
    function = bucket_jit(leaky, in_axes=("batch seq",), config=DEBUG)
    with pytest.raises(PaddingLeakError):
        function.warmup(X, progress=False)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("least", [-1, -100])
def test_what_goes_by_the_order_is_caught(dtype, least):
    """Where NaN and 0 come after all that is real, a smaller value comes before it."""
    in_order = by_numpy(lambda x: xp(x).sort(x, axis=1))
    sort = bucket_jit(in_order, in_axes="batch seq", config=DEBUG)
    with pytest.raises(PaddingLeakError, match="the padding changes the real rows"):
        sort(np.linspace(least, least / 2, 12).reshape(3, 4).astype(dtype))


@pytest.mark.parametrize(
    ("leaky", "example", "pad_value"),
    [
        (jnp.all, np.eye(3, 4) == 0, 0),
        (jnp.any, np.eye(3, 4) == 1, True),
        (jnp.min, np.tri(3, 4, dtype=np.float32), 0),
        (jnp.argmin, np.eye(3, 4) == 0, 0),
    ],
    ids=["all", "any", "min", "argmin"],
)
def test_what_a_masks_own_elements_hide_is_caught(leaky, example, pad_value):
    """What is false in each row of the example hides that padding is; a row of nothing else not."""
    for by_rows, reduce in (("batch seq", True), ("batch _", False)):
        rows = bucket_jit(
            lambda x, reduce=reduce: leaky(x, axis=1) if reduce else leaky(x, axis=0),
            in_axes=by_rows,
            pad_values=pad_value,
            config=DEBUG,
        )
        with pytest.raises(PaddingLeakError, match="the padding changes the real rows"):
            rows(example)
    chosen = bucket_jit(
        lambda x: leaky(x, axis=1), in_axes="batch seq", pad_values=1 - pad_value, config=DEBUG
    )
    np.testing.assert_array_equal(chosen(example), leaky(example, axis=1))


@pytest.mark.parametrize("example", ["zeros", "ones", "abstract"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_leak_beside_a_mask_is_caught(dtype, example):
    """What may be a mask is one only if it decides whether other padding matters."""

    @by_numpy
    def leaky(x, data, mask):
        real = (x * mask[..., None]).sum(1)
        return real + data.sum(1)[:, None]

    function = bucket_jit(leaky, in_axes=("batch seq _", "batch seq", "batch seq"), config=DEBUG)
    data, mask = EXAMPLES[example](dtype), EXAMPLES[example](dtype)
    with pytest.raises(PaddingLeakError, match="in the padding of data, but should be"):
        function.warmup(floats(0, 2, 4, 3), data, mask, progress=False)


def test_leaks_of_integers_are_caught():
    """Integer padding is moved between the ends of the real values' range."""
    function = bucket_jit(
        by_numpy(lambda ids: ids + ids.max(axis=1, keepdims=True)),
        in_axes="batch seq",
        config=DEBUG,
    )
    with pytest.raises(PaddingLeakError):
        function(-tokens(0, 2, 4) - 3)


def test_leaks_in_the_specifications_calls_are_caught():
    """execute_or_capture is checked like any other capture."""
    manager = CUDAGraphManager(DEBUG)
    with pytest.raises(PaddingLeakError):
        manager.execute_or_capture(2, 4, mean_over_batch, X)
    assert_close(manager.execute_or_capture(2, 4, double, X), X * 2)


def test_additive_masks_are_accepted():
    """A weight of exactly zero stops large finite padding, though never NaN."""

    @as_a_whole
    def pooled(x, mask):
        weights = jax.nn.softmax(jnp.where(mask, 0.0, -1e30), axis=1)
        return jnp.sum(weights * x, axis=1)

    function = bucket_jit(pooled, in_axes=("batch seq", "batch seq"), config=DEBUG)
    assert_close(function(X, np.ones((2, 4), bool)), X.mean(1))


def test_a_masked_multiplication_that_lets_large_values_through_is_caught():
    """A mask that only damps the padding is a leak."""

    @as_a_whole
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


def test_eager_outputs_of_another_shape_are_caught():
    """Outputs of another shape than the eager ones are an error that says so."""

    def changing(x):
        rows = jnp.sum(x, axis=1)
        return rows if isinstance(x, jax.core.Tracer) else rows[:, None]

    function = bucket_jit(changing, in_axes=("batch seq",), config=DEBUG)
    with pytest.warns(CUDAGraphWarning, match=r"the eager function \(2, 1\): return the same"):
        assert_close(function(X), X.sum(1)[:, None])


def test_eager_outputs_of_another_tree_are_caught():
    """A function that returns another pytree when it is not traced is named with both."""

    def changing(x):
        return (x, x) if isinstance(x, jax.core.Tracer) else [x, x]

    function = bucket_jit(changing, in_axes=("batch",), config=DEBUG)
    with pytest.warns(CUDAGraphWarning, match="return the same pytree"):
        function(floats(0, 1))
    assert stats_of(function)["eager_by_reason"] == {"failed": 1}


def test_a_plain_function_that_fails_in_the_check_is_remembered():
    """What Python raises in the check is a CaptureError for good: one capture, not one a call."""

    tried: list[int] = []

    def refusing(x):
        if not isinstance(x, jax.core.Tracer) and len(tried) < 3:
            tried.append(x.shape[0])
            raise ValueError(f"not {tried[-1]} rows")
        return x * 2

    function = bucket_jit(refusing, in_axes=("batch",), config=DEBUG)
    with pytest.warns(CUDAGraphWarning, match="the plain function does not run: not 2 rows"):
        assert_close(function(floats(0, 3)), floats(0, 3) * 2)
    assert_close(function(floats(0, 3)), floats(0, 3) * 2)
    assert stats_of(function)["eager_by_reason"] == {"failed": 2}
    assert stats_of(function)["registry"]["capture_count"] == 1
    assert tried == [2, 1, 3]


def test_a_bucket_that_fails_on_the_device_is_tried_again_later():
    """What the device refuses in the check is a CaptureError, which a pause may mend."""

    def refused(x):
        raise ValueError("out of memory")

    def calling(x):
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(refused, result, x) if isinstance(x, jax.core.Tracer) else x

    registry = CUDAGraphManager(DEBUG).registry
    with pytest.raises(CaptureError, match=r"(?s)does not run: .*out of memory") as caught:
        registry.capture(3, 5, calling, (3, 5))
    assert caught.value.stage == "warm-up"
    assert registry.num_graphs == 0
