"""`plan_buckets`: against trying everything, and what it is for."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax.planning.costs import ELEMENTS, PolynomialCost, attention_cost
from cudagraph_jax.planning.evaluation import standard_grids
from cudagraph_jax.planning.observed import BATCH_SEQ
from cudagraph_jax.planning.planner import plan_buckets
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.examples import examples
from tests.helpers.exhaustive import least, rounded_up, spent, waste

TRACE = Path(__file__).parents[2].parent / "shared" / "data" / "azure_llm_2023_conv.csv"

POLYNOMIALS = st.builds(
    PolynomialCost,
    constant=st.integers(0, 20),
    rows=st.integers(0, 5),
    elements=st.integers(0, 5),
    pairs=st.integers(0, 2),
)


@st.composite
def any_costs(draw):
    """Costs that rise and fall as they like; none is free, so that a waste has a meaning."""
    table = draw(st.lists(st.integers(1, 9), min_size=7, max_size=7))
    return lambda batch, seq: float(table[(3 * batch + seq) % 7])


COSTS = st.one_of(st.just(ELEMENTS), st.just(attention_cost(4)), POLYNOMIALS, any_costs())
COUNTS = st.integers(1, 9)
LENGTHS = st.dictionaries(st.integers(1, 30), COUNTS, min_size=1, max_size=5)
PAIRS = st.dictionaries(
    st.tuples(st.integers(1, 5), st.integers(1, 7)), COUNTS, min_size=1, max_size=6
)


def assert_as_said(plan, sizes, max_graphs, cost):
    """A plan keeps to its limit, holds every size, and wastes what it says."""
    assert plan.num_graphs <= max_graphs
    found = plan.evaluate(sizes, cost=cost)
    assert found.overflows == 0
    assert found.waste == pytest.approx(plan.expected_waste, abs=1e-9)
    wastes = [point.waste for point in plan.curve]
    assert wastes == sorted(wastes, reverse=True)
    assert [point.graphs for point in plan.curve] == list(range(1, len(wastes) + 1))
    assert wastes[-1] == plan.expected_waste


@examples(100, thorough=300)
@given(LENGTHS, COSTS, st.integers(1, 8), st.integers(1, 5), st.none() | st.integers(1, 50))
def test_lengths_against_all_ladders(sizes, cost, max_graphs, multiple, headroom):
    """Along one axis the plan is the best of all ladders, whatever the cost and the arguments."""
    plan = plan_buckets(
        sizes, max_graphs=max_graphs, cost=cost, seq_multiple=multiple, headroom=headroom
    )
    requests = {(1, size): count for size, count in sizes.items()}
    candidates = rounded_up({*sizes, max(headroom or 1, *sizes)}, multiple)
    best = least(requests, {1}, candidates, max_graphs, cost)
    assert spent(requests, (1,), plan.seq_lens, cost) == pytest.approx(best)
    assert plan.expected_waste == pytest.approx(waste(requests, best, cost), abs=1e-9)
    assert plan.batch_sizes == (1,)
    assert plan.seq_lens.max == max(candidates)
    assert all(length % multiple == 0 for length in plan.seq_lens)
    assert_as_said(plan, sizes, max_graphs, cost)


@settings(max_examples=100)
@given(
    st.dictionaries(st.integers(1, 8), COUNTS, min_size=1, max_size=5),
    POLYNOMIALS,
    st.integers(1, 5),
)
def test_no_other_sizes_are_needed(sizes, cost, max_graphs):
    """Where no larger size is cheaper, sizes that were not seen would do no better."""
    plan = plan_buckets(sizes, max_graphs=max_graphs, cost=cost)
    requests = {(1, size): count for size, count in sizes.items()}
    best = least(requests, {1}, range(1, max(sizes) + 1), max_graphs, cost)
    assert plan.expected_waste == pytest.approx(waste(requests, best, cost), abs=1e-9)


@examples(100, thorough=300)
@given(
    PAIRS,
    COSTS,
    st.integers(1, 10),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.none() | st.tuples(st.integers(1, 7), st.integers(1, 9)),
)
def test_pairs_against_all_grids(requests, cost, max_graphs, multiples, headroom):
    """Over both axes the plan is the best of all product grids, where they can all be tried."""
    plan = plan_buckets(
        requests,
        max_graphs=max_graphs,
        cost=cost,
        batch_multiple=multiples[0],
        seq_multiple=multiples[1],
        headroom=headroom,
    )
    tops = headroom or (1, 1)
    seen = [[size[axis] for size in requests] for axis in (0, 1)]
    batches, seqs = (
        rounded_up({*seen[axis], max(tops[axis], *seen[axis])}, multiples[axis]) for axis in (0, 1)
    )
    best = least(requests, batches, seqs, max_graphs, cost)
    assert spent(requests, plan.batch_sizes, plan.seq_lens, cost) == pytest.approx(best)
    assert plan.expected_waste == pytest.approx(waste(requests, best, cost), abs=1e-9)
    assert (plan.batch_sizes.max, plan.seq_lens.max) == (max(batches), max(seqs))
    assert all(size % multiples[0] == 0 for size in plan.batch_sizes)
    assert all(length % multiples[1] == 0 for length in plan.seq_lens)
    assert_as_said(plan, requests, max_graphs, cost)


@settings(max_examples=50)
@given(PAIRS, COSTS)
def test_curve_is_what_other_limits_give(requests, cost):
    """The curve says of each number of buckets what a plan with that limit wastes."""
    curve = plan_buckets(requests, max_graphs=9, cost=cost).curve
    for graphs, expected in curve:
        plan = plan_buckets(requests, max_graphs=graphs, cost=cost)
        assert plan.expected_waste == pytest.approx(expected, abs=1e-12)


def test_no_worse_than_standard_grids():
    """On both axes the plan wastes no more than any standard grid of as many buckets."""
    draw = np.random.default_rng(0)
    batches = draw.integers(1, 65, 3000)
    lengths = np.clip(draw.lognormal(3.5, 0.8, 3000), 1, 300).astype(int)
    sizes = np.stack([batches, lengths], axis=1)
    top = Bucket(int(batches.max()), int(lengths.max()))
    for cost in (ELEMENTS, PolynomialCost(constant=9, rows=2, elements=1, pairs=0.01)):
        plan = plan_buckets(sizes, max_graphs=60, cost=cost)
        assert_as_said(plan, sizes, 60, cost)
        assert plan.expected_waste < plan.comparison[0].waste
        for grid in standard_grids(BATCH_SEQ, top):
            limit = math.prod(map(len, grid.ladders))
            plan = plan_buckets(sizes, max_graphs=min(limit, 60), cost=cost)
            other = next(row for row in plan.comparison if row.name == grid.name)
            assert plan.expected_waste <= other.waste or limit > 60


def lognormal(seed=0, number=4000):
    """Lengths as of conversations: many short ones, few long ones."""
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(6.5, 1.0, number), 1, 8192).astype(np.int64)


def test_expected_waste_is_padding_by_elements():
    """By default the waste is the padded part of all elements."""
    lengths = lognormal()
    plan = plan_buckets(lengths, max_graphs=16)
    ladder = np.array(plan.seq_lens)
    padded = ladder[np.searchsorted(ladder, lengths)]
    assert plan.expected_waste == pytest.approx(1 - lengths.sum() / padded.sum(), abs=1e-12)
    assert plan.requests == len(lengths)
    assert plan.expected_waste < 0.5 * plan.comparison[0].waste


def test_the_trace_of_conversations():
    """On a real trace 16 buckets waste a fifth of what 11 powers of two do, also an hour later."""
    if not TRACE.exists():
        pytest.skip("the trace is not part of the package")
    with TRACE.open(newline="") as lines:
        lengths = np.array([int(row["ContextTokens"]) for row in csv.DictReader(lines)])
    plan = plan_buckets(lengths, max_graphs=16)
    assert plan.expected_waste <= 0.0595
    powers = plan.comparison[0]
    assert (powers.name, powers.graphs) == ("powers of two", 11)
    assert powers.waste == pytest.approx(0.303, abs=5e-4)
    half = len(lengths) // 2
    early = plan_buckets(lengths[:half], max_graphs=16, headroom=int(lengths.max()))
    later = early.evaluate(lengths[half:])
    assert later.overflows == 0
    assert later.waste <= 0.085


def test_comparison():
    """The standard grids are tried on the same sizes, with the buckets that these need."""
    plan = plan_buckets([3, 17, 40], max_graphs=2)
    rows = {row.name: (row.graphs, round(row.waste, 6)) for row in plan.comparison}
    assert rows == {
        "powers of two": (3, round(1 - 60 / 112, 6)),
        "vLLM": (3, round(1 - 60 / 68, 6)),
        "SGLang": (3, round(1 - 60 / 68, 6)),
    }


def test_more_buckets_than_sizes():
    """With a bucket for every size nothing is wasted, and the curve ends there."""
    plan = plan_buckets([(1, 8), (2, 8), (2, 16)], max_graphs=10**12)
    assert (plan.batch_sizes, plan.seq_lens) == ((1, 2), (8, 16))
    assert repr(plan.expected_waste) == "0.0"
    assert len(plan.curve) == 4


def test_nothing_is_wasted_where_costs_only_round():
    """Sums in different orders differ by rounding, which is no waste, not even a negative one."""
    lengths = lognormal(number=200)
    cost = PolynomialCost(constant=0.1, rows=0.3, elements=1 / 3, pairs=1e-7)
    plan = plan_buckets(lengths, max_graphs=1000, cost=cost)
    assert repr(plan.expected_waste) == "0.0"


def test_a_falling_cost():
    """Where a larger bucket is cheaper, it is taken, and the waste says so."""
    plan = plan_buckets([60, 64], max_graphs=2, cost=lambda batch, seq: 1.0 if seq == 64 else 3.0)
    assert plan.seq_lens == (64,)
    assert plan.expected_waste == 1 - 4 / 2
