"""The grid that a batcher serves cheapest: rows are its choice, lengths are the items'."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, product
from typing import NamedTuple, TypedDict, Unpack

import numpy as np

from cudagraph_jax._base.checks import names_nearest, positive_size, require_arguments
from cudagraph_jax.batching.composition import Part, Priced, Prices, compose
from cudagraph_jax.batching.lane import Lane
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.dispatch.replan import replan_later
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.planning.costs import (
    DEAR,
    Cost,
    Formula,
    avoiding,
    chosen_cost,
    cost_of_each,
    cost_table,
    elements_of,
    fitted_cost,
    measured_cost,
)
from cudagraph_jax.planning.evaluation import standard_grids, waste
from cudagraph_jax.planning.observed import (
    BATCH_SEQ,
    Floats,
    Ints,
    Observed,
    Sizes,
    argument_names,
    checked_axes,
)
from cudagraph_jax.planning.partition import partition
from cudagraph_jax.planning.plan import BucketPlan, PlanPoint, PlanRow
from cudagraph_jax.planning.planner import Headroom, plan_buckets
from cudagraph_jax.planning.search import Problem, best_grids
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from cudagraph_jax.shapes.pytrees import PyTree

USUAL_ROWS = (1, 4, 8, 16)
"""What one captures without a plan of the rows; no plan is worse than that."""

CALL_AND_ELEMENTS = Formula(lambda *sizes: 64.0 + elements_of(*sizes))
"""What a bucket costs where nobody measured: its elements, and 64 for the call.

