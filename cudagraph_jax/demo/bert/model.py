"""The encoder: all-MiniLM-L6-v2 as pure JAX functions, of one text in a row or of several.

The architecture is BERT (https://arxiv.org/abs/1810.04805) with the pooling of
https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2: the mean over the
real tokens, scaled to unit length. Matrix products ask for the highest precision:
the default on recent GPUs is TF32, which is off by 1e-3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

NUM_HEADS = 12
EMBEDDING_SIZE = 384
LAYER_NORM_EPS = 1e-12
MAX_SEGMENTS = 8
"""Texts that may share a row of `encode_packed`: the tables it computes grow with them."""

LOWEST = float(np.finfo(np.float32).min)

Array = jax.Array | np.ndarray


class Dense(NamedTuple):
    """An affine map: ``kernel`` is (in, out), ``bias`` is (out,)."""

    kernel: Array
    bias: Array


class Norm(NamedTuple):
    """Layer normalisation: ``scale`` and ``bias`` are (hidden,)."""

    scale: Array
    bias: Array


class Layer(NamedTuple):
    """One transformer block, normalised after each residual sum."""

    query: Dense
    key: Dense
    value: Dense
    attention_output: Dense
    attention_norm: Norm
    intermediate: Dense
    output: Dense
    output_norm: Norm


class Params(NamedTuple):
    """All weights: the token table is (vocab, hidden), the position table (512, hidden)."""

    tokens: Array
    positions: Array
    norm: Norm
    layers: tuple[Layer, ...]


def encode(params: Params, ids: ArrayLike, mask: ArrayLike) -> jax.Array:
    """One unit vector per row.

    A row whose mask is all zero, as batch padding is, gives the zero vector.

    Args:
        params: The weights.
        ids: Token ids, int32 (batch, seq).
        mask: Nonzero where a token is real, int32 or bool (batch, seq).

    Returns:
        float32 (batch, 384).
    """
    real = jnp.asarray(mask).astype(bool)
    positions = params.positions[: real.shape[1]]
    hidden = _transform(params, ids, positions, real[:, None, None, :])
    return _unit(jnp.sum(jnp.where(real[..., None], hidden, 0.0), axis=1))


def encode_packed(
    params: Params, ids: ArrayLike, positions: ArrayLike, segments: ArrayLike
) -> jax.Array:
    """One unit vector per segment: several texts stand in a row, one behind the other.

    Args:
        params: The weights.
        ids: Token ids, int32 (batch, seq).
        positions: Of each token in its own text, int32 (batch, seq).
        segments: Which text of its row a token belongs to, from 1; 0 for none: int32 (batch, seq).

    Returns:
        float32 (batch, MAX_SEGMENTS, 384), zero where a row has no such segment.
    """
    segments = jnp.asarray(segments)
    within = segments[:, None, :, None] == segments[:, None, None, :]
    places = jnp.take(params.positions, jnp.asarray(positions), axis=0, mode="clip")
    hidden = _transform(params, ids, places, within)
    members = segments[:, None, :] == jnp.arange(1, MAX_SEGMENTS + 1)[:, None]
    return _unit(jnp.matmul(members.astype(hidden.dtype), hidden, precision="highest"))


def _transform(
    params: Params, ids: ArrayLike, positions: ArrayLike, attends: jax.Array
) -> jax.Array:
    """The last hidden states (batch, seq, hidden); `attends` is bool (batch, 1, 1 or seq, seq)."""
    # clip, not fill: an id out of range in a padded place must not become NaN.
    hidden = jnp.take(params.tokens, jnp.asarray(ids), axis=0, mode="clip")
    hidden = _normalise(params.norm, hidden + positions)
    for layer in params.layers:
        hidden = _block(layer, hidden, attends)
    return hidden


def _block(layer: Layer, hidden: jax.Array, attends: jax.Array) -> jax.Array:
    attended = _dense(layer.attention_output, _attention(layer, hidden, attends))
    hidden = _normalise(layer.attention_norm, hidden + attended)
    inner = jax.nn.gelu(_dense(layer.intermediate, hidden), approximate=False)
    return _normalise(layer.output_norm, hidden + _dense(layer.output, inner))


def _attention(layer: Layer, hidden: jax.Array, attends: jax.Array) -> jax.Array:
    query, key, value = (
        _heads(_dense(dense, hidden)) for dense in (layer.query, layer.key, layer.value)
    )
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision="highest")
    # The lowest float rather than -inf: a row without real tokens must not become NaN.
    scores = jnp.where(attends, scores / query.shape[-1] ** 0.5, LOWEST)
    # The softmax, divided after the product: that array is much the smaller one.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value, precision="highest")
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    return mixed.swapaxes(1, 2).reshape(hidden.shape)


def _heads(x: jax.Array) -> jax.Array:
    batch, seq, hidden = x.shape
    return x.reshape(batch, seq, NUM_HEADS, hidden // NUM_HEADS).swapaxes(1, 2)


def _dense(dense: Dense, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, dense.kernel, precision="highest") + dense.bias


def _normalise(norm: Norm, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS) * norm.scale + norm.bias


def _unit(total: jax.Array) -> jax.Array:
    # Dividing by the count of tokens would cancel in the unit vector.
    length = jnp.linalg.norm(total, axis=-1, keepdims=True)
    return total / jnp.maximum(length, 1e-9)
