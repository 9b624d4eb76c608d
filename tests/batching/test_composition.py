"""Composition: the cheapest calls for rows of their own lengths."""

from itertools import combinations, product
from time import perf_counter

from hypothesis import given, strategies

from cudagraph_jax.batching.composition import Priced, Prices, compose
from cudagraph_jax.shapes.ladder import Bucket

SIZES = [*product((1, 2, 3), (2, 5, 9))]


def prices_of(costs):
    return Prices(Priced(Bucket(*size), cost) for size, cost in costs.items())


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
    fitting = [
        cost for (rows, length), cost in costs.items() if rows >= len(call) and length >= max(call)
    ]
    return min(fitting, default=float("inf"))


costs_of_grids = strategies.dictionaries(
    strategies.sampled_from(SIZES), strategies.floats(0.1, 10), min_size=1
)


@given(costs_of_grids, strategies.lists(strategies.integers(1, 9), max_size=6))
def test_no_cut_into_calls_is_cheaper(costs, lengths):
    """The composition costs what the cheapest of all cuts into calls costs."""
    longest = max(length for _, length in costs)
    lengths = sorted(min(length, longest) for length in lengths)
    composed = sum(part.cost for part in compose(lengths, prices_of(costs)))
    least = min(sum(cheapest(call, costs) for call in calls) for calls in partitions(lengths))
    assert abs(composed - least) < 1e-9


@given(costs_of_grids, strategies.lists(strategies.integers(1, 9), max_size=40))
def test_each_row_is_in_one_call_that_holds_it(costs, lengths):
    """The calls cover all rows once, each in a bucket that is long and wide enough."""
    longest = max(length for _, length in costs)
    lengths = sorted(min(length, longest) for length in lengths)
    parts = compose(lengths, prices_of(costs))
    covered = [row for part in reversed(parts) for row in range(part.start, part.stop)]
    assert covered == list(range(len(lengths)))
    for part in parts:
        assert part.stop - part.start <= part.bucket.batch_size
        assert max(lengths[part.start : part.stop]) <= part.bucket.seq_len
        assert costs[tuple(part.bucket)] == part.cost


@given(costs_of_grids, strategies.integers(1, 3), strategies.integers(1, 9))
def test_the_cheapest_bucket_of_one_call(costs, rows, length):
    """`holding` is the cheapest bucket of so many rows of some length, or none."""
    held = prices_of(costs).holding(rows, length)
    least = cheapest([length] * rows, costs)
    assert (float("inf") if held is None else held.cost) == least


def test_many_rows_are_composed_in_no_time():
    """Deciding for 512 rows takes less than a hundredth of what a call of the encoder takes."""
    costs = {
        (rows, length): 0.3 + rows * length / 50
        for rows, length in product((1, 4, 8, 12, 16), (32, 48, 72, 176, 256))
    }
    prices, lengths = prices_of(costs), sorted(7 + 13 * place % 250 for place in range(512))
    took = []
    for _ in range(7):
        start = perf_counter()
        compose(lengths, prices)
        took.append(perf_counter() - start)
    assert min(took) < 2e-3  # 0.4 ms on a machine that does nothing else
