"""The encoder's forward pass, on small weights."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.demo.bert.model import encode
from tests.helpers.examples import examples

SEQ_LEN = 6
compiled_encode = jax.jit(encode)
ids_strategy = st.lists(st.integers(0, 49), min_size=1, max_size=SEQ_LEN)


@pytest.fixture(scope="module")
def tiny(tiny_params):
    """One row of tokens to its vector, in a rectangle of two rows of six places."""

    def vectors(row, filler):
        ids = np.full((2, SEQ_LEN), filler, np.int32)
        mask = np.zeros((2, SEQ_LEN), np.int32)
        ids[0, : len(row)], mask[0, : len(row)] = row, 1
        return np.asarray(compiled_encode(tiny_params, ids, mask))

    return vectors


@given(ids_strategy)
def test_rows_are_unit_vectors(tiny, row):
    """A row with real tokens has length one; a row without any is zero, not NaN."""
    vectors = tiny(row, 0)
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
    assert not vectors[1].any()


@given(ids_strategy, st.integers(-(2**31), 2**31 - 1))
def test_padding_does_not_leak(tiny, row, filler):
    """What stands in the padded places does not matter, be it no token at all."""
    np.testing.assert_array_equal(tiny(row, filler), tiny(row, 0))


@examples(30, thorough=100)
@given(ids_strategy)
def test_padded_equals_exact(tiny, tiny_params, row):
    """A padded row has the vector that the row alone has."""
    exact = compiled_encode(
        tiny_params, np.array([row], np.int32), np.ones((1, len(row)), np.int32)
    )
    np.testing.assert_allclose(tiny(row, 0)[0], exact[0], atol=1e-5)


def test_bool_mask(tiny_params):
    """A mask of bools means the same as one of integers."""
    ids = np.array([[1, 2, 0]], np.int32)
    mask = np.array([[1, 1, 0]], np.int32)
    np.testing.assert_array_equal(
        encode(tiny_params, ids, mask), encode(tiny_params, ids, mask.astype(bool))
    )
