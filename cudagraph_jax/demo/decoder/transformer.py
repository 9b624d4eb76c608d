"""The decoder: a small Llama as pure JAX functions: `prefill`, `decode_step`, and both with argmax.

RMSNorm before each part, rotary positions, grouped-query attention and SwiGLU, as in
https://arxiv.org/abs/2302.13971 and https://arxiv.org/abs/2305.13245. The sizes are those of the
weights. Layers are unrolled, not scanned: XLA records no loop into command buffers by itself
(docs/xla.md, "Command buffers").

Rows are padded on the right. A place attends only to itself and to what is before it, so that
neither the padding of a row nor another row can change its answer, and places of the cache at or
after a row's position may hold anything.

Kernels are (out, in), and the cache has the heads before the context, so that XLA for GPUs reads
both as they lie. The other way round a step is more kernels (benchmarks/coverage.py counts them for
an H100): some transpose the cache, or write products of weights to memory to add them up.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cudagraph_jax.demo.decoder.decoder_params import Array, DecoderLayer, DecoderParams

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
LOWEST = float(np.finfo(np.float32).min)


class KVCache(NamedTuple):
    """Keys and values of each layer, all (batch, kv_heads, context, head_dim).

    One array for a layer: a donated one is then written in place.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def prefill(
    params: DecoderParams, tokens: ArrayLike, lengths: ArrayLike
) -> tuple[KVCache, jax.Array]:
    """Reads whole prompts.

    Args:
        params: The weights.
        tokens: Prompts, padded on the right, int32 (batch, seq).
        lengths: Real tokens of each row, int32 (batch,).

    Returns:
        The cache, as long as `tokens`, and the logits of the token after each row's last one,
        float32 (batch, vocab).
    """
    hidden = _embed(params, jnp.asarray(tokens))
    places = jnp.arange(hidden.shape[1])
    seen = places[:, None] >= places
    keys, values = [], []
    for layer in params.layers:
        query, key, value = _project(layer, hidden, places)
        hidden = _block(layer, hidden, _attend(query, key, value, seen))
        keys.append(key)
        values.append(value)
    # A row of padding alone has length 0: its answer is nobody's.
    last = jnp.clip(jnp.asarray(lengths) - 1, 0, hidden.shape[1] - 1)
    return KVCache(tuple(keys), tuple(values)), _logits(
        params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    )


def decode_step(
    params: DecoderParams, cache: KVCache, tokens: ArrayLike, positions: ArrayLike
) -> tuple[KVCache, jax.Array]:
    """Reads one more token of each row.

    Args:
        params: The weights.
        cache: What was read before; written at `positions`.
        tokens: The tokens to read, int32 (batch,).
        positions: How many tokens each row has in the cache, int32 (batch,), below its context.

    Returns:
        The cache with the tokens, and the logits of those that follow, float32 (batch, vocab).
    """
    places = jnp.asarray(positions)[:, None]
    hidden = _embed(params, jnp.asarray(tokens)[:, None])
    rows = jnp.arange(hidden.shape[0])
    seen = jnp.arange(cache.keys[0].shape[2]) <= places[..., None]
    keys, values = [], []
    for layer, old_keys, old_values in zip(params.layers, cache.keys, cache.values, strict=True):
        query, key, value = _project(layer, hidden, places)
        key = old_keys.at[rows, :, places[:, 0]].set(key[:, :, 0])
        value = old_values.at[rows, :, places[:, 0]].set(value[:, :, 0])
        hidden = _block(layer, hidden, _attend(query, key, value, seen))
        keys.append(key)
        values.append(value)
    return KVCache(tuple(keys), tuple(values)), _logits(params, hidden)


