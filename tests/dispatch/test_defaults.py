"""Defaults, written out or left out: the same call, and the same program."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphMode, InputShapeError, bucket_jit, no_compiles
from tests.helpers.functions import GRID, assert_close, floats

X = floats(0, 2, 3)
SHIFT = np.array([1.0], np.float32)
WEIGHTS = jnp.array([2.0])


def positional(x, mode="a", *, extra="b"):
    return x * {"a": 1, "c": 2}[mode] + {"b": 0, "d": 3}[extra]


def positional_only(x, mode="a", /):
    return x * {"a": 1, "c": 2}[mode]


def behind_a_gap(x, scale=2.0, mode="a", /):
    return x * scale * {"a": 1, "c": 2}[mode]


STATIC = {
    "positional": (positional, ("mode", "extra")),
    "positional-only": (positional_only, "mode"),
}

WRITTEN: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "left out": ((), {}),
    "by position": (("a",), {}),
    "by keyword": ((), {"mode": "a"}),
    "both": (("a",), {"extra": "b"}),
    "both by keyword": ((), {"extra": "b", "mode": "a"}),
}


@pytest.mark.parametrize("first", WRITTEN)
@pytest.mark.parametrize("warm", [True, False], ids=["warm-up", "call"])
def test_a_static_default_is_one_program(first, warm):
    """However a static default is written, it selects the program of all the other ways."""
    function = bucket_jit(
        positional, in_axes="batch seq", static_argnames=("mode", "extra"), config=GRID
    )
    args, kwargs = WRITTEN[first]
    if warm:
        function.warmup(X, *args, **kwargs, progress=False)
    else:
        function(X, *args, **kwargs)
    captures = function.registry.capture_count
    with no_compiles():
        for args, kwargs in WRITTEN.values():
            for _ in range(2):
                assert np.array_equal(function(X, *args, **kwargs), X)
            assert function.explain(X, *args, **kwargs).mode is CUDAGraphMode.REPLAY
    assert function.registry.capture_count == captures
    assert_close(function(X, "c", extra="d"), X * 2 + 3)


def test_a_static_default_by_position_alone():
    """A static argument that has no keyword is filled in, too, where it can be."""
    function = bucket_jit(positional_only, in_axes="batch seq", static_argnames="mode", config=GRID)
    assert np.array_equal(function(X), X)
    with no_compiles():
        assert np.array_equal(function(X, "a"), X)
    gap = bucket_jit(behind_a_gap, in_axes="batch seq", static_argnames="mode", config=GRID)
    assert_close(gap(X), X * 2)
    assert_close(
        bucket_jit(behind_a_gap, in_axes=("batch seq", None), static_argnames="mode", config=GRID)(
            X, 3.0
        ),
        X * 3,
    )


def test_a_static_default_without_a_hash():
    """A default that cannot be hashed is no key while it is left out, as for `jax.jit`."""

    def sized(x, sizes=[2]):  # noqa: B006
        return x * sizes[0]

    function = bucket_jit(sized, in_axes="batch seq", static_argnames="sizes", config=GRID)
    assert_close(function(X), X * 2)
    assert_close(function(X, sizes=(3,)), X * 3)
    with pytest.raises(InputShapeError, match="static argument sizes is a list"):
        function(X, sizes=[2])


def test_static_keywords_in_any_order():
    """Static arguments of `**options` are one program in whatever order they are written."""

    def scaled(x, **options):
        return x * options["a"] + options["b"]

    function = bucket_jit(scaled, in_axes="batch seq", static_argnames=("a", "b"), config=GRID)
    assert_close(function(X, a=2, b=3), X * 2 + 3)
    with no_compiles():
        assert_close(function(X, b=3, a=2), X * 2 + 3)


def number(x, scale=2.0):
    return x * scale


def number_by_keyword(x, *, scale=2.0):
    return x * scale


def nothing(x, shift=None):
    return x * 2 if shift is None else x * 2 + shift


def array(x, weights=WEIGHTS):
    return x * weights


def host_array(x, shift=SHIFT):
    return x + shift


PASSED: dict[str, tuple[Callable[..., Any], str, Any]] = {
    "number": (number, "scale", 2.0),
    "number by keyword": (number_by_keyword, "scale", 2.0),
    "None": (nothing, "shift", None),
    "array": (array, "weights", WEIGHTS),
    "NumPy array": (host_array, "shift", SHIFT),
}


@pytest.mark.parametrize("case", PASSED)
@pytest.mark.parametrize("is_first_written", [True, False])
@pytest.mark.parametrize("warm", [True, False], ids=["warm-up", "call"])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_passed_default_is_one_program(case, is_first_written, warm, on_device):
    """What is passed through compiles nothing where it is the default, written out or not."""
    plain, name, default = PASSED[case]
    function = bucket_jit(
        plain, in_axes=("batch seq",) + (None,) * (case != "number by keyword"), config=GRID
    )
    hosts = [floats(0, 2, 3), floats(1, 3, 5)]  # padded, and exact
    answers = [np.asarray(plain(x)) for x in hosts]
    inputs = [jnp.asarray(x) if on_device else x for x in hosts]
    kwargs = {name: default} if is_first_written else {}
    for x in inputs:
        if warm:
            function.warmup(x, **kwargs, progress=False)
        else:
            function(x, **kwargs)
    captures = function.registry.capture_count
    with no_compiles():
        for (x, expected), _ in itertools.product(zip(inputs, answers, strict=True), range(3)):
            assert_close(function(x), expected)
            assert_close(function(x, **{name: default}), expected)
            if case != "number by keyword":
                assert_close(function(x, default), expected)
            assert function.explain(x).mode is CUDAGraphMode.REPLAY
            assert function.explain(x, **{name: default}).mode is CUDAGraphMode.REPLAY
    assert function.registry.capture_count == captures


@pytest.mark.parametrize("other", [3.0, 2, -2.0, np.float32(3), True])
def test_another_value_than_the_default_is_computed_with(other):
    """Only the default itself is served by a program that has it for a constant."""
    function = bucket_jit(number, in_axes=("batch seq", None), config=GRID)
    function.warmup(X, progress=False)
    assert_close(function(X), X * 2)
    assert_close(function(X, other), jax.jit(number)(X, other))
    assert_close(function(X, 2.0), X * 2)
    assert_close(function(X), X * 2)


def test_a_warm_up_with_a_default_written_out_takes_all_values():
    """A warm-up captures the program that was asked for, also where the default's is there."""
    function = bucket_jit(number, in_axes=("batch seq", None), config=GRID)
    function.warmup(X, progress=False)
    function.warmup(X, 2.0, progress=False)
    with no_compiles():
        for scale in (2.0, 0.5, 7.0):
            assert_close(function(X, scale), X * np.float32(scale))
        assert_close(function(X), X * 2)


