"""debug_mode: sound functions are served with masks of every kind, whatever the example."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import IS_THOROUGH
from tests.helpers.functions import (
    WIDTH,
    assert_close,
    flags,
    floats,
    stats_of,
)

ONE = CUDAGraphConfig(
    capture_sizes=(3,), capture_seq_lens=(5,), warmup_iterations=1, debug_mode=True
)
TABLE = floats(4, 11, WIDTH)


def attended(x, scores):
    return softmax(scores) @ x


def scores_of(x):
    return x @ x.swapaxes(1, 2)


@by_numpy
def attention_where(x, mask):
    return attended(x, xp(x).where(mask[:, None, :] > 0, scores_of(x), -1e30))


@by_numpy
def attention_with_ten_thousand(x, mask):
    return attended(x, scores_of(x) + (1 - mask[:, None, :].astype(x.dtype)) * -10_000.0)


@by_numpy
def attention_with_log(x, mask):
    return attended(x, scores_of(x) + xp(x).log(mask[:, None, :].astype(x.dtype)))


@by_numpy
def exponential_weights(x, mask):
    weights = xp(x).exp(x[..., 0]) * mask
    return weights.sum(1) / (1 + weights.sum(1))


@by_numpy
def mean_of_real(x, mask):
    return (x * mask[..., None]).sum(1) / mask.sum(1).clip(1)[:, None]


@by_numpy
def maximum_of_real(x, mask):
    return xp(x).where(mask[..., None] == 1, x, -np.inf).max(1)


@by_numpy
def with_counts(x, mask):
    return mean_of_real(x, mask), mask.sum(1)


@by_numpy
def last_real(x, mask):
    return x[np.arange(x.shape[0]), mask.sum(1).astype(int) - 1]


@by_numpy
def segments(x, segment_ids):
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return attended(x, xp(x).where(same, scores_of(x), -1e30))


@by_numpy
def pooled_tokens(ids, mask):
    return mean_of_real(xp(ids).asarray(TABLE)[ids], mask)


@by_numpy
def typed_tokens(ids, mask, types):
    table = xp(ids).asarray(TABLE)
    return mean_of_real(table[ids] + table[::-1][types], mask)


@by_numpy
def causal(x):
    length = x.shape[1]
    return attended(x, xp(x).where(np.tri(length, dtype=bool), scores_of(x), -1e30))


@by_numpy
def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / (x.var(-1, keepdims=True) + 1e-5) ** 0.5


@by_numpy
def per_token(ids):
    return ids[..., None] == np.arange(3), ids * 2


@by_numpy
def up_to_lengths(x, lengths):
    real = np.arange(x.shape[1]) < lengths[:, None]
    return attended(x, xp(x).where(real[:, None, :], scores_of(x), -1e30)), lengths


@by_numpy
def at_last_position(x, position):
    return x[np.arange(x.shape[0]), position]


@by_numpy
def scaled(x, temperature):
    return x / temperature[:, None, None]


FEATURES, TOKENS, ROWS = "batch seq _", "batch seq", "batch"

SOUND = [
    *[
        (function, (FEATURES, TOKENS), (np.float32, dtype))
        for function in (
            attention_where,
            attention_with_ten_thousand,
            mean_of_real,
            with_counts,
            last_real,
        )
        for dtype in (np.float32, np.int32)
    ],
    (attention_with_log, (FEATURES, TOKENS), (np.float32, np.float32)),
    (exponential_weights, (FEATURES, TOKENS), (np.float32, np.float32)),
    (maximum_of_real, (FEATURES, TOKENS), (np.float32, np.int32)),
    (attention_where, (FEATURES, TOKENS), (np.float32, np.bool_)),
    (maximum_of_real, (FEATURES, TOKENS), (np.float32, np.bool_)),
    (pooled_tokens, (TOKENS, TOKENS), (np.int32, np.int32)),
    (pooled_tokens, (TOKENS, TOKENS), (np.int32, np.float32)),
    (typed_tokens, (TOKENS, TOKENS, TOKENS), (np.int32, np.int32, np.int32)),
    (causal, (FEATURES,), (np.float32,)),
    (normalised, (FEATURES,), (np.float32,)),
    (per_token, (TOKENS,), (np.int32,)),
    (up_to_lengths, (FEATURES, ROWS), (np.float32, np.int32)),
    (at_last_position, (FEATURES, ROWS), (np.float32, np.int32)),
    (scaled, (FEATURES, ROWS), (np.float32, np.float32)),
]


def shape_of(axes, batch, seq):
    return {FEATURES: (batch, seq, WIDTH), TOKENS: (batch, seq), ROWS: (batch,)}[axes]


def random_values(axes, dtype, batch, seq):
    """Features and tokens at random; masks with holes, whose first position is real."""
    if axes == FEATURES:
        return floats(1, batch, seq, WIDTH)
    if axes == ROWS:
        return np.arange(1, batch + 1).astype(dtype)
    return (flags(2, batch, seq) | (np.arange(seq) == 0)).astype(dtype)


def ends_in_zeros(axes, dtype, batch, seq):
    """As random values, but for masks: what is real comes first."""
    if axes != TOKENS:
        return random_values(axes, dtype, batch, seq)
    return (np.arange(seq) <= np.arange(batch)[:, None]).astype(dtype)


EXAMPLES = {
    "zeros": lambda axes, dtype, *sizes: np.zeros(shape_of(axes, *sizes), dtype),
    "ones": lambda axes, dtype, *sizes: np.ones(shape_of(axes, *sizes), dtype),
    "random": random_values,
    "ends in zeros": ends_in_zeros,
    "abstract": lambda axes, dtype, *sizes: jax.ShapeDtypeStruct(shape_of(axes, *sizes), dtype),
}


@pytest.mark.parametrize(
    ("sound", "in_axes", "dtypes", "example"),
    [
        pytest.param(*case, example, id=f"{case[0].__name__}-{np.dtype(case[2][-1])}-{example}")
        for place, (case, example) in enumerate(itertools.product(SOUND, EXAMPLES))
        if (case[0], example) != (last_real, "random")  # which takes no holes
        if IS_THOROUGH or place % 2 == 0  # by turns: there are five examples
    ],
)
def test_sound_functions_are_accepted(sound, in_axes, dtypes, example):
    """A mask of any kind and a function that uses it are never accused."""
    function = bucket_jit(sound, in_axes=in_axes, config=ONE)
    args = [
        EXAMPLES[example](axes, dtype, 2, 4) for axes, dtype in zip(in_axes, dtypes, strict=True)
    ]
    assert not function.warmup(*args, progress=False).failed
    assert function.registry.num_graphs == 1


@pytest.mark.parametrize(("sound", "in_axes", "dtypes"), SOUND)
def test_sound_functions_are_accepted_when_they_fill_the_bucket(sound, in_axes, dtypes):
    """An exact call, which is cut to make room for padding, is served."""
    function = bucket_jit(sound, in_axes=in_axes, config=ONE)
    args = [ends_in_zeros(axes, dtype, 3, 5) for axes, dtype in zip(in_axes, dtypes, strict=True)]
    assert_close(function(*args), sound(*args), 1e-4)
    assert stats_of(function)["captures"] == 1


@pytest.mark.parametrize("example", ["zeros", "ones", "abstract"])
def test_segments_are_accepted(example):
    """Padding that is a segment of its own is a mask; a real segment 0 would be a leak."""
    function = bucket_jit(segments, in_axes=(FEATURES, TOKENS), config=ONE)
    ids = EXAMPLES[example](TOKENS, np.int32, 2, 4)
    assert not function.warmup(floats(0, 2, 4, WIDTH), ids, progress=False).failed
