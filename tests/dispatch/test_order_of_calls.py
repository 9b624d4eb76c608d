"""What is checked when a shape is new is checked with every later call: no answer depends on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphManager,
    InputShapeError,
    bucket_jit,
)

CONFIG = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), warmup_iterations=1)
SIZES = [(3, 5), (4, 8)]  # padded, and exactly a bucket's


def plus(x, y):
    return x + y


def by_keyword(x, *, y):
    return x + y


@jax.jit
def product(x, y):
    return x * y


def both(plain, odd, *, order):
    """The odd call before or behind the plain one; it is refused, or raises, in either order."""
    for call in (plain, odd, odd) if order == "late" else (odd, plain, odd):
        if call is odd:
            with pytest.raises(InputShapeError) as caught:
                odd()
        else:
            plain()
    return str(caught.value)


@pytest.fixture(params=["early", "late"])
def order(request):
    return request.param


class Foreign:
    """What other libraries' tensors look like to NumPy."""

    def __init__(self, array):
        self.shape, self.dtype, self._array = array.shape, array.dtype, array

    def __array__(self, dtype=None, copy=None):
        return self._array


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("axes", ["batch seq", None], ids=["bucketed", "passed"])
@pytest.mark.parametrize(
    "odd",
    [
        lambda y: y.astype(np.float64),
        lambda y: np.ma.array(y, mask=y > 0.5),
        Foreign,
        lambda y: Foreign(y.astype(np.float64)),
    ],
    ids=["float64", "masked", "foreign", "foreign float64"],
)
def test_a_second_argument(shape, as_array, axes, odd, order):
    """What a first call refuses beside the array that leads, a later one refuses."""
    function = bucket_jit(plus, in_axes=("batch seq", axes), config=CONFIG)
    x = as_array(np.ones(shape, np.float32))
    y = np.ones(shape if axes else 1, np.float32)
    both(lambda: function(x, y), lambda: function(x, odd(y)), order=order)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(
    "odd", [lambda y: np.ma.array(y, mask=y > 0.5), Foreign], ids=["masked", "foreign"]
)
def test_the_argument_that_leads(shape, odd, order):
    """So is the first argument, and what leads within a pytree."""
    x = np.ones(shape, np.float32)
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=CONFIG)
    both(lambda: function(x), lambda: function(odd(x)), order=order)
    nested = bucket_jit(lambda d: d["x"] * 2, in_axes="batch seq", config=CONFIG)
    both(lambda: nested({"x": x}), lambda: nested({"x": odd(x)}), order=order)
    both(lambda: nested({"x": jnp.asarray(x)}), lambda: nested({"x": odd(x)}), order=order)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(
    "odd",
    [
        lambda y: y.astype(np.float64),
        lambda y: np.ma.array(y, mask=y > 0.5),
        Foreign,
    ],
    ids=["float64", "masked", "foreign"],
)
def test_a_keyword(shape, odd, order):
    """So is a keyword-only argument, and one that is written by its name."""
    x, y = np.ones(shape, np.float32), np.ones(1, np.float32)
    function = bucket_jit(by_keyword, in_axes="batch seq", config=CONFIG)
    message = both(lambda: function(x, y=y), lambda: function(x, y=odd(y)), order=order)
    assert message.startswith("y ")
    function = bucket_jit(plus, in_axes=("batch seq", None), config=CONFIG)
    both(lambda: function(x, y=y), lambda: function(x, y=odd(y)), order=order)


def test_one_pytree(order):
    """So are the leaves of the specification's calls."""
    manager = CUDAGraphManager(CONFIG)
    x = np.ones((3, 5), np.float32)

    def call(y):
        return manager.execute_or_capture(3, 5, lambda d: d["x"] * 2, {"x": y})

    both(lambda: call(x), lambda: call(np.ma.array(x, mask=x > 0.5)), order=order)


@pytest.mark.parametrize("shape", SIZES)
def test_subclasses_that_hold_nothing_beside(shape, tmp_path, order):
    """A `numpy.memmap` or a `numpy.matrix` is taken for the array that it is."""
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=CONFIG)
    plain = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    mapped[:] = plain
    calls = [plain, mapped, plain.view(np.matrix), mapped]
    for x in calls if order == "late" else calls[1:]:
        np.testing.assert_array_equal(function(x), plain * 2)


def test_parameters_are_converted_as_jit_does():
    """NumPy's float64 within a pytree that is passed through is JAX's to convert, at any call."""
    x, wide = np.ones((3, 5), np.float32), {"w": np.full(5, 0.1)}
    function = bucket_jit(lambda p, x: x * p["w"].sum(), in_axes=(None, "batch seq"), config=CONFIG)
    expected = jax.jit(lambda p, x: x * p["w"].sum())(wide, x)
    for parameters in (wide, {"w": wide["w"].astype(np.float32)}, wide):
        np.testing.assert_allclose(function(parameters, x), expected, rtol=1e-6)


