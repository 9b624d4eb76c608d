"""Every way to write a call: names, defaults, keyword-only, variadic and static arguments."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import BucketedFunction, ConfigError, InputShapeError, bucket_jit, no_compiles
from tests.helpers.functions import GRID, assert_close, floats


def affine(x, scale=2.0, shift=None, /, times=1.0, *, bias=0.0, power=1):
    shifted = x if shift is None else x + shift
    return (shifted * scale * times + bias) ** power


@pytest.fixture(scope="module")
def served():
    return bucket_jit(
        affine,
        in_axes=("batch seq", None, "batch seq", None),
        static_argnames="power",
        config=GRID,
    )


@settings(max_examples=20)
@given(data=st.data())
def test_any_way_to_write_a_call(served, data):
    """Positions, names, defaults and their order: the answer is that of the plain call."""
    batch, seq = data.draw(st.sampled_from([(2, 4), (3, 5)]))
    positional = [floats(0, batch, seq), 3.0, floats(1, batch, seq), 0.5]
    count = data.draw(st.integers(1, 4))
    named = {"times": 0.25, "bias": 1.5, "power": 2}
    names = data.draw(st.lists(st.sampled_from(sorted(named)), unique=True))
    kwargs = {name: named[name] for name in names if not (name == "times" and count == 4)}
    args = positional[:count]
    expected = affine(*map(jnp.asarray, args[:1]), *args[1:], **kwargs)
    assert_close(served(*args, **kwargs), np.asarray(expected))
    with no_compiles():
        assert_close(served(*args, **kwargs), np.asarray(expected))


def test_statics_tell_equal_values_of_other_types_apart():
    """1, 1.0 and True are equal, but each is a program of its own with its own answer."""
    function = bucket_jit(
        lambda x, n: jnp.full_like(x, n) if n is True else x * n,
        in_axes=("batch", None),
        static_argnames=("n",),
        config=GRID,
    )
    x = np.array([3, 4], np.int32)
    for _ in range(2):
        assert_close(function(x, 1), x * 1)
        assert_close(function(x, 1.0), (x * 1.0).astype(np.float32))
        assert_close(function(x, True), np.ones(2, np.int32))
        assert_close(function(x, n=1), x * 1)
    assert function.registry.num_graphs == 3


def test_statics_select_by_value():
    """Each value of a static argument is a program of its own, strings and tuples included."""
    function = bucket_jit(
        lambda x, how, shape: (jnp.sum(x, 1) if how == "sum" else jnp.max(x, 1)) * shape[0],
        in_axes=("batch seq",),
        static_argnames=["how", "shape"],
        config=GRID,
    )
    x = floats(0, 3, 5)
    for _ in range(2):
        assert_close(function(x, "sum", (2,)), x.sum(1) * 2)
        assert_close(function(x, "max", (2,)), x.max(1) * 2)
        assert_close(function(x, how="max", shape=(3,)), x.max(1) * 3)
    assert function.registry.num_graphs == 3


def test_static_in_front_of_arrays():
    """A static argument may stand before the arrays, by position or by name."""
    function = bucket_jit(
        lambda how, x, y: x + y if how == "add" else x - y,
        in_axes=(None, "batch", "batch"),
        static_argnames="how",
        config=GRID,
    )
    x, y = floats(0, 2), floats(1, 2)
    for _ in range(2):
        assert_close(function("add", x, y), x + y)
        assert_close(function("sub", x, y), x - y)
        assert_close(function(y=y, how="sub", x=x), x - y)
        assert_close(function("sub", y=y, x=x), x - y)


def test_a_keyword_argument_swap_is_not_a_hit():
    """Arguments given by name in another order go where their names say."""
    function = bucket_jit(lambda a, b: a - b, in_axes=("batch", "batch"), config=GRID)
    a, b = floats(0, 2), floats(1, 2)
    for _ in range(2):
        assert_close(function(a=a, b=b), a - b)
        assert_close(function(b=b, a=a), a - b)
        assert_close(function(a, b=b), a - b)
        assert_close(function(a, b), a - b)


def test_an_argument_left_out_in_the_middle():
    """Defaults between given arguments hold."""
    function = bucket_jit(
        lambda a, b=2.0, c=None: a * b if c is None else a * b + c,
        in_axes=("batch", None, "batch"),
        config=GRID,
    )
    a, c = floats(0, 2), floats(1, 2)
    for _ in range(2):
        assert_close(function(a), a * 2)
        assert_close(function(a, c=c), a * 2 + c)
        assert_close(function(c=c, a=a), a * 2 + c)
        assert_close(function(a, 3.0), a * 3)
        assert_close(function(a, 3.0, c), a * 3 + c)
        assert_close(function(a, 3.0, None), a * 3)


def test_an_array_by_name_is_not_the_array_before_it():
    """Two optional arrays of the same shape are told apart, whichever a call gives."""

    def combine(a, b=None, c=None):
        return a + (0 if b is None else b) - (0 if c is None else c)

    function = bucket_jit(combine, in_axes=("batch", "batch", "batch"), config=GRID)
    a, b = floats(0, 2), floats(1, 2)
    for _ in range(2):
        assert_close(function(a, b), a + b)
        assert_close(function(a, c=b), a - b)
        assert_close(function(a, b=b), a + b)
        assert_close(function(c=b, a=a), a - b)


def test_variadic_arguments():
    """*args and **kwargs take as many as come; **kwargs are passed through."""

    def add(*arrays, **scales):
        return sum(arrays) * sum(scales.values(), 1.0)

    function = bucket_jit(add, in_axes="batch seq", config=GRID)
    x, y, z = (floats(seed, 2, 3) for seed in range(3))
    for _ in range(2):
        assert_close(function(x), x)
        assert_close(function(x, y), x + y)
        assert_close(function(x, y, z), x + y + z)
        assert_close(function(x, y, first=1.0, second=2.0), (x + y) * 4)


@pytest.mark.parametrize(
    "number", [3.0, 3, True, np.float32(3), np.array(3.0, np.float32), jnp.float32(3)], ids=repr
)
def test_one_string_spares_numbers(number):
    """One string for all arguments means arrays: a number is passed through, wherever it stands."""
    config = dataclasses.replace(GRID, capture_sizes=(3,), capture_seq_lens=(5,))
    behind = bucket_jit(lambda x, scale=2.0: x * scale, in_axes="batch seq", config=config)
    before = bucket_jit(lambda scale, x: x * scale, in_axes="batch seq", config=config)
    shapes = ((2, 4), (3, 5), (2, 4), (1, 4), (2, 1), (3, 5))
    for make, sizes in itertools.product((np.asarray, jnp.asarray), shapes):
        x = make(floats(0, *sizes))
        assert_close(behind(x), x * 2)
        assert_close(behind(x, number), x * float(number))
        assert_close(behind(x, scale=number), x * float(number))
        assert_close(behind(x, x), x * x)
        assert_close(before(number, x), x * float(number))
        assert_close(before(x, x), x * x)
    assert_close(behind(floats(0, 9, 5), number), floats(0, 9, 5) * float(number))


def test_one_string_spares_numbers_under_a_transformation():
    """Numbers, traced or not, are passed through under `jit`, beside a mask too."""

    def masked(x, scale, *, mask):
        return jnp.where(mask, x, 0) * scale

    function: Any = bucket_jit(masked, in_axes="batch seq", mask_argname="mask", config=GRID)
    x = floats(0, 2, 4)
    assert_close(jax.jit(function)(x, 3.0), x * 3)
    assert_close(jax.jit(lambda x: function(x, 3.0))(x), x * 3)


def test_numbers_alone_carry_no_sizes():
    """Where all arguments are numbers, none of them is an array that has the sizes."""
    function = bucket_jit(lambda x, y: x + y, in_axes="batch", config=GRID)
    with pytest.raises(InputShapeError, match=r"x is of type float, not an array"):
        function(2.0, 3.0)


def test_variadic_in_axes_bound_the_number_of_arguments():
    """*args beyond the entries of in_axes are an error that says how many there are."""
    function = bucket_jit(lambda *a: sum(a), in_axes=("batch", "batch"), config=GRID)
    assert_close(function(floats(0, 2)), floats(0, 2))
    with pytest.raises(InputShapeError, match=r"in_axes has 2 entries, but the call has 3"):
        function(floats(0, 2), floats(0, 2), floats(0, 2))


def test_static_variadic_keywords():
    """A static argument may be one of **kwargs."""
    function = bucket_jit(
        lambda x, **options: x * 2 if options["how"] == "twice" else x * options["by"],
        in_axes=("batch",),
        static_argnames=("how",),
        config=GRID,
    )
    x = floats(0, 2)
    assert_close(function(x, how="twice"), x * 2)
    assert_close(function(x, how="scaled", by=3.0), x * 3)


def test_mask_and_statics_together():
    """The library's mask and the caller's static and keyword-only arguments go together."""

    def pool(x, *, mask, how, bias=0.0):
        real = jnp.where(mask, x, 0)
        return (jnp.sum(real, 1) if how == "sum" else jnp.sum(real, 1) / jnp.sum(mask, 1)) + bias

    function: Any = bucket_jit(
        pool, in_axes=("batch seq",), mask_argname="mask", static_argnames="how", config=GRID
    )
    x = floats(0, 2, 4)
    for _ in range(2):
        assert_close(function(x, how="sum"), x.sum(1))
        assert_close(function(x, how="mean", bias=1.0), x.mean(1) + 1)
    with pytest.raises(InputShapeError, match="got 'mask', which bucket_jit builds itself"):
        function(x, how="sum", mask=np.ones((2, 4), bool))


def two(ids, mask):
    return ids * mask


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (1, {}, "missing a required argument: 'mask'"),
        (0, {}, "missing a required argument: 'ids'"),
        (3, {}, "too many positional arguments"),
        (2, {"maks": 1}, "got an unexpected keyword argument 'maks'"),
        (2, {"mask": 1}, "multiple values for argument 'mask'"),
    ],
)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_missing_and_unknown_arguments(args, kwargs, said, warm):
    """A missing or unknown argument is an error that names it, and nothing is captured."""
    function = bucket_jit(two, in_axes=("batch seq", "batch seq"), config=GRID)
    ones = np.ones((2, 2), np.float32)
    if warm:
        function(ones, ones)
        function(ones, ones)
    graphs = function.registry.num_graphs
    with pytest.raises(InputShapeError, match="cannot be called like this") as caught:
        function(*[ones] * args, **dict.fromkeys(kwargs, ones))
    assert said in str(caught.value)
    assert function.registry.num_graphs == graphs
    assert_close(function(ones, ones), ones)


def test_unhashable_static():
    """A static argument that cannot be hashed is an error that names it."""
    function = bucket_jit(
        lambda x, sizes: x * sizes[0], in_axes=("batch",), static_argnames="sizes", config=GRID
    )
    with pytest.raises(InputShapeError, match="static argument sizes is a list"):
        function(floats(0, 2), [2])
    assert function.registry.num_graphs == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"static_argnames": "hwo"}, r"\(a, b\) has no argument 'hwo'"),
        ({"mask_argname": "mask"}, r"\(a, b\) has no argument 'mask'"),
        ({"donate_argnums": 2}, "donate_argnums has 2, but .* has 2 arguments"),
        ({"donate_argnums": (0, -1)}, "donate_argnums has -1"),
        ({"in_axes": ("batch", None, None)}, "in_axes has 3 entries, but .* has 2 arguments"),
        ({"in_axes": None}, "names no axis"),
        ({"in_axes": (None, "_ ...")}, "names no axis"),
        ({"in_axes": ("rows",)}, "'rows', which has no sizes"),
        ({"in_axes": (0, None)}, "in_axes has the entry 0"),
        ({"pad_values": "edges"}, "pad_values has 'edges'"),
        ({"pad_values": (Ellipsis,)}, "pad_values has Ellipsis"),
        ({"unpad": "gpu"}, "unpad='gpu' is unknown"),
        ({"out_axes": 0}, "out_axes has the entry 0"),
        ({"fn": 3}, "fn=3 cannot be called"),
    ],
    ids=str,
)
def test_options_are_checked_when_declared(options, said):
    """An option that cannot be is a ConfigError where the function is declared, not at a call."""
    chosen = {"fn": lambda a, b: a, "in_axes": ("batch",), "config": GRID, **options}
    with pytest.raises(ConfigError, match=said):
        bucket_jit(**chosen)


def test_a_function_without_a_signature():
    """A callable whose signature Python cannot see is refused with what to do."""
    with pytest.raises(ConfigError, match="wrap it in a function of your own"):
        bucket_jit(max, in_axes=("batch",))


def test_config_and_manager_must_agree():
    """A manager brings its own config: another one beside it is an error."""
    first = bucket_jit(lambda x: x, in_axes="batch", config=GRID)
    assert isinstance(first, BucketedFunction)
    same = bucket_jit(lambda x: x, in_axes="batch", config=GRID, manager=first.manager)
    assert same.manager is first.manager
    with pytest.raises(ConfigError, match="is not the manager's"):
        bucket_jit(
            lambda x: x, in_axes="batch", config=type(GRID).disabled(), manager=first.manager
        )


def test_as_a_decorator():
    """With options first, it decorates."""

    @bucket_jit(in_axes="batch", config=GRID)
    def double(x):
        """Twice x."""
        return x * 2

    assert double.__doc__ == "Twice x."
    assert_close(double(floats(0, 2)), floats(0, 2) * 2)


@pytest.mark.parametrize("scalar", [np.float32(3), jnp.asarray(3.0), None, True, 3])
def test_pad_values_may_be_any_scalar(scalar):
    """Padding values may be Python, NumPy or JAX scalars; None is 0."""
    function = bucket_jit(
        lambda x: x, in_axes=("batch",), pad_values=scalar, unpad="none", config=GRID
    )
    padding = float(0 if scalar is None else scalar)
    assert_close(function(floats(0, 2))[2:], np.array([padding], np.float32))
