"""How the demo's figures look: rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from cudagraph_jax.demo.figures import (
    Answer,
    Comparison,
    DemoResult,
    Environment,
    Padding,
    TrafficFigures,
    WarmupFigures,
)
from cudagraph_jax.tables import text_table

WIDTH = 96

_NOT_REPORTED = "not reported by this JAX"


class Screen:
    """Prints each part of the demo.

    Args:
        output: Where to; stdout if None.
    """

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = sys.stdout if output is None else output

    def opening(self, environment: Environment, passages: int, batches: int) -> None:
        """Where it runs, and on what."""
        versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
        self._print(f"{versions}; {environment.backend}: {environment.device}")
        self._print(
            f"{passages} paragraphs of NumPy's docstrings in {batches} ragged micro-batches, "
            "embedded by all-MiniLM-L6-v2"
        )

    def warmup(self, figures: WarmupFigures) -> None:
        """The captured buckets."""
        self._table(
            f"Warm-up: {_count(len(figures.buckets), 'bucket')} in {figures.seconds:.1f} s, "
            f"{_count(figures.compiles, 'compile')}",
            ("bucket", "compile ms", "memory MiB"),
            [
                (
                    record.bucket,
                    f"{record.capture_time_ms:.0f}",
                    "" if record.memory_bytes is None else f"{record.memory_bytes / 2**20:.1f}",
                )
                for record in figures.buckets
            ],
        )

    def traffic(self, figures: TrafficFigures, padding: Padding) -> None:
        """The whole stream through `bucket_jit`."""
        self._table(
            "Traffic through bucket_jit",
            ("figure", "value"),
            [
                ("compiles", _count(figures.compiles)),
                ("hit rate", f"{padding.hit_rate:.1%}"),
                ("elements that were bucket padding", f"{padding.waste:.1%}"),
                ("throughput", f"{figures.passages_per_second:.1f} passages/s"),
                ("p50 latency of a micro-batch", f"{figures.p50_ms:.1f} ms"),
                ("p99 latency of a micro-batch", f"{figures.p99_ms:.1f} ms"),
            ],
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
        """`bucket_jit` beside plain `jax.jit`."""
        count = comparison.jit.micro_batches
        stream = "the whole stream" if count == of else f"the first {count} of {of} micro-batches"
        columns = (comparison.bucket_jit, comparison.jit, comparison.jit_again)
        self._table(
            f"The same stream under plain jax.jit: {stream}, {comparison.shapes} distinct sizes",
            ("figure", "bucket_jit, warm", "jax.jit, cold", "jax.jit, second pass"),
            [(name, *map(cell, columns)) for name, cell in _COMPARED],
        )
        self._print(
            "A second pass of jax.jit computes no padding, which bucket_jit trades for never "
            "compiling.\nLargest difference between the embeddings: "
            f"{comparison.max_difference:.1e}"
        )

    def closing(self, result: DemoResult) -> None:
        """How long it took."""
        self._print(f"\nDone in {result.total_seconds:.0f} s.")

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


def _count(number: int | None, noun: str = "") -> str:
    if number is None:
        return _NOT_REPORTED
    return f"{number} {noun}{'' if number == 1 else 's'}" if noun else str(number)


def _seconds(number: float | None) -> str:
    return _NOT_REPORTED if number is None else f"{number:.1f} s"


_COMPARED = (
    ("compiles", lambda figures: _count(figures.compiles)),
    ("stalled calls", lambda figures: _count(figures.stalled_calls)),
    ("time in stalled calls", lambda figures: _seconds(figures.stalled_seconds)),
    ("total time in calls", lambda figures: _seconds(figures.seconds)),
    ("throughput", lambda figures: f"{figures.passages_per_second:.1f} passages/s"),
    ("p50 latency", lambda figures: f"{figures.p50_ms:.1f} ms"),
    ("p99 latency", lambda figures: f"{figures.p99_ms:.1f} ms"),
    ("slowest call", lambda figures: f"{figures.max_ms:.1f} ms"),
)
