"""The ladders that waste least on observed sizes."""

from __future__ import annotations

import math

import numpy as np

from cudagraph_jax.checks import positive_size
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.costs import ELEMENTS, Cost, cost_of_each, cost_table
from cudagraph_jax.shapes.evaluation import evaluate, standard_grids, waste
from cudagraph_jax.shapes.grid_search import Grid, Problem, best_grids, places_of
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from cudagraph_jax.shapes.observed import Ints, Observed, Sizes
from cudagraph_jax.shapes.plan import BucketPlan, PlanPoint, PlanRow

Headroom = int | float | tuple[int, int]


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

    Along one axis, and over both where one of them has few different sizes, this is the optimum;
    else it is the best of many starts, improved one axis at a time, and never worse than the
    standard ladders of as many buckets. A larger bucket is taken to cost no less than a smaller
    one for the speed of the search alone: the result is right for any cost.

    Args:
        sizes: What was asked for: (batch, seq_len) pairs (N, 2), lengths (N,), or a mapping of
            pairs or lengths to how often they came, such as `manager.sizes()`.
        max_graphs: The most buckets.
        cost: What a replay of (batch, seq_len) costs; its elements if None. See `attention_cost`
            and `measured_cost`.
        batch_multiple: Batch sizes are multiples of it: the devices that share a batch, say.
        seq_multiple: Sequence lengths are multiples of it: 8 or more for tensor cores, say.
        headroom: One more bucket for sizes not seen yet. An integer: up to this seq_len; a pair:
            up to this (batch, seq_len); a fraction such as 0.25: so much above the largest seen
            (an axis that only ever had size 1 stays). None: up to the largest that was seen.

    Returns:
        The plan; `CUDAGraphConfig.from_plan` makes a configuration of it.

    Raises:
        ConfigError: An argument that is not valid, or a cost that is no number of 0 or more.
    """
    observed = Observed.of(sizes)
    max_graphs = positive_size(max_graphs, name="max_graphs")
    multiples = (
        positive_size(batch_multiple, name="batch_multiple"),
        positive_size(seq_multiple, name="seq_multiple"),
    )
    tops = _tops(observed, headroom)
    batches = _candidates(observed.batches, multiples[0], tops.batch_size)
    seqs = _candidates(observed.seq_lens, multiples[1], tops.seq_len)
    cost = ELEMENTS if cost is None else cost
    problem = Problem(
        np.stack(
            [np.searchsorted(batches, observed.batches), np.searchsorted(seqs, observed.seq_lens)]
        ),
        observed.counts,
        cost_table(cost, batches, seqs),
    )
    standard = standard_grids(int(batches[-1]), int(seqs[-1]))
    starts = [
        (places_of(grid.batch_sizes, batches), places_of(grid.seq_lens, seqs)) for grid in standard
    ]
    grids = best_grids(problem, max_graphs, starts)
    ideal = float(observed.counts @ cost_of_each(cost, observed.batches, observed.seq_lens))
    return BucketPlan(
        batch_sizes=Ladder(batches[list(grids[-1].batches)].tolist()),
        seq_lens=Ladder(seqs[list(grids[-1].seqs)].tolist()),
        expected_waste=waste(ideal, grids[-1].cost),
        requests=observed.requests,
        curve=_curve(grids, ideal),
        comparison=_comparison(observed, cost),
    )


def _tops(observed: Observed, headroom: Headroom | None) -> Bucket:
    """The largest sizes that must fit."""
    largest = observed.largest
    if headroom is None:
        return largest
    if isinstance(headroom, float):
        if not 0 <= headroom < math.inf:
            raise ConfigError(f"headroom={headroom!r} is no fraction of 0 or more, such as 0.25")
        return Bucket(
            *[size if size == 1 else math.ceil(size * (1 + headroom)) for size in largest]
        )
    pair = headroom if isinstance(headroom, tuple) else (1, headroom)
    if len(pair) != 2:
        raise ConfigError(f"headroom={headroom!r} is no seq_len and no (batch, seq_len)")
    batch, seq = (positive_size(size, name="a size in headroom") for size in pair)
    return Bucket(max(batch, largest.batch_size), max(seq, largest.seq_len))


def _candidates(sizes: Ints, multiple: int, top: int) -> Ints:
    """What a bucket may have on one axis: an optimum needs no other sizes."""
    return np.unique(-(-np.append(sizes, top) // multiple) * multiple)


def _curve(grids: list[Grid], ideal: float) -> tuple[PlanPoint, ...]:
    """The waste of each number of buckets, up to where more of them are worth nothing."""
    useful = max(grid.graphs for grid in grids)
    return tuple(
        PlanPoint(graphs, waste(ideal, grid.cost))
        for graphs, grid in enumerate(grids[:useful], start=1)
    )


def _comparison(observed: Observed, cost: Cost) -> tuple[PlanRow, ...]:
    rows = []
    for grid in standard_grids(*observed.largest):
        found = evaluate(observed, grid.batch_sizes, grid.seq_lens, cost)
        rows.append(PlanRow(grid.name, found.graphs, found.waste))
    return tuple(rows)
