"""The best product grid: a ladder for each axis, no more buckets than allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, groupby, islice, product
from math import comb, inf, log2, prod
from typing import NamedTuple, TypeAlias

import numpy as np

from cudagraph_jax.planning.observed import Floats, Ints
from cudagraph_jax.planning.partition import SMALL, Axis, fewest, lowest_below, partition
from cudagraph_jax.shapes.ladder import Ladder

MOST_WORK = 3e8
"""Array elements to go through up to which all ladders of the shorter axes are tried: a second."""

Ladders: TypeAlias = Sequence[Ints]
"""A ladder for each axis, as places among its candidates, ascending, with the last one."""


class ProductGrid(NamedTuple):
    """A product of ladders, as places among the candidates of each axis.

    Attributes:
        cost: What all requests cost in it; infinite where one is padded too much.
        ladders: The places on each axis.
    """

    cost: float
    ladders: tuple[tuple[int, ...], ...]

    @property
    def graphs(self) -> int:
        """How many buckets it has."""
        return prod(map(len, self.ladders))


class PaddingBound(NamedTuple):
    """How empty a bucket may be.

    Attributes:
        sizes: Each distinct request's size on each axis, k times float64 (N,).
        candidates: The candidates of each axis, k times float64.
        filled: The least part of its bucket's elements that a request fills, from 0 to 1.
    """

    sizes: Sequence[Floats]
    candidates: Sequence[Floats]
    filled: float


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Requests among candidate sizes on k axes.

    Attributes:
        shape: How many candidates each axis has.
        places: On each axis the smallest candidate that holds each distinct request, k times
            int64 (N,).
        counts: How often each came, float64 (N,).
        unit: What a replay costs at places of each axis, by NumPy's rules of broadcasting.
        rises: Whether no larger bucket is cheaper along the axis of most candidates.
        bound: How empty a bucket may be; None where that does not matter.
    """

    shape: tuple[int, ...]
    places: Sequence[Ints]
    counts: Floats
    unit: Callable[..., Floats]
    rises: bool
    bound: PaddingBound | None = None

    @classmethod
    def of(
        cls,
        places: Sequence[Ints],
        counts: Floats,
        table: Floats,
        bound: PaddingBound | None = None,
    ) -> Problem:
        """The problem of requests where the cost of every bucket is known.

        Args:
            places: As the attribute.
            counts: As the attribute.
            table: The cost of each candidate of the first axis with each of the second …, float64.
            bound: As the attribute.
        """
        rises = bool((np.diff(table, axis=_longest(table.shape)) >= 0).all())
        return cls(table.shape, places, counts, lambda *at: table[at], rises, bound)

    @property
    def sides(self) -> range:
        """The numbers of the axes."""
        return range(len(self.shape))

    def axis(self, free: int, ladders: Ladders) -> Axis:
        """One axis, given the ladders of the others; what `ladders` has for itself is not used."""
        columns, rows = self.shape[free], 1
        code = self.places[free] + 1
        for side in reversed(self.sides):
            if side != free:
                code = (
                    code
                    + (self._steps(side, ladders[side]) * (rows * (columns + 1)))[self.places[side]]
                )
                rows *= len(ladders[side])
        counts = np.bincount(code, self.counts, rows * (columns + 1)).reshape(rows, columns + 1)
        grid = [np.arange(columns) if side == free else ladders[side] for side in self.sides]
        open_grid = [
            at.reshape([-1 if axis == side else 1 for axis in self.sides])
            for side, at in enumerate(grid)
        ]
        unit = np.moveaxis(self.unit(*open_grid), free, -1).reshape(rows, columns)
        weight, unit = _merged(counts.cumsum(axis=1), unit)
        return Axis(weight, _from_zero(unit), self._lowest(free, ladders))

    def grid(self, ladders: Ladders) -> ProductGrid:
        """The grid of a ladder for each axis."""
        cost = self.axis(len(self.shape) - 1, ladders).cost(ladders[-1])
        return ProductGrid(cost, tuple(tuple(ladder.tolist()) for ladder in ladders))

    def grids(
        self, free: int, ladders: Ladders, max_graphs: int, *, optimal: bool = True
    ) -> list[ProductGrid]:
        """The ladders of the other axes with the best one of an axis, for every length of that.

        Args:
            free: The axis.
            ladders: What `ladders` has for that axis is not used.
            max_graphs: The most buckets of a grid.
            optimal: As for `partition`.
        """
        most = max_graphs // _others(free, ladders)
        result = partition(self.axis(free, ladders), most, optimal=optimal)
        before = tuple(tuple(ladder.tolist()) for ladder in ladders[:free])
        after = tuple(tuple(ladder.tolist()) for ladder in ladders[free + 1 :])
        return [
            ProductGrid(float(cost), (*before, tuple(result.ladder(index + 1).tolist()), *after))
            for index, cost in enumerate(result.costs)
            if index == 0 or cost < result.costs[index - 1]
        ]

    def price(self, ladders: Ladders) -> float:
        """What a grid costs, as in `grid`, in a time that does not grow with it."""
        at = self._buckets(ladders)
        if self.bound is not None and not self._is_within(self.bound, at):
            return inf
        return float((self.counts * self.unit(*at)).sum())

    def shortest(self, free: int, ladders: Ladders) -> Ints | None:
        """The shortest ladder of an axis that keeps to the bound, given those of the others.

        None where there is none, or no bound.
        """
        lowest = self._lowest(free, ladders)
        return None if lowest is None else fewest(lowest)

    def shortest_alone(self, side: int, filled: float) -> Ints | None:
        """The shortest ladder that leaves each request so large a part of it; None if none does."""
        if self.bound is None:
            return None
        least = np.full(self.shape[side], inf)
        np.minimum.at(least, self.places[side], self.bound.sizes[side])
        return fewest(lowest_below(least, self.bound.candidates[side] * filled * _ROUNDED))

    def _steps(self, side: int, ladder: Ints) -> Ints:
        """Which step of a ladder holds each candidate."""
        steps: Ints = np.searchsorted(ladder, np.arange(self.shape[side]))
        return steps

    def _buckets(self, ladders: Ladders) -> list[Ints]:
        """The place of each request's bucket on each axis."""
        return [
            ladder[self._steps(side, ladder)][self.places[side]]
            for side, ladder in enumerate(ladders)
        ]

    def _lowest(self, free: int, ladders: Ladders) -> Ints | None:
        if self.bound is None:
            return None
        part = self.bound.sizes[free].copy()
        for side, ladder in enumerate(ladders):
            if side != free:
                held = self.bound.candidates[side][ladder[self._steps(side, ladder)]]
                part *= self.bound.sizes[side] / held[self.places[side]]
        filled = np.full(self.shape[free], inf)
        np.minimum.at(filled, self.places[free], part)
        return lowest_below(filled, self.bound.candidates[free] * self.bound.filled * _ROUNDED)

    @staticmethod
    def _is_within(bound: PaddingBound, at: Sequence[Ints]) -> bool:
        part = np.ones(len(at[0]))
        for size, candidates, place in zip(bound.sizes, bound.candidates, at, strict=True):
            part *= size / candidates[place]
        return bool((part >= bound.filled * _ROUNDED).all())


