"""A text encoder without a model: each word has a vector, a text their mean. The host may wait."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax import Batcher, CUDAGraphConfig, bucket_jit

VOCAB, SIZE, MAX_TOKENS = 1000, 8, 16
TABLE = np.random.default_rng(0).normal(size=(VOCAB, SIZE)).astype(np.float32)


class TinyTokenize:
    """Words to ids between a first token 1 and a last token 2."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return self.with_cuts(texts)[0]

    def with_cuts(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        rows = [[3 + zlib.crc32(word.encode()) % (VOCAB - 3) for word in t.split()] for t in texts]
        cuts = [len(row) > MAX_TOKENS - 2 for row in rows]
        return [[1, *row[: MAX_TOKENS - 2], 2] for row in rows], cuts


def expected(row: Sequence[int], dimensions: int = SIZE) -> np.ndarray:
    """The unit vector of a row of ids, by NumPy."""
    vector = TABLE[list(row)].mean(axis=0)
    vector = (vector / np.linalg.norm(vector))[:dimensions]
    return vector / np.linalg.norm(vector)


class TinyEncoder:
    """What a server serves.

    Attributes:
        entered: Set whenever a call computes.
        go: Calls wait for it.
        calls: How many rows each call had.
    """

    def __init__(
        self,
        *,
        store: str | None = None,
        max_waiting: int = 2048,
        before_call: Callable[[], object] = lambda: None,
    ) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.calls: list[int] = []
        self.before_call = before_call
        self.tokenize = TinyTokenize()
        self.vocab_size, self.embedding_size, self.max_tokens = VOCAB, SIZE, MAX_TOKENS
        self.function = bucket_jit(
            self._embed if store is None else _embed_alone,
            in_axes=(None, "batch seq", "batch seq"),
            config=CUDAGraphConfig(
                capture_sizes=(1, 4), capture_seq_lens=(MAX_TOKENS,), warmup_iterations=1
            ),
            store=store,
            fingerprint=None if store is None else "tiny",
            name="tiny",
        )
        self.batcher = Batcher(self.function, TABLE, max_waiting=max_waiting, name="tiny")

    def _embed(self, table: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        counted = jax.pure_callback(
            self._on_host, jax.ShapeDtypeStruct(mask.shape, mask.dtype), mask
        )
        return _embed_alone(table, ids, counted)

    def _on_host(self, mask: Any) -> np.ndarray:
        mask = np.asarray(mask)
        self.calls.append(int(mask.any(axis=1).sum()))
        self.entered.set()
        self.before_call()
        assert self.go.wait(60)
        return mask

    def hold(self) -> None:
        """Has the next calls wait."""
        self.entered.clear()
        self.go.clear()

    def item(self, row: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(row, np.int32)
        return ids, np.ones_like(ids)

    def vector(self, answer: np.ndarray) -> np.ndarray:
        return answer

    def warmup(self, *, progress: Any = False) -> object:
        ids = np.ones((1, 3), np.int32)
        return self.function.warmup(TABLE, ids, ids, progress=progress)


def _embed_alone(table: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    vectors = jnp.take(jnp.asarray(table), ids, axis=0, mode="clip")
    total = jnp.sum(jnp.where(mask[..., None] != 0, vectors, 0.0), axis=1)
    length = jnp.linalg.norm(total, axis=-1, keepdims=True)
    return total / jnp.maximum(length, 1e-9)


def warm_encoder(**options: Any) -> TinyEncoder:
    """One that is captured and sealed."""
    encoder = TinyEncoder(**options)
    encoder.warmup()
    encoder.function.seal()
    encoder.calls.clear()
    encoder.entered.clear()
    return encoder
