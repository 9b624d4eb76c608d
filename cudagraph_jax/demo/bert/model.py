"""Sentence encoders of the BERT family as pure JAX functions, of one text in a row or of several.

The architecture is BERT (https://arxiv.org/abs/1810.04805), with the poolings of
https://sbert.net/docs/package_reference/sentence_transformer/modules.html behind it. Whatever of
it is compiled stands in this module, by whose digest a store knows it. Matrix products ask for the
highest precision: the default on recent GPUs is TF32, which is off by 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

MAX_SEGMENTS = 8
"""Texts that may share a row of `encode_packed`: the tables it computes grow with them."""

LOWEST = float(np.finfo(np.float32).min)

Array = jax.Array | np.ndarray

# By their names in transformers and in sentence-transformers.
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


class Projection(NamedTuple):
    """A dense layer behind the pooling: the size of what it gives, and if a tanh follows."""

    size: int
    is_tanh: bool
    has_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What an encoder computes, but for its weights; the defaults are all-MiniLM-L6-v2's.

    Attributes:
        vocab_size: Tokens that it knows.
        positions: Tokens of the longest text.
        hidden_size: Numbers for each token.
        intermediate_size: Numbers for each token inside of a block.
        layers: Blocks.
        heads: Of the attention; `hidden_size` is a multiple.
        layer_norm_eps: Added to variances.
        activation: In the middle of a block.
        pooling: How the tokens become a vector; of several ways the vectors are joined.
        projections: Dense layers behind the pooling.
        normalise: Whether the vectors are scaled to unit length.
    """

    vocab_size: int = 30_522
    positions: int = 512
    hidden_size: int = 384
    intermediate_size: int = 1536
    layers: int = 6
    heads: int = 12
    layer_norm_eps: float = 1e-12
    activation: Activation = "gelu"
    pooling: tuple[Pooling, ...] = ("mean",)
    projections: tuple[Projection, ...] = ()
    normalise: bool = True

    @property
    def pooled_size(self) -> int:
        """Numbers in a text's vector before the projections."""
        return self.hidden_size * len(self.pooling)

    @property
    def embedding_size(self) -> int:
        """Numbers in a text's vector."""
        return self.projections[-1].size if self.projections else self.pooled_size


MINILM = Architecture()


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
    """All weights: the token table is (vocab, hidden), the position table (positions, hidden)."""

    tokens: Array
    positions: Array
    norm: Norm
    layers: tuple[Layer, ...]
    projections: tuple[Dense, ...] = ()


def encode(
    params: Params, ids: ArrayLike, mask: ArrayLike, *, architecture: Architecture = MINILM
) -> jax.Array:
    """One vector per row.

    Args:
        params: The weights.
        ids: Token ids, int32 (batch, seq).
        mask: Nonzero where a token is real, int32 or bool (batch, seq).
        architecture: Of the weights.

    Returns:
        float32 (batch, embedding_size). A row whose mask is all zero, as batch padding is, is
        pooled to the zero vector.
    """
    real = jnp.asarray(mask).astype(bool)
    positions = jnp.arange(real.shape[1])[None]
    hidden = _transform(architecture, params, ids, positions, real[:, None, None, :])
    return _vectors(architecture, params, hidden, positions, real[:, None, :])[:, 0]


def encode_packed(
    params: Params,
    ids: ArrayLike,
    positions: ArrayLike,
    segments: ArrayLike,
    *,
    architecture: Architecture = MINILM,
) -> jax.Array:
    """One vector per segment: several texts stand in a row, one behind the other.

    Args:
        params: The weights.
        ids: Token ids, int32 (batch, seq).
        positions: Of each token in its own text, int32 (batch, seq).
        segments: Which text of its row a token belongs to, from 1; 0 for none: int32 (batch, seq).
        architecture: Of the weights.

    Returns:
        float32 (batch, MAX_SEGMENTS, embedding_size), pooled to zero where a row has no such
        segment.
    """
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)
    within = segments[:, None, :, None] == segments[:, None, None, :]
    hidden = _transform(architecture, params, ids, positions, within)
    members = segments[:, None, :] == jnp.arange(1, MAX_SEGMENTS + 1)[:, None]
    return _vectors(architecture, params, hidden, positions, members)


