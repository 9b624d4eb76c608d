"""Heat maps over two axes: a number in every cell, and a shade behind it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple

from cudagraph_jax._base.html import escaped, scrolling
from cudagraph_jax.report.words import part, short, things
from cudagraph_jax.shapes.ladder import Bucket, axis_name

LEVELS = 5
"""Shades, from that of zero to the strongest."""

_SHADES = " ·░▒▓"


class Cell(NamedTuple):
    """What stands for the buckets of two sizes.

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
    """A number for each bucket, by its sizes along two axes.

    Attributes:
        kind: What is shown, which decides its colour.
        title: What the numbers are.
        axes: What the rows and the columns are sizes of.
        rows: The sizes of the one.
        columns: Those of the other.
        cells: By row and column; a place without a cell is blank.
        legend: What each shade means, as pairs of level and words.
        note: What is not shown; empty where nothing is left out.
    """

    kind: Literal["hits", "waste"]
    title: str
    axes: tuple[str, str]
    rows: Sequence[int]
    columns: Sequence[int]
    cells: Mapping[tuple[int, int], Cell]
    legend: Sequence[tuple[int, str]]
    note: str = ""

    def text(self) -> str:
        """The map for a terminal."""
        rows = [[self._corner, *map(str, self.columns)]]
        for row in self.rows:
            found = [self.cells.get((row, column)) for column in self.columns]
            shown = ["" if cell is None else _shaded(cell.level, cell.text) for cell in found]
            rows.append([str(row), *shown])
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
        head = "".join(f'<th scope="col">{column}</th>' for column in self.columns)
        body = "".join(
            f'<tr><th scope="row">{row}</th>'
            + "".join(self._html_cell(row, column) for column in self.columns)
            + "</tr>"
            for row in self.rows
        )
        table = (
            f'<table class="heat {self.kind}"><caption>{escaped(self.title)}</caption>'
            f'<thead><tr><th scope="col">{escaped(self._corner)}</th>{head}</tr></thead>'
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

    @property
    def _corner(self) -> str:
        return " \\ ".join(map(axis_name, self.axes))

    def _html_cell(self, row: int, column: int) -> str:
        cell = self.cells.get((row, column))
        if cell is None:
            return "<td></td>"
        return f'<td class="l{cell.level}" title="{escaped(cell.words)}">{escaped(cell.text)}</td>'


def _shaded(level: int, text: str) -> str:
    return f"{text}{_SHADES[level]}"


ON_A_PAGE = (24, 24)
"""The most rows and columns of a heat map on a page."""

ON_A_TERMINAL = (24, 12)
"""The same where a line is some hundred characters."""

_WASTE_BOUNDS = (0.05, 0.15, 0.30, 0.50)
_NEVER = "–"


@dataclass(frozen=True)
class HeatGrid:
    """Replays and padding by bucket, all variants of a bucket together.

    Attributes:
        replays: How often each bucket was replayed.
        padding: Elements of padding that those replays computed.
        most: How many rows and columns a heat map may have.
    """

    replays: Mapping[Bucket, int]
    padding: Mapping[Bucket, float]
    most: tuple[int, int]

    @classmethod
    def of(cls, stats: Mapping[str, Any], *, most: tuple[int, int]) -> HeatGrid:
        """The grid of a manager's statistics.

        Args:
            stats: They, with one bucket at least.
            most: How many rows and columns the heat maps may have.
        """
        replays: Counter[Bucket] = Counter()
        padding: defaultdict[Bucket, float] = defaultdict(float)
        for graph in stats["registry"]["graphs"].values():
            bucket = bucket_of(graph)
            replays[bucket] += graph["replay_count"]
            padding[bucket] += graph["waste"] * graph["replay_count"] * bucket.elements
        return cls(replays, padding, most)

    def maps(self) -> list[HeatMap]:
        """Hits and waste, for each pair of axes that have more than one size."""
        views = [_View(self, axes) for axes in self._pairs()]
        return [each for view in views for each in (view.hits_map(), view.waste_map())]

    def _pairs(self) -> list[tuple[str, str]]:
        """The pairs of axes; batch and sequence where no other axis has more than one size."""
        names = dict.fromkeys(axis for bucket in self.replays for axis in bucket.sizes)
        varied = [
            axis
            for axis in ("batch", "seq", *sorted({*names} - {"batch", "seq"}))
            if len({bucket.sizes.get(axis) for bucket in self.replays} - {None}) > 1
        ]
        if not set(varied) - {"batch", "seq"}:
            return [("batch", "seq")]
        pairs = [
            pair
            for pair in combinations(varied, 2)
            if any(bucket.sizes.keys() >= {*pair} for bucket in self.replays)
        ]
        alone = set(varied[varied[0] == "batch" :]).difference(*pairs)
        return pairs + [("batch", axis) for axis in varied if axis in alone]


class _View:
    """A grid by the sizes of two axes, those of the others together.

    Args:
        grid: The grid.
        axes: The axes of the rows and of the columns.
    """

    def __init__(self, grid: HeatGrid, axes: tuple[str, str]) -> None:
        self.axes = axes
        self.is_whole = all(bucket.sizes.keys() == {*axes} for bucket in grid.replays)
        self.replays: Counter[tuple[int, int]] = Counter()
        self.padding: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.computed: Counter[tuple[int, int]] = Counter()
        self.buckets: Counter[tuple[int, int]] = Counter()
        for bucket, count in grid.replays.items():
            if not bucket.sizes.keys() >= {*axes}:
                continue
            place = bucket.size(axes[0]), bucket.size(axes[1])
            self.replays[place] += count
            self.padding[place] += grid.padding[bucket]
            self.computed[place] += count * bucket.elements
            self.buckets[place] += 1
        self.rows, self.columns = (_axis(self.replays, at, grid.most[at]) for at in (0, 1))

    def hits_map(self) -> HeatMap:
        """How often each bucket was replayed."""
        bounds = _bounds(max(self.replays.values()))
        first = LEVELS - len(bounds)

        def cell(place: tuple[int, int]) -> Cell:
            count = self.replays[place]
            level = first + bisect_left(bounds, count) if count else 0
            return Cell(short(count), level, f"{self._named(place)}: {things(count, 'replay')}")

        legend = [(0, "0")]
        legend += [(level, f"up to {short(bound)}") for level, bound in enumerate(bounds, first)]
        return self._map("hits", "Hits: how often each bucket was replayed", cell, legend)

    def waste_map(self) -> HeatMap:
        """Which part of what each bucket computed was padding."""

        def cell(place: tuple[int, int]) -> Cell:
            name, computed = self._named(place), self.computed[place]
            if not computed:
                return Cell(_NEVER, 0, f"{name}: never replayed")
            waste = self.padding[place] / computed
            words = f"{name}: {part(waste)} padding in {things(self.replays[place], 'replay')}"
            return Cell(f"{waste:.0%}", bisect_left(_WASTE_BOUNDS, waste), words)

        bounds = (0.0, *_WASTE_BOUNDS, 1.0)
        legend = [
            (level, f"{low:.0%} to {high:.0%}")
            for level, (low, high) in enumerate(pairwise(bounds))
        ]
        return self._map(
            "waste", "Waste: the part of each bucket's work that was padding", cell, legend
        )

    def _named(self, place: tuple[int, int]) -> str:
        sizes = dict(zip(self.axes, place, strict=True))
        if self.is_whole:
            return str(Bucket.of(sizes))
        return ", ".join(f"{axis_name(axis)} {size}" for axis, size in sizes.items())

    def _map(
        self,
        kind: Literal["hits", "waste"],
        title: str,
        cell: Callable[[tuple[int, int]], Cell],
        legend: list[tuple[int, str]],
    ) -> HeatMap:
        if not self.is_whole:
            title += f", by {' and '.join(map(axis_name, self.axes))}"
        return HeatMap(
            kind=kind,
            title=title,
            axes=self.axes,
            rows=self.rows,
            columns=self.columns,
            cells={place: cell(place) for place in self._shown},
            legend=legend,
            note=self._left_out(),
        )

    @cached_property
    def _shown(self) -> list[tuple[int, int]]:
        rows, columns = set(self.rows), set(self.columns)
        return [(row, column) for row, column in self.replays if row in rows and column in columns]

    def _left_out(self) -> str:
        """What the heat maps do not show, in words."""
        missing = sum(self.buckets.values()) - sum(self.buckets[place] for place in self._shown)
        if not missing:
            return ""
        shown = [
            f"{len(sizes)} of {_sizes_of(axis, len({place[at] for place in self.replays}))}"
            for at, (axis, sizes) in enumerate(
                zip(self.axes, (self.rows, self.columns), strict=True)
            )
        ]
        hits = self.replays.total() - sum(self.replays[place] for place in self._shown)
        return (
            f"Shown are the most used sizes: {', '.join(shown)}. "
            f"Left out: {things(missing, 'bucket')} with {things(hits, 'replay')}."
        )


def bucket_of(graph: Mapping[str, Any]) -> Bucket:
    """The bucket of a graph's statistics; older ones know of batch and sequence alone."""
    sizes = {"batch": graph["batch_size"], "seq": graph["seq_len"]}
    return Bucket.of({**sizes, **graph.get("axes", {})})


def _sizes_of(axis: str, number: int) -> str:
    if axis in ("batch", "seq"):
        return things(number, "batch size" if axis == "batch" else "sequence length")
    return f"{things(number, 'size')} of {axis}"


def _axis(replays: Mapping[tuple[int, int], int], at: int, most: int) -> list[int]:
    """The sizes of one axis that are replayed most, ascending."""
    used: Counter[int] = Counter()
    for place, count in replays.items():
        used[place[at]] += count
    return sorted(sorted(used, key=lambda size: (-used[size], size))[:most])


def _bounds(most: int) -> list[int]:
    """The upper ends of the shades above zero: even steps of the logarithm, as counts are."""
    steps = LEVELS - 1
    ends = {round(most ** (step / steps)) for step in range(1, steps)} | {most}
    return sorted(end for end in ends if end)