@pytest.mark.parametrize("nest", [lambda n: {"n": n}, lambda n: (1, [n]), lambda n: [{"a": n}]])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_numbers_within_pytrees(nest, as_array):
    """A number gives way to the arrays' dtype where it is weak, and only there, in any order."""
    weak, strong = jnp.asarray(2.0), jnp.asarray(np.float32(2))
    assert weak.weak_type
    assert not strong.weak_type

    def scaled(numbers, x):
        return x * jax.tree.leaves(numbers)[-1]

    x = as_array(np.ones((4, 8), jnp.bfloat16))
    for first, second in ((weak, strong), (strong, weak)):
        function = bucket_jit(scaled, in_axes=(None, "batch seq"), config=CONFIG)
        for number in (first, second, first, 2.0, np.float32(2)):
            expected = jax.eval_shape(scaled, nest(number), x)
            assert function(nest(number), x).dtype == expected.dtype


def test_shapes_of_other_arrays():
    """Arrays beside the one that leads have its sizes in every call: none is broadcast silently."""
    function = bucket_jit(plus, in_axes=("batch seq", "batch seq"), config=CONFIG)
    for as_array in (np.asarray, jnp.asarray):
        for shape in SIZES:
            x = as_array(np.ones(shape, np.float32))
            np.testing.assert_array_equal(function(x, x), 2 * x)
            for other in ((1, shape[1]), (shape[0], 1), (1, 1), shape[::-1]):
                with pytest.raises(InputShapeError, match="all arrays of one call must have"):
                    function(x, np.ones(other, np.float32))


def test_wide_leaves_beside_one_that_leads(order):
    """A float64 leaf of a pytree that carries the sizes is refused at any call."""
    function = bucket_jit(lambda d: d["x"] + d["y"], in_axes="batch seq", config=CONFIG)
    for shape in SIZES:
        x = np.ones(shape, np.float32)
        both(
            lambda x=x: function({"x": x, "y": x}),
            lambda x=x: function({"x": x, "y": x.astype(np.float64)}),
            order=order,
        )


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "complex64", "int8"])
def test_other_dtypes_of_other_arrays(shape, dtype):
    """An array beside the one that leads is never cast to the dtype of an earlier call's."""
    x, y = np.full(shape, 2, np.int32), np.full(shape, 2.7).astype(dtype)
    for as_array in (jnp.asarray, np.asarray):
        function = bucket_jit(lambda x, y: x * y, in_axes="batch seq", config=CONFIG)
        for _ in range(2):
            function(x, x)
        found, expected = function(x, as_array(y)), product(x, y)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("number", [2, 2.7, True, 1j])
def test_a_number_in_the_place_of_an_array(shape, number, order):
    """It is no array whose axes are bucketed, whatever was called before."""
    x = np.full(shape, 2, np.int32)
    function = bucket_jit(lambda x, y: x * y, in_axes=("batch seq",) * 2, config=CONFIG)
    both(lambda: function(x, x), lambda: function(x, number), order=order)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("number", [2, 2.7, True, 1j, np.float16(2), np.array(3, np.int8)])
@pytest.mark.parametrize("first", ["array", "number"])
def test_a_number_beside_arrays_of_one_declaration(shape, number, first):
    """One string for all spares it, with the plain answer, whatever was called before."""
    x = np.full(shape, 2, np.int32)
    function = bucket_jit(lambda x, y: x * y, in_axes="batch seq", config=CONFIG)
    others = (x, number) if first == "array" else (number, x)
    for other in (*others, *others, *others):
        found, expected = function(x, other), product(x, other)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("odd", [np.float64, lambda y: np.ma.array(y, mask=y > 0)])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_an_array_behind_a_pytree_that_leads(shape, odd, as_array, order):
    """It is looked at like any other, also where a pytree carries the sizes first."""
    x = np.ones(shape, np.float32)
    function = bucket_jit(lambda d, y: d["a"] + y, in_axes="batch seq", config=CONFIG)
    tree = {"a": as_array(x)}
    for _ in range(2):
        function(tree, as_array(x))
    both(lambda: function(tree, x), lambda: function(tree, odd(x)), order=order)


def test_the_first_bucket_says_nothing_of_the_outputs():
    """Outputs are understood alike, whichever bucket shows them first."""
    config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(1, 2, 8))
    for lengths in ((2, 7), (7, 2), (1, 2, 7)):
        function = bucket_jit(lambda x: x[:, ::2], in_axes="batch seq", config=config)
        for seq in lengths:
            x = np.arange(4 * seq, dtype=np.float32).reshape(4, seq)
            np.testing.assert_array_equal(function(x), x[:, ::2])
