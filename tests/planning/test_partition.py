"""The best ladder along one axis, by each way to compute a layer."""

import math
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax.planning.partition import (
    SMALL,
    Axis,
    all_gaps,
    any_layer,
    monotone_layer,
    partition,
    table_layer,
    worthwhile,
)
from tests.helpers.examples import examples
from tests.helpers.exhaustive import ladders

LAYERS = {
    "table": lambda previous, axis: table_layer(previous, all_gaps(axis)),
    "monotone": monotone_layer,
    "any": any_layer,
}


def axis_of(counts, unit):
    """The axis of requests per candidate and costs of each, both (buckets, candidates)."""
    upto = np.cumsum(np.asarray(counts, np.float64), axis=1)
    start = np.zeros((len(upto), 1))
    return Axis(
        np.concatenate([start, upto], axis=1),
        np.concatenate([start, np.asarray(unit, np.float64)], axis=1),
    )


@st.composite
def axes(draw, *, monotone=False, most=5):
    """Small axes with whole numbers, so that sums are exact."""
    rows, candidates = draw(st.integers(1, 3)), draw(st.integers(1, most))
    row = st.lists(st.integers(0, 9), min_size=candidates, max_size=candidates)
    table = st.lists(row, min_size=rows, max_size=rows)
    unit = draw(table)
    return axis_of(draw(table), [sorted(costs) for costs in unit] if monotone else unit)


def cost_of(axis, ladder):
    """What a ladder of candidates, from 0, costs."""
    at = np.array(ladder) + 1
    return axis.gap(np.append(0, at[:-1]), at).sum()


def least_costs(axis, places):
    """The least cost of any ladder of some candidates, with at most 1, 2 … buckets."""
    weight, unit = axis.weight.tolist(), axis.unit.tolist()
    least = [math.inf] * axis.candidates
    for ladder in ladders(places):
        steps = [(below + 1, at + 1) for below, at in pairwise((-1, *ladder))]
        cost = sum(
            row[at] * (upto[at] - upto[below])
            for row, upto in zip(unit, weight, strict=True)
            for below, at in steps
        )
        least[len(ladder) - 1] = min(least[len(ladder) - 1], cost)
    return list(accumulate(least, min))


def assert_best(axis, found):
    """All ladders of a partition are as good as trying everything."""
    assert found.costs.tolist() == least_costs(axis, range(axis.candidates))
    for limit, cost in enumerate(found.costs, start=1):
        ladder = found.ladder(limit)
        assert cost_of(axis, ladder) == cost
        assert len(ladder) <= limit
        assert ladder[-1] == axis.candidates - 1


@examples(150, thorough=500)
@given(axes(), st.sampled_from([0, SMALL]))
def test_any_cost(axis, small):
    """For any cost the ladders of each length are the best, with a table of gaps and without."""
    assert_best(axis, partition(axis, axis.candidates, small=small))


@examples(150, thorough=500)
@given(axes(monotone=True), st.sampled_from([0, SMALL]))
def test_monotone_cost(axis, small):
    """Where no larger bucket is cheaper, dividing and conquering is as good as the table."""
    assert axis.is_monotone
    assert_best(axis, partition(axis, axis.candidates, small=small))


@given(axes(monotone=True, most=40))
def test_layers_agree(axis):
    """The three ways to add a bucket give the same costs, and neighbours that have them."""
    everything = np.arange(axis.candidates + 1)
    costs = dict.fromkeys(LAYERS, np.append(0.0, axis.gap(np.array([0]), everything[1:])))
    for _ in range(3):
        for name, layer in LAYERS.items():
            previous = costs[name]
            costs[name], choice = layer(previous, axis)
            at = everything[1:]
            assert (choice[at] < at).all()
            spent = previous[choice[at]] + axis.gap(choice[at], at)
            np.testing.assert_array_equal(spent, costs[name][1:])
        np.testing.assert_array_equal(costs["table"], costs["monotone"])
        np.testing.assert_array_equal(costs["table"], costs["any"])


@settings(max_examples=100)
@given(axes())
def test_not_optimal(axis):
    """Without `optimal` the costs are those of the ladders, and none is above a single bucket's."""
    found = partition(axis, axis.candidates, small=0, optimal=False)
    for limit, cost in enumerate(found.costs, start=1):
        assert cost_of(axis, found.ladder(limit)) == cost
        assert len(found.ladder(limit)) <= limit
        assert found.ladder(limit)[-1] == axis.candidates - 1
    assert found.costs[0] == least_costs(axis, range(axis.candidates))[0]


@given(axes(), st.integers(1, 20))
def test_limit(axis, limit):
    """There are no more ladders than the limit, nor than candidates."""
    assert len(partition(axis, limit).costs) == min(limit, axis.candidates)


@examples(150, thorough=500)
@given(axes())
def test_worthwhile(axis):
    """What is left out is not missed, whatever the number of buckets and the costs."""
    kept = worthwhile(axis.unit[:, 1:])
    assert kept[-1] == axis.candidates - 1
    assert least_costs(axis, kept.tolist()) == least_costs(axis, range(axis.candidates))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_worthwhile_row_rises(costs):
    """Of a single row, what is left always rises: dividing and conquering is right for it."""
    unit = np.array([costs], np.float64)
    assert (np.diff(unit[:, worthwhile(unit)]) > 0).all()


def test_many_candidates():
    """Above the table's size the costs are the same as with it."""
    draw = np.random.default_rng(0)
    for unit in (np.sort(draw.integers(1, 999, (2, 300))), draw.integers(1, 999, (2, 300))):
        axis = axis_of(draw.integers(0, 50, (2, 300)), unit)
        with_table = partition(axis, 9, small=300)
        np.testing.assert_array_equal(partition(axis, 9).costs, with_table.costs)


@pytest.mark.parametrize("limit", [1, 5])
def test_single_candidate(limit):
    """One candidate is one bucket."""
    found = partition(axis_of([[3]], [[7]]), limit)
    assert found.costs.tolist() == [21.0]
    assert found.ladder(1).tolist() == [0]