_ROUNDED = 1 - 1e-12
"""What is only rounding is not too empty."""


def best_grids(
    problem: Problem,
    max_graphs: int,
    starts: Iterable[Ladders],
    *,
    most_work: float = MOST_WORK,
) -> list[ProductGrid]:
    """The best grid found with at most 1, 2 … `max_graphs` buckets.

    Where all axes but one have few candidates, all their ladders are tried, each with the optimum
    of that one: the result is the optimum. Else each way to share the buckets among the axes is
    improved from several starts, one axis at a time, to where no axis alone can be better.

    Args:
        problem: The requests.
        max_graphs: The limit.
        starts: Ladders to improve upon: grids that the result must not be worse than.
        most_work: Array elements to go through up to which all ladders are tried.
    """
    if _is_tried(problem, max_graphs, most_work):
        grids = _enumerated(problem, max_graphs)
    else:
        grids = _descended(problem, max_graphs, starts)
    best: dict[int, ProductGrid] = {}
    for grid in grids:
        if grid.graphs not in best or grid.cost < best[grid.graphs].cost:
            best[grid.graphs] = grid
    found = [best[1]]
    for graphs in range(2, max_graphs + 1):
        # A larger limit allows every smaller grid too.
        found.append(min(found[-1], best.get(graphs, found[-1]), key=lambda grid: grid.cost))
    return found


