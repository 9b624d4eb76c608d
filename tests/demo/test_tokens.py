"""Text to rows of ids, and rows to rectangles."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.demo.bert.tokens import stack


def test_special_tokens(encoder):
    """Each text begins with [CLS] and ends with [SEP], and case does not matter."""
    lower, upper = encoder.tokenize(["array", "ARRAY"])
    assert lower == upper == [101, 9140, 102]


def test_truncation(encoder):
    """A long text keeps its first 254 tokens and [SEP]."""
    (row,) = encoder.tokenize(["word " * 400])
    assert len(row) == 256
    assert row[-1] == 102


@given(st.lists(st.lists(st.integers(1, 99), min_size=1), min_size=1))
def test_stack(rows):
    """The mask covers what each row had, and the rest is zero."""
    ids, mask = stack(rows)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [list(line[: keep.sum()]) for line, keep in zip(ids, mask, strict=True)] == rows
    assert not ids[mask == 0].any()
