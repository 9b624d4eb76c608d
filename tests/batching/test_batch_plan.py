"""The grid for a batcher: what it costs against every other, and what is refused."""

import json
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, strategies

from cudagraph_jax import (
    BucketPlan,
    ConfigError,
    CUDAGraphConfig,
    PolynomialCost,
    attention_cost,
    plan_buckets,
    plan_for_batcher,
)
from cudagraph_jax.batching.batch_plan import CALL_AND_ELEMENTS, USUAL_ROWS
from cudagraph_jax.batching.composition import Priced, Prices, compose
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.examples import examples

SKEWED = np.clip(30 * np.random.default_rng(3).lognormal(0.0, 0.9, 200), 3, 250).astype(int)
IMAGE = ("height", "width")
costs = strategies.builds(
    PolynomialCost,
    constant=strategies.sampled_from((0.0, 3.0, 30.0, 300.0)),
    rows=strategies.sampled_from((0.0, 5.0)),
    elements=strategies.just(1.0),
)
histograms = strategies.dictionaries(
    strategies.integers(1, 60), strategies.integers(1, 30), min_size=1, max_size=6
)


def spent(lengths, cost, rows, *ladders, waiting):
    """What windows of items cost on a grid, those of `plan_for_batcher`: written once more."""
    if isinstance(lengths, dict):
        lengths = [length for length, count in lengths.items() for _ in range(count)]
    axes = ("seq",) if len(ladders) == 1 else IMAGE
    items = [dict(zip(axes, each, strict=True)) for each in sorted(map(tuple, np.c_[lengths]))]
    count = -(-1024 // waiting) * waiting
    drawn = ((np.arange(count) + 0.5) * len(items) / count).astype(int)
    windows = np.random.default_rng(0).permutation(drawn).reshape(-1, waiting)
    prices = Prices(
        Priced(
            Bucket.of({"batch": batch, **dict(zip(axes, sizes, strict=True))}), cost(batch, *sizes)
        )
        for batch in rows
        for sizes in product(*ladders)
    )
    total = 0.0
    for window in windows:
        classes = [prices.class_of(Bucket.of(items[place])) for place in window]
        total += sum(part.cost for part in compose([each for each in classes if each], prices))
    return total


def spent_by(plan, lengths, cost, *, waiting):
    return spent(lengths, cost, *plan.sizes.values(), waiting=waiting)


def all_grids(lengths, max_graphs, waiting):
    *others, longest = sorted(lengths)
    powers = [rows for rows in (2, 4, 8, 16, 32, 64) if rows <= waiting]
    ladders = [(1, *more) for count in range(3) for more in combinations(powers, count)]
    for rows in (*ladders, USUAL_ROWS):
        for count in range(min(len(lengths), max_graphs // len(rows))):
            for chosen in combinations(others, count):
                yield rows, (*chosen, longest)


@examples(8, thorough=40)
@given(histograms, costs, strategies.integers(1, 8), strategies.sampled_from((2, 8, 32)))
def test_as_good_as_all_grids(lengths, cost, max_graphs, waiting):
    """Of all grids of the rows that are tried none is cheaper by more than three in a hundred."""
    plan = plan_for_batcher(lengths, max_graphs=max_graphs, cost=cost, waiting=waiting)
    assert plan.num_graphs <= max_graphs
    assert plan.seq_lens[-1] == max(lengths)
    least = min(
        spent(lengths, cost, *grid, waiting=waiting)
        for grid in all_grids(lengths, max_graphs, waiting)
    )
    assert spent_by(plan, lengths, cost, waiting=waiting) <= 1.03 * least


def ladders_up_to(sizes, most):
    *others, largest = sorted(set(sizes))
    for count in range(min(len(others) + 1, most)):
        for chosen in combinations(others, count):
            yield (*chosen, largest)


@examples(6, thorough=40)
@given(
    strategies.dictionaries(
        strategies.tuples(strategies.integers(1, 30), strategies.integers(1, 30)),
        strategies.integers(1, 20),
        min_size=1,
        max_size=4,
    ),
    strategies.sampled_from((0.0, 30.0, 300.0)),
    strategies.integers(1, 6),
    strategies.sampled_from((2, 32)),
)
def test_as_good_as_all_grids_of_two_axes(sizes, constant, max_graphs, waiting):
    """Of all products of ladders with the rows that are tried none is cheaper by three in 100."""

    def cost(rows, height, width):
        return constant + rows * height * width

    plan = plan_for_batcher(sizes, axes=IMAGE, max_graphs=max_graphs, cost=cost, waiting=waiting)
    assert plan.num_graphs <= max_graphs
    powers = [rows for rows in (2, 4, 8, 16, 32, 64) if rows <= waiting]
    every = [(1, *more) for count in range(3) for more in combinations(powers, count)]
    heights, widths = zip(*sizes, strict=True)
    least = min(
        spent(sizes, cost, rows, first, second, waiting=waiting)
        for rows in (*every, USUAL_ROWS)
        if len(rows) <= max_graphs
        for first in ladders_up_to(heights, max_graphs // len(rows))
        for second in ladders_up_to(widths, max_graphs // len(rows) // len(first))
    )
    assert spent_by(plan, sizes, cost, waiting=waiting) <= 1.03 * least


DRAW = np.random.default_rng(5)
TALL = np.clip(40 * DRAW.lognormal(0.0, 0.7, 300), 3, 250).astype(int)
IMAGES = {"height": TALL, "width": np.clip(4000 / TALL * DRAW.lognormal(0.0, 0.3, 300), 3, 250)}
IMAGES = {axis: sizes.astype(int) for axis, sizes in IMAGES.items()}
PIXELS = list(zip(*IMAGES.values(), strict=True))


def test_sizes_on_several_axes():
    """A plan over two axes serves images that are tall or wide at less than two thirds of what as
    many buckets cost by powers of two or `plan_buckets`, and is a plan like any other."""

    def cost(rows, height, width):
        return 500 + rows * height * width

    measured = {Bucket(n, 1, height=h, width=h): cost(n, h, h) for n in (1, 8) for h in (9, 90)}
    plan = plan_for_batcher(
        IMAGES, axes=IMAGE, max_graphs=8, cost=measured, multiples={"height": 2}
    )
    own = spent_by(plan, PIXELS, cost, waiting=64)
    assert own < 0.67 * spent(PIXELS, cost, (1, 8), (64, 256), (64, 256), waiting=64)
    of_items = plan_buckets(IMAGES, axes=IMAGE, max_graphs=4).sizes
    assert own < 0.7 * spent(PIXELS, cost, (1, 8), *of_items.values(), waiting=64)
    assert all(height % 2 == 0 for height in plan.sizes["height"])
    config = CUDAGraphConfig.from_plan(plan)
    assert config.capture_axes == {axis: plan.sizes[axis] for axis in IMAGE}
    assert BucketPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert [point.graphs for point in plan.curve] == sorted({point.graphs for point in plan.curve})
    assert plan.requests == 300


def test_several_axes_within_a_budget():
    """Each image is held by a bucket within the budget."""
    plan = plan_for_batcher(IMAGES, axes=IMAGE, max_graphs=12, max_bucket_elements=16_000)
    config = CUDAGraphConfig.from_plan(plan, max_bucket_elements=16_000)
    for height, width in PIXELS:
        buckets = [bucket.named for bucket in config.buckets()]
        assert any(height <= each["height"] and width <= each["width"] for each in buckets)


@examples(4, thorough=10)
@given(costs, strategies.integers(4, 24), strategies.sampled_from((8, 64)))
def test_never_worse_than_lengths_alone(cost, max_graphs, waiting):
    """It costs no more than the plan of the lengths crossed with 1, 4, 8 and 16 rows."""
    plan = plan_for_batcher(SKEWED, max_graphs=max_graphs, cost=cost, waiting=waiting)
    lengths = plan_buckets(SKEWED, max_graphs=max_graphs // 4).seq_lens
    usual = spent(SKEWED, cost, USUAL_ROWS, lengths, waiting=waiting)
    assert spent_by(plan, SKEWED, cost, waiting=waiting) <= usual * (1 + 1e-12)


@pytest.mark.parametrize("cost", [CALL_AND_ELEMENTS, attention_cost(32), lambda b, n: 5 + n])
def test_more_buckets_are_never_dearer(cost):
    """The cost does not rise with the limit, and the curve is that of smaller limits."""
    plans = [
        plan_for_batcher(SKEWED, max_graphs=graphs, cost=cost, waiting=16) for graphs in range(1, 7)
    ]
    wastes = [plan.expected_waste for plan in plans]
    assert wastes == sorted(wastes, reverse=True)
    own = {plan.num_graphs: plan.expected_waste for plan in plans}
    assert {point.graphs: point.waste for point in plans[-1].curve} == own


def test_rows_follow_what_a_call_costs():
    """Where calls are dear, rows are many; where only elements cost, one row is a call."""
    dear = plan_for_batcher(SKEWED, max_graphs=8, cost=lambda rows, length: 1e5 + rows * length)
    assert dear.batch_sizes[-1] == 64
    free = plan_for_batcher(SKEWED, max_graphs=8, cost=PolynomialCost(elements=1.0))
    assert free.batch_sizes == (1,)


def test_no_more_rows_than_wait():
    """A batch that never fills is not captured, and a single item is a call of one row."""
    for waiting in (1, 3, 20):
        plan = plan_for_batcher(SKEWED, max_graphs=6, waiting=waiting)
        assert plan.batch_sizes[0] == 1
        assert plan.batch_sizes[-1] <= waiting


def test_the_same_for_the_same():
    """Lengths in any order, or counted, give the same plan, and rows that are given stay."""
    plan = plan_for_batcher(SKEWED, max_graphs=6)
    assert plan == plan_for_batcher(SKEWED[::-1], max_graphs=6)
    values, counts = np.unique(SKEWED, return_counts=True)
    counted = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert plan == plan_for_batcher(counted, max_graphs=6)
    assert plan_for_batcher(SKEWED, max_graphs=6, capture_sizes=(2, 6)).batch_sizes == (2, 6)


def test_measured_costs():
    """Costs by bucket stand for the function that is fitted to them, but for rounding."""
    cost = PolynomialCost(constant=3.0, elements=0.1)
    measured = {Bucket(rows, n): cost(rows, n) for rows in (1, 8) for n in (16, 64, 256)}
    plan = plan_for_batcher(SKEWED, max_graphs=6, cost=measured)
    expected = plan_for_batcher(SKEWED, max_graphs=6, cost=cost)
    assert plan.batch_sizes == expected.batch_sizes
    assert plan.expected_waste == pytest.approx(expected.expected_waste, abs=0.01)


def test_a_plan_like_any_other():
    """It makes a configuration, prints, and goes through JSON."""
    plan = plan_for_batcher(SKEWED, max_graphs=12, headroom=300, seq_multiple=8)
    config = CUDAGraphConfig.from_plan(plan)
    assert (config.capture_sizes, config.capture_seq_lens) == (plan.batch_sizes, plan.seq_lens)
    assert plan.seq_lens[-1] == 304
    assert all(length % 8 == 0 for length in plan.seq_lens)
    assert BucketPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert 0 < plan.expected_waste < 1
    assert "plan_buckets x (1, 4, 8, 16)" in str(plan)


def test_within_a_budget_of_elements():
    """No bucket that is used has more elements than may be, and each length has one."""
    plan = plan_for_batcher(
        SKEWED, max_graphs=12, max_bucket_elements=512, cost=lambda rows, n: 500 + rows * n
    )
    config = CUDAGraphConfig.from_plan(plan, max_bucket_elements=512)
    assert max(bucket.elements for bucket in config.buckets()) <= 512
    assert max(bucket.seq_len for bucket in config.buckets()) == max(SKEWED)


def wrong(**options):
    return {"max_graphs": 8, **options}


@pytest.mark.parametrize(
    ("lengths", "options", "match"),
    [
        ([], wrong(), "sizes are empty"),
        ([0, 3], wrong(), r"sizes\[0\]=0 is below 1"),
        ([3.5], wrong(), "is no whole number"),
        ("abc", wrong(), "is text"),
        ({3: 0}, wrong(), "all counts are 0"),
        ([(1, 3)], wrong(), "has 2 numbers, but the axes are seq"),
        ([3], wrong(max_graphs=0), "max_graphs=0"),
        ([3], wrong(waiting=0), "waiting=0"),
        ([3], wrong(seq_multiple=0), "seq_multiple=0"),
        ([3], wrong(headroom=-1.0), "headroom=-1.0"),
        ([3], wrong(cost=3), "cost=3 is no function"),
        ([3], wrong(cost=lambda rows, length: -1.0), "is no number"),
        ([3], wrong(cost={(1, 8): 0.1}), "too few to fit a cost to"),
        ([3], wrong(cost={1: 0.1}), "something else than costs of"),
        ([3], wrong(capture_sizes=()), "capture_sizes"),
        ([3], wrong(axes=("batch", "seq")), "has the batch, whose sizes are the batcher's"),
        ([3], wrong(axes=IMAGE), "the axes are height, width"),
        ([(3, 4)], wrong(axes=IMAGE, cost=lambda rows, height: 1.0), "not a size on each of the"),
        ([(3, 4)], wrong(axes=IMAGE, cost={(1, 3): 1.0}), r"else than costs of \(rows, height, w"),
        ([(3, 4)], wrong(axes=IMAGE, cost={(1, 3, 4): 1.0}), "1 different buckets, too few"),
        ([(3, 4)], wrong(axes=IMAGE, seq_multiple=2), "no axis 'seq'"),
        ([(3, 4)], wrong(axes=IMAGE, multiples={"hight": 2}), "multiples has 'hight'"),
        (
            [3],
            wrong(capture_sizes=(1, 2, 3), max_graphs=2),
            "are 3 buckets of one length, more than",
        ),
        ([30], wrong(max_bucket_elements=20), "more than max_bucket_elements=20"),
        (
            [30],
            wrong(max_bucket_elements=40, capture_sizes=(4,)),
            "no grid of so many buckets with",
        ),
    ],
)
def test_refused(lengths, options, match):
    """What is no length, no limit and no cost is refused with what to give."""
    with pytest.raises(ConfigError, match=match):
        plan_for_batcher(lengths, **options)


def test_misspelt():
    """A keyword that does not exist is a mistake that names the nearest."""
    with pytest.raises(TypeError, match="max_graphs"):
        plan_for_batcher([3], max_graph=3)  # type: ignore[call-arg]
