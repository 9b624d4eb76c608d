"""The best product grid: a ladder for each axis, no more buckets than allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from math import comb, log2
from typing import NamedTuple

import numpy as np

from cudagraph_jax.planning.observed import Floats, Ints
from cudagraph_jax.planning.partition import SMALL, Axis, partition
from cudagraph_jax.shapes.ladder import Ladder

MOST_WORK = 3e8
"""Array elements to go through up to which all ladders of one axis are tried: a second or two."""


class ProductGrid(NamedTuple):
    """A product of two ladders, as places among the candidates of each axis.

    Attributes:
        cost: What all requests cost in it.
        batches: Places of the batch sizes.
        seqs: Places of the sequence lengths.
    """

    cost: float
    batches: tuple[int, ...]
    seqs: tuple[int, ...]

    @property
    def graphs(self) -> int:
        """How many buckets it has."""
        return len(self.batches) * len(self.seqs)

    def transposed(self) -> ProductGrid:
        """The same with the axes exchanged."""
        return ProductGrid(self.cost, self.seqs, self.batches)


class Problem(NamedTuple):
    """Requests among candidate sizes.

    Attributes:
        upto: How many requests fit each batch candidate with each seq candidate, float64 (B, S).
        unit: The cost of each batch candidate with each seq candidate, float64 (B, S).
    """

    upto: Floats
    unit: Floats

    @classmethod
    def of(cls, batches: Ints, seqs: Ints, counts: Floats, unit: Floats) -> Problem:
        """The problem of requests by the smallest candidates that hold them.

        Args:
            batches: Each distinct request's batch candidate, int64 (N,).
            seqs: Each distinct request's seq candidate, int64 (N,).
            counts: How often each came, float64 (N,).
            unit: The cost of each batch candidate with each seq candidate, float64 (B, S).
        """
        found = np.bincount(batches * unit.shape[1] + seqs, counts, minlength=unit.size)
        upto: Floats = found.astype(np.float64).reshape(unit.shape)
        return cls(upto.cumsum(axis=0).cumsum(axis=1), unit)

    def transposed(self) -> Problem:
        """The same with the axes exchanged."""
        return Problem(self.upto.T, self.unit.T)

    def axis(self, batches: Ints) -> Axis:
        """The second axis, given the ladder of the first."""
        weight, unit = _merged(np.diff(self.upto[batches], axis=0, prepend=0.0), self.unit[batches])
        return Axis(_from_zero(weight), _from_zero(unit))

    def grid(self, batches: Ints, seqs: Ints) -> ProductGrid:
        """The grid of two ladders."""
        at = seqs + 1
        gaps = self.axis(batches).gap(np.append(0, at[:-1]), at)
        return ProductGrid(float(gaps.sum()), tuple(batches.tolist()), tuple(seqs.tolist()))

    def grids(self, batches: Ints, max_graphs: int, *, optimal: bool = True) -> list[ProductGrid]:
        """The ladder of the first axis with the best of the second, for every length of that.

        Args:
            batches: The ladder.
            max_graphs: The most buckets of a grid.
            optimal: As for `partition`.
        """
        result = partition(self.axis(batches), max_graphs // len(batches), optimal=optimal)
        chosen = tuple(batches.tolist())
        return [
            ProductGrid(float(cost), chosen, tuple(result.ladder(index + 1).tolist()))
            for index, cost in enumerate(result.costs)
            if index == 0 or cost < result.costs[index - 1]
        ]


def best_grids(
    problem: Problem,
    max_graphs: int,
    starts: Iterable[tuple[Ints, Ints]],
    *,
    most_work: float = MOST_WORK,
) -> list[ProductGrid]:
    """The best grid found with at most 1, 2 … `max_graphs` buckets.

    Where one axis has few candidates, all its ladders are tried, each with the optimum of the
    other axis: the result is the optimum. Else each way to share the buckets between the axes is
    improved from several starts, one axis at a time, to where neither axis alone can be better.

    Args:
        problem: The requests.
        max_graphs: The limit.
        starts: Ladders to improve upon, as places: those that the result must not be worse than.
        most_work: Array elements to go through up to which all ladders of one axis are tried.
    """
    flat = 1 in problem.unit.shape
    if flat or _work(problem, max_graphs, most_work) <= most_work:
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


def _enumerated(problem: Problem, max_graphs: int) -> Iterator[ProductGrid]:
    if problem.unit.shape[0] > problem.unit.shape[1]:
        for grid in _enumerated(problem.transposed(), max_graphs):
            yield grid.transposed()
        return
    top = problem.unit.shape[0] - 1
    for size in range(min(top + 1, max_graphs)):
        for chosen in combinations(range(top), size):
            yield from problem.grids(np.array([*chosen, top]), max_graphs)


def _descended(
    problem: Problem, max_graphs: int, starts: Iterable[tuple[Ints, Ints]]
) -> Iterator[ProductGrid]:
    sides = (problem, problem.transposed())
    seen: set[tuple[int, tuple[int, ...]]] = set()
    # A single bucket, whatever the starts are worth.
    tops = [np.array([size - 1]) for size in problem.unit.shape]
    yield problem.grid(tops[0], tops[1])
    for batches, seqs in starts:
        if len(batches) * len(seqs) <= max_graphs:
            yield problem.grid(batches, seqs)
        yield from _improved(sides, 0, batches, max_graphs, seen)
        yield from _improved(sides, 1, seqs, max_graphs, seen)
    for share in _shares(max_graphs):
        for side in (0, 1):
            # Each axis by itself: as if the other one had a single bucket.
            alone = partition(sides[1 - side].axis(tops[1 - side]), share, optimal=False)
            ladder = alone.ladder(len(alone.costs))
            yield from _improved(sides, side, ladder, max_graphs, seen)


def _improved(
    sides: tuple[Problem, Problem],
    side: int,
    ladder: Ints,
    max_graphs: int,
    seen: set[tuple[int, tuple[int, ...]]],
) -> Iterator[ProductGrid]:
    """From the ladder of one axis, each axis in turn made the best for the other one.

    It ends where it gains nothing, or where another start has been before.
    """
    cost = np.inf
    while len(ladder) <= max_graphs and (side, tuple(ladder.tolist())) not in seen:
        seen.add((side, tuple(ladder.tolist())))
        grids = sides[side].grids(ladder, max_graphs, optimal=False)
        yield from (grid.transposed() if side else grid for grid in grids)
        best = min(grids)
        if best.cost >= cost:
            return
        cost = best.cost
        side, ladder = 1 - side, np.array(best.seqs)


def _shares(max_graphs: int) -> list[int]:
    """The most buckets that the first axis can have for each number that the second one has."""
    return sorted({max_graphs // other for other in range(1, max_graphs + 1)})


def _work(problem: Problem, max_graphs: int, most: float) -> float:
    """About how many array elements it takes to try all ladders of the shorter axis.

    It stops counting above `most`.
    """
    shorter, longer = sorted(problem.unit.shape)
    rises = np.diff(problem.unit, axis=int(problem.unit.shape[1] == longer)) >= 0
    divides = bool(rises.all())
    work = 0.0
    for size in range(1, min(shorter, max_graphs) + 1):
        layers = comb(shorter - 1, size - 1) * (max_graphs // size)
        work += layers * _layer_work(longer, size, divides)
        if work > most:
            break
    return work


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
    if not np.allclose(unit, np.multiply.outer(factor, unit[-1]), rtol=1e-12, atol=0.0):
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
