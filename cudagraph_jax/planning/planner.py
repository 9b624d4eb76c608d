"""The ladders that waste least on observed sizes."""

from __future__ import annotations

import math

import numpy as np

from cudagraph_jax._base.checks import names_nearest, positive_size
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.costs import Cost, chosen_cost, cost_of_each, cost_table
from cudagraph_jax.planning.evaluation import evaluate, standard_grids, waste
from cudagraph_jax.planning.observed import LARGEST_SIZE, Floats, Ints, Observed, Sizes
from cudagraph_jax.planning.partition import worthwhile
from cudagraph_jax.planning.plan import BucketPlan, PlanPoint, PlanRow
from cudagraph_jax.planning.search import Problem, ProductGrid, best_grids, places_of
from cudagraph_jax.shapes.ladder import Bucket, Ladder

Headroom = int | float | tuple[int, int]

MOST_BUCKETS = 2**24
"""Batch candidates times seq candidates: their costs are a table in memory, 128 MiB."""


@names_nearest
def plan_buckets(
    sizes: Sizes,
    *,
    max_graphs: int,
    cost: Cost | None = None,
    batch_multiple: int = 1,
    seq_multiple: int = 1,
    headroom: Headroom | None = None,
) -> BucketPlan:
    """The grid of at most `max_graphs` buckets that wastes least on observed sizes.

    Buckets have sizes that were seen, rounded up to the multiples. Of those grids this is the
    best along one axis, and over both where one of them has few different sizes. Else it is the
    best of many starts, improved one axis at a time. Where no larger size is cheaper, no other
    sizes could do better, and the grid wastes no more than a standard one of as many buckets, but
    for what multiples and headroom ask.

    Over both axes some hundreds of buckets take seconds: for 300 batch sizes with 300 sequence
    lengths, 64 buckets take 0.8 s and 512 take 9 s on one core.

    Args:
        sizes: What was asked for: (batch, seq_len) pairs (N, 2), lengths (N,), or a mapping of
            pairs or lengths to how often they came, such as `manager.sizes()`.
        max_graphs: The most buckets.
        cost: What a replay of (batch, seq_len) costs; its elements if None. It is asked for every
            batch with every seq_len that a bucket may have. See `attention_cost` and
            `measured_cost`. Where only some larger sizes are cheaper, such as multiples of 64,
            say so by a multiple.
        batch_multiple: Batch sizes are multiples of it: the devices that share a batch, say.
        seq_multiple: Sequence lengths are multiples of it: 8 or more for tensor cores, say.
        headroom: How far the largest bucket goes, for sizes not seen yet. An integer: up to this
            seq_len; a pair: up to this (batch, seq_len); a fraction such as 0.25: so much above
            the largest seen (an axis that only ever had size 1 stays). None, or less than the
            largest seen: up to that.

    Returns:
        The plan; `CUDAGraphConfig.from_plan` makes a configuration of it.

    Raises:
        ConfigError: An argument that is not valid, a cost that is no function or gives no
            number of 0 or more, or too many different sizes on both axes.

    Example:
        >>> plan = plan_buckets([10, 11, 12, 100], max_graphs=2)
        >>> plan.seq_lens, round(plan.expected_waste, 3)
        (Ladder((12, 100)), 0.022)
    """
    observed = Observed.of(sizes)
    max_graphs = positive_size(max_graphs, name="max_graphs")
    cost = chosen_cost(cost)
    tops = _tops(observed, headroom)
    batches = _candidates(observed.batches, tops.batch_size, batch_multiple, name="batch_multiple")
    seqs = _candidates(observed.seq_lens, tops.seq_len, seq_multiple, name="seq_multiple")
    batches, seqs, unit = _choices(cost, batches, seqs)
    problem = Problem.of(
        np.searchsorted(batches, observed.batches),
        np.searchsorted(seqs, observed.seq_lens),
        observed.counts,
        unit,
    )
    starts = [
        (places_of(grid.batch_sizes, batches), places_of(grid.seq_lens, seqs))
        for grid in standard_grids(int(batches[-1]), int(seqs[-1]))
    ]
    grids = best_grids(problem, min(max_graphs, unit.size), starts)
    ideal = float(observed.counts @ cost_of_each(cost, observed.batches, observed.seq_lens))
    return BucketPlan(
        batch_sizes=Ladder(batches[list(grids[-1].batches)].tolist()),
        seq_lens=Ladder(seqs[list(grids[-1].seqs)].tolist()),
        expected_waste=waste(ideal, grids[-1].cost),
        requests=observed.requests,
        curve=_curve(grids, ideal),
        comparison=_comparison(observed, cost, ideal),
    )


