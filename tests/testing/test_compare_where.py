"""The kit's assertions with `compare_where="mask"`, which leaves out what a mask leaves out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.testing import assert_bucketing_preserves, assert_padding_does_not_leak
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import examples
from tests.helpers.mistakes import X, elementwise, masked_attention

GRID = CUDAGraphConfig(capture_sizes=(3,), capture_seq_lens=(1, 4))
ASSERTIONS = [assert_bucketing_preserves, assert_padding_does_not_leak]
MASKED: dict[str, Any] = {
    "in_axes": (X, "batch seq"),
    "dtypes": (None, "bool"),
    "values": (None, "mask"),
    "config": GRID,
    "settings": examples(12, thorough=25),
}


@by_numpy
def queries_and_keys(x, mask):
    """Attention whose padded queries see all keys alike, padded ones too."""
    allowed = mask[:, :, None] & mask[:, None, :]
    scores = xp(x).einsum("bqd,bkd->bqk", x, x)
    return softmax(xp(x).where(allowed, scores, -1e30)) @ x


@by_numpy
def leaky(x, mask):
    return queries_and_keys(x, mask) + x.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("check", ASSERTIONS)
def test_padded_queries(check):
    """They differ, which the message tells, and its advice is accepted."""
    with pytest.raises(AssertionError) as caught:
        check(queries_and_keys, **MASKED)
    message = str(caught.value)
    assert "it differs only where mask is false" in message
    assert 'set compare_where="mask" (in CUDAGraphConfig, or in an assertion of the' in message
    check(queries_and_keys, compare_where="mask", **MASKED)


@pytest.mark.parametrize("check", ASSERTIONS)
def test_as_the_configuration_says(check):
    """Without the keyword that of the configuration counts, also that of a bucketed function."""
    config = dataclasses.replace(GRID, compare_where="mask")
    check(queries_and_keys, **{**MASKED, "config": config})
    function = bucket_jit(queries_and_keys, in_axes=(X, "batch seq"), config=config)
    options = {**MASKED, "in_axes": None, "config": None}
    check(function, **options)
    with pytest.raises(AssertionError, match="only where mask is false"):
        check(function, compare_where="all", **options)


@pytest.mark.parametrize("check", ASSERTIONS)
def test_leaks_into_what_is_real_are_found(check):
    """Where the mask is true nothing is forgiven."""
    with pytest.raises(AssertionError) as caught:
        check(leaky, compare_where="mask", **MASKED)
    assert "padding is counted in, that of the sequence" in str(caught.value)


@pytest.mark.parametrize("check", ASSERTIONS)
def test_a_function_without_a_mask(check):
    """Where no call has a mask, to compare by it is a mistake; the library's own is one."""
    options: dict[str, Any] = {"in_axes": (X,), "config": GRID, "compare_where": "mask"}
    with pytest.raises(ConfigError, match="the function takes no mask: name mask_argname"):
        check(elementwise, **options)
    check(masked_attention, mask_argname="mask", settings=examples(6, thorough=10), **options)


@pytest.mark.parametrize("check", ASSERTIONS)
def test_an_unknown_word(check):
    """What may be compared is one of two words."""
    with pytest.raises(ConfigError, match="compare_where='masks' is unknown: did you mean 'mask'"):
        check(elementwise, in_axes=(X,), compare_where="masks")