def greedy_prefill(
    params: DecoderParams, tokens: ArrayLike, lengths: ArrayLike
) -> tuple[KVCache, jax.Array, jax.Array]:
    """`prefill`, and the likeliest token after each prompt.

    Args:
        params: The weights.
        tokens: Prompts, padded on the right, int32 (batch, seq).
        lengths: Real tokens of each row, int32 (batch,).

    Returns:
        The cache, as long as `tokens`; the next tokens and their positions, int32 (batch,).
    """
    cache, logits = prefill(params, tokens, lengths)
    return cache, _likeliest(logits), jnp.asarray(lengths)


def greedy_step(
    params: DecoderParams, cache: KVCache, tokens: ArrayLike, positions: ArrayLike
) -> tuple[KVCache, jax.Array, jax.Array]:
    """`decode_step`, and the likeliest tokens: what it returns is what the next step takes.

    Args:
        params: The weights.
        cache: What was read before.
        tokens: The tokens to read, int32 (batch,).
        positions: Where they go in the cache, int32 (batch,).

    Returns:
        The cache; the next tokens and their positions, int32 (batch,).
    """
    cache, logits = decode_step(params, cache, tokens, positions)
    return cache, _likeliest(logits), jnp.asarray(positions) + 1


def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _embed(params: DecoderParams, tokens: jax.Array) -> jax.Array:
    # clip, not fill: an id out of range in a padded place must not become NaN.
    return jnp.take(jnp.asarray(params.embedding), tokens, axis=0, mode="clip")


def _project(
    layer: DecoderLayer, hidden: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (batch, kv_heads, group, t, head_dim); keys and values, without group.

    `places` is int (t,), or (batch, t).
    """
    x = _norm(layer.attention_norm, hidden)
    qkv = _einsum("bth,kqwh->bkqtw", x, layer.qkv)
    turned = _rotate(qkv[:, :, :-1], places[..., None, None, :])
    return turned[:, :, :-1], turned[:, :, -1], qkv[:, :, -1]


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention of (batch, kv_heads, group, t, head_dim) over the places that are `seen`.

    `seen` is bool (t, context), or (batch, t, context). The result is (batch, t, heads * head_dim).
    """
    scores = jnp.einsum(
        "bkqtw,bksw->bkqts", query, key, precision="highest", preferred_element_type=jnp.float32
    )
    seen = seen if seen.ndim == 2 else seen[:, None, None]
    # A place sees itself at least, so that no softmax is over nothing.
    scores = jnp.where(seen, scores * query.shape[-1] ** -0.5, LOWEST)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    attended = _einsum("bkqts,bksw->btkqw", weights, value)
    return attended.reshape(*attended.shape[:2], -1)


def _block(layer: DecoderLayer, hidden: jax.Array, attended: jax.Array) -> jax.Array:
    """What follows the attention: its projection, and SwiGLU."""
    hidden = hidden + _einsum("bti,hi->bth", attended, layer.output)
    x = _norm(layer.mlp_norm, hidden)
    gate, up = _einsum("bth,nih->nbti", x, layer.gate_up)
    return hidden + _einsum("bti,hi->bth", jax.nn.silu(gate) * up, layer.down)


def _logits(params: DecoderParams, hidden: jax.Array) -> jax.Array:
    """Logits float32 (batch, vocab) of hidden (batch, 1, hidden)."""
    x = _norm(params.norm, hidden[:, 0])
    return jnp.einsum(
        "bh,vh->bv", x, params.head, precision="highest", preferred_element_type=jnp.float32
    )


def _rotate(x: jax.Array, places: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + head_dim / 2) by angles that grow with the place."""
    half = x.shape[-1] // 2
    frequencies = np.float32(ROPE_THETA) ** -(np.arange(half, dtype=np.float32) / half)
    angles = places[..., None] * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _norm(scale: Array, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + NORM_EPS)
    return wide.astype(x.dtype) * scale


def _einsum(formula: str, x: jax.Array, kernel: Array) -> jax.Array:
    # The default precision on recent GPUs is TF32, which is off by 1e-3.
    return jnp.einsum(formula, x, kernel, precision="highest")
