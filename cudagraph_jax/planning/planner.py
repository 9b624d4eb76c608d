"""The ladders that waste least on observed sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cudagraph_jax._base.checks import names_nearest, nearest, positive_size
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.costs import (
    DEAR,
    Cost,
    avoiding,
    chosen_cost,
    cost_of_each,
    cost_table,
    is_formula,
)
from cudagraph_jax.planning.evaluation import (
    evaluate,
    padded_columns,
    standard_grids,
    waste,
    worst_padding,
)
from cudagraph_jax.planning.observed import (
    BATCH_SEQ,
    LARGEST_SIZE,
    Floats,
    Ints,
    Observed,
    Sizes,
    argument_names,
    checked_axes,
    distinct,
)
from cudagraph_jax.planning.partition import worthwhile
from cudagraph_jax.planning.plan import BucketPlan, PlanPoint, PlanRow
from cudagraph_jax.planning.search import (
    PaddingBound,
    Problem,
    ProductGrid,
    best_grids,
    bounded_grids,
    fewest_graphs,
    places_of,
)
from cudagraph_jax.shapes.ladder import Ladder

Headroom = int | float | tuple[int, ...] | Mapping[str, int]

MOST_BUCKETS = 2**24
"""Costs in memory at a time, 128 MiB: those of every candidate with every other where they are
asked for one by one, else those of a step of the search."""


@names_nearest
def plan_buckets(
    sizes: Sizes,
    *,
    max_graphs: int,
    axes: Sequence[str] = BATCH_SEQ,
    cost: Cost | None = None,
    batch_multiple: int = 1,
    seq_multiple: int = 1,
    multiples: Mapping[str, int] | None = None,
    headroom: Headroom | None = None,
    max_padding: float | None = None,
    max_bucket_elements: int | None = None,
) -> BucketPlan:
    """The grid of at most `max_graphs` buckets that wastes least on observed sizes.

    The grid is the product of a ladder for each axis. Buckets have sizes that were seen, rounded up
    to the multiples. Of those grids this is the best along one axis, by dynamic programming (Yao,
    "Efficient dynamic programming using quadrangle inequalities", STOC 1980), and over several
    where all but one of them have few different sizes. Else it is the best of many starts, among
    them every product of the axes' own optima, improved one axis at a time. Where no larger size is
    cheaper, no other sizes could do better, and the grid wastes no more than a standard one of as
    many buckets, but for what multiples, headroom and `max_padding` ask.

    Over two axes some hundreds of buckets take seconds: for 300 batch sizes with 300 sequence
    lengths, 64 buckets take 0.3 s and 512 take 2 s on one core.

    Args:
        sizes: What was asked for: one number for each of the k axes (N, k), such as (batch,
            seq_len) pairs (N, 2), a mapping of these to how often they came, such as
            `manager.sizes()`, or of each axis to its sizes (N,). On the axes ("batch", "seq")
            lengths (N,) alone have batch 1. A function of a manager that does not carry a named
            axis asks for no bucket of it.
        max_graphs: The most buckets.
        axes: The names of the axes, in the order of a size.
        cost: What a replay of a bucket costs, a function of its size on each axis: of (batch,
            seq_len) unless `axes` says otherwise; its elements if None. It is asked for every
            bucket that there may be. See `attention_cost` and `measured_cost`. Where only some
            larger sizes are cheaper, such as multiples of 64, say so by a multiple.
        batch_multiple: Batch sizes are multiples of it: the devices that share a batch, say.
        seq_multiple: Sequence lengths are multiples of it: 8 or more for tensor cores, say.
        multiples: The same for any axis by its name: `{"src": 8}`.
        headroom: How far the largest bucket goes, for sizes not seen yet. An integer: up to this
            seq_len, or size of a single axis; a tuple: up to this size on each axis; a mapping: up
            to these sizes; a fraction such as 0.25: so much above the largest seen (an axis that
            only ever had size 1 stays). None, or less than the largest seen: up to that.
        max_padding: The most of its bucket's elements that may be padding for any request seen,
            from 0 up to 1; None: however much is best on the whole.
        max_bucket_elements: The most elements of a bucket that serves a request seen, as in
            `CUDAGraphConfig`; None: any number.

    Returns:
        The plan; `CUDAGraphConfig.from_plan` makes a configuration of it.

    Raises:
        ConfigError: An argument that is not valid, a cost that is no function or gives no
            number of 0 or more, too many different sizes, or a `max_padding` or
            `max_bucket_elements` that cannot be kept to: the error says what can.

    Example:
        >>> plan = plan_buckets([10, 11, 12, 100], max_graphs=2)
        >>> plan.seq_lens, round(plan.expected_waste, 3)
        (Ladder((12, 100)), 0.022)
        >>> pairs = [(1, 30, 20), (1, 35, 60), (4, 30, 25), (4, 90, 80)]
        >>> plan_buckets(pairs, axes=("batch", "src", "tgt"), max_graphs=4).sizes["src"]
        Ladder((35, 90))
    """
    axes = checked_axes(axes)
    most = math.inf
    if max_bucket_elements is not None:
        most = positive_size(max_bucket_elements, name="max_bucket_elements")
    observed = Observed.of(sizes, axes, max_elements=most)
    max_graphs = positive_size(max_graphs, name="max_graphs")
    cost = chosen_cost(cost, axes)
    if max_bucket_elements is not None:
        _check_elements(observed, observed.columns, most, "leave it out, or raise that")
        cost = avoiding(cost, more_elements_than=most)
    factors = _multiples(axes, batch_multiple, seq_multiple, multiples)
    tops = _tops(observed, headroom)
    columns = zip(observed.columns, tops, factors.items(), strict=True)
    candidates = [_candidates(sizes, top, *factor) for sizes, top, factor in columns]
    max_padding = None if max_padding is None else _bound(max_padding)
    candidates, problem = _problem(observed, cost, candidates, max_graphs, max_padding)
    largest = [int(sizes[-1]) for sizes in candidates]
    starts = [
        [places_of(*pair) for pair in zip(grid.ladders, candidates, strict=True)]
        for grid in standard_grids(axes, largest)
    ]
    grids = best_grids(problem, min(max_graphs, math.prod(problem.shape)), starts)
    if max_padding is not None and math.isinf(grids[-1].cost):
        raise _out_of_bound(observed, problem, candidates, max_padding, max_graphs)
    ladders = {
        axis: Ladder(sizes[list(places)].tolist())
        for axis, sizes, places in zip(axes, candidates, grids[-1].ladders, strict=True)
    }
    if max_bucket_elements is not None:
        held = padded_columns(observed, [*ladders.values()])
        remedy = f"no grid of {max_graphs} buckets was found that is: raise one of the two"
        _check_elements(observed, held, max_bucket_elements, remedy)
    ideal = float(observed.counts @ cost_of_each(cost, *observed.columns, axes=axes))
    return BucketPlan.of(
        ladders,
        expected_waste=waste(ideal, grids[-1].cost),
        requests=observed.requests,
        curve=_curve(grids, ideal, most=math.inf if max_bucket_elements is None else ideal * DEAR),
        comparison=_comparison(observed, cost, ideal, most=most),
        worst_padding=None if max_padding is None else worst_padding(observed, [*ladders.values()]),
    )


def _multiples(
    axes: tuple[str, ...], batch: int, seq: int, multiples: Mapping[str, int] | None
) -> dict[str, int]:
    """The multiple of each axis, by the name of what asked for it, in the order of the axes."""
    multiples = {} if multiples is None else multiples
    if not isinstance(multiples, Mapping):
        raise ConfigError(
            f'multiples={multiples!r:.80} is no mapping: give one, such as {{"src": 8}}'
        )
    for axis in multiples:
        if axis not in axes:
            raise ConfigError(f"multiples has {axis!r}, which is no axis: {nearest(axis, axes)}")
    found: dict[str, int] = {}
    by_name = {"batch": batch, "seq": seq}
    for axis, multiple in by_name.items():
        if multiple == 1 or (axis in axes and axis not in multiples):
            continue
        other = (
            f"multiples[{axis!r}]={multiples[axis]!r} too" if axis in axes else f"no axis {axis!r}"
        )
        raise ConfigError(f"{axis}_multiple={multiple!r}, but there is {other}: leave one out")
    for axis in axes:
        if axis in by_name and axis not in multiples:
            found[f"{axis}_multiple"] = positive_size(by_name[axis], name=f"{axis}_multiple")
        else:
            name = f"multiples[{axis!r}]"
            found[name] = positive_size(multiples.get(axis, 1), name=name)
    return found


def _check_elements(observed: Observed, held: Sequence[Ints], most: float, remedy: str) -> None:
    """Raises where a request, or the bucket that holds it, has more elements than there may be."""
    elements = np.prod([column.astype(np.float64) for column in held], axis=0)
    worst = int(np.argmax(elements))
    if elements[worst] > most:
        names = argument_names(observed.axes)
        sizes = ", ".join(
            f"{name}={int(column[worst])}"
            for name, column in zip(names, observed.columns, strict=True)
        )
        raise ConfigError(
            f"a request of {sizes} is held by {int(elements[worst])} elements, more than "
            f"max_bucket_elements={most}: {remedy}"
        )


def _bound(max_padding: float) -> float:
    is_number = isinstance(max_padding, int | float | np.number)
    if not is_number or isinstance(max_padding, bool) or not 0 <= max_padding < 1:
        raise ConfigError(
            f"max_padding={max_padding!r:.80} is no part of a bucket: give 0.0 or more and below "
            "1, such as 0.5"
        )
    return float(max_padding)


def _tops(observed: Observed, headroom: Headroom | None) -> tuple[int, ...]:
    """The largest size on each axis that must fit."""
    largest, axes = observed.largest, observed.axes
    if headroom is None:
        return largest
    if isinstance(headroom, float | np.floating):
        return tuple(_grown(size, float(headroom)) for size in largest)
    asked = _asked(headroom, axes)
    if len(asked) != len(axes):
        of_length = "a seq_len, " if "seq" in axes else ""
        raise ConfigError(
            f"headroom={headroom!r} has {len(asked)} sizes: give {of_length}a "
            f"({', '.join(argument_names(axes))}) or a fraction such as 0.25"
        )
    least = [positive_size(size, name=name) for name, size in asked]
    return tuple(map(max, least, largest))


def _asked(
    headroom: int | tuple[int, ...] | Mapping[str, int], axes: Sequence[str]
) -> list[tuple[str, int]]:
    """The size that headroom asks for on each axis, and what to call it."""
    if isinstance(headroom, tuple):
        return [(f"headroom[{place}]", size) for place, size in enumerate(headroom)]
    if isinstance(headroom, Mapping):
        for axis in headroom:
            if axis not in axes:
                raise ConfigError(f"headroom has {axis!r}, which is no axis: {nearest(axis, axes)}")
        return [(f"headroom[{axis!r}]", headroom.get(axis, 1)) for axis in axes]
    length = axes[0] if len(axes) == 1 else "seq"
    if length not in axes:
        raise ConfigError(
            f"headroom={headroom!r} does not say which axis it is for: give a mapping, such as "
            f'{{"{axes[-1]}": {headroom!r}}}, or a fraction such as 0.25'
        )
    return [("headroom", headroom if axis == length else 1) for axis in axes]


def _grown(size: int, fraction: float) -> int:
    if not 0 <= fraction < math.inf:
        raise ConfigError(
            f"headroom={fraction!r:.80} is no fraction: give 0.0 or more, such as 0.25, or a size"
        )
    # Rounded first: 100 and a tenth is 110.00000000000001 in floating point, not 111.
    return size if size == 1 else math.ceil(round(size * (1 + min(fraction, LARGEST_SIZE)), 6))


def _candidates(sizes: Ints, top: int, name: str, multiple: int) -> Ints:
    """What a bucket may have on one axis: where no larger one is cheaper, no others are needed."""
    if max(top, multiple) > LARGEST_SIZE:
        raise ConfigError(
            f"headroom and {name} ask for a bucket of {max(top, multiple)}, above 2**53: set a "
            "smaller one"
        )
    return np.unique(-(-np.append(sizes, top) // multiple) * multiple)


def _problem(
    observed: Observed,
    cost: Cost,
    candidates: list[Ints],
    max_graphs: int,
    max_padding: float | None,
) -> tuple[list[Ints], Problem]:
    """The candidates that are worth a bucket, and the requests among them."""
    table = _table(observed.axes, cost, candidates, max_graphs)
    if max_padding is None:  # else the larger bucket that is as cheap may be too large
        candidates, table = _worthwhile(cost, candidates, table)
    columns = list(zip(candidates, observed.columns, strict=True))
    places = [np.searchsorted(sizes, column) for sizes, column in columns]
    counts, bound = observed.counts, None
    is_rounded = any(
        (sizes[at] != column).any() for at, (sizes, column) in zip(places, columns, strict=True)
    )
    if max_padding is None and is_rounded:
        # Multiples leave fewer requests that differ in what they need.
        different, counts = distinct(np.stack(places, axis=1), counts)
        places = list(np.ascontiguousarray(different.T))
    if max_padding is not None:
        bound = PaddingBound(
            sizes=[column.astype(np.float64) for column in observed.columns],
            candidates=[sizes.astype(np.float64) for sizes in candidates],
            filled=1 - max_padding,
        )
    if table is not None:
        return candidates, Problem.of(places, counts, table, bound)

    def unit(*at: Ints) -> Floats:
        chosen = zip(candidates, at, strict=True)
        return cost_of_each(cost, *[sizes[place] for sizes, place in chosen])

    shape = tuple(map(len, candidates))
    return candidates, Problem(shape, places, counts, unit, rises=True, bound=bound)


def _table(
    axes: Sequence[str], cost: Cost, candidates: list[Ints], max_graphs: int
) -> Floats | None:
    """What each bucket costs; None where a formula says it whenever it is needed."""
    shape = [len(sizes) for sizes in candidates]
    needed = math.prod(shape)
    if is_formula(cost):
        needed = min(needed, max_graphs * max(shape))
    if needed > MOST_BUCKETS:
        kinds = {"batch": "batch sizes", "seq": "sequence lengths"}
        counts = [
            f"{n:,} {kinds.get(axis, f'of {axis}')}" for n, axis in zip(shape, axes, strict=True)
        ]
        is_pair = tuple(axes) == BATCH_SEQ
        raise ConfigError(
            f"sizes have {', '.join(counts[:-1])}{' and ' if counts[1:] else ''}{counts[-1]}, too "
            "many to try each with each: set "
            f"{'batch_multiple or seq_multiple' if is_pair else 'multiples'}, or plan from fewer "
            "requests"
        )
    return None if is_formula(cost) else cost_table(cost, *candidates, axes=axes)


def _worthwhile(
    cost: Cost, candidates: list[Ints], table: Floats | None
) -> tuple[list[Ints], Floats | None]:
    """The candidates without those that a larger one can stand for, and their costs."""
    chosen = list(candidates)
    for side in reversed(range(len(chosen))):
        if table is None:
            # Along a single line: a formula that is flat where all else is largest always is.
            line = [sizes if at == side else sizes[-1:] for at, sizes in enumerate(chosen)]
            unit = cost_of_each(cost, *line)[None, :]
        else:
            unit = np.moveaxis(table, side, -1).reshape(-1, len(chosen[side]))
        kept = worthwhile(unit)
        chosen[side] = chosen[side][kept]
        table = None if table is None else table.take(kept, axis=side)
    return chosen, table


def _out_of_bound(
    observed: Observed,
    problem: Problem,
    candidates: list[Ints],
    max_padding: float,
    max_graphs: int,
) -> ConfigError:
    """The error of a bound that no grid keeps to, with what would have to change."""
    bounded = bounded_grids(problem)
    if bounded:
        return ConfigError(
            f"max_padding={max_padding!r} cannot be kept to with max_graphs={max_graphs}: the "
            "fewest buckets found that keep to it are "
            f"{fewest_graphs(problem, bounded)}; raise either"
        )
    held = [sizes[place] for sizes, place in zip(candidates, problem.places, strict=True)]
    part = np.ones(len(observed.counts))
    for column, sizes in zip(observed.columns, held, strict=True):
        part *= column / sizes
    worst = int(part.argmin())
    request, bucket = (
        tuple(int(sizes[worst]) for sizes in columns) for columns in (observed.columns, held)
    )
    least = 1 - float(part[worst])
    return ConfigError(
        f"max_padding={max_padding!r} cannot be kept to: the smallest bucket for {request} is "
        f"{bucket}; give {min(math.ceil(least * 1e4) / 1e4, 0.9999)} or more, or smaller multiples"
    )


def _curve(grids: list[ProductGrid], ideal: float, *, most: float) -> tuple[PlanPoint, ...]:
    """The waste of each number of buckets, up to where more of them are worth nothing.

    Args:
        grids: The best grid of each number.
        ideal: What would be spent without any padding.
        most: What a grid that keeps to all bounds does not come near to.
    """
    useful = max(grid.graphs for grid in grids)
    return tuple(
        PlanPoint(graphs, waste(ideal, grid.cost))
        for graphs, grid in enumerate(grids[:useful], start=1)
        if grid.cost < most
    )


def _comparison(
    observed: Observed, cost: Cost, ideal: float, *, most: float
) -> tuple[PlanRow, ...]:
    """What standard grids waste, those that keep to the budget of elements."""
    rows = []
    for grid in standard_grids(observed.axes, observed.largest):
        held = padded_columns(observed, grid.ladders)
        if most < math.inf and np.prod([column.astype(float) for column in held], 0).max() > most:
            continue
        found = evaluate(observed, grid.ladders, cost, ideal=ideal)
        rows.append(PlanRow(grid.name, found.graphs, found.waste))
    return tuple(rows)
