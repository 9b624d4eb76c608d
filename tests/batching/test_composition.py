"""Composition: the cheapest calls for rows of their own sizes."""

from functools import cache
from itertools import combinations, product
from time import perf_counter

from hypothesis import given, strategies

from cudagraph_jax.batching.composition import Priced, Prices, compose, rectangle
from cudagraph_jax.shapes.ladder import Bucket

LADDERS = {
    "length": [*product((1, 2, 3), (2, 5, 9), (1,))],
    "image": [*product((1, 2, 3), (2, 5, 9), (1, 4))],
}


def partitions(rows):
    """All ways to put rows into calls."""
    if not rows:
        yield []
        return
    first, *others = rows
    for count in range(len(others) + 1):
        for mates in combinations(range(len(others)), count):
            rest = [row for place, row in enumerate(others) if place not in mates]
            for calls in partitions(rest):
                yield [[first, *(others[place] for place in mates)], *calls]


def cheapest(call, costs):
    sizes = rectangle(call)
    return min((cost for bucket, cost in costs.items() if bucket.holds(sizes)), default=99.0)


def bucket(rows, length, width):
    return Bucket(rows, length, width=width)


def grids(kind):
    """Captured buckets with their costs, of any grid."""
    sizes = strategies.sampled_from([bucket(*sizes) for sizes in LADDERS[kind]])
    return strategies.dictionaries(sizes, strategies.floats(0.1, 10), min_size=1)


@strategies.composite
def cases(draw, kind, most):
    """Costs of a grid, and rows that it holds."""
    costs = draw(grids(kind))
    widths = strategies.integers(1, 4 if kind == "image" else 1)
    rows = strategies.lists(
        strategies.builds(bucket, strategies.just(1), strategies.integers(1, 9), widths),
        max_size=most,
    )
    return costs, [row for row in draw(rows) if any(held.holds(row) for held in costs)]


def classes_of(rows, prices):
    return [found for row in rows if (found := prices.class_of(row))]


def composed(costs, rows):
    prices = Prices(Priced(*item) for item in costs.items())
    return compose(classes_of(rows, prices), prices)


@given(cases("length", 6))
def test_no_cut_into_calls_is_cheaper(case):
    """With one axis the composition costs what the cheapest of all cuts into calls costs."""
    costs, rows = case
    total = sum(part.cost for part in composed(costs, rows))
    least = min(sum(cheapest(call, costs) for call in calls) for calls in partitions(rows))
    assert abs(total - least) < 1e-9


@given(cases("image", 12))
def test_no_cut_of_rows_in_order_is_cheaper(case):
    """With several axes no cut costs less of the rows sorted by what each of them costs alone."""
    costs, rows = case
    parts = composed(costs, rows)
    order = [rows[place] for part in reversed(parts) for place in part.rows]
    alone = [cheapest([row], costs) for row in order]
    assert alone == sorted(alone)

    @cache
    def least(stop):
        starts = range(max(0, stop - 3), stop)
        return min(least(at) + cheapest(order[at:stop], costs) for at in starts) if stop else 0.0

    assert abs(sum(part.cost for part in parts) - least(len(order))) < 1e-9


@given(cases("image", 40))
def test_each_row_is_in_one_call_that_holds_it(case):
    """The calls cover all rows once, each in a bucket that is large enough on every axis."""
    costs, rows = case
    parts = composed(costs, rows)
    assert sorted(place for part in parts for place in part.rows) == list(range(len(rows)))
    for part in parts:
        assert part.bucket.holds(rectangle([rows[place] for place in part.rows]))
        assert costs[part.bucket] == part.cost


@given(grids("image"), strategies.builds(bucket, *[strategies.integers(1, 9)] * 3))
def test_the_cheapest_bucket_of_one_call(costs, sizes):
    """`holding` is the cheapest bucket of a call of some sizes, or none."""
    held = Prices(Priced(*item) for item in costs.items()).holding(sizes)
    fitting = [cost for bucket, cost in costs.items() if bucket.holds(sizes)]
    assert (None if held is None else held.cost) == min(fitting, default=None)


def test_what_fits_in_the_place_of_too_large_a_row():
    """It says to which size one axis has to be cut, or each of several."""
    prices = Prices(Priced(bucket(1, *sizes), 1.0) for sizes in ((2, 8), (4, 4), (8, 2)))
    assert prices.fitting(bucket(1, 4, 8)) == ({"seq": 2, "width": 4}, True)
    assert prices.fitting(bucket(1, 9, 2)) == ({"seq": 8}, True)
    assert prices.fitting(bucket(1, 9, 9)) == ({"seq": 8, "width": 8}, False)
    assert prices.fitting(bucket(1, 8, 8)) == ({"seq": 2, "width": 2}, True)


def test_many_rows_are_composed_in_no_time():
    """Deciding for 512 rows takes less than a hundredth of what a call of the encoder takes."""
    grid = [Bucket(*sizes) for sizes in product((1, 4, 8, 12, 16), (32, 48, 72, 176, 256))]
    prices = Prices(Priced(bucket, 0.3 + bucket.elements / 50) for bucket in grid)
    rows = [Bucket(1, 7 + 13 * place % 250) for place in range(512)]
    took = []
    for _ in range(7):
        start = perf_counter()
        compose(classes_of(rows, prices), prices)
        took.append(perf_counter() - start)
    assert min(took) < 2e-3  # 0.3 ms on a machine that does nothing else
