"""The demo from start to end: warm up, serve single texts, search, compare."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from cudagraph_jax import CUDAGraphConfig, GraphStore
from cudagraph_jax._base.checks import positive_size
from cudagraph_jax._base.files import check_writable, write_json
from cudagraph_jax.demo.bert.model import Params, encode
from cudagraph_jax.demo.bert.tokens import IntArray, Row
from cudagraph_jax.demo.corpus import Passage, numpy_passages
from cudagraph_jax.demo.encoder import Encoder, checked_texts
from cudagraph_jax.demo.figures import (
    Answer,
    Comparison,
    DemoResult,
    Environment,
    TextFigures,
)
from cudagraph_jax.demo.show import Screen
from cudagraph_jax.demo.streams import (
    FIFO_SIZE,
    Stream,
    by_sentence_transformers,
    in_fifo_batches,
    through_batcher,
)
from cudagraph_jax.demo.traffic import Serve
from cudagraph_jax.demo.warmup_figures import warm_up
from cudagraph_jax.report.progress import Callback, Progress
from cudagraph_jax.xla.compiles import compiles_are_reported

DEFAULT_LIMIT = 600
COMPARED_TEXTS = 192
QUERIES = (
    "How do I sort an array?",
    "solve a system of linear equations",
    "draw random numbers from a normal distribution",
)


def run(
    query: Sequence[str] = (),
    *,
    limit: int | None = None,
    json_path: Path | None = None,
    config: CUDAGraphConfig | None = None,
    store: GraphStore | str | os.PathLike[str] | None = None,
    progress: Callback | bool | None = None,
    output: TextIO | None = None,
) -> DemoResult:
    """Searches NumPy's documentation, and measures how the encoder was served meanwhile.

    Args:
        query: What to search for; three examples if empty.
        limit: At most this many passages; 600 if None.
        json_path: Where the figures go, as JSON.
        config: The encoder's buckets and policies; `Encoder`'s own if None.
        store: Where executables are kept, or its directory: what is there is not compiled again.
        progress: As for `BucketedFunction.warmup`.
        output: Where the report goes; stdout if None.

    Raises:
        DemoError: The model package or an optional dependency is missing, or the weights are not
            those expected.
        OSError: `json_path` cannot be written, as a `CUDAGraphError` that says why.
        ConfigError: `limit` is no positive integer, or `store` no path.
        StoreError: The directory cannot be used.
        InputShapeError: `query` is a single string, or holds something that is no string.
    """
    start = time.perf_counter()
    queries = checked_texts(query) or list(QUERIES)
    limit = DEFAULT_LIMIT if limit is None else positive_size(limit, name="limit")
    if json_path is not None:
        check_writable(json_path)
    encoder = Encoder(config, store=store)
    session = _Session(encoder, numpy_passages(limit=limit), progress, Screen(output))
    result = session.measure(queries, started=start)
    if json_path is not None:
        write_json(json_path, result.to_dict())
    return result


class _Session:
    """The steps of one run, each printed as soon as it is done."""

    def __init__(
        self,
        encoder: Encoder,
        passages: list[Passage],
        shown: Callback | bool | None,
        screen: Screen,
    ) -> None:
        # In a random order, as texts come to a server, and the same one each time.
        order = np.random.default_rng(0).permutation(len(passages))
        self.passages = [passages[place] for place in order]
        self.shown = shown
        self.screen = screen
        self.encoder = encoder
        self.fifo_size = min(FIFO_SIZE, encoder.max_batch_size)
        self.rows = encoder.tokenize([passage.text for passage in self.passages])
        self.reported = compiles_are_reported()

    def measure(self, queries: Sequence[str], *, started: float) -> DemoResult:
        environment = Environment.current()
        self.screen.opening(environment, f"{len(self.passages)} paragraphs")
        warmup = warm_up(self.encoder, progress=self.shown, compiles_reported=self.reported)
        self.screen.warmup(warmup)
        stream = self._through_batcher(self.rows)
        figures = self._figures(stream)
        self.screen.traffic(figures)
        asked = self.encoder.embed(queries)
        answers = Answer.to_each(queries, asked, stream.vectors, self.passages)
        self.screen.answers(answers)
        comparison = self._compare()
        self.screen.comparison(comparison, of=len(self.rows))
        result = DemoResult(
            environment=environment,
            passages=len(self.passages),
            warmup=warmup,
            traffic=figures,
            answers=answers,
            comparison=comparison,
            total_seconds=time.perf_counter() - started,
        )
        self.screen.closing(result.total_seconds)
        return result

    def _compare(self) -> Comparison:
        count = min(COMPARED_TEXTS, len(self.rows))
        rows, texts = self.rows[:count], [passage.text for passage in self.passages[:count]]
        jit = _plain_jit(self.encoder.params)
        streams = [
            self._through_batcher(rows),
            self._in_fifo_batches(self.encoder.serve, rows, "FIFO batches", self._bucket_elements),
            self._in_fifo_batches(jit, rows, "plain jax.jit", operator.mul),
            self._in_fifo_batches(jit, rows, "plain jax.jit, compiled", operator.mul),
        ]
        vectors = [stream.vectors for stream in streams]
        figures = [self._figures(stream) for stream in streams]
        theirs = by_sentence_transformers(texts)
        if theirs is not None:
            vectors.append(theirs.vectors)
        return Comparison(
            batcher=figures[0],
            fifo=figures[1],
            jit=figures[2],
            jit_again=figures[3],
            fifo_size=self.fifo_size,
            sentence_transformers=None if theirs is None else count / theirs.seconds,
            max_difference=float(np.ptp(vectors, axis=0).max()),
        )

    def _figures(self, stream: Stream) -> TextFigures:
        return TextFigures.of(stream, compiles_reported=self.reported)

    def _bucket_elements(self, batch: int, seq: int) -> int:
        return self.encoder.config.bucket_for(batch, seq).elements

    def _through_batcher(self, rows: Sequence[Row]) -> Stream:
        with Progress(self.shown).over(len(rows), "single texts") as step:
            return through_batcher(self.encoder, rows, step=step)

    def _in_fifo_batches(
        self, serve: Serve, rows: Sequence[Row], title: str, elements: Callable[[int, int], int]
    ) -> Stream:
        with Progress(self.shown).over(-(-len(rows) // self.fifo_size), title) as step:
            return in_fifo_batches(serve, rows, size=self.fifo_size, elements=elements, step=step)


def _plain_jit(params: Params) -> Serve:
    # A function of its own: the cache of jax.jit belongs to the function, and starts empty.
    def exact(params: Params, ids: IntArray, mask: IntArray) -> jax.Array:
        return encode(params, ids, mask)

    function: Callable[..., jax.Array] = jax.jit(exact)
    return lambda ids, mask: np.asarray(function(params, ids, mask))