def _is_tried(problem: Problem, max_graphs: int, most_work: float = MOST_WORK) -> bool:
    """Whether `best_grids` tries everything, so that its result is the optimum."""
    is_flat = sum(size > 1 for size in problem.shape) < 2
    return is_flat or _work(problem, max_graphs, most_work) <= most_work


def _enumerated(problem: Problem, max_graphs: int) -> Iterator[ProductGrid]:
    free = _longest(problem.shape)
    lengths = [
        [1] if side == free else range(1, min(size, max_graphs) + 1)
        for side, size in enumerate(problem.shape)
    ]
    for sizes in product(*lengths):
        if prod(sizes) > max_graphs:
            continue
        each = [
            combinations(range(top - 1), size - 1)
            for top, size in zip(problem.shape, sizes, strict=True)
        ]
        for chosen in product(*each):
            ladders = [
                np.array([*places, top - 1])
                for places, top in zip(chosen, problem.shape, strict=True)
            ]
            yield from problem.grids(free, ladders, max_graphs)


def _longest(shape: Sequence[int]) -> int:
    return max(range(len(shape)), key=lambda side: (shape[side], side))


def _descended(
    problem: Problem, max_graphs: int, starts: Iterable[Ladders]
) -> Iterator[ProductGrid]:
    seen: set[object] = set()
    # A single bucket, whatever the starts are worth.
    yield problem.grid([np.array([size - 1]) for size in problem.shape])
    bounded = [[np.array(places) for places in grid.ladders] for grid in bounded_grids(problem)]
    for ladders in chain(starts, bounded):
        if prod(map(len, ladders)) <= max_graphs:
            yield problem.grid(ladders)
        for free in reversed(problem.sides):
            yield from _improved(problem, free, ladders, max_graphs, seen)
    alone = [_alone(problem, side, max_graphs) for side in problem.sides]
    costs = _shared(problem, alone, max_graphs)
    for shares in _best_of_each_count(costs):
        yield problem.grid(_taken(alone, shares))
    for free, shares in _promising(problem, alone, max_graphs):
        yield from _improved(problem, free, _taken(alone, shares), max_graphs, seen)


def _alone(problem: Problem, side: int, max_graphs: int) -> list[Ints]:
    """The best ladders of an axis by itself, as if the others had a single bucket."""
    tops = [np.array([size - 1]) for size in problem.shape]
    axis = problem.axis(side, tops)
    found = partition(Axis(axis.weight, axis.unit), max_graphs, optimal=False)
    return [found.ladder(index + 1) for index in range(len(found.costs))]


def _taken(alone: Sequence[list[Ints]], shares: Sequence[int]) -> list[Ints]:
    """The best ladder of each axis alone with its share of the buckets."""
    return [
        ladders[min(share, len(ladders)) - 1] for ladders, share in zip(alone, shares, strict=True)
    ]


