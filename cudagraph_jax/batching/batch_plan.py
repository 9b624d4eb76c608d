"""The grid that a batcher serves cheapest: rows are its choice, lengths are the items'."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import NamedTuple, TypedDict, Unpack

import numpy as np

from cudagraph_jax._base.checks import names_nearest, positive_size, require_arguments
from cudagraph_jax.batching.composition import Part, Priced, Prices, compose
from cudagraph_jax.batching.lane import Lane
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.dispatch.replan import replan_later
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.planning.costs import (
    Cost,
    PolynomialCost,
    avoiding,
    chosen_cost,
    cost_table,
    measured_cost,
)
from cudagraph_jax.planning.evaluation import standard_grids, waste
from cudagraph_jax.planning.observed import Floats, Ints, Observed, Sizes
from cudagraph_jax.planning.partition import partition
from cudagraph_jax.planning.plan import BucketPlan, PlanPoint, PlanRow
from cudagraph_jax.planning.planner import Headroom, plan_buckets
from cudagraph_jax.planning.search import Problem
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from cudagraph_jax.shapes.pytrees import PyTree

USUAL_ROWS = (1, 4, 8, 16)
"""What one captures without a plan of the rows; no plan is worse than that."""

CALL_AND_ELEMENTS = PolynomialCost(constant=64.0, elements=1.0)
"""What a bucket costs where nobody measured: its elements, and 64 for the call.

