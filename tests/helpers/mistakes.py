"""Models that padding breaks, and models that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import as_a_whole
from tests.helpers.functions import floats

WEIGHTS = floats(0, 3, 3)
VOCABULARY = floats(2, 3, 2000) / 10
TABLE = floats(1, 1000, 4)


@by_numpy
def batch_norm(x):
    """Statistics over a batch that has padded rows."""
    return (x - x.mean(axis=0)) / (x.var(axis=0) + 1e-3) ** 0.5


@by_numpy
def mean_of_tokens(x):
    """A mean that counts padded tokens."""
    return x.mean(axis=1)


@by_numpy
def attention(x):
    """Softmax over scores of which some are padding."""
    scores = xp(x).einsum("bqd,bkd->bqk", x, x)
    return xp(x).einsum("bqk,bkd->bqd", softmax(scores), x)


@by_numpy
def positions_from_the_end(x):
    """Positions that are read from the padded length."""
    return x + xp(x).arange(x.shape[1])[::-1, None]


@by_numpy
def best_token(x):
    """An argmax that can choose padding."""
    return x.sum(axis=-1).argmax(axis=1)


@by_numpy
def tied_to_the_batch(x):
    """A loss that is scaled by the padded batch."""
    return x / x.shape[0]


@by_numpy
def largest_token(x):
    """A maximum that padding wins where all tokens are negative."""
    return x.max(axis=1)


@by_numpy
def last_token(x):
    """The last token, which is padding."""
    return x[:, -1]


@by_numpy
def probabilities(x):
    """A mean that counts padded tokens, behind a softmax of which every part is small."""
    return softmax(x.mean(axis=1) @ VOCABULARY)


@by_numpy
def in_small_units(x):
    """The same where the unit makes all numbers small."""
    return x.mean(axis=1) * 1e-4


PLANTED = (batch_norm, mean_of_tokens, attention, positions_from_the_end, best_token)
FURTHER = (tied_to_the_batch, largest_token, last_token, probabilities, in_small_units)


@by_numpy
def elementwise(x):
    return xp(x).tanh(x) * 2 + 1


@by_numpy
def dense(x):
    return xp(x).tanh(x @ WEIGHTS)


@by_numpy
def layer_norm(x):
    # By deviations: `jax.nn.standardize` takes squares from squares, where few digits may be left.
    deviations = x - x.mean(axis=-1, keepdims=True)
    return deviations / ((deviations**2).mean(axis=-1, keepdims=True) + 1e-5) ** 0.5


@by_numpy
def running_sum(x):
    return {"sums": x.cumsum(axis=1), "signs": x > 0}


@by_numpy
def masked_mean(x, mask):
    return (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)


@by_numpy
def masked_attention(x, mask):
    scores = xp(x).einsum("bqd,bkd->bqk", x, x)
    weights = softmax(xp(x).where(mask[:, None, :], scores, -np.inf))
    return xp(x).einsum("bqk,bkd->bqd", weights, x)


@by_numpy
def masked_best(x, mask):
    return xp(x).where(mask, x.sum(axis=-1), -np.inf).argmax(axis=1)


@by_numpy
def causal_attention(x):
    scores = xp(x).einsum("bqd,bkd->bqk", x, x)
    before = np.tri(*scores.shape[1:], dtype=np.bool_)
    weights = softmax(xp(x).where(before, scores, -1e9))
    return xp(x).einsum("bqk,bkd->bqd", weights, x)


@by_numpy
def last_by_length(x, lengths):
    return xp(x).take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


@by_numpy
def embedded(ids, mask):
    vectors = xp(ids).asarray(TABLE)[ids] * mask[..., None]
    pooled = vectors.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return pooled / xp(pooled).linalg.norm(pooled, axis=1, keepdims=True)


def step(state, row):
    state = jnp.tanh(state + row)
    return state, state


@as_a_whole
def scanned(x):
    _, states = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(states, 0, 1)


@by_numpy
def masked_batch_norm(x, mask):
    real = mask[..., None]
    count = real.sum(axis=(0, 1))
    mean = (x * real).sum(axis=(0, 1)) / count
    variance = ((x - mean) ** 2 * real).sum(axis=(0, 1)) / count
    return (x - mean) / (variance + 1e-3) ** 0.5


X = "batch seq ..."
SOUND: dict[Callable[..., Any], dict[str, Any]] = {
    elementwise: {"in_axes": (X,)},
    dense: {"in_axes": (X,)},
    layer_norm: {"in_axes": (X,)},
    running_sum: {"in_axes": (X,)},
    causal_attention: {"in_axes": (X,)},
    scanned: {"in_axes": (X,)},
    masked_mean: {"in_axes": (X, "batch seq"), "values": (None, "mask")},
    masked_attention: {"in_axes": (X,), "mask_argname": "mask"},
    masked_best: {"in_axes": (X,), "mask_argname": "mask"},
    masked_batch_norm: {"in_axes": (X,), "mask_argname": "mask"},
    last_by_length: {
        "in_axes": (X, "batch"),
        "dtypes": (None, "int32"),
        "values": (None, "lengths"),
        "pad_values": (0, 1),
    },
    embedded: {
        "in_axes": ("batch seq", "batch seq"),
        "dtypes": ("int32", None),
        "values": ((0, 999), "mask"),
    },
}