def _improved(
    problem: Problem, free: int, ladders: Ladders, max_graphs: int, seen: set[object]
) -> Iterator[ProductGrid]:
    """From the ladders of all axes but one, each axis in turn made the best for the others.

    It ends where no axis gains anything, or where another start has been before.
    """
    cost, in_vain = inf, 0
    while _others(free, ladders) <= max_graphs:
        state = (
            free,
            tuple(tuple(ladder.tolist()) for side, ladder in enumerate(ladders) if side != free),
        )
        if state in seen:
            return
        seen.add(state)
        grids = problem.grids(free, ladders, max_graphs, optimal=False)
        yield from grids
        best = min(grids)
        if best.cost < cost:
            cost, in_vain, ladders = best.cost, 0, [np.array(each) for each in best.ladders]
        else:
            in_vain += 1
            if in_vain >= len(problem.shape) - 1:
                return
        free = (free - 1) % len(problem.shape)


def _shared(
    problem: Problem, alone: Sequence[list[Ints]], max_graphs: int
) -> dict[tuple[int, ...], float]:
    """What the product of each axis' own best ladders costs, for each way to share the buckets.

    Where there are very many ways, shares are those that waste no bucket, or powers of two.
    """
    most = int(max(MOST_WORK / len(problem.counts) / len(problem.shape), 1000))
    doubling = [1 << power for power in range(max_graphs.bit_length())]
    for steps in (range(1, max_graphs + 1), _shares(max_graphs), doubling):
        choices = [[step for step in steps if step <= len(ladders)] for ladders in alone]
        ways = list(islice(_within(max_graphs, choices), most + 1))
        if len(ways) <= most:
            break
    costs = {}
    for before, following in groupby(ways, key=lambda shares: shares[:-1]):
        ladders = _taken(alone, (*before, 1))
        axis = problem.axis(len(before), ladders)
        for shares in following:
            costs[shares] = axis.cost(alone[-1][shares[-1] - 1])
    return costs


