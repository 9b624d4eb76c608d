"""How far two answers may be apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cudagraph_jax import CaptureError
from cudagraph_jax.graphs.compare import EXACT, Tolerance, coarse_products, worst_difference

NUMBERS = arrays(np.float32, (2, 3), elements=st.floats(width=32))


@given(NUMBERS)
def test_an_answer_equals_itself(answer):
    """No element is off from itself, NaN and infinity included, however strict."""
    assert worst_difference(answer, answer.copy(), tolerance=EXACT) is None


@given(NUMBERS, NUMBERS, st.floats(0, 1), st.floats(0, 10))
def test_it_is_what_numpy_says(found, expected, rtol, atol):
    """With a tolerance given, answers are as close as `numpy.allclose` says."""
    wide = found.astype(np.float64), expected.astype(np.float64)
    close = np.allclose(*wide, rtol=rtol, atol=atol, equal_nan=True)
    tolerance = Tolerance(rtol, atol)
    assert (worst_difference(found, expected, tolerance=tolerance) is None) == close


@pytest.mark.parametrize(
    ("found", "expected", "index"),
    [
        ([1.0, 2.0], [1.0, 2.0001], None),
        ([1.0, 2.0], [1.0, 2.1], (1,)),
        ([np.nan, 2.1], [1.0, 2.0], (0,)),
        ([1000.1, 0.0], [1000.0, 0.0], None),
        ([-np.inf, 1.0], [np.inf, 1.0], (0,)),
    ],
)
def test_half_of_the_digits(found, expected, index):
    """Unless said otherwise, float32 may be off by some 3e-4 of the largest element."""
    worst = worst_difference(np.array(found, np.float32), np.array(expected, np.float32))
    assert (None if worst is None else worst.at) == index


def test_other_dtypes():
    """Integers and bools are equal or not; bfloat16 has fewer digits, complex both its parts."""
    assert worst_difference(np.array([3, 7]), np.array([3, 8])) == ((1,), 7, 8, 1, 0)
    assert worst_difference(np.array([True]), np.array([True])) is None
    near = np.array([1.0, 1.05])
    assert worst_difference(near.astype(jnp.bfloat16), np.ones(2, jnp.bfloat16)) is None
    worst = worst_difference(np.array([1 + 2j]), np.array([1 + 3j]))
    assert worst is not None
    assert worst.off == 1
    assert worst_difference(np.zeros((0, 2)), np.zeros((0, 2))) is None


def test_another_dtype():
    """Another dtype is no matter of tolerance."""
    with pytest.raises(CaptureError, match="gives float16, the eager function float32"):
        worst_difference(np.ones(2, np.float16), np.ones(2, np.float32))


def test_other_shapes():
    """Another shape is no matter of tolerance."""
    with pytest.raises(CaptureError, match="return the same shapes"):
        worst_difference(np.zeros(2), np.zeros(3))


TF32 = 2.0**-8


@pytest.mark.parametrize(
    ("dtype", "precision", "platform", "expected"),
    [
        (np.float32, None, "gpu", TF32),
        (np.float32, "high", "gpu", TF32),
        (np.float32, "bfloat16", "gpu", TF32),
        (np.float32, "highest", "gpu", 0),
        (np.float32, "float32", "gpu", 0),
        (np.float32, None, "cpu", 0),
        (np.float16, None, "gpu", 0),
        (jnp.bfloat16, None, "gpu", 0),
    ],
)
def test_products_of_a_gpu(dtype, precision, platform, expected):
    """Where a GPU takes ten bits of float32 factors, two buckets may differ by as much."""
    with jax.default_matmul_precision(precision):
        assert coarse_products(np.dtype(dtype), platform=lambda: platform) == expected


def test_coarse_products_hide_no_mistake():
    """One percent of the largest element is a mistake on a GPU, too, and so is a lost softmax."""
    epsilon = float(np.finfo(np.float32).eps)
    usual = Tolerance()
    assert usual.allowed(np.ones(3), epsilon, TF32).max() < 0.01
    softmax = np.full(64, 1 / 64)
    assert usual.allowed(np.zeros(64), epsilon, TF32).max() < softmax.max() / 100