def _tops(observed: Observed, headroom: Headroom | None) -> Bucket:
    """The largest sizes that must fit."""
    largest = observed.largest
    if headroom is None:
        return largest
    if isinstance(headroom, float | np.floating):
        return Bucket(*[_grown(size, float(headroom)) for size in largest])
    pair = headroom if isinstance(headroom, tuple) else (1, headroom)
    if len(pair) != 2:
        raise ConfigError(
            f"headroom={headroom!r} has {len(pair)} sizes: give a seq_len, a (batch, seq_len) or a "
            "fraction such as 0.25"
        )
    batch, seq = (
        positive_size(size, name=f"headroom[{index}]" if pair is headroom else "headroom")
        for index, size in enumerate(pair)
    )
    return Bucket(max(batch, largest.batch_size), max(seq, largest.seq_len))


def _grown(size: int, fraction: float) -> int:
    if not 0 <= fraction < math.inf:
        raise ConfigError(
            f"headroom={fraction!r} is no fraction: give 0.0 or more, such as 0.25, or a size"
        )
    # Rounded first: 100 and a tenth is 110.00000000000001 in floating point, not 111.
    return size if size == 1 else math.ceil(round(size * (1 + min(fraction, LARGEST_SIZE)), 6))


def _candidates(sizes: Ints, top: int, multiple: int, *, name: str) -> Ints:
    """What a bucket may have on one axis: where no larger one is cheaper, no others are needed."""
    multiple = positive_size(multiple, name=name)
    if max(top, multiple) > LARGEST_SIZE:
        raise ConfigError(
            f"headroom and {name} ask for a bucket of {max(top, multiple)}, above 2**53: set a "
            "smaller one"
        )
    return np.unique(-(-np.append(sizes, top) // multiple) * multiple)


def _choices(cost: Cost, batches: Ints, seqs: Ints) -> tuple[Ints, Ints, Floats]:
    """The candidates that are worth a bucket, and what each pair costs."""
    if len(batches) * len(seqs) > MOST_BUCKETS:
        raise ConfigError(
            f"sizes have {len(batches):,} batch sizes and {len(seqs):,} sequence lengths, too many "
            "to try each with each: set batch_multiple or seq_multiple, or plan from fewer requests"
        )
    unit = cost_table(cost, batches, seqs)
    kept = worthwhile(unit)
    seqs, unit = seqs[kept], unit[:, kept]
    kept = worthwhile(unit.T)
    return batches[kept], seqs, unit[kept]


def _curve(grids: list[ProductGrid], ideal: float) -> tuple[PlanPoint, ...]:
    """The waste of each number of buckets, up to where more of them are worth nothing."""
    useful = max(grid.graphs for grid in grids)
    return tuple(
        PlanPoint(graphs, waste(ideal, grid.cost))
        for graphs, grid in enumerate(grids[:useful], start=1)
    )


def _comparison(observed: Observed, cost: Cost, ideal: float) -> tuple[PlanRow, ...]:
    rows = []
    for grid in standard_grids(*observed.largest):
        found = evaluate(observed, grid.batch_sizes, grid.seq_lens, cost, ideal=ideal)
        rows.append(PlanRow(grid.name, found.graphs, found.waste))
    return tuple(rows)
