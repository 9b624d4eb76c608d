"""Defaults, written out or left out: the same call, and the same program."""

import copy
import dataclasses
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphMode, InputShapeError, bucket_jit, no_compiles
from tests.helpers.functions import GRID, assert_close, floats

CONFIG = dataclasses.replace(GRID, capture_sizes=(3,), capture_seq_lens=(5,))
X = floats(0, 2, 3)
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
        positional, in_axes="batch seq", static_argnames=("mode", "extra"), config=CONFIG
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
    function = bucket_jit(
        positional_only, in_axes="batch seq", static_argnames="mode", config=CONFIG
    )
    assert np.array_equal(function(X), X)
    with no_compiles():
        assert np.array_equal(function(X, "a"), X)
    gap = bucket_jit(behind_a_gap, in_axes="batch seq", static_argnames="mode", config=CONFIG)
    assert_close(gap(X), X * 2)
    assert_close(
        bucket_jit(
            behind_a_gap, in_axes=("batch seq", None), static_argnames="mode", config=CONFIG
        )(X, 3.0),
        X * 3,
    )


def test_a_static_default_without_a_hash():
    """A default that cannot be hashed is no key while it is left out, as for `jax.jit`."""

    def sized(x, sizes=[2]):  # noqa: B006
        return x * sizes[0]

    function = bucket_jit(sized, in_axes="batch seq", static_argnames="sizes", config=CONFIG)
    assert_close(function(X), X * 2)
    assert_close(function(X, sizes=(3,)), X * 3)
    with pytest.raises(InputShapeError, match="static argument sizes is a list"):
        function(X, sizes=[2])


def test_static_keywords_in_any_order():
    """Static arguments of `**options` are one program in whatever order they are written."""

    def scaled(x, **options):
        return x * options["a"] + options["b"]

    function = bucket_jit(scaled, in_axes="batch seq", static_argnames=("a", "b"), config=CONFIG)
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


def numpy_scalar(x, scale=np.float32(2)):  # noqa: B008
    return x * scale


def numbers(x, pair=(1.0, (np.int8(2), None))):  # noqa: B008
    return x * pair[0] * pair[1][0]


PASSED: dict[str, tuple[Callable[..., Any], str, Any]] = {
    "number": (number, "scale", 2.0),
    "number by keyword": (number_by_keyword, "scale", 2.0),
    "None": (nothing, "shift", None),
    "array": (array, "weights", WEIGHTS),
    "NumPy scalar": (numpy_scalar, "scale", np.float32(2)),
    "tuple": (numbers, "pair", (1.0, (np.int8(2), None))),
}


@pytest.mark.parametrize("case", PASSED)
@pytest.mark.parametrize("is_first_written", [True, False])
@pytest.mark.parametrize("warm", [True, False], ids=["warm-up", "call"])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_passed_default_is_one_program(case, is_first_written, warm, on_device):
    """What is passed through compiles nothing where it is the default, written out or not."""
    plain, name, default = PASSED[case]
    function = bucket_jit(
        plain, in_axes=("batch seq",) + (None,) * (case != "number by keyword"), config=CONFIG
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


@dataclasses.dataclass
class Weight:
    """A pytree of one number that can be set."""

    value: Any

    def __getitem__(self, _):
        return self.value

    def __setitem__(self, _, value):
        self.value = value


jax.tree_util.register_dataclass(Weight, ["value"], [])
CHANGING = [
    np.full(1, 2, np.float32), [np.float32(2)], {0: np.float32(2)}, Weight(np.float32(2)),
    (np.full(1, 2, np.float32),),
]  # fmt: skip


@pytest.mark.parametrize("default", CHANGING, ids=lambda default: type(default).__name__)
def test_a_default_that_has_changed(default):
    """A default that can be changed in place is computed with as it is when it is passed."""

    def scaled(x, weight=default):
        weight = weight[0] if isinstance(weight, tuple) else weight
        return x * weight[0]

    function = bucket_jit(scaled, in_axes=("batch seq", None), config=CONFIG)
    function.warmup(X, progress=False)
    assert_close(function(X), X * 2)
    (default[0] if isinstance(default, tuple) else default)[0] = np.float32(5)
    try:
        for _ in range(2):
            assert_close(function(X, default), X * 5)
            assert_close(function(X, weight=default), X * 5)
    finally:
        (default[0] if isinstance(default, tuple) else default)[0] = np.float32(2)


@dataclasses.dataclass(frozen=True)
class Options:
    size: Any
    about: str = ""


ALIKE = [
    ((0, 0), (0.0, 0.0)), ((0.0,), (-0.0,)), (0.0, -0.0), ((1, (2, True)), (1, (2, 1))),
    (frozenset({1}), frozenset({1.0})), (Options(1), Options(1.0)),
    (Options((0,)), Options((0.0,))), (np.float32(0), np.float32(-0.0)), (0j, complex(0, -0.0)),
]  # fmt: skip


def described(value: Any) -> int:
    return zlib.crc32(repr(value).encode()) % 1000


@pytest.mark.parametrize(("default", "other"), ALIKE, ids=repr)
def test_static_values_that_are_equal_and_not_alike(default, other):
    """Equal static values of other types, or signs of zero, are other programs, however nested."""

    def added(x, value=default):
        return x + described(value)

    function = bucket_jit(added, in_axes="batch seq", static_argnames="value", config=CONFIG)
    for value in (default, other):
        assert_close(function(X, value=value), X + described(value))
    with no_compiles():
        assert_close(function(X), X + described(default))
        assert_close(function(X, value=copy.deepcopy(other)), X + described(other))


NESTED = [((0, 0), (0.0, 0.0)), ((0.0,), (-0.0,)), (np.float32(2), np.float16(2))]


@pytest.mark.parametrize(("default", "other"), NESTED, ids=repr)
def test_passed_values_that_are_equal_and_not_alike(default, other):
    """Nor is such a value taken for the default where it is passed through."""

    def added(x, value=default):
        first = value[0] if isinstance(value, tuple) else value
        return x.astype(jnp.int32) + jnp.copysign(1, first)

    function = bucket_jit(added, in_axes=("batch seq", None), config=CONFIG)
    for value in (default, other):
        function(X, default)
        expected = jax.jit(added)(X, value)
        assert_close(function(X, value), expected)


@pytest.mark.parametrize("other", [3.0, 2, -2.0, np.float32(3), True])
def test_another_value_than_the_default_is_computed_with(other):
    """Only the default itself is served by a program that has it for a constant."""
    function = bucket_jit(number, in_axes=("batch seq", None), config=CONFIG)
    function.warmup(X, progress=False)
    assert_close(function(X), X * 2)
    assert_close(function(X, other), jax.jit(number)(X, other))
    assert_close(function(X, 2.0), X * 2)
    assert_close(function(X), X * 2)


def test_a_warm_up_with_a_default_written_out_takes_all_values():
    """A warm-up captures the program that was asked for, also where the default's is there."""
    function = bucket_jit(number, in_axes=("batch seq", None), config=CONFIG)
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

    function = bucket_jit(added, in_axes=("batch seq", None), config=CONFIG)
    assert_close(function(X), X + 1)
    assert_close(function(X, -0.0), X - 1)


def test_a_default_that_decides():
    """A default that the function branches by stays a constant, and so does its like."""

    def branches(x, train=False):
        return x * 3 if train else x * 2

    function = bucket_jit(branches, in_axes=("batch seq", None), config=CONFIG)
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
