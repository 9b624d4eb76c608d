"""`demo --plan`: plan the grid from the first tenth of the stream, serve the rest by both."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from cudagraph_jax import BucketPlan, CUDAGraphConfig, GraphStore, plan_buckets
from cudagraph_jax._base.checks import positive_size
from cudagraph_jax._base.files import check_writable, write_json
from cudagraph_jax.demo.corpus import Passage, numpy_passages
from cudagraph_jax.demo.encoder import Encoder, checked_texts
from cudagraph_jax.demo.figures import (
    Answer,
    Environment,
    Padding,
    TrafficFigures,
)
from cudagraph_jax.demo.planned.grid_figures import GridFigures, PlannedResult
from cudagraph_jax.demo.planned.prefix_plan import first_tenth, plan_grid, powers_of_two, with_grid
from cudagraph_jax.demo.session import QUERIES
from cudagraph_jax.demo.show import Screen
from cudagraph_jax.demo.traffic import Traffic, drive, drive_in_turn, micro_batches
from cudagraph_jax.demo.warmup_figures import WarmupFigures, warm_up
from cudagraph_jax.report.progress import Callback, Progress
from cudagraph_jax.xla.compiles import compiles_are_reported

# A tenth of it has some 130 texts: of half as many one can hardly tell how long texts may be.
DEFAULT_LIMIT = 1200


def run_planned(
    query: Sequence[str] = (),
    *,
    limit: int | None = None,
    json_path: Path | None = None,
    config: CUDAGraphConfig | None = None,
    store: GraphStore | str | os.PathLike[str] | None = None,
    progress: Callback | bool | None = None,
    output: TextIO | None = None,
) -> PlannedResult:
    """Plans a grid from a tenth of the stream, and compares it with powers of two on the rest.

    Args:
        query: What to search for; three examples if empty.
        limit: At most this many passages; 1200 if None.
        json_path: Where the figures go, as JSON.
        config: The grid to compare with, and the policies of both; powers of two if None.
        store: Where executables are kept, or its directory: what is there is not compiled again.
        progress: As for `BucketedFunction.warmup`.
        output: Where the report goes; stdout if None.

    Raises:
        DemoError: As for `run`; or the stream is too short to be divided.
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
    config = powers_of_two() if config is None else config
    session = _Comparison(config, store, numpy_passages(limit=limit), progress, Screen(output))
    result = session.measure(queries, started=start)
    if json_path is not None:
        write_json(json_path, result.to_dict())
    return result


class _Comparison:
    """The steps of one run, each printed as soon as it is done."""

    def __init__(
        self,
        config: CUDAGraphConfig,
        store: GraphStore | str | os.PathLike[str] | None,
        passages: list[Passage],
        shown: Callback | bool | None,
        screen: Screen,
    ) -> None:
        self.config = config
        self.passages = passages
        self.shown = shown
        self.screen = screen
        self.store = store
        self.guessed = Encoder(config, store=store)
        rows = self.guessed.tokenize([passage.text for passage in passages])
        batches = micro_batches(rows, max_size=self.guessed.max_batch_size)
        seen = first_tenth(batches)
        self.seen, self.rest = batches[:seen], batches[seen:]
        self.reported = compiles_are_reported()

    def measure(self, queries: Sequence[str], *, started: float) -> PlannedResult:
        environment = Environment.current()
        micro_batches = len(self.seen) + len(self.rest)
        self.screen.opening(
            environment, f"{len(self.passages)} paragraphs in {micro_batches} ragged micro-batches,"
        )
        warmups = [self._warm_up(self.guessed, "Powers of two")]
        with Progress(self.shown).over(len(self.seen), "serving the first tenth") as step:
            first = drive(self.guessed.serve, self.seen, step=step)
        plan = plan_grid(self.seen, self.config)
        self.screen.plan(plan, len(self.seen), first.passages)
        grid = with_grid(self.config, plan.batch_sizes, plan.seq_lens)
        planned = Encoder(grid, store=self.store)
        warmups.append(self._warm_up(planned, "The planned grid"))
        if environment.backend != "cpu":
            # A new command buffer evicts all recorded ones (docs/xla.md, "Command buffers"): the
            # first grid's buckets record theirs again before they are timed.
            self.guessed.warmup(progress=False)
        grids, served = self._serve([self.guessed, planned], warmups)
        vectors = Traffic(served=first.served + served.served).vectors(len(self.passages))
        answers = Answer.to_each(queries, planned.embed(queries), vectors, self.passages)
        result = PlannedResult(
            environment=environment,
            passages=len(self.passages),
            micro_batches=micro_batches,
            seen_micro_batches=len(self.seen),
            seen_passages=first.passages,
            plan=plan.to_dict(),
            powers_of_two=grids[0],
            planned=grids[1],
            least_waste=self._least_waste(plan),
            answers=answers,
            total_seconds=time.perf_counter() - started,
        )
        self.screen.grids(result)
        self.screen.answers(answers)
        self.screen.closing(result.total_seconds)
        return result

    def _warm_up(self, encoder: Encoder, grid: str) -> WarmupFigures:
        figures = warm_up(encoder, progress=self.shown, compiles_reported=self.reported)
        self.screen.stored(figures, title=grid)
        return figures

    def _serve(
        self, encoders: Sequence[Encoder], warmups: Sequence[WarmupFigures]
    ) -> tuple[list[GridFigures], Traffic]:
        """The rest of the stream by each; and what the last of them answered."""
        before = [encoder.function.stats() for encoder in encoders]
        with Progress(self.shown).over(len(self.rest), "serving the rest by both") as step:
            traffics = drive_in_turn([encoder.serve for encoder in encoders], self.rest, step=step)
        tokens = int(sum(batch.mask.sum() for batch in self.rest))
        grids = [
            GridFigures(
                batch_sizes=tuple(encoder.config.capture_sizes),
                seq_lens=tuple(encoder.config.capture_seq_lens or ()),
                warmup=warmup,
                traffic=TrafficFigures.of(traffic, compiles_reported=self.reported),
                padding=Padding.between(
                    stats, encoder.function.stats(), calls=len(self.rest), tokens=tokens
                ),
            )
            for encoder, warmup, stats, traffic in zip(
                encoders, warmups, before, traffics, strict=True
            )
        ]
        return grids, traffics[-1]

    def _least_waste(self, plan: BucketPlan) -> float:
        """What the best grid of as many buckets would waste, had one known the rest."""
        best = plan_buckets(
            np.array([batch.shape for batch in self.rest]),
            max_graphs=len(self.config.buckets()),
            headroom=(plan.batch_sizes.max, plan.seq_lens.max),
        )
        return best.expected_waste