By elements alone rows that share a call save nothing, and rows of one would be best. A call of the
demo's encoder was measured at 58 elements on a CPU; on an accelerator it may be thousands.
"""

MOST_ROWS = 64
"""The largest batch that is tried."""

_SEVERAL = 2  # batch sizes beside 1: a third one was worth 0.7 % at the most
_ITEMS = 1024  # to price a grid with takes a millisecond; 4,096 gave the same grids
_MOST_LENGTHS = 64  # of a grid that stands for all lengths

BatchCost = Cost | Mapping[tuple[int, int], float] | Mapping[Bucket, float]


@names_nearest
def plan_for_batcher(
    lengths: Sizes,
    *,
    max_graphs: int,
    cost: BatchCost | None = None,
    waiting: int = 64,
    capture_sizes: Sequence[int] | None = None,
    batch_multiple: int = 1,
    seq_multiple: int = 1,
    headroom: Headroom | None = None,
    max_bucket_elements: int | None = None,
) -> BucketPlan:
    """The grid of at most `max_graphs` buckets in which a `Batcher` serves such items cheapest.

    Rows are the batcher's choice: a grid is worth what the calls cost that it composes, from as
    many items as wait. Windows of them are drawn from `lengths`, the same for every grid. Tried are
    a batch of one alone and with one or two powers of two, and 1, 4, 8 and 16 rows, each with the
    best lengths for single items and for calls as they are cut on a fine grid, by dynamic
    programming. What then costs least is cut and fitted anew until nothing is gained. Of all grids
    of these rows that is within 3 % of the cheapest in the small cases that are tested. A larger
    limit never gives a dearer grid, and none is dearer than `plan_buckets(lengths,
    max_graphs=max_graphs // 4)` crossed with 1, 4, 8 and 16 rows.

    Args:
        lengths: Of the items: (N,), or a mapping of lengths to how often they came.
        max_graphs: The most buckets.
        cost: What a run of (rows, length) costs: a function, such as `measured_cost(entries)`, or
            costs by bucket, to which one is fitted as `measured_cost` does. None: its elements, and
            64 of them for the call; so measure where you can.
        waiting: How many items wait when a call is composed, as under load.
        capture_sizes: The rows; None: the best.
        batch_multiple: Rows are rounded up to multiples of it.
        seq_multiple: As for `plan_buckets`, and so are the next two.
        headroom: How far the longest bucket goes, for lengths not seen yet.
        max_bucket_elements: The most elements of a bucket that is used.

    Returns:
        The plan. Its waste is the part of the cost that rows of their own lengths in full batches
        would not have. `CUDAGraphConfig.from_plan` makes a configuration of it.

    Raises:
        ConfigError: As for `plan_buckets`.

    Example:
        >>> plan = plan_for_batcher([10, 11, 12, 13, 90, 100], max_graphs=4)
        >>> plan.batch_sizes, plan.seq_lens
        (Ladder((1, 16)), Ladder((13, 100)))
    """
    max_graphs = positive_size(max_graphs, name="max_graphs")
    chosen = _row_ladders(positive_size(waiting, name="waiting"), capture_sizes)
    every = list(dict.fromkeys(tuple(Ladder(rows).rounded(batch_multiple)) for rows in chosen))
    ladders = [rows for rows in every if len(rows) <= max_graphs]
    if not ladders:
        raise ConfigError(
            f"capture_sizes={every[0]} are {len(every[0])} buckets of one length, more than "
            f"max_graphs={max_graphs}: raise that, or leave some out"
        )
    observed = Observed.of(lengths, ("seq",))
    counts = zip(observed.columns[0].tolist(), observed.counts.astype(int).tolist(), strict=True)
    longest = plan_buckets(  # which refuses what is no length and no limit
        dict(counts),
        axes=("seq",),
        max_graphs=max_graphs // len(ladders[0]),
        seq_multiple=seq_multiple,
        headroom=headroom,
        max_bucket_elements=max_bucket_elements,
    ).seq_lens[-1]
    needed = -(-observed.columns[0] // seq_multiple) * seq_multiple
    price = _checked_cost(cost)
    if max_bucket_elements is not None:
        price = avoiding(price, more_elements_than=max_bucket_elements)
    windows = _Windows(observed, np.unique(np.append(needed, longest)), waiting, price)
    grids = _best_grids(windows, ladders, max_graphs)
    if max_bucket_elements is not None:
        windows.check_elements(grids[-1], max_bucket_elements)
    ideal = windows.ideal(sorted({rows for ladder in every for rows in ladder}))
    return _plan_of(windows, grids, ideal, max_graphs)


class BatchPlanOptions(TypedDict, total=False):
    """What `Batcher.replan` takes beside the number of buckets.

    Attributes:
        cost: As for `plan_for_batcher`, and so are the others; None: `cost_ms` of the buckets.
        waiting: Items that wait when a call is composed.
        capture_sizes: The rows.
        seq_multiple: Lengths are multiples of it.
        headroom: How far the longest bucket goes; None: as far as now.
    """

    cost: BatchCost | None
    waiting: int
    capture_sizes: Sequence[int] | None
    seq_multiple: int
    headroom: Headroom | None


def change_grid(
    function: BucketedFunction[..., PyTree],
    lanes: Sequence[Lane],
    max_graphs: int | None,
    **options: Unpack[BatchPlanOptions],
) -> BucketPlan:
    """Has a function's grid follow the items that came; see `Batcher.replan`."""
    require_arguments("replan", options, ["max_graphs", *BatchPlanOptions.__annotations__])
    manager = function.manager
    config = manager.config
    lengths = Counter(length for lane in lanes for length in lane.lengths.copy())
    ladder = config.capture_seq_lens or (1,)
    if not lengths:
        raise ConfigError("no items came yet: plan after there were some")
    if config.capture_axes or (config.capture_seq_lens is None and max(lengths) > 1):
        raise ConfigError(
            "a batcher plans rows and lengths, but with capture_axes there are other sizes, and "
            "with capture_seq_lens=None each length is a bucket of its own: for capture_axes use "
            "the function's own replan, else give capture_seq_lens"
        )
    keeps_limits = options.get("headroom") is None
    if keeps_limits:
        options["headroom"] = ladder[-1]
    if options.get("cost") is None:
        with suppress(ConfigError):  # too few were measured, as without warm-up runs
            entries = [entry for lane in lanes for entry in lane.grid().entries.values()]
            options["cost"] = measured_cost(entries)
    if max_graphs is None:
        max_graphs = len(config.capture_sizes) * len(ladder)
    most = config.max_bucket_elements
    rows, parts = (manager.multiples.get(axis, 1) for axis in ("batch", "seq"))
    given = positive_size(options.get("seq_multiple", 1), name="seq_multiple")
    options["seq_multiple"] = math.lcm(given, parts)
    plan = plan_for_batcher(
        lengths,
        max_graphs=max_graphs,
        max_bucket_elements=most,
        batch_multiple=rows,
        **options,
    )
    replan_later(manager.dispatcher, plan, keeps_limits=keeps_limits)
    manager.wait()
    found = manager.config
    if (found.capture_sizes, found.capture_seq_lens or (1,)) != (plan.batch_sizes, plan.seq_lens):
        raise CUDAGraphError(
            f"{plan!r} is not in place: either it was not captured, and the warning says why, or "
            "another plan came after it: call replan again"
        )
    return plan


