"""Padding up to a bucket and trimming back."""

import math
import warnings
from contextlib import suppress

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.axes import PASS_THROUGH, LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import EDGE, UNCHOSEN, check_pad_value, padder, real_index

DTYPES = [
    np.dtype(dtype)
    for dtype in (
        *(np.bool_, np.int8, np.uint8, np.int32, np.int64),
        *(np.float16, np.float32, np.float64, np.complex64, jnp.bfloat16),
    )
]
SIZE = st.integers(1, 5)


@st.composite
def padded_arrays(draw):
    """An array of any rank and dtype with its axes, its sizes and a bucket that holds them."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    free = draw(st.permutations([*range(len(shape)), None, None]))
    axes = LeafAxes.at(free[0], free[1])
    sizes = Bucket(draw(SIZE), draw(SIZE))
    bucket = Bucket(sizes.batch_size + draw(st.integers(0, 4)), sizes.seq_len + draw(SIZE) - 1)
    shape = axes.resize(shape, sizes)
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    array = generator.integers(0, 100, shape).astype(draw(st.sampled_from(DTYPES)))
    return array, axes, sizes, bucket


def _values(dtype):
    common = [0, 1, True, False, EDGE]
    if dtype.kind in "iu":
        return [*common, 100]
    return common if dtype.kind == "b" else [*common, -1.5, float("nan"), float("-inf")]


@given(padded_arrays(), st.data())
def test_pad_and_trim(case, data):
    """Padding puts the array in a corner of the bucket and the value elsewhere; trimming undoes it.

    This holds for any rank, axes, sizes, dtype and value, `"edge"` too.
    """
    array, axes, sizes, bucket = case
    value = data.draw(st.sampled_from(_values(array.dtype)))
    pad = padder(array.shape, array.dtype, axes=axes, sizes=sizes, bucket=bucket, value=value)
    if axes.resize(array.shape, bucket) == array.shape:
        assert pad is None
        return
    assert pad is not None
    padded = pad(array)
    widths = [
        (0, large - small)
        for small, large in zip(array.shape, axes.resize(array.shape, bucket), strict=True)
    ]
    expected = (
        np.pad(array, widths, mode="edge")
        if value == EDGE
        else np.pad(array, widths, constant_values=np.array(value).astype(array.dtype))
    )
    assert (padded.dtype, padded.shape) == (array.dtype, expected.shape)
    assert padded.tobytes() == expected.tobytes()
    trimmed = padded[real_index(axes, array.ndim, sizes)]
    np.testing.assert_array_equal(trimmed, array, strict=True)


def test_edge_repeats_row_and_position():
    """With `"edge"` the last row and the last position are repeated, the corner with both."""
    pad = padder(
        (2, 2),
        np.dtype(np.int32),
        axes=LeafAxes.at(0, 1),
        sizes=Bucket(2, 2),
        bucket=Bucket(3, 4),
        value="edge",
    )
    assert pad is not None
    assert pad([[1, 2], [3, 4]]).tolist() == [[1, 2, 2, 2], [3, 4, 4, 4], [3, 4, 4, 4]]


@pytest.mark.parametrize("make", [np.array, jnp.array, list], ids=["numpy", "jax", "list"])
def test_any_array_gives_a_new_numpy_array(make):
    """NumPy arrays, JAX arrays and lists are padded into a new NumPy array of the dtype lowered."""
    given = make([1, 2, 3])
    pad = padder(
        (3,),
        np.dtype(np.float32),
        axes=LeafAxes.at(batch=0),
        sizes=Bucket(3, 1),
        bucket=Bucket(4, 1),
        value=7,
    )
    assert pad is not None
    first, second = pad(given), pad(given)
    first[:] = 0
    assert type(second) is np.ndarray
    assert second.dtype == np.float32
    assert second.tolist() == [1, 2, 3, 7]
    assert list(given) == [1, 2, 3]


def test_pass_through_is_never_padded():
    """An array that carries neither size has no padder, and trimming leaves all of it."""
    dtype = np.dtype(np.float32)
    sizes, bucket = Bucket(1, 1), Bucket(8, 8)
    assert padder((1, 1), dtype, axes=PASS_THROUGH, sizes=sizes, bucket=bucket) is None
    assert real_index(PASS_THROUGH, 2, sizes) == (slice(None), slice(None))


ML_DTYPES = sorted(
    name for name in dir(ml_dtypes) if name.startswith(("float", "bfloat", "int", "uint"))
)
SPECIAL = (0, 1, -1, 0.5, 2.0, -3, 7, 300, 1e30, 1e-30, math.inf, -math.inf, math.nan, 1j, 1 + 0j)


@pytest.mark.parametrize("dtype", [*ML_DTYPES, "bool", "float16", "float32", "complex64", "int8"])
@pytest.mark.parametrize("value", SPECIAL, ids=repr)
def test_pad_values_that_a_dtype_does_not_hold(dtype, value):
    """Finite stays finite, infinite infinite, and nothing becomes NaN; else it is refused."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    held = True
    try:
        check_pad_value(value, kind, name="x")
    except InputShapeError:
        held = False
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = complex(np.full(1, value, np.complex128).astype(kind)[0])
    same = stored == value or (stored != stored and value != value)
    close = abs(stored - value) < 0.51 * abs(value) if np.isfinite([stored, value]).all() else False
    assert held == same or (held and close)


