"""What arrays are filled with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from cudagraph_jax import Bucket
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.axes import AxisPattern
from cudagraph_jax.testing.values import ArraySpec, draw_arrays, is_values

INEXACT = ("float32", "float16", "bfloat16", "complex64")
EVERY = (*INEXACT, "int32", "int8", "uint8", "bool")
ORDERED = ("float32", "bfloat16", "int32", "int8", "uint8")
ANY_SIZE = st.builds(Bucket, st.integers(1, 6), st.integers(1, 6))


def spec(dtype: str, values: Any = None, *, axes: str = "batch seq") -> ArraySpec:
    """A two-dimensional array, unless `axes` has another number of them."""
    shape = (3,) * len(axes.split())
    resolved = AxisPattern.parse(axes).resolve(len(shape), name="x")
    return ArraySpec("x", shape, resolved, jnp.dtype(dtype), values)


def arrays(*specs: ArraySpec, size: Bucket) -> st.SearchStrategy[list[Any]]:
    return st.composite(lambda draw: draw_arrays(draw, specs, size))()


@given(st.data(), ANY_SIZE, st.sampled_from(EVERY))
def test_shapes_and_dtypes(data, size, dtype):
    """An array has its dtype, and the size of the call along the axes that are declared."""
    found = data.draw(arrays(spec(dtype), spec(dtype, axes="_ seq batch"), size=size))
    assert [array.dtype for array in found] == [jnp.dtype(dtype)] * 2
    assert [array.shape for array in found] == [tuple(size), (3, size.seq_len, size.batch_size)]


@given(st.data(), ANY_SIZE, st.sampled_from(ORDERED), st.integers(0, 100), st.integers(0, 27))
def test_ranges(data, size, dtype, low, width):
    """Numbers are from one to the other, both included."""
    (array,) = data.draw(arrays(spec(dtype, (low, low + width)), size=size))
    numbers = array.astype(np.float64)
    assert low <= numbers.min()
    assert numbers.max() <= low + width


@given(st.data(), ANY_SIZE, st.integers(-20, 20), st.integers(0, 40))
def test_integers_differ_where_they_can(data, size, low, width):
    """Integers are all different where the range has enough: equal ones make ties."""
    (array,) = data.draw(arrays(spec("int32", (low, low + width)), size=size))
    if array.size <= width + 1:
        assert len(np.unique(array)) == array.size


@pytest.mark.parametrize("at", [0, 9])
def test_both_ends_of_a_range(at):
    """Both ends are drawn, of a range that is given and of the usual one."""
    for values in (None, (0, 9)):
        (array,) = find(
            arrays(spec("int32", values), size=Bucket(1, 2)),
            lambda found: at in found[0],
            settings=settings(max_examples=1000, database=None),
        )
        assert array.dtype == np.int32


def test_a_wide_range_of_integers():
    """A range that is too wide to be shuffled is drawn from all the same."""
    (array,) = find(arrays(spec("int32", (-(2**31), 2**31 - 1)), size=Bucket(3, 4)), lambda _: True)
    assert len(np.unique(array)) == 12


@given(st.data(), ANY_SIZE, st.sampled_from(INEXACT))
def test_usual_numbers(data, size, dtype):
    """Usual numbers are finite and not large; complex ones have two parts."""
    (array,) = data.draw(arrays(spec(dtype), size=size))
    assert np.abs(array.astype(np.complex128)).max() < 20
    assert np.iscomplexobj(array) == (dtype == "complex64")


@pytest.mark.parametrize("sign", [1, -1])
def test_signs(sign):
    """All numbers of a call may have one sign: padding of zeros wins or loses a maximum then."""
    one, other = find(
        arrays(spec("float32"), spec("float32"), size=Bucket(4, 4)),
        lambda found: all((array * sign > 0).all() for array in found),
    )
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("value", [False, True])
def test_bools(value):
    """Each bool is drawn."""
    assert find(arrays(spec("bool"), size=Bucket(1, 1)), lambda found: found[0] == value)


@given(
    st.data(),
    ANY_SIZE,
    st.sampled_from(["batch seq", "seq batch", "_ seq batch", "seq"]),
    st.sampled_from(["bool", "int32", "float32"]),
)
def test_masks(data, size, axes, dtype):
    """A mask is ones and then zeros along the sequence, at least one of them in each row.

    Where it is padded on the left it is the other way round.
    """
    mask = spec(dtype, "mask", axes=axes)
    is_left = data.draw(st.booleans())
    if is_left:
        mask = dataclasses.replace(mask, axes=mask.axes.padded_left(["seq"]))
    (array,) = data.draw(arrays(mask, size=size))
    rows = np.moveaxis(np.asarray(array, np.int32), axes.split().index("seq"), -1)
    rows = rows[..., ::-1] if is_left else rows
    assert set(np.unique(rows)) <= {0, 1}
    assert (rows[..., 0] == 1).all()
    assert (np.diff(rows, axis=-1) <= 0).all()


@given(st.data(), ANY_SIZE)
def test_masks_are_of_the_row(data, size):
    """What is beside the batch and the sequence has the mask of its row."""
    (array,) = data.draw(arrays(spec("bool", "mask", axes="batch seq _"), size=size))
    assert (array == array[..., :1]).all()


@given(st.data(), ANY_SIZE)
def test_lengths(data, size):
    """Lengths are from 1 to that of the call."""
    (array,) = data.draw(arrays(spec("int32", "lengths", axes="batch"), size=size))
    assert array.shape == (size.batch_size,)
    assert array.min() >= 1
    assert array.max() <= size.seq_len


@given(st.data(), ANY_SIZE)
def test_elements_of_ones_own(data, size):
    """The values of a strategy are the elements."""
    (array,) = data.draw(arrays(spec("float32", st.sampled_from([0.5, 8.0])), size=size))
    assert array.shape == tuple(size)
    assert set(np.unique(array)) <= {0.5, 8.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((2, 1), r"values=\(2, 1\) of x is no range \(low, high\)"),
        ((0, float("nan")), "is no range"),
        ("masks", r"values='masks' of x: use \"mask\" or \"lengths\""),
        (
            7,
            r"values=7 of x is unknown: use None, \(low, high\), \"mask\", \"lengths\",",
        ),
    ],
)
def test_values_that_are_none(values, message):
    """What says nothing of values is refused, with the array's name and what could be said."""
    with pytest.raises(ConfigError, match=message):
        spec("float32", values)