def _plan_of(
    windows: _Windows, grids: Sequence[_RowGrid], ideal: float, max_graphs: int
) -> BucketPlan:
    best = grids[-1]
    return BucketPlan.of(
        {"batch": Ladder(best.rows), "seq": Ladder(best.lengths)},
        expected_waste=waste(ideal, best.cost),
        requests=windows.observed.requests,
        curve=tuple(PlanPoint(grid.graphs, waste(ideal, grid.cost)) for grid in grids),
        comparison=tuple(_comparison(windows, max_graphs, ideal)),
    )


def _checked_cost(cost: BatchCost | None) -> Cost:
    if cost is None:
        return CALL_AND_ELEMENTS
    if not isinstance(cost, Mapping):
        return chosen_cost(cost)
    try:
        timed = [_Timed(int(rows), int(seq), float(ms)) for (rows, seq), ms in cost.items()]
    except (TypeError, ValueError):
        raise ConfigError(
            f"cost={cost!r:.80} has something else than costs of (rows, length): give such as "
            "{(1, 128): 0.8, (8, 128): 2.1}, or a function"
        ) from None
    return measured_cost(timed)


class _Timed(NamedTuple):
    """A measured bucket."""

    batch_size: int
    seq_len: int
    cost_ms: float


def _row_ladders(waiting: int, capture_sizes: Sequence[int] | None) -> list[tuple[int, ...]]:
    """The rows to choose from: a batch of one for quiet times, and some for many at a time."""
    if capture_sizes is not None:
        return [tuple(Ladder(capture_sizes, name="capture_sizes"))]
    powers = [2**power for power in range(1, MOST_ROWS.bit_length()) if 2**power <= waiting]
    several = [chosen for count in range(_SEVERAL + 1) for chosen in combinations(powers, count)]
    return [*((1, *chosen) for chosen in several), USUAL_ROWS]


class _RowGrid(NamedTuple):
    """Rows and lengths, with what all windows cost in them."""

    cost: float
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def graphs(self) -> int:
        """How many buckets it has."""
        return len(self.rows) * len(self.lengths)


