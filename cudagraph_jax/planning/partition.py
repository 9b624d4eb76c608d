"""The best ladder along one axis: an exact optimum by dynamic programming."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cudagraph_jax.planning.observed import Floats, Ints

SMALL = 256
"""Up to so many candidates a layer is one table of all gaps, which NumPy does at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One axis, the buckets of the others being given.

    A bucket at candidate j, with the next smaller one at candidate i, serves the requests between
    them: it costs `sum(unit[r, j] * (weight[r, j] - weight[r, i]) for r)`.

    Attributes:
        weight: Requests up to each candidate, those before the first included, by the bucket of
            the other axes: float64 (buckets, candidates + 1).
        unit: What one request costs in a bucket of this candidate: float64, the same shape, with
            nothing in column 0.
        lowest: The smallest next smaller bucket that each candidate may have, so that none of its
            requests is padded too much: int64 (candidates + 1,), never falling. None: any.
    """

    weight: Floats
    unit: Floats
    lowest: Ints | None = None

    @property
    def candidates(self) -> int:
        """How many sizes a bucket may have."""
        return int(self.weight.shape[1]) - 1

    def gap(self, below: Ints, at: Ints) -> Floats:
        """The cost of a bucket at each candidate `at`, where `below` is the next smaller one.

        Candidates count from 1; 0 means that there is no smaller bucket.
        """
        total = np.zeros(np.broadcast_shapes(below.shape, at.shape))
        for weight, unit in zip(self.weight, self.unit, strict=True):
            total += unit[at] * (weight[at] - weight[below])
        if self.lowest is not None:
            total[np.broadcast_to(below < self.lowest[at], total.shape)] = np.inf
        return total

    def cost(self, ladder: Ints) -> float:
        """The cost of a ladder of candidates, from 0, that holds the largest."""
        at = ladder + 1
        return float(self.gap(np.append(0, at[:-1]), at).sum())

    @property
    def is_monotone(self) -> bool:
        """Whether no larger bucket is cheaper.

        The gaps then satisfy the quadrangle inequality: the best smaller neighbour of a bucket
        never falls as the bucket grows (Yao, "Efficient dynamic programming using quadrangle
        inequalities", STOC 1980). What `lowest` forbids is infinite, which keeps to it: where a
        bucket may serve a range, another may serve any part of that.
        """
        return bool((np.diff(self.unit[:, 1:], axis=1) >= 0).all())


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """The best ladders of every number of buckets up to a limit.

    Attributes:
        costs: The least cost with at most k + 1 buckets, float64 (limit,); infinite where
            `Axis.lowest` asks for more.
        choices: For each k and bucket, the next smaller bucket: int64 (limit, candidates + 1).
    """

    costs: Floats
    choices: Ints

    def ladder(self, buckets: int) -> Ints:
        """The candidates, from 0, of the best ladder with at most so many buckets."""
        picked: list[int] = []
        at = self.choices.shape[1] - 1
        for choice in self.choices[buckets - 1 :: -1]:
            if at == 0:
                break
            picked.append(at - 1)
            at = int(choice[at])
        return np.array(picked[::-1], np.int64)


def partition(axis: Axis, limit: int, *, small: int = SMALL, optimal: bool = True) -> Partition:
    """The best ladders with at most 1, 2 … `limit` buckets; each holds the largest candidate.

    With n candidates this takes O(limit · n · log n) where the cost is monotone, by dividing and
    conquering on the best smaller neighbour, else O(limit · n²).

    Args:
        axis: The axis.
        limit: The most buckets.
        small: Up to so many candidates all gaps are put into a table.
        optimal: False takes O(limit · n · log n) for any cost: where it falls somewhere, the
            ladders are good ones and perhaps not the best.
    """
    count = axis.candidates
    limit = min(limit, count)
    everything = np.arange(count + 1)
    best = np.zeros(count + 1)
    best[1:] = axis.gap(np.zeros(1, np.int64), everything[1:])
    choices = np.zeros((limit, count + 1), np.int64)
    costs = np.zeros(limit)
    costs[0] = best[-1]
    gaps = all_gaps(axis) if count <= small else None
    divides = not optimal or axis.is_monotone
    for layer in range(1, limit):
        if gaps is not None:
            best, choices[layer] = table_layer(best, gaps)
        elif divides:
            best, choices[layer] = monotone_layer(best, axis)
        else:
            best, choices[layer] = any_layer(best, axis)
        costs[layer] = best[-1]
    return Partition(costs, choices)


def all_gaps(axis: Axis) -> Floats:
    """The cost of a bucket at each column, above a smaller one at each row; infinite if above."""
    places = np.arange(axis.candidates + 1)
    gaps = axis.gap(places[:, None], places[None, :])
    gaps[places[:, None] >= places[None, :]] = np.inf
    return gaps


def table_layer(previous: Floats, gaps: Floats) -> tuple[Floats, Ints]:
    """One more bucket: the least cost up to each candidate, and the smaller neighbour in it."""
    totals = previous[:, None] + gaps
    choice = totals.argmin(axis=0)
    best = totals[choice, np.arange(len(choice))]
    best[0] = 0.0
    return best, choice


def any_layer(previous: Floats, axis: Axis) -> tuple[Floats, Ints]:
    """As `table_layer`, a column at a time: memory for one of them."""
    best = np.zeros_like(previous)
    choice = np.zeros(len(previous), np.int64)
    for at in range(1, len(previous)):
        totals = previous[:at] + axis.gap(np.arange(at), np.array([at]))
        choice[at] = totals.argmin()
        best[at] = totals[choice[at]]
    return best, choice


def monotone_layer(previous: Floats, axis: Axis) -> tuple[Floats, Ints]:
    """As `table_layer`, by dividing and conquering: right where the cost is monotone.

    All middles of one level are done at a time: their ranges overlap in their ends alone.
    """
    best = np.zeros_like(previous)
    choice = np.zeros(len(previous), np.int64)
    left, right = np.array([1]), np.array([len(previous) - 1])
    low, high = np.array([0]), np.array([len(previous) - 2])
    while left.size:
        middle = (left + right) // 2
        found, at = _least(previous, axis, middle, low, np.minimum(high, middle - 1))
        best[middle], choice[middle] = found, at
        left, right = np.concatenate([left, middle + 1]), np.concatenate([middle - 1, right])
        low, high = np.concatenate([low, at]), np.concatenate([at, high])
        kept = left <= right
        left, right, low, high = left[kept], right[kept], low[kept], high[kept]
    return best, choice


def _least(previous: Floats, axis: Axis, at: Ints, low: Ints, high: Ints) -> tuple[Floats, Ints]:
    """The least cost of each bucket `at`, and its neighbour, between `low` and `high`."""
    lengths = high - low + 1
    ends = np.cumsum(lengths)
    starts = ends - lengths
    owner = np.repeat(np.arange(len(at)), lengths)
    below = np.arange(ends[-1]) - starts[owner] + low[owner]
    totals = previous[below] + axis.gap(below, at[owner])
    least = np.minimum.reduceat(totals, starts)
    places = np.flatnonzero(totals == least[owner])
    first = below[places[np.searchsorted(owner[places], np.arange(len(at)))]]
    # Out of reach, and so is all above: what is below must not be narrowed by it.
    return least, np.where(np.isinf(least), high, first)


def lowest_below(filled: Floats, needed: Floats) -> Ints:
    """The smallest next smaller bucket of each candidate that leaves no request too empty.

    Args:
        filled: What the emptiest request at each candidate fills of a bucket of size 1, the
            buckets of the other axes being given: float64 (candidates,), infinite for none.
        needed: What must be filled of a bucket at each candidate, ascending: float64 (candidates,).

    Returns:
        int64 (candidates + 1,): for each candidate, from 1, that number or a larger one has to be
        the next smaller bucket; its own number where no bucket will do.
    """
    count = len(needed)
    # From this candidate on a bucket is too large for the request.
    too_large = np.maximum(np.searchsorted(needed, filled, side="right"), np.arange(count)) + 1
    lowest = np.zeros(count + 2, np.int64)
    np.maximum.at(lowest, too_large, np.arange(1, count + 1))
    found: Ints = np.maximum.accumulate(lowest[: count + 1])
    return found


def fewest(lowest: Ints) -> Ints | None:
    """The candidates, from 0, of the shortest ladder that keeps to `lowest`; None if there is none.

    From the largest down, each as far below the one before as may be.
    """
    picked: list[int] = []
    at = len(lowest) - 1
    while at:
        picked.append(at - 1)
        if lowest[at] == at:
            return None
        at = int(lowest[at])
    return np.array(picked[::-1], np.int64)


def worthwhile(unit: Floats) -> Ints:
    """The candidates that some best ladder keeps to: the others can be left out without loss.

    A candidate is left out where a larger one costs no more than it, nor than any other that is
    larger than it: the bucket may as well go there, in place of all up to there. What remains of
    a single row always rises.

    Args:
        unit: What one request costs in a bucket of each candidate, one row for each bucket of the
            other axis: float64 (buckets, candidates).
    """
    least = np.minimum.accumulate(unit[:, ::-1], axis=1)[:, ::-1]
    attained = np.flatnonzero((unit == least).all(axis=0))
    places = np.arange(unit.shape[1] - 1)
    larger = attained[np.searchsorted(attained, places, side="right")]
    replaced = (least[:, larger] == least[:, :-1]).all(axis=0)
    return np.flatnonzero(np.append(~replaced, True))