def test_what_is_said_of_such_a_value():
    """The error names the value, the argument and the dtype."""
    with pytest.raises(InputShapeError) as caught:
        check_pad_value(-math.inf, np.dtype(ml_dtypes.float8_e4m3fn), name="x")
    assert str(caught.value) == (
        "pad_values has -inf for x, which its dtype float8_e4m3fn does not hold: choose another "
        "value"
    )


FLOATS = [name for name in ML_DTYPES if "float" in name and name != "bfloat16"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_float_is_held_as_the_nearest_number(dtype):
    """A small dtype holds its numbers and what rounds to the nearest, not what lies beyond them."""
    kind = np.dtype(getattr(ml_dtypes, dtype))
    bits = int(dtype.partition("_")[0].removeprefix("float"))
    every = np.arange(2**bits, dtype=np.uint8).view(kind).astype(np.float64)
    known = np.unique(every[np.isfinite(every)])
    between = (known[1:] + known[:-1]) / 2
    for value in (*known, *between, *(known * 0.9)):
        with suppress(InputShapeError):
            check_pad_value(float(value), kind, name="x")
            stored = float(np.asarray(value).astype(kind))
            assert abs(stored - value) == np.min(np.abs(known - value))
    for value in known:
        check_pad_value(float(value), kind, name="x")
    for value in (known[-1] * 2, 1e-300):
        with pytest.raises(InputShapeError):
            check_pad_value(float(value), kind, name="x")


@pytest.mark.parametrize("value", [-0.0, complex(0.0, -0.0), complex(-0.0, 0.0)], ids=repr)
def test_a_negative_zero_keeps_its_sign(value):
    """Padding with -0.0 is -0.0, of which 1/x has another sign than of 0."""
    kind = np.dtype(np.complex64 if isinstance(value, complex) else np.float32)
    sizes, bucket = Bucket(1, 1), Bucket(2, 1)
    pad = padder((1,), kind, axes=LeafAxes.at(0), sizes=sizes, bucket=bucket, value=value)
    assert pad is not None
    assert pad(np.ones(1, kind))[1].tobytes() == np.full(1, value, kind).tobytes()
    function = bucket_jit(
        lambda x: 1 / x.real,
        in_axes="batch",
        pad_values=value,
        unpad="none",
        config=CUDAGraphConfig(capture_sizes=(2,)),
    )
    sign = math.copysign(1, value.real)
    assert np.asarray(function(np.ones(1, kind)))[1] == sign * math.inf


def test_zero_bytes_of_a_dtype_without_a_zero():
    """float8_e8m0fnu is padded with its smallest number where nobody chose a value."""
    kind = np.dtype(ml_dtypes.float8_e8m0fnu)
    sizes, bucket = Bucket(1, 1), Bucket(2, 1)
    pad = padder((1,), kind, axes=LeafAxes.at(0), sizes=sizes, bucket=bucket, value=UNCHOSEN)
    assert pad is not None
    assert pad(np.ones(1, kind)).astype(float).tolist() == [1.0, 2.0**-127]
    with pytest.raises(InputShapeError, match="has 0 for x, which its dtype float8_e8m0fnu does"):
        check_pad_value(0, kind, name="x")
