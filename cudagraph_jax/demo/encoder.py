"""The sentence encoder of the demo, served through `bucket_jit`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

import jax
import numpy as np
import numpy.typing as npt

from cudagraph_jax import (
    Batcher,
    CUDAGraphConfig,
    GraphStore,
    InputShapeError,
    WarmupReport,
    bucket_jit,
)
from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax.demo.corpus import Passage
from cudagraph_jax.demo.model import EMBEDDING_SIZE, encode
from cudagraph_jax.demo.tokens import MAX_TOKENS, IntArray, load_tokenizer, stack
from cudagraph_jax.demo.weights import find_model, load_params
from cudagraph_jax.report.progress import Callback

# A small grid of little waste for the demo's own traffic.
BATCH_SIZES = (1, 4, 8, 12, 16)
SEQ_LENS = (32, 48, 72, 176, MAX_TOKENS)

Embeddings = npt.NDArray[np.float32]


def default_config() -> CUDAGraphConfig:
    """Twenty-five buckets for up to 16 texts, with the runs that the backend needs to be warm."""
    # A CPU has no command buffers to record: it is warm after one run, and the second costs what
    # a bucket costs, by which the batcher goes.
    runs = 2 if jax.default_backend() == "cpu" else CUDAGraphConfig().warmup_iterations
    return CUDAGraphConfig(
        capture_sizes=BATCH_SIZES, capture_seq_lens=SEQ_LENS, warmup_iterations=runs
    )


def model_fingerprint() -> str:
    """What a store knows the model's code by: a digest of the module that holds all of it.

    The weights are arguments, and so no part of what is compiled.
    """
    source = resources.files("cudagraph_jax.demo").joinpath("model.py").read_bytes()
    return f"all-MiniLM-L6-v2 {hashlib.sha256(source).hexdigest()}"


@belongs_to_process
class Encoder:
    """Texts to unit vectors, by all-MiniLM-L6-v2.

    Args:
        config: The buckets and the policies; `default_config()` if None.
        store: Where executables are kept, or its directory: what is there is loaded untraced.

    Attributes:
        config: The buckets and the policies.
        function: The `BucketedFunction` of (params, ids, mask).
        params: The weights, on the device.
        tokenize: Gives the token ids of each text.
        max_batch_size: Texts in the largest bucket.

    Raises:
        DemoError: The model package or an optional dependency is missing, or the weights are not
            those expected.
        ConfigError: `store` is no path, or `config` names another store.
        StoreError: The directory cannot be used.
    """

    def __init__(
        self,
        config: CUDAGraphConfig | None = None,
        *,
        store: GraphStore | str | os.PathLike[str] | None = None,
    ) -> None:
        config = default_config() if config is None else config
        self.config = config
        files = find_model()
        self.params = jax.device_put(load_params(files.weights))
        self.tokenize = load_tokenizer(files.tokenizer)
        self.function = bucket_jit(
            encode,
            in_axes=(None, "batch seq", "batch seq"),
            config=config,
            store=store,
            fingerprint=model_fingerprint(),
        )
        self.max_batch_size = min(config.max_batch_size, max(config.capture_sizes))

    @cached_property
    def batcher(self) -> Batcher:
        """Serves single texts: an item is the token ids and the mask of one, both int32 (seq,)."""
        return Batcher(self.function, self.params, name="Encoder")

    def warmup(self, *, progress: Callback | bool | None = None, workers: int = 1) -> WarmupReport:
        """Captures the whole grid, so that no later `embed` compiles.

        Args:
            progress: As for `BucketedFunction.warmup`.
            workers: How many buckets XLA compiles at a time.
        """
        ids, mask = stack(self.tokenize(["example"]))
        return self.function.warmup(self.params, ids, mask, progress=progress, workers=workers)

    def serve(self, ids: IntArray, mask: IntArray) -> Embeddings:
        """The vectors of one micro-batch, in host memory: float32 (batch, 384).

        Args:
            ids: Token ids (batch, seq).
            mask: 1 where a token is real (batch, seq).
        """
        return np.asarray(self.function(self.params, ids, mask))

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """One unit vector for each text, in the order of the texts.

        Args:
            texts: Any number of texts; each is cut off after 256 tokens.

        Returns:
            float32 (len(texts), 384).

        Raises:
            InputShapeError: `texts` is a single string, or holds something that is no string.
        """
        rows = self.tokenize(checked_texts(texts))
        vectors = np.zeros((len(rows), EMBEDDING_SIZE), np.float32)
        # Texts of similar length share a micro-batch, which saves padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.max_batch_size):
            chosen = order[start : start + self.max_batch_size]
            ids, mask = stack([rows[index] for index in chosen])
            vectors[chosen] = self.serve(ids, mask)
        return vectors


def checked_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list.

    Raises:
        InputShapeError: `texts` is a single string, or holds something that is no string.
    """
    if isinstance(texts, (str, bytes)):
        raise InputShapeError(
            f"texts={texts!r:.60} is a single {type(texts).__name__}, expected a sequence of str: "
            "wrap it in a list"
        )
    checked = list(texts)
    for index, text in enumerate(checked):
        if not isinstance(text, str):
            raise InputShapeError(
                f"texts[{index}]={text!r:.60} is a {type(text).__name__}, expected str: "
                "convert it first"
            )
    return checked


@dataclass(frozen=True, slots=True)
class Match:
    """A passage and the cosine of the angle between it and the query."""

    passage: Passage
    score: float


def search(
    query: Embeddings, vectors: Embeddings, passages: Sequence[Passage], *, top: int = 3
) -> list[Match]:
    """The passages most similar to a query, the best first.

    Args:
        query: A unit vector (384,).
        vectors: Unit vectors of the passages (passages, 384).
        passages: What they stand for.
        top: At most this many.
    """
    scores = vectors @ query
    best = np.argsort(-scores, kind="stable")[:top]
    return [Match(passages[int(index)], float(scores[index])) for index in best]
