"""A sentence encoder, the demo's or another one of its family, served through `bucket_jit`."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
    pack,
)
from cudagraph_jax._base.checks import positive_size
from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax.demo.bert.model import (
    MAX_SEGMENTS,
    MINILM,
    Architecture,
    Params,
    encode,
    encode_packed,
)
from cudagraph_jax.demo.bert.model_folder import find_model, read_folder
from cudagraph_jax.demo.bert.tokens import MAX_TOKENS, IntArray, Row, load_tokenizer, padded
from cudagraph_jax.demo.bert.weights import load_params
from cudagraph_jax.demo.corpus import Passage
from cudagraph_jax.report.progress import Callback
from cudagraph_jax.shapes.padding import Array

# Of a busy server few texts wait: four together cost much less than four alone, and sixteen little
# less for each than four.
BATCH_SIZES = (1, 4, 16)
# What `plan_buckets` fits to the lengths of NumPy's passages: rows are the batcher's choice.
SEQ_LENS = (15, 21, 30, 40, 53, 70, 87, 117, 141, 179, 222, MAX_TOKENS)

# Rows that are filled need no fitted lengths, only short ones for few texts.
PACKED_SEQ_LENS = (32, 64, 128, MAX_TOKENS)
PACKED_ROW_LEN = 128
"""Longer rows waste less of their end, and compute more attention between texts, in vain."""

_PACKED_TOGETHER = 512
"""Texts among which a row looks for company; with more, no row is fuller, and looking is slower."""

Embeddings = npt.NDArray[np.float32]


def default_config(*, max_tokens: int = MAX_TOKENS, packing: bool = False) -> CUDAGraphConfig:
    """Thirty-six buckets for up to 16 texts, with the runs that the backend needs to be warm.

    Args:
        max_tokens: The longest length: for a limit of 512 forty-eight buckets.
        packing: For rows of several texts: twelve buckets of other lengths.
    """
    positive_size(max_tokens, name="max_tokens")
    fitted, growth = (PACKED_SEQ_LENS, 2.0) if packing else (SEQ_LENS, 1.25)
    above = max_tokens / MAX_TOKENS
    steps = max(1, math.ceil(math.log(above, growth)))
    lengths = [length for length in fitted if length < max_tokens]
    lengths += [round(MAX_TOKENS * above ** (step / steps)) for step in range(1, steps + 1)]
    # A CPU has no command buffers to record: it is warm after one run, and the second costs what
    # a bucket costs, by which the batcher goes.
    runs = 2 if jax.default_backend() == "cpu" else CUDAGraphConfig().warmup_iterations
    return CUDAGraphConfig(
        capture_sizes=BATCH_SIZES,
        capture_seq_lens=lengths,
        warmup_iterations=runs,
    )


def model_fingerprint(architecture: Architecture = MINILM) -> str:
    """What a store knows the model's code by: a digest of the module that holds all of it.

    The weights are arguments, and so no part of what is compiled: models of one architecture
    share executables.

    Args:
        architecture: What is compiled in.
    """
    source = resources.files("cudagraph_jax.demo.bert").joinpath("model.py").read_bytes()
    return f"bert {hashlib.sha256(source + repr(architecture).encode()).hexdigest()}"


@belongs_to_process
class Encoder:
    """Texts to vectors, by a sentence encoder of the BERT family.

    Args:
        config: The buckets and the policies; `default_config` of the model's limit if None.
        model: A folder that sentence-transformers has saved, with the weights in safetensors:
            BERT, RoBERTa, XLM-RoBERTa, CamemBERT or DistilBERT with a pooling, and dense layers
            and a normalisation behind it if there are any. all-MiniLM-L6-v2 if None, from the
            package that the demo installs.
        store: Where executables are kept, or its directory: what is there is loaded untraced.
        packing: Whether short texts share a row, which computes hardly any padding.
        max_waiting: Of `batcher`.

    Attributes:
        config: The buckets and the policies.
        function: The `BucketedFunction` of (params, ids, mask), or with packing of (params, ids,
            positions, segments).
        batcher: Serves single texts. An item is what `item` gives for one, and `vector` takes the
            text's vector from the answer.
        tokenize: Gives the token ids of each text: `max_tokens` at the most, behind the default
            prompt that the model may have. `tokenize.with_cuts` also tells which lost their end.
        name: Of the model.
        max_tokens: Of a text, special tokens included: the model's limit, or the longest length
            of a grid that ends before.
        embedding_size: Numbers in a vector.
        vocab_size: Token ids are less than this.

    Raises:
        DemoError: The model package or an optional dependency is missing, the folder is not one
            of those above, or the weights are not those expected.
        ConfigError: `store` is no path, or `config` names another store.
        StoreError: The directory cannot be used.
    """

    def __init__(
        self,
        config: CUDAGraphConfig | None = None,
        *,
        model: str | os.PathLike[str] | None = None,
        store: GraphStore | str | os.PathLike[str] | None = None,
        packing: bool = False,
        max_waiting: int = 2048,
    ) -> None:
        folder = find_model() if model is None else read_folder(model)
        if config is None:
            config = default_config(max_tokens=folder.max_tokens, packing=packing)
        self.config = config
        self.packing = packing
        self.name = folder.name
        self.embedding_size = folder.architecture.embedding_size
        self.vocab_size = folder.architecture.vocab_size
        captured = [bucket.seq_len for bucket in config.buckets() if config.capture_seq_lens]
        self.max_tokens = min(folder.max_tokens, max(captured, default=folder.max_tokens))
        self.tokenize = load_tokenizer(folder, max_tokens=self.max_tokens)
        self._params: Params = jax.device_put(load_params(folder))
        function = encode_packed if packing else encode
        self.function = bucket_jit(
            partial(function, architecture=folder.architecture),
            in_axes=(None, *["batch seq"] * (3 if packing else 2)),
            config=config,
            store=store,
            fingerprint=model_fingerprint(folder.architecture),
            name=function.__name__,
        )
        self.batcher = Batcher(self.function, self._params, max_waiting=max_waiting, name="Encoder")

    @property
    def params(self) -> Params:
        """The weights, on the device; others of the same shapes may take their place."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self.batcher.update(params)
        self._params = params

    @property
    def max_batch_size(self) -> int:
        """Texts in the largest bucket."""
        config = self.function.manager.config
        return min(config.max_batch_size, max(config.capture_sizes))

    def warmup(self, *, progress: Callback | bool | None = None, workers: int = 1) -> WarmupReport:
        """Captures the whole grid, so that no later `embed` compiles.

        Args:
            progress: As for `BucketedFunction.warmup`.
            workers: How many buckets XLA compiles at a time.
        """
        example = [column[None] for column in self.item(self.tokenize(["example"])[0])]
        return self.function.warmup(self.params, *example, progress=progress, workers=workers)

    def item(self, row: Row | IntArray) -> tuple[IntArray, ...]:
        """The token ids of one text as an item of `batcher`: int32 (seq,) each.

        Its ids and a mask of ones; with packing ids, positions and segments.
        """
        ids = np.array(row, np.int32)
        if self.packing:
            return ids, np.arange(len(row), dtype=np.int32), np.ones_like(ids)
        return ids, np.ones_like(ids)

    def vector(self, answer: Embeddings) -> Embeddings:
        """The vector of one text, float32 (embedding_size,), of what `batcher` answers to its item.

        The answer is the vector itself; with packing those of all segments of a row, of which the
        text is the first.
        """
        return answer[0] if self.packing else answer

    def serve(self, ids: IntArray, mask: IntArray) -> Embeddings:
        """The vectors of one micro-batch, in host memory: float32 (batch, embedding_size).

        Args:
            ids: Token ids (batch, seq).
            mask: 1 where a token is real (batch, seq).
        """
        if not self.packing:
            return np.asarray(self.function(self.params, ids, mask))
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        return np.asarray(self.function(self.params, ids, positions, mask))[:, 0]

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """One vector for each text, in the order of the texts.

        Once the whole grid is captured they go through `batcher`, and share calls with what else
        waits there. Before, and for texts longer than the grid (a new plan may have cut it), texts
        of similar length are called together, as the configuration says.

        Args:
            texts: Any number of texts; each is cut off after `max_tokens`.

        Returns:
            float32 (len(texts), embedding_size).

        Raises:
            InputShapeError: `texts` is a single string, or holds something that is no string.
            BucketOverflowError: With packing: a text is longer than the grid.
        """
        rows = [np.array(row, np.int32) for row in self.tokenize(checked_texts(texts))]
        if not rows:
            return np.zeros((0, self.embedding_size), np.float32)
        if not self.packing:
            return np.stack(self._answers([self.item(row) for row in rows]))
        vectors: list[Embeddings] = []
        for start in range(0, len(rows), _PACKED_TOGETHER):
            packed = pack(
                rows[start : start + _PACKED_TOGETHER],
                config=self.function.manager.config,
                max_segments=MAX_SEGMENTS,
                row_len=PACKED_ROW_LEN,
            )
            vectors += packed.unpack(self._answers(packed.items()))
        return np.stack(vectors)

    def _answers(self, items: Sequence[tuple[Array, ...]]) -> Sequence[Embeddings]:
        """The answer to each item."""
        config = self.function.manager.config
        captured = {entry.bucket for entry in self.function.registry.entries()}
        # Items of similar length share a micro-batch, which saves padding.
        order = sorted(range(len(items)), key=lambda index: len(items[index][0]))
        answers: dict[int, Embeddings] = {}
        if captured.issuperset(config.buckets()):
            inside = [index for index in order if len(items[index][0]) <= config.max_seq_len]
            answers.update(zip(inside, self.batcher.map(items[at] for at in inside), strict=True))
            order = order[len(inside) :]
        for start in range(0, len(order), self.max_batch_size):
            chosen = order[start : start + self.max_batch_size]
            columns = zip(*[items[index] for index in chosen], strict=True)
            outputs = self.function(self.params, *map(padded, columns))
            answers.update(zip(chosen, np.asarray(outputs), strict=True))
        return [answers[index] for index in range(len(items))]


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
        query: A unit vector (embedding_size,).
        vectors: Unit vectors of the passages (passages, embedding_size).
        passages: What they stand for.
        top: At most this many.
    """
    scores = vectors @ query
    best = np.argsort(-scores, kind="stable")[:top]
    return [Match(passages[int(index)], float(scores[index])) for index in best]
