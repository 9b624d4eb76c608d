"""The best product grid: a ladder for each axis, no more buckets than allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from math import comb, log2
from typing import NamedTuple

import numpy as np

from cudagraph_jax.shapes.ladder import Ladder
from cudagraph_jax.shapes.observed import Floats, Ints
from cudagraph_jax.shapes.partition import SMALL, Axis, partition

MOST_WORK = 3e8
"""Array elements to go through up to which all ladders of one axis are tried: a second or two."""


class Grid(NamedTuple):
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


class Problem(NamedTuple):
    """Requests among candidate sizes.

    Attributes:
        places: Each distinct request's smallest batch and seq candidate, int64 (2, N).
        counts: How often each came, float64 (N,).
        unit: The cost of each batch candidate with each seq candidate, float64 (B, S).
    """

    places: Ints
    counts: Floats
    unit: Floats

    def transposed(self) -> Problem:
        """The same with the axes exchanged."""
        return Problem(self.places[::-1], self.counts, self.unit.T)

    def axis(self, batches: Ints) -> Axis:
        """The second axis, given the ladder of the first."""
        held = np.searchsorted(batches, self.places[0])
        width = self.unit.shape[1]
        found = np.bincount(
            held * width + self.places[1], weights=self.counts, minlength=len(batches) * width
        )
        upto = found.astype(np.float64).reshape(len(batches), width).cumsum(axis=1)
        weight, unit = _merged(upto, self.unit[batches])
        return Axis(_from_zero(weight), _from_zero(unit))


def best_grids(
    problem: Problem, max_graphs: int, starts: Iterable[tuple[Ints, Ints]]
) -> list[Grid]:
    """The best grid found with at most 1, 2 … `max_graphs` buckets.

    Where one axis has few candidates, all its ladders are tried, each with the optimum of the
    other axis: the result is the optimum. Else each way to share the buckets between the axes is
    improved from several starts, one axis at a time, to where neither axis alone can be better.

    Args:
        problem: The requests.
        max_graphs: The limit.
        starts: Ladders to improve upon, as places: those that the result must not be worse than.
    """
    best: dict[int, Grid] = {}
    for grid in _candidates(problem, max_graphs, starts):
        if grid.graphs not in best or grid.cost < best[grid.graphs].cost:
            best[grid.graphs] = grid
    found = [best[1]]
    for graphs in range(2, max_graphs + 1):
        # A larger limit allows every smaller grid too.
        found.append(min(found[-1], best.get(graphs, found[-1]), key=lambda grid: grid.cost))
    return found


def _candidates(
    problem: Problem, max_graphs: int, starts: Iterable[tuple[Ints, Ints]]
) -> Iterator[Grid]:
    if _work(sorted(problem.unit.shape), max_graphs) <= MOST_WORK:
        yield from _enumerated(problem, max_graphs)
        return
    flipped = problem.transposed()
    for batches, seqs in starts:
        yield from _descended(problem, flipped, batches, max_graphs)
        yield from _flipped(_descended(flipped, problem, seqs, max_graphs))
    for share in _shares(max_graphs):
        # Each axis by itself: as if the other one had a single bucket.
        for one, other, turn in ((problem, flipped, False), (flipped, problem, True)):
            alone = partition(other.axis(np.array([one.unit.shape[1] - 1])), share)
            grids = _descended(one, other, alone.ladder(len(alone.costs)), max_graphs)
            yield from _flipped(grids) if turn else grids


def _enumerated(problem: Problem, max_graphs: int) -> Iterator[Grid]:
    if problem.unit.shape[0] > problem.unit.shape[1]:
        yield from _flipped(_enumerated(problem.transposed(), max_graphs))
        return
    top = problem.unit.shape[0] - 1
    for size in range(min(top + 1, max_graphs)):
        for chosen in combinations(range(top), size):
            yield from _with_best(problem, np.array([*chosen, top]), max_graphs)


def _with_best(problem: Problem, batches: Ints, max_graphs: int) -> Iterator[Grid]:
    """The ladder of the first axis with the best of the second, for every length of that."""
    result = partition(problem.axis(batches), max_graphs // len(batches))
    for index, cost in enumerate(result.costs):
        if index == 0 or cost < result.costs[index - 1]:
            yield Grid(
                float(cost), tuple(batches.tolist()), tuple(result.ladder(index + 1).tolist())
            )


def _descended(
    problem: Problem, flipped: Problem, batches: Ints, max_graphs: int
) -> Iterator[Grid]:
    """From the ladder of one axis, each axis in turn made the best for the other one."""
    if len(batches) > max_graphs:
        return
    cost = np.inf
    while True:
        grids = list(_with_best(problem, batches, max_graphs))
        yield from grids
        best = grids[-1]
        if best.cost >= cost:
            return
        cost = best.cost
        turned = list(_with_best(flipped, np.array(best.seqs), max_graphs))
        yield from _flipped(turned)
        if turned[-1].cost >= cost:
            return
        batches = np.array(turned[-1].seqs)


def _flipped(grids: Iterable[Grid]) -> Iterator[Grid]:
    return (Grid(grid.cost, grid.seqs, grid.batches) for grid in grids)


def _shares(max_graphs: int) -> list[int]:
    """The most buckets that the first axis can have for each number that the second one has."""
    return sorted({max_graphs // other for other in range(1, max_graphs + 1)})


def _work(candidates: list[int], max_graphs: int) -> float:
    """About how many array elements it takes to try all ladders of the shorter axis."""
    shorter, longer = candidates
    layer = longer**2 if longer <= SMALL else 8 * longer * log2(longer)
    # NumPy's own cost of a call is that of some thousand elements.
    return sum(
        comb(shorter - 1, size - 1) * (max_graphs // size) * (layer + 20_000.0)
        for size in range(1, min(shorter, max_graphs) + 1)
    )


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