def test_words_that_do_not_fit():
    """A mask needs a sequence, lengths need integers, and PRNG keys are not drawn."""
    with pytest.raises(ConfigError, match='values="mask" of x, which has no axis but the'):
        spec("bool", "mask", axes="batch _")
    with pytest.raises(ConfigError, match='values="lengths" of x, whose dtype is float32'):
        spec("float32", "lengths", axes="batch")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    axes = AxisPattern.parse("batch").resolve(1, name="keys")
    with pytest.raises(ConfigError, match="keys holds PRNG keys, which are not drawn: give inputs"):
        ArraySpec("keys", keys.shape, axes, keys.dtype)


@pytest.mark.parametrize("values", [None, "mask", (0, 9), (0.5, np.float32(2)), st.floats(), 7])
def test_one_thing_that_is_said(values):
    """Each of these says what one array is filled with."""
    assert is_values(values)


@pytest.mark.parametrize("values", [(None, "mask"), ((0, 9), None), [(0, 9)], {"ids": (0, 9)}])
def test_more_than_one_thing(values):
    """A pytree of them is one for several arrays."""
    assert not is_values(values)


@given(st.data(), ANY_SIZE)
def test_positions(data, size):
    """Positions are places of the sequence, counted from 0."""
    (found,) = data.draw(arrays(spec("int32", "positions", axes="batch"), size=size))
    assert found.shape == (size.batch_size,)
    assert found.min() >= 0
    assert found.max() < size.seq_len


@pytest.mark.parametrize("word", ["mask", "lengths", "positions"])
def test_words_vary(word):
    """What a word stands for is not the same in all examples, nor in all rows."""
    wanted = spec("int32", word, axes="batch seq" if word == "mask" else "batch")
    seen: set[object] = set()

    @settings(max_examples=30, database=None)
    @given(arrays(wanted, size=Bucket(8, 5)))
    def look(found):
        seen.update(map(tuple, found[0].reshape(8, -1).tolist()))

    look()
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("dtype", "ends"),
    [
        ("int8", (0, 999)),
        ("uint8", (-3, -1)),
        ("int32", (0.5, 2.5)),
        ("float16", (0, 1e6)),
        ("float32", (0, np.inf)),
    ],
)
def test_ranges_that_the_dtype_does_not_hold(dtype, ends):
    """A range is kept or refused, never wrapped around."""
    with pytest.raises(ConfigError, match=r"does not hold both ends|is no range"):
        spec(dtype, ends)


@given(st.data())
def test_bools_of_a_range(data):
    """Bools from 1 to 1 are all true."""
    (found,) = data.draw(arrays(spec("bool", (1, 1)), size=Bucket(3, 2)))
    assert found.all()
