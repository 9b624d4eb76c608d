"""`BucketedFunction.pad`: arguments at the size of their bucket, ahead of the call itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import (
    BucketOverflowError,
    CUDAGraphMode,
    InputShapeError,
    Padded,
    bucket_jit,
    no_compiles,
)
from tests.helpers.examples import examples
from tests.helpers.functions import CHAINED as CONFIG
from tests.helpers.functions import ONE_BUCKET as ONE
from tests.helpers.functions import floats, tokens


def identity(params, x, rows, *, mask):
    return x + 0, rows + 0, mask


SIDES = [
    bucket_jit(
        identity,
        in_axes=(None, "batch seq", "batch"),
        pad_values=(0, fill, -1),
        pad_side=("right", side, "right"),
        mask_argname="mask",
        unpad="none",
        config=CONFIG,
    )
    for side in ("right", "left")
    for fill in (0, 7, "edge", "any")
]


@examples(30, thorough=100)
@given(st.integers(1, 4), st.integers(1, 16), st.sampled_from(SIDES))
def test_as_the_call_would_pad_them(batch, seq, function):
    """What is padded ahead is what the call itself pads to, and nothing is done anew in it."""
    params, x = jnp.ones(3), floats(batch + 10 * seq, batch, seq)
    rows = tokens(seq, batch)
    expected = function(params, x, rows)
    with no_compiles():
        ahead = function.pad(params, x, rows)
        assert ahead[0] is params
        for made, array, whole in zip(ahead[1:], (x, rows), expected, strict=False):
            assert isinstance(made.array, jax.Array)
            assert made.shape == array.shape
            np.testing.assert_array_equal(made, array)
            np.testing.assert_array_equal(made.array, whole)
        for arguments in (ahead, jax.device_put(ahead)):
            jax.tree.map(np.testing.assert_array_equal, function(*arguments), expected)
            reason = function.explain(*arguments).reason
            is_padded = not ahead[1].is_whole
            assert ("x is passed on as it is" in reason) == is_padded
            assert "host" not in reason


def test_nothing_is_copied_in_the_call():
    """What was padded ahead is not copied again, in either direction."""
    function = bucket_jit(lambda x, y: x @ y.T, in_axes="batch seq", unpad="none", config=ONE)
    x, y = floats(0, 3, 5), floats(1, 3, 5)
    ahead = function.pad(x, y)
    function(*ahead)
    hits = function.stats()["hits"]
    with jax.transfer_guard("disallow_explicit"):
        found = function(*ahead)
    assert function.stats()["hits"] == hits + 1
    np.testing.assert_allclose(found[:3, :3], x @ y.T, rtol=1e-5)


def test_what_carries_no_axes_is_as_it_was():
    """Numbers, static arguments, keywords and what is passed through are given back as they are."""

    def scaled(x, mode, scale, *, shift=0.0):
        return {"twice": x["a"] * scale + shift, "mode": x["b"]}[mode]

    function = bucket_jit(
        scaled,
        in_axes=({"a": "batch seq", "b": None}, None, None),
        static_argnames="mode",
        config=ONE,
    )
    x = {"a": floats(0, 3, 5), "b": np.ones(3, np.float32)}
    ahead = function.pad(x, "twice", 2.0, shift=1.0)
    assert ahead[1:] == ("twice", 2.0)
    assert ahead[0]["b"] is x["b"]
    assert repr(ahead[0]["a"]) == "Padded(float32[3,5] in [4,8])"
    np.testing.assert_allclose(function(*ahead, shift=1.0), x["a"] * 2 + 1, rtol=1e-6)
    (first,) = function.pad(x, mode="twice", scale=2.0)
    np.testing.assert_allclose(function(first, mode="twice", scale=2.0), x["a"] * 2, rtol=1e-6)
    with pytest.raises(InputShapeError, match="x carries axes and is given by keyword"):
        function.pad(x=x, mode="twice", scale=2.0)
    for_all = bucket_jit(lambda x, scale: x * scale, in_axes="batch seq", config=ONE)
    assert for_all.pad(x["a"], 2.0)[1] == 2.0


def test_arrays_of_other_kinds():
    """Of JAX, of 64-bit integers, which are narrowed, and exact ones, which are not shared."""
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=ONE)
    (ahead,) = function.pad(jnp.ones((3, 5)))
    assert isinstance(ahead.array, jax.Array)
    with jax.transfer_guard("disallow"):
        function.pad(ahead.array)
    np.testing.assert_array_equal(function(ahead), np.full((3, 5), 2.0))
    whole = floats(0, 4, 8)
    (ahead,) = function.pad(whole)
    before, whole[:] = whole.copy(), 0
    np.testing.assert_array_equal(function(ahead), before * 2)
    (ahead,) = function.pad(np.ones((3, 5), np.int64))
    assert ahead.dtype == np.int32
    assert function(ahead).dtype == np.int32
    shape = jax.ShapeDtypeStruct((3, 5), np.float32)
    with pytest.raises(InputShapeError, match=r"x is a jax\.ShapeDtypeStruct"):
        function.pad(shape)


def test_what_another_function_has_made():
    """A `Padded` is filled once, ahead, and then taken as it is by each call."""
    first = bucket_jit(lambda x: x + 1, in_axes="batch seq", unpad="padded", config=ONE)
    second = bucket_jit(lambda x: x.sum(1), in_axes="batch seq", config=ONE)
    x = floats(0, 3, 5)
    made = first(x)
    (ahead,) = second.pad(made)
    assert isinstance(ahead.array, jax.Array)
    assert "x is passed on as it is" in second.explain(ahead).reason
    assert second.pad(ahead)[0] is ahead
    for _ in range(2):
        np.testing.assert_allclose(second(ahead), (x + 1).sum(1), rtol=1e-5)
    for value in (-1, "edge"):
        other = bucket_jit(lambda x: x, in_axes="batch seq", pad_values=value, config=ONE)
        for given_ahead in (made, ahead):
            (again,) = other.pad(given_ahead)
            assert again.layout.fill == value
            assert np.asarray(again.array)[0, 7] == (-1 if value == -1 else x[0, 4] + 1)


def test_which_bucket():
    """That of the call: a larger one while sealed, the grid's where nothing runs in buckets."""
    x = floats(0, 3, 5)
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=CONFIG)
    function(floats(0, 4, 16))
    function.seal()
    assert function.pad(x)[0].array.shape == (4, 16)
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.DISABLED):
        function.manager.mode = mode
        (ahead,) = function.pad(x)
        assert ahead.array.shape == (4, 8)
        np.testing.assert_array_equal(function(ahead), x * 2)
    for policy in ("eager", "split", "error"):
        limited = bucket_jit(
            lambda x: x,
            in_axes="batch seq",
            config=dataclasses.replace(ONE, on_overflow=policy, on_miss="error"),
        )
        with pytest.raises(
            BucketOverflowError, match=r"5x5 is outside the limits.*add larger buckets"
        ):
            limited.pad(floats(0, 5, 5))
        limited.seal()  # what a piece of it is refused for is no bucket of the whole
        assert limited.explain(floats(0, 5, 5)).bucket is None
        with pytest.raises(BucketOverflowError, match="5x5 is outside the limits"):
            limited.pad(floats(0, 5, 5))
    exact = bucket_jit(
        lambda x: x, in_axes="batch seq", config=dataclasses.replace(ONE, on_overflow="exact")
    )
    (ahead,) = exact.pad(floats(0, 5, 5))
    assert ahead.is_whole
    assert isinstance(ahead, Padded)