By elements alone rows that share a call save nothing, and rows of one would be best. A call of the
demo's encoder was measured at 58 elements on a CPU; on an accelerator it may be thousands.
"""

MOST_ROWS = 64
"""The largest batch that is tried."""

_SEVERAL = 2  # batch sizes beside 1: a third one was worth 0.7 % at the most
_ITEMS = 1024  # to price a grid with takes a millisecond; 4,096 gave the same grids
_MOST_LENGTHS = 64  # of a grid that stands for all lengths
_MOST_COMPARED = 512  # of a usual grid
_MOST_WORK = 1e7  # as of `best_grids`: 0.1 s
_MOST_CELLS = 1 << 12  # sizes on several axes, each with each, that are tried

Ladders = tuple[tuple[int, ...], ...]
"""The sizes of the buckets on each axis but the batch."""

BatchCost = (
    Cost
    | Mapping[tuple[int, int], float]
    | Mapping[tuple[int, ...], float]
    | Mapping[Bucket, float]
)


@names_nearest
def plan_for_batcher(
    lengths: Sizes,
    *,
    max_graphs: int,
    axes: Sequence[str] = ("seq",),
    cost: BatchCost | None = None,
    waiting: int = 64,
    capture_sizes: Sequence[int] | None = None,
    batch_multiple: int = 1,
    seq_multiple: int = 1,
    multiples: Mapping[str, int] | None = None,
    headroom: Headroom | None = None,
    max_bucket_elements: int | None = None,
) -> BucketPlan:
    """The grid of at most `max_graphs` buckets in which a `Batcher` serves such items cheapest.

    Rows are the batcher's choice: a grid is worth what the calls cost that it composes, from as
    many items as wait. Windows of them are drawn from `lengths`, the same for every grid. Tried are
    a batch of one alone and with one or two powers of two, and 1, 4, 8 and 16 rows, each with the
    best lengths for single items and for calls as they are cut on a fine grid. What then costs
    least is cut and fitted anew until nothing is gained. Of all grids of these rows that is within
    3 % of the cheapest in the small cases that are tested.

    With one axis the best lengths for given calls are found by dynamic programming: a larger limit
    never gives a dearer grid, and none is dearer than `plan_buckets(lengths,
    max_graphs=max_graphs // 4)` crossed with 1, 4, 8 and 16 rows. With several axes the grid is the
    product of a ladder for each, found as by `plan_buckets`: where all that there are can be tried
    in 0.1 s the best, else by improving one axis at a time.

    Args:
        lengths: Of the items: (N,), or a mapping of lengths to how often they came. With several
            axes (N, k), a mapping of tuples to counts, or of each axis to its sizes (N,).
        max_graphs: The most buckets.
        axes: The names of an item's axes, in the order of a size.
        cost: What a run of (rows, length), or (rows, a size on each axis), costs: a function, such
            as `measured_cost(entries)`, or costs by bucket, to which one is fitted. None: its
            elements, and 64 of them for the call; so measure where you can.
        waiting: How many items wait when a call is composed, as under load.
        capture_sizes: The rows; None: the best.
        batch_multiple: Rows are rounded up to multiples of it.
        seq_multiple: As for `plan_buckets`, and so are the next three.
        multiples: Of any axis, by its name.
        headroom: How far the largest bucket goes, for lengths not seen yet.
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
        >>> images = [(10, 40), (12, 40), (11, 38), (90, 10), (100, 12)]
        >>> plan = plan_for_batcher(images, axes=("height", "width"), max_graphs=4)
        >>> plan.sizes["height"], plan.sizes["width"]
        (Ladder((12, 100)), Ladder((12, 40)))
    """
    axes = checked_axes(axes)
    if "batch" in axes:
        raise ConfigError(
            f"axes={axes!r} has the batch, whose sizes are the batcher's choice: name the axes of "
            "an item alone"
        )
    max_graphs = positive_size(max_graphs, name="max_graphs")
    chosen = _row_ladders(positive_size(waiting, name="waiting"), capture_sizes)
    every = list(dict.fromkeys(tuple(Ladder(rows).rounded(batch_multiple)) for rows in chosen))
    ladders = [rows for rows in every if len(rows) <= max_graphs]
    if not ladders:
        raise ConfigError(
            f"capture_sizes={every[0]} are {len(every[0])} buckets of one length, more than "
            f"max_graphs={max_graphs}: raise that, or leave some out"
        )
    observed = Observed.of(lengths, axes)
    sizes = zip(*(column.tolist() for column in observed.columns), strict=True)
    largest = plan_buckets(  # which refuses what is no length and no limit
        dict(zip(sizes, observed.counts.astype(int).tolist(), strict=True)),
        axes=axes,
        max_graphs=max_graphs // len(ladders[0]),
        seq_multiple=seq_multiple,
        multiples=multiples,
        headroom=headroom,
        max_bucket_elements=max_bucket_elements,
    ).sizes
    parts = {"seq": seq_multiple, **(multiples or {})}
    windows = _Windows(
        observed,
        [
            _candidates(column, observed.counts, parts.get(axis, 1), largest[axis][-1], len(axes))
            for axis, column in zip(axes, observed.columns, strict=True)
        ],
        waiting,
        _checked_cost(cost, ("batch", *axes)),
        most_elements=math.inf if max_bucket_elements is None else max_bucket_elements,
    )
    grids = _best_grids(windows, ladders, max_graphs)
    windows.check_elements(grids[-1])
    ideal = windows.ideal(sorted({rows for ladder in every for rows in ladder}))
    return _plan_of(windows, grids, ideal, max_graphs)


def _candidates(column: Ints, counts: Floats, multiple: int, largest: int, axes: int) -> Ints:
    """The sizes that a bucket may have on an axis; of several axes not all that were seen."""
    needed = -(-column // multiple) * multiple
    most = int(_MOST_CELLS ** (1 / axes))
    if axes > 1 and len(np.unique(needed)) > most:
        order = np.argsort(needed)
        upto = np.cumsum(counts[order])
        ranks = np.arange(1, most) / (most - 1) * upto[-1]
        needed = needed[order][np.searchsorted(upto, ranks)]
    found: Ints = np.unique(np.append(needed, largest))
    return found


class BatchPlanOptions(TypedDict, total=False):
    """What `Batcher.replan` takes beside the number of buckets.

    Attributes:
        cost: As for `plan_for_batcher`, and so are the others; None: `cost_ms` of the buckets.
        waiting: Items that wait when a call is composed.
        capture_sizes: The rows.
        seq_multiple: Lengths are multiples of it.
        multiples: Of any axis, by its name.
        headroom: How far the longest bucket goes; None: as far as now.
    """

    cost: BatchCost | None
    waiting: int
    capture_sizes: Sequence[int] | None
    seq_multiple: int
    multiples: Mapping[str, int] | None
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
    came = Counter(sizes for lane in lanes for sizes in lane.recent.copy())
    axes = _axes_to_plan(config, came, name=function.called)
    ladders = {axis: config.ladder(axis) or (1,) for axis in axes}
    keeps_limits = options.get("headroom") is None
    if keeps_limits:
        options["headroom"] = {axis: ladder[-1] for axis, ladder in ladders.items()}
    if options.get("cost") is None:
        entries = [entry for lane in lanes for entry in lane.grid().entries.values()]
        measured = {entry.bucket: entry.cost_ms for entry in entries if entry.cost_ms}
        if len(measured) > 1:  # else too few, as without warm-up runs
            options["cost"] = measured
    if max_graphs is None:
        max_graphs = len(config.capture_sizes) * math.prod(map(len, ladders.values()))
    meshes = manager.multiples
    given = options.get("multiples") or {}
    if "seq" in axes and "seq" not in given:
        given = {**given, "seq": options.pop("seq_multiple", 1)}
    options["multiples"] = {**given, **{axis: _multiple(given, meshes, axis) for axis in axes}}
    plan = plan_for_batcher(
        came,
        max_graphs=max_graphs,
        axes=axes,
        max_bucket_elements=config.max_bucket_elements,
        batch_multiple=meshes.get("batch", 1),
        **options,
    )
    replan_later(manager.dispatcher, plan, keeps_limits=keeps_limits)
    manager.wait()
    found = manager.config
    if any((found.ladder(axis) or (1,)) != ladder for axis, ladder in plan.sizes.items()):
        raise CUDAGraphError(
            f"{plan!r} is not in place: either it was not captured, and the warning says why, or "
            "another plan came after it: call replan again"
        )
    return plan


def _axes_to_plan(
    config: CUDAGraphConfig, came: Collection[Bucket], *, name: str
) -> tuple[str, ...]:
    """The axes of items that came, which are all that the grid has beside the batch.

    Raises:
        ConfigError: They are not, or there were no items.
    """
    if not came:
        raise ConfigError("no items came yet: plan after there were some")
    if config.capture_seq_lens is None and any(sizes.seq_len > 1 for sizes in came):
        raise ConfigError(
            "a batcher plans rows and lengths, but with capture_seq_lens=None each length is a "
            "bucket of its own: give capture_seq_lens"
        )
    named = tuple(config.capture_axes)
    for axis in named:
        if any(axis not in sizes.named for sizes in came):
            raise ConfigError(
                f"capture_axes has {axis!r}, and items of {name} have not: a batcher plans the "
                "axes of its items alone, so use the function's own replan"
            )
    return named if named and config.capture_seq_lens is None else ("seq", *named)


def _multiple(given: Mapping[str, int], meshes: Mapping[str, int], axis: str) -> int:
    """What sizes of an axis are multiples of, as was asked for and as the meshes need it."""
    asked = positive_size(given.get(axis, 1), name=f"multiple of {axis}")
    return math.lcm(asked, meshes.get(axis, 1))


def _plan_of(
    windows: _Windows, grids: Sequence[_RowGrid], ideal: float, max_graphs: int
) -> BucketPlan:
    best = grids[-1]
    return BucketPlan.of(
        dict(zip(windows.axes, map(Ladder, (best.rows, *best.ladders)), strict=True)),
        expected_waste=waste(ideal, best.cost),
        requests=windows.observed.requests,
        curve=tuple(PlanPoint(grid.graphs, waste(ideal, grid.cost)) for grid in grids),
        comparison=tuple(_comparison(windows, max_graphs, ideal)),
    )


def _checked_cost(cost: BatchCost | None, axes: tuple[str, ...]) -> Cost:
    if cost is None:
        return CALL_AND_ELEMENTS
    if not isinstance(cost, Mapping):
        return chosen_cost(cost, axes)
    try:
        times = {
            tuple(int(size) for size in _sizes_of(bucket, axes)): float(ms)
            for bucket, ms in cost.items()
        }
    except (KeyError, TypeError, ValueError):
        such = ", ".join(("rows", *argument_names(axes[1:])))
        raise ConfigError(
            f"cost={cost!r:.80} has something else than costs of ({such}): give milliseconds by "
            "tuples of these, or a function"
        ) from None
    if axes != BATCH_SEQ:
        return fitted_cost(times)
    return measured_cost([_Timed(rows, seq, ms) for (rows, seq), ms in times.items()])


def _sizes_of(bucket: Sequence[int], axes: Sequence[str]) -> Sequence[int]:
    """The sizes of a bucket on each axis."""
    if isinstance(bucket, Bucket):
        return [bucket.size(axis) for axis in axes]
    return [size for _, size in zip(axes, bucket, strict=True)]


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
    """Rows and the ladders of the other axes, with what all windows cost in them."""

    cost: float
    rows: tuple[int, ...]
    ladders: Ladders

    @property
    def graphs(self) -> int:
        """How many buckets it has."""
        return len(self.rows) * self.lengths

    @property
    def lengths(self) -> int:
        """How many buckets it has of each number of rows."""
        return math.prod(map(len, self.ladders))


class _Windows:
    """Items as they wait together, composed on one grid or another.

    Args:
        observed: Their sizes.
        candidates: On each axis the sizes that a bucket may have, ascending.
        waiting: How many wait.
        cost: Of rows and a size on each axis.
        most_elements: Of a bucket that is used.

    Attributes:
        observed: The same.
        candidates: The same.
        axes: The batch, and those of the items.
    """

    def __init__(
        self,
        observed: Observed,
        candidates: Sequence[Ints],
        waiting: int,
        cost: Cost,
        *,
        most_elements: float,
    ) -> None:
        self.observed, self.candidates = observed, candidates
        self.axes = ("batch", *observed.axes)
        self._cost, self._most_elements = cost, most_elements
        self._price = self._within_budget(cost)
        # Quantiles in random order: together they are spread as all items are.
        shape = (-(-_ITEMS // waiting), waiting)
        upto = np.cumsum(observed.counts)
        ranks = (np.arange(math.prod(shape)) + 0.5) / math.prod(shape) * upto[-1]
        drawn = np.random.default_rng(0).permutation(np.searchsorted(upto, ranks))
        self._drawn = [column[drawn] for column in observed.columns]
        sizes = zip(*(column.tolist() for column in self._drawn), strict=True)
        items = [Bucket.of(dict(zip(observed.axes, each, strict=True))) for each in sizes]
        self._windows = [items[start : start + waiting] for start in range(0, len(items), waiting)]
        self.grid = cache(self._grid)

    def _calls(self, rows: Sequence[int], ladders: Ladders) -> Iterator[tuple[list[Bucket], Part]]:
        """All windows, each with its calls."""
        grid = (rows, *ladders)
        costs = cost_table(self._price, *map(np.array, grid), axes=self.axes).ravel().tolist()
        buckets = [Bucket.of(dict(zip(self.axes, sizes, strict=True))) for sizes in product(*grid)]
        prices = Prices(map(Priced, buckets, costs))
        for window in self._windows:
            classes = map(prices.class_of, window)
            for part in compose([each for each in classes if each is not None], prices):
                yield window, part

    def _grid(self, rows: tuple[int, ...], ladders: Ladders) -> _RowGrid:
        """A grid, priced."""
        return _RowGrid(sum(part.cost for _, part in self._calls(rows, ladders)), rows, ladders)

    def check_elements(self, grid: _RowGrid) -> None:
        """Raises where a bucket is used that has more elements than it may.

        Raises:
            ConfigError: One is.
        """
        calls = self._calls(grid.rows, grid.ladders)
        if any(part.bucket.elements > self._most_elements for _, part in calls):
            raise ConfigError(
                f"no grid of so many buckets with {grid.rows} rows was found that keeps to "
                f"max_bucket_elements={self._most_elements}: raise one of the two, or plan fewer "
                "rows"
            )

    def fitted(self, rows: Sequence[int], ladders: Ladders, most: int) -> list[Ladders]:
        """The best 1, 2 … `most` buckets of each number of rows for the calls of a grid.

        Cut anew on these, they cost no more, where larger buckets cost no less.
        """
        calls = list(self._calls(rows, ladders))
        batches = np.array([part.bucket.batch_size for _, part in calls])
        largest = [
            np.array(
                [max(window[place].size(axis) for place in part.rows) for window, part in calls]
            )
            for axis in self.observed.axes
        ]
        return self._best(batches, largest, np.ones(len(calls)), self._cost, most)

    def fitted_to_items(self, most: int) -> list[Ladders]:
        """The best 1, 2 … `most` by elements of each item alone, as in `plan_buckets`."""
        ones = np.ones(len(self.observed.counts), np.int64)
        return self._best(
            ones, self.observed.columns, self.observed.counts, Formula(elements_of), most
        )

    def _best(
        self, rows: Ints, columns: Sequence[Ints], counts: Floats, cost: Cost, most: int
    ) -> list[Ladders]:
        """The best 1, 2 … `most` buckets of each number of rows for some calls.

        Args:
            rows: Of each call.
            columns: What it needs on each axis.
            counts: How often it came.
            cost: Of a call.
            most: The limit.
        """
        places = [np.searchsorted(*pair) for pair in zip(self.candidates, columns, strict=True)]
        if len(columns) > 1:
            # Each weighs what it costs itself, and grows with its sizes as those of most rows do.
            most_rows = rows.max()
            each, wide = (
                cost_of_each(cost, batches, *columns, axes=self.axes)
                for batches in (rows, np.full_like(rows, most_rows))
            )
            weights = counts * np.divide(each, wide, out=np.ones_like(each), where=wide > 0)
            unit = cost_table(cost, np.array([most_rows]), *self.candidates, axes=self.axes)[0]
            is_over = elements_of(*np.ix_(*self.candidates)) > self._most_elements
            problem = Problem.of(places, weights, unit * np.where(is_over, DEAR, 1.0))
            grids = best_grids(problem, min(most, unit.size), (), most_work=_MOST_WORK)
            chosen = [grid.ladders for grid in grids]
        else:
            batches, of_call = np.unique(rows, return_inverse=True)
            price = self._within_budget(cost)
            table = cost_table(price, batches, *self.candidates, axes=self.axes)
            all_places = [np.arange(size) for size in table.shape]
            axis = Problem.of([of_call, *places], counts, table).axis(1, all_places)
            found = partition(axis, most, optimal=False)
            counts_of = range(1, len(found.costs) + 1)
            chosen = [(tuple(found.ladder(count).tolist()),) for count in counts_of]
        return [
            tuple(
                tuple(sizes[list(at)].tolist())
                for sizes, at in zip(self.candidates, ladders, strict=True)
            )
            for ladders in chosen
        ]

    def _within_budget(self, cost: Cost) -> Cost:
        if self._most_elements == math.inf:
            return cost
        return avoiding(cost, more_elements_than=self._most_elements)

    def ideal(self, rows: Sequence[int]) -> float:
        """What all items cost without padding, each in the best of full batches."""
        each = [
            cost_of_each(
                self._price, np.full_like(self._drawn[0], batch), *self._drawn, axes=self.axes
            )
            / batch
            for batch in rows
        ]
        return float(np.min(each, axis=0).sum())


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
        grid.rows: windows.fitted(grid.rows, grid.ladders, max_graphs // len(grid.rows))
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
            found = _refitted(windows, found)
            best = [*(grid for grid in best if grid.graphs < found.graphs), found]
    return best


def _refitted(windows: _Windows, grid: _RowGrid) -> _RowGrid:
    """A grid whose lengths are fitted to its own calls, again and again while that helps."""
    while True:
        lengths = windows.fitted(grid.rows, grid.ladders, grid.lengths)[-1]
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
    largest = [int(sizes[-1]) for sizes in windows.candidates]
    powers = standard_grids(windows.observed.axes, largest)[0]
    named[powers.name] = tuple(map(tuple, powers.ladders))
    for name, ladders in named.items():
        if math.prod(map(len, ladders)) > _MOST_COMPARED:
            continue
        grid = windows.grid(USUAL_ROWS, ladders)
        yield PlanRow(f"{name} x {USUAL_ROWS}", grid.graphs, waste(ideal, grid.cost))
