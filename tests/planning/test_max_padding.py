"""A bound on the padding of every single request."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import Bucket, CUDAGraphConfig, attention_cost, plan_buckets
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.partition import Axis, fewest, lowest_below, partition
from cudagraph_jax.planning.search import PaddingBound, Problem, best_grids, bounded_grids
from tests.helpers.examples import examples
from tests.helpers.exhaustive import grids, padding, rounded_up, spent


@st.composite
def traffic(draw):
    """Requests on 1 to 3 axes, few enough to try all grids of."""
    k, size = draw(st.sampled_from([(1, 20), (2, 6), (3, 4)]))
    row = st.tuples(*[st.integers(1, size)] * k)
    return draw(st.dictionaries(row, st.integers(1, 9), min_size=1, max_size=6))


def elements(*sizes):
    """What a bucket costs by default."""
    return float(math.prod(sizes))


COSTS = st.sampled_from([None, lambda *sizes: 1.0, lambda *sizes: float(1 + sum(sizes) % 5)])


@examples(100, thorough=300)
@given(
    traffic(),
    COSTS,
    st.integers(1, 9),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75]),
    st.sampled_from([1, 1, 3]),
)
def test_against_all_grids(requests, cost, max_graphs, bound, multiple):
    """The plan is the best of all grids that keep to the bound; without one, the error says why."""
    axes = ("a", "b", "c")[: len(next(iter(requests)))]
    candidates = [rounded_up(set(column), multiple) for column in zip(*requests, strict=True)]
    arguments: dict[str, Any] = {
        "cost": cost,
        "max_padding": bound,
        "multiples": dict.fromkeys(axes, multiple),
    }
    every = list(grids(*candidates, max_graphs=10**9))
    allowed = [grid for grid in every if padding(requests, *grid) <= bound + 1e-12]
    counts = [math.prod(map(len, grid)) for grid in allowed]
    if min(counts, default=math.inf) > max_graphs:
        with pytest.raises(ConfigError) as caught:
            plan_buckets(requests, axes=axes, max_graphs=max_graphs, **arguments)
        message = str(caught.value)
        if counts:
            assert f"the fewest buckets found that keep to it are {min(counts)};" in message
            return
        # The bound that it names can be kept to.
        arguments["max_padding"] = float(message.partition("; give ")[2].partition(" ")[0])
        assert min(padding(requests, *grid) for grid in every) <= arguments["max_padding"]
        plan_buckets(requests, axes=axes, max_graphs=999, **arguments)
        return
    plan = plan_buckets(requests, axes=axes, max_graphs=max_graphs, **arguments)
    price = cost or elements
    small = [g for g, count in zip(allowed, counts, strict=True) if count <= max_graphs]
    best = min(spent(requests, *grid, price) for grid in small)
    assert spent(requests, *plan.sizes.values(), price) == pytest.approx(best)
    assert plan.worst_padding == pytest.approx(padding(requests, *plan.sizes.values()), abs=1e-12)
    assert plan.worst_padding <= bound + 1e-12
    assert plan.curve[0].graphs == min(counts)


def test_it_is_shown():
    """A plan with a bound says how much the worst request is padded, and has it in its JSON."""
    plan = plan_buckets([2, 10, 11, 12, 100], max_graphs=3, max_padding=0.5)
    assert plan.seq_lens == (2, 12, 100)
    assert plan.worst_padding == pytest.approx(1 / 6)
    assert "from 5 requests, none padded by more than 16.7%" in str(plan)
    assert plan.to_dict()["worst_padding"] == plan.worst_padding
    free = plan_buckets([2, 10, 11, 12, 100], max_graphs=2)
    assert free.worst_padding is None
    assert "worst_padding" not in free.to_dict()


def test_what_can_be_kept_to():
    """An error says how many buckets the bound takes, or which bound the multiples allow."""
    with pytest.raises(ConfigError) as caught:
        plan_buckets([1, 10, 100, 1000], max_graphs=3, max_padding=0.5)
    assert str(caught.value) == (
        "max_padding=0.5 cannot be kept to with max_graphs=3: the fewest buckets found that keep "
        "to it are 4; raise either"
    )
    with pytest.raises(ConfigError) as caught:
        plan_buckets([(1, 5), (2, 8)], max_graphs=9, max_padding=0.25, seq_multiple=8)
    assert str(caught.value) == (
        "max_padding=0.25 cannot be kept to: the smallest bucket for (1, 5) is (1, 8); give 0.375 "
        "or more, or smaller multiples"
    )


@pytest.mark.parametrize("bound", [1, 1.0, -0.1, math.nan, "0.5", True])
def test_no_bound(bound):
    """A bound is a part of a bucket."""
    with pytest.raises(ConfigError) as caught:
        plan_buckets([5], max_graphs=1, max_padding=bound)
    assert str(caught.value) == (
        f"max_padding={bound!r} is no part of a bucket: give 0.0 or more and below 1, such as 0.5"
    )


@pytest.mark.parametrize("seed", range(4))
def test_descent_keeps_to_it(seed):
    """Where not all grids can be tried, those found keep to the bound and are near the best."""
    draw = np.random.default_rng(seed)
    shape = (5, 6, 12)
    sizes = [np.sort(draw.choice(np.arange(1, 60), n, replace=False)).astype(float) for n in shape]
    places = [draw.integers(0, count, 150) for count in shape]
    unit = np.multiply.outer(np.multiply.outer(sizes[0], sizes[1]), sizes[2])
    own = [size[place] for size, place in zip(sizes, places, strict=True)]
    problem = Problem.of(places, np.ones(150), unit, PaddingBound(own, sizes, 0.1))
    found = best_grids(problem, 40, [], most_work=0)
    best = best_grids(problem, 40, [], most_work=math.inf)
    fewest_buckets = bounded_grids(problem)[0].graphs
    for limit, (ours, theirs) in enumerate(zip(found, best, strict=True), start=1):
        assert theirs.cost <= ours.cost * (1 + 1e-12)
        if limit >= fewest_buckets:
            assert ours.cost <= 1.05 * theirs.cost


@examples(100, thorough=300)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.sampled_from([0.2, 0.5, 0.8]),
    st.data(),
)
def test_ways_to_add_a_bucket_agree(requests, part, data):
    """With a bound, too, dividing and conquering gives the costs that the table gives."""
    sizes = np.cumsum([step for _, step in requests]).astype(np.float64)
    seen = np.array([data.draw(st.floats(0.5, 1)) for _ in sizes]) * sizes
    counts = np.array([count for count, _ in requests], np.float64)
    lowest = lowest_below(np.where(counts > 0, seen, np.inf), part * sizes)
    axis = Axis(np.append(0.0, counts.cumsum())[None, :], np.append(0.0, sizes)[None, :], lowest)
    table = partition(axis, axis.candidates)
    divided = partition(axis, axis.candidates, small=0)
    np.testing.assert_allclose(table.costs, divided.costs)
    shortest = fewest(lowest)
    if shortest is None:
        assert np.isinf(table.costs).all()
    else:
        assert np.isfinite(table.costs).argmax() + 1 == len(shortest)
        assert axis.cost(shortest) < np.inf
    for limit in np.flatnonzero(np.isfinite(divided.costs)) + 1:
        assert axis.cost(divided.ladder(int(limit))) == pytest.approx(divided.costs[limit - 1])


def test_a_budget_of_elements():
    """No request seen is held by a bucket of more elements, at any cost, or the error says why."""
    sizes = [(8, 4), (7, 3), (2, 16), (1, 15), (4, 8)]
    free = plan_buckets(sizes, max_graphs=9)
    for cost in (None, attention_cost(4), lambda batch, seq_len: float(batch + seq_len)):
        plan = plan_buckets(sizes, max_graphs=9, cost=cost, max_bucket_elements=32)
        config = CUDAGraphConfig.from_plan(plan, max_bucket_elements=32)
        assert all(config.admits(Bucket(*size)) for size in sizes)
        assert 0 <= plan.expected_waste < 1
        assert all(point.waste < 1 for point in plan.curve)
    assert plan_buckets(sizes, max_graphs=9, max_bucket_elements=10**6) == free
    # Powers of two hold (8, 4) by 8 x 16 elements: a grid that is no choice is not compared with.
    assert "powers of two" in {row.name for row in free.comparison}
    assert "powers of two" not in {row.name for row in plan.comparison}
    with pytest.raises(ConfigError, match="request of batch=2, seq_len=16 is held by 32 elements"):
        plan_buckets(sizes, max_graphs=9, max_bucket_elements=31)
    with pytest.raises(ConfigError, match="no grid of 1 buckets was found that is"):
        plan_buckets(sizes, max_graphs=1, max_bucket_elements=32)
