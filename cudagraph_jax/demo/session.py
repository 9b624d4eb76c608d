"""The demo from start to end: warm up, serve, search, compare with plain `jax.jit`."""

from __future__ import annotations

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
from cudagraph_jax.demo.corpus import Passage, numpy_passages
from cudagraph_jax.demo.encoder import Encoder, checked_texts
from cudagraph_jax.demo.figures import (
    Answer,
    Comparison,
    DemoResult,
    Environment,
    Padding,
    TrafficFigures,
)
from cudagraph_jax.demo.model import Params, encode
from cudagraph_jax.demo.show import Screen
from cudagraph_jax.demo.tokens import IntArray
from cudagraph_jax.demo.traffic import MicroBatch, Serve, Traffic, drive, micro_batches
from cudagraph_jax.demo.warmup_figures import warm_up
from cudagraph_jax.report.progress import Callback, Progress
from cudagraph_jax.xla.compiles import compiles_are_reported

DEFAULT_LIMIT = 600
COMPARED_BATCHES = 20
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
        self.passages = passages
        self.shown = shown
        self.screen = screen
        self.encoder = encoder
        self.rows = self.encoder.tokenize([passage.text for passage in passages])
        self.batches = micro_batches(self.rows, max_size=encoder.max_batch_size)
        self.reported = compiles_are_reported()

    def measure(self, queries: Sequence[str], *, started: float) -> DemoResult:
        environment = Environment.current()
        self.screen.opening(environment, len(self.passages), len(self.batches))
        warmup = warm_up(self.encoder, progress=self.shown, compiles_reported=self.reported)
        self.screen.warmup(warmup)
        traffic, padding = self._serve()
        figures = TrafficFigures.of(traffic, compiles_reported=self.reported)
        self.screen.traffic(figures, padding)
        vectors = traffic.vectors(len(self.passages))
        answers = Answer.to_each(queries, self.encoder.embed(queries), vectors, self.passages)
        self.screen.answers(answers)
        comparison = self._compare(traffic)
        self.screen.comparison(comparison, of=len(self.batches))
        result = DemoResult(
            environment=environment,
            passages=len(self.passages),
            warmup=warmup,
            traffic=figures,
            padding=padding,
            answers=answers,
            comparison=comparison,
            total_seconds=time.perf_counter() - started,
        )
        self.screen.closing(result.total_seconds)
        return result

    def _serve(self) -> tuple[Traffic, Padding]:
        before = self.encoder.function.stats()
        traffic = self._drive(self.encoder.serve, self.batches, "serving")
        padding = Padding.between(
            before,
            self.encoder.function.stats(),
            calls=len(self.batches),
            tokens=sum(map(len, self.rows)),
        )
        return traffic, padding

    def _compare(self, traffic: Traffic) -> Comparison:
        batches = self.batches[:COMPARED_BATCHES]
        bucketed = traffic[:COMPARED_BATCHES]
        serve = _plain_jit(self.encoder.params)
        first = self._drive(serve, batches, "plain jax.jit")
        again = self._drive(serve, batches, "plain jax.jit, compiled")
        count = len(self.passages)
        difference = np.abs(bucketed.vectors(count) - first.vectors(count)).max()
        figures = [
            TrafficFigures.of(stream, compiles_reported=self.reported)
            for stream in (bucketed, first, again)
        ]
        return Comparison(
            bucket_jit=figures[0],
            jit=figures[1],
            jit_again=figures[2],
            shapes=len({batch.shape for batch in batches}),
            max_difference=float(difference),
        )

    def _drive(self, serve: Serve, batches: Sequence[MicroBatch], title: str) -> Traffic:
        with Progress(self.shown).over(len(batches), title) as step:
            return drive(serve, batches, step=step)


def _plain_jit(params: Params) -> Serve:
    # A function of its own: the cache of jax.jit belongs to the function, and starts empty.
    def exact(params: Params, ids: IntArray, mask: IntArray) -> jax.Array:
        return encode(params, ids, mask)

    function: Callable[..., jax.Array] = jax.jit(exact)
    return lambda ids, mask: np.asarray(function(params, ids, mask))
