"""Models that padding breaks, and models that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.helpers.examples import as_a_whole

WEIGHTS = jax.random.normal(jax.random.key(0), (3, 3))
VOCABULARY = jax.random.normal(jax.random.key(2), (3, 2000)) / 10
TABLE = jax.random.normal(jax.random.key(1), (1000, 4))


@as_a_whole
def batch_norm(x):
    """Statistics over a batch that has padded rows."""
    return (x - x.mean(axis=0)) / jnp.sqrt(x.var(axis=0) + 1e-3)


@as_a_whole
def mean_of_tokens(x):
    """A mean that counts padded tokens."""
    return x.mean(axis=1)


@as_a_whole
def attention(x):
    """Softmax over scores of which some are padding."""
    scores = jnp.einsum("bqd,bkd->bqk", x, x)
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), x)


@as_a_whole
def positions_from_the_end(x):
    """Positions that are read from the padded length."""
    return x + jnp.flip(jnp.arange(x.shape[1]))[:, None]


@as_a_whole
def best_token(x):
    """An argmax that can choose padding."""
    return jnp.argmax(x.sum(axis=-1), axis=1)


@as_a_whole
def tied_to_the_batch(x):
    """A loss that is scaled by the padded batch."""
    return x / x.shape[0]


@as_a_whole
def largest_token(x):
    """A maximum that padding wins where all tokens are negative."""
    return x.max(axis=1)


@as_a_whole
def last_token(x):
    """The last token, which is padding."""
    return x[:, -1]


@as_a_whole
def probabilities(x):
    """A mean that counts padded tokens, behind a softmax of which every part is small."""
    return jax.nn.softmax(x.mean(axis=1) @ VOCABULARY)


@as_a_whole
def in_small_units(x):
    """The same where the unit makes all numbers small."""
    return x.mean(axis=1) * 1e-4


PLANTED = (batch_norm, mean_of_tokens, attention, positions_from_the_end, best_token)
FURTHER = (tied_to_the_batch, largest_token, last_token, probabilities, in_small_units)


@as_a_whole
def elementwise(x):
    return jnp.tanh(x) * 2 + 1


@as_a_whole
def dense(x):
    return jax.nn.gelu(x @ WEIGHTS)


@as_a_whole
def layer_norm(x):
    # By deviations: `jax.nn.standardize` takes squares from squares, where few digits may be left.
    deviations = x - x.mean(axis=-1, keepdims=True)
    return deviations / jnp.sqrt(jnp.square(deviations).mean(axis=-1, keepdims=True) + 1e-5)


@as_a_whole
def running_sum(x):
    return {"sums": jnp.cumsum(x, axis=1), "signs": x > 0}


@as_a_whole
def masked_mean(x, mask):
    return (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)


@as_a_whole
def masked_attention(x, mask):
    scores = jnp.einsum("bqd,bkd->bqk", x, x)
    weights = jax.nn.softmax(jnp.where(mask[:, None, :], scores, -jnp.inf))
    return jnp.einsum("bqk,bkd->bqd", weights, x)


@as_a_whole
def masked_best(x, mask):
    return jnp.argmax(jnp.where(mask, x.sum(axis=-1), -jnp.inf), axis=1)


@as_a_whole
def causal_attention(x):
    scores = jnp.einsum("bqd,bkd->bqk", x, x)
    before = jnp.tril(jnp.ones(scores.shape[1:], bool))
    weights = jax.nn.softmax(jnp.where(before, scores, -1e9))
    return jnp.einsum("bqk,bkd->bqd", weights, x)


@as_a_whole
def last_by_length(x, lengths):
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


@as_a_whole
def embedded(ids, mask):
    vectors = TABLE[ids] * mask[..., None]
    pooled = vectors.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True)


def step(state, row):
    state = jnp.tanh(state + row)
    return state, state


@as_a_whole
def scanned(x):
    _, states = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(states, 0, 1)


@as_a_whole
def masked_batch_norm(x, mask):
    real = mask[..., None]
    count = real.sum(axis=(0, 1))
    mean = (x * real).sum(axis=(0, 1)) / count
    variance = (jnp.square(x - mean) * real).sum(axis=(0, 1)) / count
    return (x - mean) / jnp.sqrt(variance + 1e-3)


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
