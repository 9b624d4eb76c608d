"""Heat maps over batch and seq_len: a number in every cell, and a shade behind it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from cudagraph_jax._base.html import escaped, scrolling
from cudagraph_jax.report.words import part, short, things
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


ON_A_PAGE = (24, 24)
"""The most batch sizes and sequence lengths of a heat map on a page."""

ON_A_TERMINAL = (24, 12)
"""The same where a line is some hundred characters."""

_WASTE_BOUNDS = (0.05, 0.15, 0.30, 0.50)
_NEVER = "–"


@dataclass(frozen=True, slots=True)
class HeatGrid:
    """Replays and padding by bucket, all variants of a bucket together.

    Attributes:
        replays: How often each bucket was replayed.
        padding: Elements of padding that those replays computed.
        batch_sizes: The rows of the heat maps: the batch sizes that are replayed most.
        seq_lens: Their columns, likewise.
    """

    replays: Mapping[Bucket, int]
    padding: Mapping[Bucket, float]
    batch_sizes: Sequence[int]
    seq_lens: Sequence[int]

    @classmethod
    def of(cls, stats: Mapping[str, Any], *, most: tuple[int, int]) -> HeatGrid:
        """The grid of a manager's statistics.

        Args:
            stats: They, with one bucket at least.
            most: How many batch sizes and sequence lengths the heat maps may have.
        """
        replays: Counter[Bucket] = Counter()
        padding: defaultdict[Bucket, float] = defaultdict(float)
        for graph in stats["registry"]["graphs"].values():
            bucket = Bucket(graph["batch_size"], graph["seq_len"])
            replays[bucket] += graph["replay_count"]
            padding[bucket] += graph["waste"] * graph["replay_count"] * bucket.elements
        return cls(replays, padding, *(_axis(replays, axis, most[axis]) for axis in (0, 1)))

    def waste(self, bucket: Bucket) -> float | None:
        """The part of what a bucket computed that was padding; None before its first replay."""
        computed = self.replays[bucket] * bucket.elements
        return self.padding[bucket] / computed if computed else None

    def hits_map(self) -> HeatMap:
        """How often each bucket was replayed."""
        bounds = _bounds(max(self.replays.values()))
        first = LEVELS - len(bounds)

        def cell(bucket: Bucket) -> Cell:
            count = self.replays[bucket]
            level = first + bisect_left(bounds, count) if count else 0
            return Cell(short(count), level, f"{bucket}: {things(count, 'replay')}")

        legend = [(0, "0")]
        legend += [(level, f"up to {short(bound)}") for level, bound in enumerate(bounds, first)]
        return self._map("hits", "Hits: how often each bucket was replayed", cell, legend)

    def waste_map(self) -> HeatMap:
        """Which part of what each bucket computed was padding."""

        def cell(bucket: Bucket) -> Cell:
            waste = self.waste(bucket)
            if waste is None:
                return Cell(_NEVER, 0, f"{bucket}: never replayed")
            words = f"{bucket}: {part(waste)} padding in {things(self.replays[bucket], 'replay')}"
            return Cell(f"{waste:.0%}", bisect_left(_WASTE_BOUNDS, waste), words)

        bounds = (0.0, *_WASTE_BOUNDS, 1.0)
        legend = [
            (level, f"{low:.0%} to {high:.0%}")
            for level, (low, high) in enumerate(pairwise(bounds))
        ]
        return self._map(
            "waste", "Waste: the part of each bucket's work that was padding", cell, legend
        )

    def _map(
        self,
        kind: Literal["hits", "waste"],
        title: str,
        cell: Callable[[Bucket], Cell],
        legend: list[tuple[int, str]],
    ) -> HeatMap:
        return HeatMap(
            kind=kind,
            title=title,
            batch_sizes=self.batch_sizes,
            seq_lens=self.seq_lens,
            cells={bucket: cell(bucket) for bucket in self._shown()},
            legend=legend,
            note=self._left_out(),
        )

    def _shown(self) -> list[Bucket]:
        rows, columns = set(self.batch_sizes), set(self.seq_lens)
        return [b for b in self.replays if b.batch_size in rows and b.seq_len in columns]

    def _left_out(self) -> str:
        """What the heat maps do not show, in words."""
        shown = self._shown()
        missing = len(self.replays) - len(shown)
        if not missing:
            return ""
        batches = things(len({bucket.batch_size for bucket in self.replays}), "batch size")
        lengths = things(len({bucket.seq_len for bucket in self.replays}), "sequence length")
        hits = sum(self.replays.values()) - sum(self.replays[bucket] for bucket in shown)
        return (
            f"Shown are the most used sizes: {len(self.batch_sizes)} of {batches}, "
            f"{len(self.seq_lens)} of {lengths}. "
            f"Left out: {things(missing, 'bucket')} with {things(hits, 'replay')}."
        )


def _axis(replays: Mapping[Bucket, int], axis: int, most: int) -> list[int]:
    """The sizes of one axis that are replayed most, ascending."""
    used: Counter[int] = Counter()
    for bucket, count in replays.items():
        used[bucket[axis]] += count
    return sorted(sorted(used, key=lambda size: (-used[size], size))[:most])


def _bounds(most: int) -> list[int]:
    """The upper ends of the shades above zero: even steps of the logarithm, as counts are."""
    steps = LEVELS - 1
    ends = {round(most ** (step / steps)) for step in range(1, steps)} | {most}
    return sorted(end for end in ends if end)