class _Windows:
    """Items as they wait together, composed on one grid or another.

    Args:
        observed: Their lengths.
        candidates: The lengths that a bucket may have, ascending.
        waiting: How many wait.
        cost: Of (rows, length).

    Attributes:
        observed: The same.
        candidates: The same.
    """

    def __init__(self, observed: Observed, candidates: Ints, waiting: int, cost: Cost) -> None:
        self.observed, self.candidates, self._cost = observed, candidates, cost
        # Quantiles in random order: together they are spread as all items are.
        shape = (-(-_ITEMS // waiting), waiting)
        upto = np.cumsum(observed.counts)
        ranks = (np.arange(math.prod(shape)) + 0.5) / math.prod(shape) * upto[-1]
        drawn = observed.columns[0][np.searchsorted(upto, ranks)]
        self._drawn = np.random.default_rng(0).permutation(drawn).reshape(shape)
        self._windows = [[Bucket(1, n) for n in window] for window in self._drawn.tolist()]

    def _calls(
        self, rows: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[list[Bucket], Part]]:
        """All windows, each with its calls."""
        table = cost_table(self._cost, np.array(rows), np.array(lengths)).tolist()
        prices = Prices(
            Priced(Bucket(batch, length), cost)
            for batch, costs in zip(rows, table, strict=True)
            for length, cost in zip(lengths, costs, strict=True)
        )
        for window in self._windows:
            classes = map(prices.class_of, window)
            for part in compose([each for each in classes if each is not None], prices):
                yield window, part

    def grid(self, rows: Sequence[int], lengths: Sequence[int]) -> _RowGrid:
        """A grid, priced."""
        cost = sum(part.cost for _, part in self._calls(rows, lengths))
        return _RowGrid(cost, tuple(rows), tuple(lengths))

    def check_elements(self, grid: _RowGrid, most: int) -> None:
        """Raises where a bucket is used that has more elements.

        Raises:
            ConfigError: One is.
        """
        calls = self._calls(grid.rows, grid.lengths)
        if any(part.bucket.elements > most for _, part in calls):
            raise ConfigError(
                f"no grid of so many buckets with {grid.rows} rows was found that keeps to "
                f"max_bucket_elements={most}: raise one of the two, or plan fewer rows"
            )

    def fitted(
        self, rows: Sequence[int], lengths: Sequence[int], most: int
    ) -> list[tuple[int, ...]]:
        """The best 1, 2 … `most` lengths for the calls as they are cut on a grid.

        Cut anew on these, they cost no more, where larger buckets cost no less.
        """
        calls = [
            (rows.index(part.bucket.batch_size), max(window[place].seq_len for place in part.rows))
            for window, part in self._calls(rows, lengths)
        ]
        batches, longest = np.array(calls).T
        table = cost_table(self._cost, np.array(rows), self.candidates)
        return self._partitioned([batches, self._places(longest)], np.ones(len(calls)), table, most)

    def fitted_to_items(self, most: int) -> list[tuple[int, ...]]:
        """The best 1, 2 … `most` lengths by elements of each item alone, as in `plan_buckets`."""
        column, counts = self.observed.columns[0], self.observed.counts
        table = self.candidates.astype(np.float64)[None, :]
        return self._partitioned([np.zeros_like(column), self._places(column)], counts, table, most)

    def _places(self, lengths: Ints) -> Ints:
        places: Ints = np.searchsorted(self.candidates, lengths)
        return places

    def _partitioned(
        self, places: Sequence[Ints], counts: Floats, table: Floats, most: int
    ) -> list[tuple[int, ...]]:
        all_places = [np.arange(size) for size in table.shape]
        axis = Problem.of(places, counts, table).axis(1, all_places)
        found = partition(axis, most, optimal=False)
        return [
            tuple(self.candidates[found.ladder(count)].tolist())
            for count in range(1, len(found.costs) + 1)
        ]

    def ideal(self, rows: Sequence[int]) -> float:
        """What all items cost without padding, each in the best of full batches."""
        lengths, counts = np.unique(self._drawn, return_counts=True)
        batches = np.array(rows)
        each = (cost_table(self._cost, batches, lengths) / batches[:, None]).min(axis=0)
        return float(counts @ each)


def _best_grids(
    windows: _Windows, ladders: Sequence[tuple[int, ...]], max_graphs: int
) -> list[_RowGrid]:
    """The grids that are cheaper than all smaller ones, the best one last.

    What is tried for a number of buckets does not depend on `max_graphs`: so a larger one gives no
    dearer grid.
    """
    of_items = windows.fitted_to_items(max(max_graphs, _MOST_LENGTHS))
    fine = [windows.grid(rows, of_items[:_MOST_LENGTHS][-1]) for rows in ladders]
    fitted = {
        grid.rows: windows.fitted(grid.rows, grid.lengths, max_graphs // len(grid.rows))
        for grid in fine
    }
    best: list[_RowGrid] = []
    for graphs in range(1, max_graphs + 1):
        least = best[-1].cost if best else math.inf
        grids = [
            windows.grid(grid.rows, lengths[graphs // len(grid.rows) - 1])
            for grid in fine
            if graphs % len(grid.rows) == 0 and (grid.cost < least or grid.rows == USUAL_ROWS)
            for lengths in (fitted[grid.rows], of_items)
            if graphs // len(grid.rows) <= len(lengths)
        ]
        found = min(grids, default=None)
        if found is not None and found.cost < least:
            best.append(_refitted(windows, found))
    return best


def _refitted(windows: _Windows, grid: _RowGrid) -> _RowGrid:
    """A grid whose lengths are fitted to its own calls, again and again while that helps."""
    while True:
        lengths = windows.fitted(grid.rows, grid.lengths, len(grid.lengths))[-1]
        found = windows.grid(grid.rows, lengths)
        if found.cost >= grid.cost:
            return grid
        grid = found


def _comparison(windows: _Windows, max_graphs: int, ideal: float) -> Iterator[PlanRow]:
    """What usual rows cost with the lengths that one has without this plan."""
    named = {}
    if max_graphs >= len(USUAL_ROWS):
        count = max_graphs // len(USUAL_ROWS)
        named["plan_buckets"] = windows.fitted_to_items(count)[-1]
    powers = standard_grids(("seq",), [int(windows.candidates[-1])])[0]
    named[powers.name] = tuple(powers.ladders[0])
    for name, lengths in named.items():
        grid = windows.grid(USUAL_ROWS, lengths)
        yield PlanRow(f"{name} x {USUAL_ROWS}", grid.graphs, waste(ideal, grid.cost))