def _transform(
    architecture: Architecture,
    params: Params,
    ids: ArrayLike,
    positions: jax.Array,
    attends: jax.Array,
) -> jax.Array:
    """The last hidden states (batch, seq, hidden); `attends` is bool (batch, 1, 1 or seq, seq)."""
    # clip, not fill: what is out of range in a padded place must not become NaN.
    hidden = jnp.take(params.tokens, jnp.asarray(ids), axis=0, mode="clip")
    hidden = hidden + jnp.take(params.positions, positions, axis=0, mode="clip")
    hidden = _normalise(architecture.layer_norm_eps, params.norm, hidden)
    for layer in params.layers:
        hidden = _block(architecture, layer, hidden, attends)
    return hidden


def _block(
    architecture: Architecture, layer: Layer, hidden: jax.Array, attends: jax.Array
) -> jax.Array:
    eps = architecture.layer_norm_eps
    mixed = _attention(architecture.heads, layer, hidden, attends)
    hidden = _normalise(eps, layer.attention_norm, hidden + _dense(layer.attention_output, mixed))
    inner = _activated(architecture.activation, _dense(layer.intermediate, hidden))
    return _normalise(eps, layer.output_norm, hidden + _dense(layer.output, inner))


def _activated(activation: Activation, x: jax.Array) -> jax.Array:
    # Not a table of functions: into that a store could not see, and would trace to be sure.
    if activation == "relu":
        return jax.nn.relu(x)
    if activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=activation != "gelu")


def _attention(heads: int, layer: Layer, hidden: jax.Array, attends: jax.Array) -> jax.Array:
    query, key, value = (
        _split(heads, _dense(dense, hidden)) for dense in (layer.query, layer.key, layer.value)
    )
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision="highest")
    # The lowest float rather than -inf: a row without real tokens must not become NaN.
    scores = jnp.where(attends, scores / query.shape[-1] ** 0.5, LOWEST)
    # The softmax, divided after the product: that array is much the smaller one.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value, precision="highest")
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    return mixed.swapaxes(1, 2).reshape(hidden.shape)


def _split(heads: int, x: jax.Array) -> jax.Array:
    batch, seq, hidden = x.shape
    return x.reshape(batch, seq, heads, hidden // heads).swapaxes(1, 2)


def _dense(dense: Dense, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, dense.kernel, precision="highest") + dense.bias


def _normalise(eps: float, norm: Norm, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps) * norm.scale + norm.bias


def _vectors(
    architecture: Architecture,
    params: Params,
    hidden: jax.Array,
    positions: jax.Array,
    members: jax.Array,
) -> jax.Array:
    """The vector of each text (batch, texts, embedding_size).

    Args:
        architecture: Of the weights.
        params: The weights.
        hidden: The last hidden states (batch, seq, hidden).
        positions: Of each token in its own text (batch or 1, seq).
        members: Which tokens belong to a text, bool (batch, texts, seq).
    """
    places = positions[:, None, :]
    pooled = [_pooled(mode, hidden, places, members) for mode in architecture.pooling]
    vectors = jnp.concatenate(pooled, axis=-1)
    for projection, dense in zip(architecture.projections, params.projections, strict=True):
        vectors = _dense(dense, vectors)
        vectors = jnp.tanh(vectors) if projection.is_tanh else vectors
    if not architecture.normalise:
        return vectors
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.maximum(length, 1e-12)


def _pooled(mode: Pooling, hidden: jax.Array, places: jax.Array, members: jax.Array) -> jax.Array:
    """One vector per text (batch, texts, hidden), zero for one without tokens."""
    counts = jnp.sum(members, axis=-1, keepdims=True)
    if mode == "max":
        highest = jnp.max(jnp.where(members[..., None], hidden[:, None], LOWEST), axis=2)
        return jnp.where(counts > 0, highest, 0.0)
    # All others are sums over the tokens, by their weights.
    if mode == "cls":
        members = members & (places == 0)
    elif mode == "lasttoken":
        members = members & (places == counts - 1)
    weights = members * (places + 1) if mode == "weightedmean" else members
    weights = weights.astype(hidden.dtype)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    summed = jnp.matmul(weights, hidden, precision="highest")
    return summed / (jnp.sqrt(total) if mode == "mean_sqrt_len_tokens" else total)