def _within(max_graphs: int, choices: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """One of each of the ascending choices, in all ways whose product is within the limit."""
    if not choices:
        yield ()
        return
    for step in choices[0]:
        if step > max_graphs:
            return
        for following in _within(max_graphs // step, choices[1:]):
            yield (step, *following)


def _best_of_each_count(costs: dict[tuple[int, ...], float]) -> Iterator[tuple[int, ...]]:
    """The cheapest way to share each number of buckets, where fewer are not as cheap."""
    least = inf
    for shares in sorted(costs, key=lambda shares: (prod(shares), costs[shares])):
        if costs[shares] < least * (1 - 1e-12):
            least = costs[shares]
            yield shares


def _promising(
    problem: Problem, alone: Sequence[list[Ints]], max_graphs: int
) -> list[tuple[int, tuple[int, ...]]]:
    """Where to start from: an axis to begin with, and the shares of the others.

    Of two axes every way to share the buckets; of more, as many, those that cost least.
    """
    steps = _shares(max_graphs)
    starts = []
    for others in _within(max_graphs, [steps] * (len(problem.shape) - 1)):
        for free in reversed(problem.sides):
            starts.append((free, (*others[:free], max_graphs // prod(others), *others[free:])))
    most = 2 * len(steps)
    if len(starts) <= most:
        return starts
    return sorted(starts, key=lambda start: problem.price(_taken(alone, start[1])))[:most]


def bounded_grids(problem: Problem) -> list[ProductGrid]:
    """Grids of few buckets that keep to the bound, ascending by those; none where none keeps to it.

    The bound is shared among the axes in several ways, each axis then getting the shortest ladder
    that keeps to its share. From there, and from all candidates, each axis in turn gets the
    shortest ladder for the others.
    """
    if problem.bound is None:
        return []
    everything = [np.arange(size) for size in problem.shape]
    starts: list[tuple[int, Ladders]] = [(first, everything) for first in problem.sides]
    parts = max(4, 24 // len(problem.shape))
    for shares in _compositions(parts, len(problem.shape)):
        alone = [
            problem.shortest_alone(side, problem.bound.filled ** (share / parts))
            for side, share in enumerate(shares)
        ]
        found = [ladder for ladder in alone if ladder is not None]
        if len(found) == len(alone):
            starts.append((0, found))
    grids = set()
    for first, start in starts:
        ladders = _shortened(problem, first, start)
        chosen = tuple(tuple(ladder.tolist()) for ladder in ladders)
        grids.add(ProductGrid(problem.price(ladders), chosen))
    return sorted((grid for grid in grids if grid.cost < inf), key=lambda grid: (grid.graphs, grid))


def _compositions(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of so many whole numbers of 0 or more."""
    if count == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for following in _compositions(total - first, count - 1):
            yield (first, *following)


def _shortened(problem: Problem, free: int, ladders: Ladders) -> Ladders:
    """From ladders within the bound, each axis in turn with the shortest ladder for the others."""
    in_vain = 0
    while in_vain < len(problem.shape):
        shortest = problem.shortest(free, ladders)
        if shortest is not None and len(shortest) < len(ladders[free]):
            ladders, in_vain = [*ladders[:free], shortest, *ladders[free + 1 :]], 0
        else:
            in_vain += 1
        free = (free + 1) % len(problem.shape)
    return ladders


def fewest_graphs(problem: Problem, bounded: Sequence[ProductGrid]) -> int:
    """The smallest number of buckets that keep to the bound: of all grids where all can be tried.

    Args:
        problem: The requests.
        bounded: What `bounded_grids` found, at least one.
    """
    most = bounded[0].graphs
    if _work(problem, most, MOST_WORK) > MOST_WORK:
        return most
    return next(grid.graphs for grid in best_grids(problem, most, []) if grid.cost < inf)


def _others(free: int, ladders: Ladders) -> int:
    """How many buckets the other axes have together."""
    return prod(len(ladder) for side, ladder in enumerate(ladders) if side != free)


def _shares(max_graphs: int) -> list[int]:
    """The most buckets that one part of the axes can have for each number that the rest has."""
    return sorted({max_graphs // other for other in range(1, max_graphs + 1)})


def _work(problem: Problem, max_graphs: int, most: float) -> float:
    """About how many array elements it takes to try all ladders of all axes but the longest.

    Infinite where it is far above `most`.
    """
    longest = _longest(problem.shape)
    ways = {1: 1}  # of the ladders, by the buckets that they make
    for side, size in enumerate(problem.shape):
        if side == longest:
            continue
        more: dict[int, int] = {}
        for graphs, count in ways.items():
            for step in range(1, min(size, max_graphs // graphs) + 1):
                found = count * comb(size - 1, step - 1)
                if found > most:
                    return inf
                more[graphs * step] = more.get(graphs * step, 0) + found
        ways = more
    return sum(
        count * (max_graphs // graphs) * _layer_work(problem.shape[longest], graphs, problem.rises)
        for graphs, count in ways.items()
    )


def _layer_work(candidates: int, rows: int, divides: bool) -> float:
    """About what a layer of `partition` takes; NumPy's cost of a call is that of 1,000 elements."""
    if candidates <= SMALL:
        return candidates**2 + 20_000.0
    if divides:
        return log2(candidates) * (8 * candidates + 15_000.0)
    return candidates * rows * (candidates + 5_000.0)


def _merged(weight: Floats, unit: Floats) -> tuple[Floats, Floats]:
    """One row in place of many, where the costs of all are multiples of each other."""
    factor = unit[:, -1] / unit[-1, -1] if unit[-1, -1] else np.ones(len(unit))
    multiples = np.multiply.outer(factor, unit[-1])
    # As np.allclose, which takes longer than all else here.
    if not (np.abs(unit - multiples) <= 1e-12 * multiples).all():
        return weight, unit
    merged: Floats = factor @ weight
    return merged[None, :], unit[-1:]


def _from_zero(table: Floats) -> Floats:
    return np.concatenate([np.zeros((len(table), 1)), table], axis=1)


def places_of(ladder: Ladder, candidates: Ints) -> Ints:
    """The candidates that do what `ladder` does: the largest below each size that is needed."""
    held = np.searchsorted(np.array(ladder), candidates)
    last = np.flatnonzero(np.diff(held, append=held[-1] + 1))
    return last.astype(np.int64)