def test_signed_zeros_are_two_values():
    """-0.0 is not taken for a default of 0.0."""

    def added(x, shift=0.0):
        return x + jnp.copysign(1.0, shift)

    function = bucket_jit(added, in_axes=("batch seq", None), config=GRID)
    assert_close(function(X), X + 1)
    assert_close(function(X, -0.0), X - 1)


def test_a_default_that_decides():
    """A default that the function branches by stays a constant, and so does its like."""

    def branches(x, train=False):
        return x * 3 if train else x * 2

    function = bucket_jit(branches, in_axes=("batch seq", None), config=GRID)
    assert_close(function(X), X * 2)
    with no_compiles():
        assert_close(function(X, False), X * 2)
        assert_close(function(X, train=False), X * 2)
    with pytest.warns(UserWarning, match="by the value of train, name that in static_argnames"):
        assert_close(function(X, True), X * 3)


def test_a_sealed_function_finds_the_other_program():
    """After `seal` a call whose own program is not there is answered by the one that is."""
    config = CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(8,), warmup_iterations=0)
    function = bucket_jit(number, in_axes=("batch seq", None), config=config)
    function(np.ones((4, 8), np.float32))
    function.seal()
    for x in (np.ones((3, 5), np.float32), np.ones((1, 2), np.float32)):
        assert_close(function(x, scale=2.0), x * 2)
    assert function.stats()["eager_calls"] == 0
