"""Requests that are being decoded: their KV cache, on the device, in a bucket's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from cudagraph_jax.demo.decoder.transformer import KVCache
from cudagraph_jax.shapes.ladder import Bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """What a step hands to the next one, which donates cache and positions: each is taken once.

    Attributes:
        cache: Keys and values, (batch, kv_heads, context, head_dim) of the bucket.
        tokens: The newest token of each row, which the cache does not have yet, int32 (batch,).
        positions: How many tokens each row has in the cache, int32 (batch,).
        rows: Rows that are real; those after them are padding.
        longest: The largest position of a real row.
    """

    cache: KVCache
    tokens: jax.Array
    positions: jax.Array
    rows: int
    longest: int

    @property
    def bucket(self) -> Bucket:
        """The bucket whose shape the cache has."""
        batch, _, context, _ = self.cache.keys[0].shape
        return Bucket(batch, context)


def gathered(states: Sequence[DecodeState], bucket: Bucket) -> DecodeState:
    """The real rows of all states, one after the other, in a bucket that holds them.

    They go through host memory, where copying compiles nothing; the states stay valid.

    Args:
        states: At least one.
        bucket: The batch and context of the result.
    """

    def caches(*arrays: jax.Array) -> jax.Array:
        pieces = [
            np.asarray(array)[: state.rows, :, : state.longest]
            for array, state in zip(arrays, states, strict=True)
        ]
        _, kv_heads, _, head_dim = arrays[0].shape
        return _placed(pieces, (bucket.batch_size, kv_heads, bucket.seq_len, head_dim))

    def vectors(*arrays: jax.Array) -> jax.Array:
        pieces = [
            np.asarray(array)[: state.rows] for array, state in zip(arrays, states, strict=True)
        ]
        return _placed(pieces, (bucket.batch_size,))

    return DecodeState(
        cache=jax.tree.map(caches, *(state.cache for state in states)),
        tokens=vectors(*(state.tokens for state in states)),
        positions=vectors(*(state.positions for state in states)),
        rows=sum(state.rows for state in states),
        longest=max(state.longest for state in states),
    )


def _placed(pieces: Sequence[np.ndarray], shape: tuple[int, ...]) -> jax.Array:
    """The pieces below one another in zeros of `shape`, on the device."""
    whole = np.zeros(shape, pieces[0].dtype)
    start = 0
    for piece in pieces:
        inside = (slice(start, start + len(piece)), *map(slice, piece.shape[1:]))
        whole[inside] = piece
        start += len(piece)
    array: jax.Array = jax.device_put(whole)
    return array
