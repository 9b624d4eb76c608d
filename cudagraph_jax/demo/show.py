"""How the demo's figures look: rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TextIO

from cudagraph_jax._base.text import text_table
from cudagraph_jax.demo.figures import (
    Answer,
    Comparison,
    Environment,
    TextFigures,
)
from cudagraph_jax.demo.planned.grid_figures import GridFigures, PlannedResult
from cudagraph_jax.demo.streams import CLIENTS
from cudagraph_jax.demo.warmup_figures import StoreFigures, WarmupFigures
from cudagraph_jax.planning.plan import BucketPlan

WIDTH = 96

_NOT_REPORTED = "not reported by this JAX"


class Screen:
    """Prints each part of the demo.

    Args:
        output: Where to; stdout if None.
    """

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = sys.stdout if output is None else output

    def opening(self, environment: Environment, texts: str) -> None:
        """Where it runs, and on what."""
        versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
        self._print(f"{versions}; {environment.backend}: {environment.device}")
        self._print(f"{texts} of NumPy's docstrings, embedded by all-MiniLM-L6-v2")

    def warmup(self, figures: WarmupFigures) -> None:
        """The captured buckets."""
        self._table(
            f"Warm-up: {_count(len(figures.buckets), 'bucket')} in {figures.seconds:.1f} s, "
            f"{_count(figures.compiles, 'compile')}",
            ("bucket", "status", "ms", "memory MiB"),
            [
                (
                    record.bucket,
                    _STATUS.get(record.status, record.status),
                    f"{record.capture_time_ms:.0f}",
                    "" if record.memory_bytes is None else f"{record.memory_bytes / 2**20:.1f}",
                )
                for record in figures.buckets
            ],
        )
        self.stored(figures)

    def stored(self, figures: WarmupFigures, *, title: str = "Store") -> None:
        """What a store had to do with a warm-up; nothing without one."""
        if figures.store is not None:
            told = _stored(figures.store, len(figures.buckets), figures.compiles)
            self._print(f"\n{title}: {told}")

    def traffic(self, figures: TextFigures) -> None:
        """The whole stream through the batcher."""
        self._table(
            f"{figures.passages} single texts through the batcher, up to {CLIENTS} waiting",
            ("figure", "value"),
            [(name, cell(figures)) for name, cell in _OF_TEXTS],
        )

    def answers(self, answers: Sequence[Answer]) -> None:
        """The best passages of each query."""
        for answer in answers:
            self._print(f"\n{answer.query}")
            for match in answer.matches:
                self._print(f"  {match.score:.3f}  {match.passage.name}")
                text = textwrap.shorten(match.passage.text, 2 * (WIDTH - 9), placeholder=" …")
                self._print(textwrap.indent(textwrap.fill(text, WIDTH - 9), " " * 9))

    def comparison(self, comparison: Comparison, *, of: int) -> None:
        """The batcher beside other ways to serve the same texts."""
        count = comparison.batcher.passages
        stream = "The same stream" if count == of else f"The first {count} of the {of} texts"
        columns = (comparison.batcher, comparison.fifo, comparison.jit, comparison.jit_again)
        self._table(
            f"{stream} served in other ways, too",
            ("figure", "batcher", "FIFO batches", "jax.jit, cold", "second pass"),
            [(name, *map(cell, columns)) for name, cell in _OF_TEXTS],
        )
        self._print(
            f"FIFO batches: {comparison.fifo_size} texts as they came, by the same buckets. "
            f"jax.jit: those batches\nat their exact sizes, {comparison.jit.shapes} of them; in a "
            "second pass all are compiled."
        )
        if comparison.sentence_transformers is not None:
            self._print(
                "sentence-transformers, given all of them at once: "
                f"{comparison.sentence_transformers:.1f} texts/s."
            )
        self._print(f"Largest difference between the embeddings: {comparison.max_difference:.1e}")

    def plan(self, plan: BucketPlan, micro_batches: int, passages: int) -> None:
        """The planned grid, and what it was planned from."""
        self._print(
            f"\nThe first {micro_batches} micro-batches are served by powers of two, and a grid is "
            f"planned from\nthe lengths of their {passages} passages, all batch sizes taken to be "
            "equally likely:"
        )
        self._print(f"  batch sizes       {_listed(plan.batch_sizes)}")
        self._print(f"  sequence lengths  {_listed(plan.seq_lens)}")

    def grids(self, result: PlannedResult) -> None:
        """The guessed grid beside the planned one, on what neither was made from."""
        before, after = result.powers_of_two, result.planned
        self._table(
            f"The other {_count(after.traffic.micro_batches, 'micro-batch', 'es')}, each served by "
            "both grids in turn",
            ("figure", "powers of two", "planned"),
            [(name, cell(before), cell(after)) for name, cell in _SIDE_BY_SIDE],
        )
        padding, throughput = result.padding_ratio, result.throughput_ratio
        self._print(
            f"Padded elements: {padding:.2f} times those of powers of two. Throughput: "
            f"{throughput:.2f} times theirs.\nThe best grid of as many buckets, had the rest been "
            f"known: {result.least_waste:.1%} padding."
        )
        if padding > 0.5:
            self._print(
                f"Not halved: {_count(result.seen_passages, 'passage')} tell little of the rest. "
                "A longer stream (--limit) has a longer first tenth."
            )

    def closing(self, total_seconds: float) -> None:
        """How long it took."""
        self._print(f"\nDone in {total_seconds:.0f} s.")

    def _print(self, text: str) -> None:
        print(text, file=self._output, flush=True)

    def _table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._print(f"\n{title}")
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            self._print(text_table(header, rows))
            return
        table = Table(*header, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console(file=self._output, width=WIDTH).print(table)


def _count(number: int | None, noun: str = "", plural: str = "s") -> str:
    if number is None:
        return _NOT_REPORTED
    return f"{number} {noun}{'' if number == 1 else plural}" if noun else str(number)


def _stored(store: StoreFigures, buckets: int, compiles: int | None) -> str:
    """What was loaded and what was compiled, as sentences."""
    took = _seconds(store.seconds)
    if store.loaded == buckets:
        nothing = "no bucket" if compiles else "nothing"
        before = _seconds(store.compile_seconds)
        return (
            f"all {_count(buckets, 'bucket')} were loaded from {store.path} in {took}, and "
            f"{nothing} was compiled."
            + ("" if store.compile_seconds is None else f"\nCompiling them took {before}.")
        )
    is_filled = store.written == store.compiled == buckets - store.loaded
    return (
        f"{store.loaded} of {_count(buckets, 'bucket')} were loaded from {store.path} and "
        f"{store.compiled} compiled, in {took}.\n{store.written} were put there"
        + (": the next run loads all of them." if is_filled else ".")
    )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _seconds(number: float | None) -> str:
    return _NOT_REPORTED if number is None else f"{number:.1f} s"


_STATUS = {"captured": "compiled"}
_OF_TEXTS: tuple[tuple[str, Callable[[TextFigures], str]], ...] = (
    ("throughput", lambda figures: f"{figures.passages_per_second:.1f} texts/s"),
    ("p50 latency of a text", lambda figures: f"{figures.p50_ms:.0f} ms"),
    ("p99 latency of a text", lambda figures: f"{figures.p99_ms:.0f} ms"),
    ("real of computed tokens", lambda figures: f"{figures.real_ratio:.1%}"),
    ("calls", lambda figures: str(figures.calls)),
    ("compiles", lambda figures: _count(figures.compiles)),
    ("time in calls that compiled", lambda figures: _seconds(figures.stalled_seconds)),
)
_SIDE_BY_SIDE: tuple[tuple[str, Callable[[GridFigures], str]], ...] = (
    ("buckets", lambda grid: str(len(grid.warmup.buckets))),
    ("warm-up", lambda grid: f"{grid.warmup.seconds:.1f} s"),
    ("compiles in calls", lambda grid: _count(grid.traffic.compiles)),
    ("hit rate", lambda grid: f"{grid.padding.hit_rate:.1%}"),
    ("real elements", lambda grid: f"{grid.padding.real_elements:,}"),
    ("padded elements", lambda grid: f"{grid.padding.padded_elements:,}"),
    ("padding, of all computed", lambda grid: f"{grid.padding.waste:.1%}"),
    ("throughput", lambda grid: f"{grid.traffic.passages_per_second:.1f} passages/s"),
    ("p50 latency", lambda grid: f"{grid.traffic.p50_ms:.1f} ms"),
    ("p99 latency", lambda grid: f"{grid.traffic.p99_ms:.1f} ms"),
)
