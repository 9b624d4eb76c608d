"""Heat maps over batch and seq_len: a number in every cell, and a shade behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cudagraph_jax._base.text import escaped, scrolling
from cudagraph_jax.shapes.ladder import Bucket

LEVELS = 5
"""Shades, from that of zero to the strongest."""

_SHADES = " ·░▒▓"
_CORNER = "batch \\ seq_len"


class Cell(NamedTuple):
    """What stands for one bucket.

    Attributes:
        text: The number, short.
        level: The shade, from 0 to `LEVELS - 1`.
        words: The same in full.
    """

    text: str
    level: int
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """A number for each bucket, by its two sizes.

    Attributes:
        kind: What is shown, which decides its colour.
        title: What the numbers are.
        batch_sizes: The rows.
        seq_lens: The columns.
        cells: By bucket; one without a cell is blank.
        legend: What each shade means, as pairs of level and words.
        note: What is not shown; empty where nothing is left out.
    """

    kind: Literal["hits", "waste"]
    title: str
    batch_sizes: Sequence[int]
    seq_lens: Sequence[int]
    cells: Mapping[Bucket, Cell]
    legend: Sequence[tuple[int, str]]
    note: str = ""

    def text(self) -> str:
        """The map for a terminal."""
        rows = [[_CORNER, *map(str, self.seq_lens)]]
        for batch in self.batch_sizes:
            found = [self.cells.get(Bucket(batch, length)) for length in self.seq_lens]
            shown = ["" if cell is None else _shaded(cell.level, cell.text) for cell in found]
            rows.append([str(batch), *shown])
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = [
            " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        legend = "  ".join(f"{_SHADES[level]} {words}".strip() for level, words in self.legend)
        key = f"Shades: {legend}; blank: not captured."
        return "\n".join([self.title, *lines, key, *filter(None, [self.note])])

    def html(self) -> str:
        """The map as an HTML table, with a legend below it."""
        head = "".join(f'<th scope="col">{length}</th>' for length in self.seq_lens)
        body = "".join(
            f'<tr><th scope="row">{batch}</th>'
            + "".join(self._html_cell(Bucket(batch, length)) for length in self.seq_lens)
            + "</tr>"
            for batch in self.batch_sizes
        )
        table = (
            f'<table class="heat {self.kind}"><caption>{escaped(self.title)}</caption>'
            f'<thead><tr><th scope="col">{escaped(_CORNER)}</th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )
        shades = "".join(
            f'<span class="l{level}">{escaped(words)}</span>' for level, words in self.legend
        )
        note = f"<p>{escaped(self.note)}</p>" if self.note else ""
        return (
            f'{scrolling(self.title, table)}<p class="legend {self.kind}">Shades: {shades} '
            f"Blank: not captured.</p>{note}"
        )

    def _html_cell(self, bucket: Bucket) -> str:
        cell = self.cells.get(bucket)
        if cell is None:
            return "<td></td>"
        return f'<td class="l{cell.level}" title="{escaped(cell.words)}">{escaped(cell.text)}</td>'


def _shaded(level: int, text: str) -> str:
    return f"{text}{_SHADES[level]}"
