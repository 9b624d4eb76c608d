"""Which rows share a call: the cheapest cut of what waits, by what each captured bucket costs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import ge
from typing import NamedTuple

from cudagraph_jax.shapes.ladder import Bucket


class Priced(NamedTuple):
    """A captured bucket and what a run of it costs, in any unit."""

    bucket: Bucket
    cost: float


class Part(NamedTuple):
    """One call of a composition.

    Attributes:
        rows: Which rows, by their places in what was given.
        bucket: Where it runs.
        cost: What that costs.
    """

    rows: list[int]
    bucket: Bucket
    cost: float


_Option = tuple[Bucket, float, int]
"""A bucket, its cost and its rows: an attribute costs more than all else that is done with them."""

_Lengths = tuple[int, ...]
"""All sizes but the batch, in the order of a bucket."""


@dataclass(eq=False, slots=True)
class SizeClass:
    """Rows that the same buckets hold.

    Attributes:
        lengths: The largest such row, on each axis.
        options: The buckets worth a thought, by rows; none holds more for less.
    """

    lengths: _Lengths
    options: list[_Option]


class Prices:
    """What it costs to run so many rows of some sizes, from the buckets that there are.

    Args:
        buckets: Captured buckets of one function with their costs.

    Attributes:
        ladders: The sizes of the buckets, ascending, by axis, without the batch.
        most_rows: Those of the largest batch.
    """

    def __init__(self, buckets: Iterable[Priced]) -> None:
        held = sorted(
            buckets, key=lambda each: (each.cost, -each.bucket.batch_size, each.bucket.elements)
        )
        self._held = [
            (_lengths(bucket), (bucket, cost, bucket.batch_size)) for bucket, cost in held
        ]
        axes = [axis for axis in held[0].bucket.sizes if axis != "batch"] if held else []
        columns = zip(*(lengths for lengths, _ in self._held), strict=True)
        self.ladders = {
            axis: sorted(set(column)) for axis, column in zip(axes, columns, strict=True)
        }
        self.most_rows = max((bucket.batch_size for bucket, _ in held), default=0)
        self._classes: dict[_Lengths, SizeClass | None] = {}
        self._by_sizes: dict[Bucket, SizeClass | None] = {}
        self._joined: dict[tuple[SizeClass, SizeClass], SizeClass | None] = {}

    def class_of(self, sizes: Bucket) -> SizeClass | None:
        """The class of rows of these sizes; None where no bucket holds one."""
        try:
            return self._by_sizes[sizes]
        except KeyError:
            pass
        rungs = [
            ladder[bisect_left(ladder, size) :][:1]
            for ladder, size in zip(self.ladders.values(), _lengths(sizes), strict=False)
        ]
        fits = bool(rungs) and all(rungs)
        found = self._class(tuple(rung for (rung,) in rungs)) if fits else None
        self._by_sizes[sizes] = found
        return found

    def joined(self, one: SizeClass, other: SizeClass) -> SizeClass | None:
        """The class of calls that have rows of both; None where no bucket holds them."""
        try:
            return self._joined[one, other]
        except KeyError:
            found = self._class(tuple(map(max, one.lengths, other.lengths)))
            self._joined[one, other] = found
            return found

    def holding(self, sizes: Bucket) -> Priced | None:
        """The cheapest bucket of a call of these sizes; None where none is large enough."""
        found = self.class_of(sizes.with_sizes({"batch": 1}))
        # Of the options each holds more than those before it, and costs more.
        options = () if found is None else found.options
        fitting = (option for option in options if option[2] >= sizes.batch_size)
        return next((Priced(bucket, cost) for bucket, cost, _ in fitting), None)

    def share(self, sizes: Bucket) -> float:
        """The least that a row of these sizes costs as one of a full call; 0 if none holds it."""
        found = self.class_of(sizes)
        return 0.0 if found is None else min(cost / rows for _, cost, rows in found.options)

    def fitting(self, sizes: Bucket) -> tuple[dict[str, int], bool]:
        """How large a row may be, by axis, where one of `sizes` is larger than every bucket.

        Returns:
            The largest size of each axis that is to blame, and whether it is enough to cut one.
        """
        alone = dict.fromkeys(self.ladders, 0)
        for _, (bucket, _, _) in self._held:
            short = [axis for axis in self.ladders if bucket.size(axis) < sizes.size(axis)]
            if len(short) == 1:
                alone[short[0]] = max(bucket.size(short[0]), alone[short[0]])
        if any(alone.values()):
            return {axis: most for axis, most in alone.items() if most}, True
        largest = {axis: ladder[-1] for axis, ladder in self.ladders.items()}
        beyond = {axis: most for axis, most in largest.items() if sizes.size(axis) > most}
        return beyond or largest, False

    def _class(self, lengths: _Lengths) -> SizeClass | None:
        """The class whose largest row is of these lengths, which are rungs of the ladders."""
        if lengths not in self._classes:
            options = self._options(lengths)
            self._classes[lengths] = SizeClass(lengths, options) if options else None
        return self._classes[lengths]

    def _options(self, lengths: _Lengths) -> list[_Option]:
        options: list[_Option] = []
        most = 0
        for held, option in self._held:  # the cheapest first
            if option[2] > most and all(map(ge, held, lengths)):
                options.append(option)
                most = option[2]
                if most == self.most_rows:
                    break
        return options


def _lengths(sizes: Bucket) -> _Lengths:
    return (sizes.seq_len, *sizes.named.values())


def rectangle(rows: Sequence[Bucket]) -> Bucket:
    """The sizes of a call of these rows: how many they are, and the largest on each axis."""
    largest = rows[0].map(lambda *sizes: max(sizes), *rows[1:])
    return largest.with_sizes({"batch": len(rows)})


def compose(rows: Sequence[SizeClass], prices: Prices) -> list[Part]:
    """The calls of the least total cost that serve rows of these classes.

    Rows are sorted by what one of them costs alone, and neighbours share a call. With one axis, for
    any cut into calls there is one of these that costs no more; with several, no other cut of the
    rows in this order does. Dynamic programming over the first rows, as in TurboTransformers
    (https://arxiv.org/abs/2010.05680, algorithm 3), over measured buckets of any number of axes.

    Args:
        rows: Each row's class.
        prices: Whose classes they are.

    Returns:
        The calls, those of the costliest rows first.
    """
    order: list[int] = []
    runs: list[tuple[int, SizeClass]] = []
    least = [0.0]  # for the first rows, as many as the index says
    chosen: list[tuple[int, _Reach]] = []
    for size_class, places in _by_class(rows):
        runs.append((len(order), size_class))
        order += places
        options = _reaching(runs, prices)
        for count in range(len(least), len(order) + 1):
            best = math.inf
            for option in options:
                first, _, cost, room = option
                start = count - room
                if start < first:
                    start = first
                total = least[start] + cost
                if total <= best:  # of two that cost the same the one of fewer calls
                    best, pick, begin = total, option, start
            least.append(best)
            chosen.append((begin, pick))
    return _parts(order, chosen)


def _by_class(rows: Sequence[SizeClass]) -> list[tuple[SizeClass, list[int]]]:
    """The places of the rows of each class in their order, by what one of them costs alone."""
    groups: dict[SizeClass, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row, []).append(place)
    return sorted(groups.items(), key=lambda group: (group[0].options[0][1], group[0].lengths))


_Reach = tuple[int, Bucket, float, int]
"""Where a call may begin at the earliest, and an option for it."""


def _reaching(runs: Sequence[tuple[int, SizeClass]], prices: Prices) -> list[_Reach]:
    """The options of a call that ends in the last run, and how far back each may reach.

    The farther back a call begins, the larger it may have to be. Up to the next row that needs
    larger buckets the options are the same, and a call takes as many rows as it holds, since fewer
    rows never cost more. With one axis no row before needs a larger one.

    Args:
        runs: Where rows of one class begin, which follow each other, and their class.
        prices: Whose classes they are.
    """
    begin, joined = runs[-1]
    found: list[_Reach] = []
    first, reached = begin, begin + 1
    for start, other in [*reversed(runs[:-1]), (0, None)]:
        is_far = begin - first >= prices.most_rows  # no call reaches back farther
        wider = None if other is None or is_far else prices.joined(joined, other)
        if wider is not joined:
            enough = begin + 1 - reached  # what holds no more was cheaper before
            found += [(first, *option) for option in joined.options if option[2] > enough]
            if wider is None:
                break
            joined, reached = wider, first
        first = start
    return found


def _parts(order: Sequence[int], chosen: Sequence[tuple[int, _Reach]]) -> list[Part]:
    """The calls, from what was chosen for the last of the first 1, 2, 3, … rows."""
    parts, stop = [], len(chosen)
    while stop:
        start, (_, bucket, cost, _) = chosen[stop - 1]
        parts.append(Part(list(order[start:stop]), bucket, cost))
        stop = start
    return parts
