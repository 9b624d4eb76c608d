"""State on the device: a decode loop whose KV cache lives in donated buffers of bucket shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit, no_compiles
from tests.helpers.examples import as_a_whole
from tests.helpers.functions import VOCABULARY, floats, stats_of

WIDTH = 4
STEPS = 1000
BATCHES, LENGTHS = (1, 2, 4), (16, 64, 1024)
CONFIG = CUDAGraphConfig(
    capture_sizes=BATCHES, capture_seq_lens=LENGTHS, on_miss="error", warmup_iterations=1
)
PARAMS = {
    "embedding": floats(1, VOCABULARY, WIDTH),
    "q": floats(2, WIDTH, WIDTH),
    "k": floats(3, WIDTH, WIDTH),
    "v": floats(4, WIDTH, WIDTH),
}


def step(params, cache, tokens, position):
    """One token for each row: written to the cache, then attended with all before it."""
    x = params["embedding"][tokens]
    keys = cache["k"].at[:, position].set(x @ params["k"])
    values = cache["v"].at[:, position].set(x @ params["v"])
    scores = jnp.einsum("bw,bsw->bs", x @ params["q"], keys)
    seen = jnp.arange(keys.shape[1]) <= position
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    logits = (x + jnp.einsum("bs,bsw->bw", weights, values)) @ params["embedding"].T
    return {"k": keys, "v": values}, logits


def grown(cache, batch, length):
    """The cache at a larger bucket's shape, padded in NumPy, on the device again."""

    def grow(array):
        host = np.asarray(array)
        padded = np.zeros((batch, length, WIDTH), host.dtype)
        padded[: host.shape[0], : host.shape[1]] = host
        return jax.device_put(padded)

    return {name: grow(array) for name, array in cache.items()}


def rows_at(position):
    """Requests join now and then."""
    return min(4, 1 + position // 300)


def bucket_of(position):
    rows = rows_at(position)
    return (
        next(size for size in BATCHES if size >= rows),
        next(size for size in LENGTHS if size > position),
    )


def eager_loop():
    """All tokens and logits, with one cache of the final size."""
    params, plain = jax.device_put(PARAMS), as_a_whole(step)
    cache: Any = {name: jnp.zeros((4, LENGTHS[-1], WIDTH)) for name in "kv"}
    tokens = np.zeros(4, np.int32)
    for position in range(STEPS):
        cache, logits = plain(params, cache, jnp.asarray(tokens), jnp.int32(position))
        rows = rows_at(position)
        # A row that has not joined yet starts from token 0 with an empty cache.
        if rows_at(position + 1) > rows:
            cache = {name: array.at[rows:].set(0) for name, array in cache.items()}
        tokens = np.where(np.arange(4) < rows, np.argmax(logits, -1), 0).astype(np.int32)
        yield tokens[:rows].copy(), np.asarray(logits)[:rows]


def test_a_decode_loop_equals_the_eager_loop():
    """A thousand steps through growing buckets compile nothing and give the eager tokens."""
    function: Any = bucket_jit(
        step,
        in_axes=(None, "batch seq _", "batch", None),
        donate_argnums=1,
        unpad="none",
        config=CONFIG,
    )
    params = jax.device_put(PARAMS)
    cache = {name: jax.device_put(np.zeros((1, 16, WIDTH), np.float32)) for name in "kv"}
    function.warmup(params, cache, np.zeros(1, np.int32), np.int32(0), progress=False)
    assert function.registry.num_graphs == 9
    expected = list(eager_loop())
    tokens = np.zeros(1, np.int32)
    bucket = (1, 16)
    growths = 0
    with no_compiles():
        for position in range(STEPS):
            if bucket_of(position) != bucket:
                bucket = bucket_of(position)
                cache = grown(cache, *bucket)
                growths += 1
            given = np.zeros(bucket[0], np.int32)
            given[: len(tokens)] = tokens
            previous = cache
            cache, logits = function(params, previous, given, np.int32(position))
            assert all(array.is_deleted() for array in previous.values())
            assert cache["k"].shape == (*bucket, WIDTH)
            rows = rows_at(position)
            found = np.asarray(logits)[:rows]
            tokens = np.argmax(found, -1).astype(np.int32)
            np.testing.assert_allclose(found, expected[position][1], 2e-4, 2e-4)
            np.testing.assert_array_equal(tokens, expected[position][0])
            if rows_at(position + 1) > rows:
                # What the padding rows wrote so far is not part of the request that joins.
                keep = np.arange(bucket[0])[:, None, None] < rows
                cache = {
                    name: jax.device_put(np.where(keep, np.asarray(array), np.float32(0)))
                    for name, array in cache.items()
                }
    assert growths == 4
    stats = stats_of(function)
    assert (stats["calls"], stats["hits"], stats["replays"]["exact"]) == (STEPS, STEPS, STEPS)
    assert not any(array.is_deleted() for array in params.values())


def test_padded_donated_buffers_are_invalid_too():
    """A donated cache that had to be padded is gone afterwards, as under jit."""
    function: Any = bucket_jit(
        step,
        in_axes=(None, "batch seq _", "batch", None),
        donate_argnums=1,
        unpad="none",
        config=CUDAGraphConfig(
            capture_sizes=BATCHES, capture_seq_lens=LENGTHS, warmup_iterations=0
        ),
    )
    for _ in range(2):
        cache = {name: jnp.zeros((3, 10, WIDTH)) for name in "kv"}
        grown_cache, _ = function(PARAMS, cache, np.zeros(3, np.int32), np.int32(0))
        assert all(array.is_deleted() for array in cache.values())
        assert grown_cache["k"].shape == (4, 16, WIDTH)


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_donated_buffers_that_are_of_no_use_stay():
    """What XLA cannot take over is as alive afterwards as under jit, padded or not."""
    function = bucket_jit(
        lambda x: x[..., :1].sum(axis=1),  # no output is as large as the input
        in_axes="batch seq _",
        donate_argnums=0,
        config=CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0),
    )
    for rows in (4, 3):
        x, plain = (jnp.ones((rows, 8, WIDTH)) for _ in range(2))
        jax.jit(lambda x: x[..., :1].sum(axis=1), donate_argnums=0)(plain)
        function(x)
        assert x.is_deleted() == plain.is_deleted()


def test_a_padded_donated_constant_while_another_function_is_traced():
    """It is served as outside of any trace."""
    inner: Any = bucket_jit(
        lambda x: x * 2,
        in_axes="batch seq",
        donate_argnums=0,
        config=CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0),
    )
    constant = np.ones((3, 5), np.float32)
    inner(constant)
    found = jax.jit(lambda x: x + inner(constant).sum())(np.float32(1))
    np.testing.assert_allclose(found, 31)
