"""The best product grid, by trying all and by improving one axis at a time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.planning.evaluation import standard_grids
from cudagraph_jax.planning.observed import BATCH_SEQ
from cudagraph_jax.planning.search import Problem, best_grids, places_of
from cudagraph_jax.shapes.ladder import Ladder
from tests.helpers.examples import examples
from tests.helpers.exhaustive import held, ladders, spent


@st.composite
def cases(draw, *, kinds=("elements", "separable", "rising", "any")):
    """Problems of up to 4 batch and 5 seq candidates, with what a pair of ladders costs."""
    batches, seqs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    place = st.tuples(st.integers(0, batches - 1), st.integers(0, seqs - 1))
    requests = draw(st.dictionaries(place, st.integers(1, 9), min_size=1, max_size=8))
    kind = draw(st.sampled_from(kinds))
    steps = np.array(
        draw(st.lists(st.integers(0, 9), min_size=batches * seqs, max_size=batches * seqs))
    ).reshape(batches, seqs)
    unit = {
        "elements": np.outer(np.arange(1, batches + 1), np.arange(1, seqs + 1)),
        "separable": np.outer(steps[:, 0].cumsum(), steps[0].cumsum()),
        "rising": steps.cumsum(axis=0).cumsum(axis=1),
        "any": steps,
    }[kind].astype(np.float64)
    return problem_of(requests, unit), requests, unit


def problem_of(requests, unit):
    """The problem of requests, a mapping of places to counts."""
    places = np.array(list(requests))
    counts = np.array(list(requests.values()), np.float64)
    return Problem.of(list(places.T), counts, unit)


def cost_of(requests, unit, batches, seqs):
    """What requests cost in a grid of places."""
    return spent(requests, batches, seqs, lambda batch, seq: float(unit[batch, seq]))


def all_grids(problem):
    """Every product grid that holds the largest candidates."""
    rows, columns = problem.shape
    return [(batches, seqs) for batches in ladders(range(rows)) for seqs in ladders(range(columns))]


def assert_honest(grids, requests, unit):
    """Grids keep to their limits, cost what they say and never cost more with a higher limit."""
    for limit, grid in enumerate(grids, start=1):
        assert grid.graphs == math.prod(map(len, grid.ladders)) <= limit
        assert grid.cost == pytest.approx(cost_of(requests, unit, *grid.ladders))
        assert [ladder[-1] + 1 for ladder in grid.ladders] == list(unit.shape)
    costs = [grid.cost for grid in grids]
    assert costs == sorted(costs, reverse=True)


@examples(50, thorough=100)
@given(cases())
def test_enumerated(case):
    """Where all ladders of one axis are tried, the grid of each limit is the best of all."""
    problem, requests, unit = case
    grids = best_grids(problem, unit.size, [])
    assert len(grids) == unit.size
    assert_honest(grids, requests, unit)
    tried = [(len(b) * len(s), cost_of(requests, unit, b, s)) for b, s in all_grids(problem)]
    for limit, grid in enumerate(grids, start=1):
        assert grid.cost == pytest.approx(min(cost for graphs, cost in tried if graphs <= limit))


@examples(50, thorough=100)
@given(cases(), st.data())
def test_descent_is_no_worse_than_its_starts(case, data):
    """Improving never ends above a start that keeps to the limit, whatever the cost."""
    problem, requests, unit = case
    pairs = data.draw(st.lists(st.sampled_from(all_grids(problem)), max_size=3))
    limit = data.draw(st.integers(1, unit.size))
    starts = [(np.array(batches), np.array(seqs)) for batches, seqs in pairs]
    grids = best_grids(problem, limit, starts, most_work=0)
    assert len(grids) == limit
    assert_honest(grids, requests, unit)
    for batches, seqs in pairs:
        graphs = len(batches) * len(seqs)
        if graphs <= limit:
            assert grids[graphs - 1].cost <= cost_of(requests, unit, batches, seqs) + 1e-9


def random_problem(seed, kind):
    """A problem with tens of sizes on both axes, and the sizes."""
    draw = np.random.default_rng(seed)
    batches = np.sort(draw.choice(np.arange(1, 65), 12, replace=False))
    seqs = np.sort(draw.choice(np.arange(1, 600), 40, replace=False))
    elements = np.outer(batches, seqs).astype(np.float64)
    unit = {
        "elements": elements,
        "rising": 1000 + elements + 0.01 * np.outer(batches, seqs**2),
        "any": draw.uniform(1, 100, elements.shape),
    }[kind]
    places = zip(
        draw.integers(0, 12, 300).tolist(), draw.integers(0, 40, 300).tolist(), strict=True
    )
    problem = problem_of(dict.fromkeys(places, 7), unit)
    return problem, batches, seqs


@pytest.mark.parametrize("kind", ["elements", "rising", "any"])
@pytest.mark.parametrize("seed", range(6))
def test_descent_is_no_worse_than_standard_ladders(kind, seed):
    """At each limit the grid is as good as every standard pair with no more buckets."""
    problem, batches, seqs = random_problem(seed, kind)
    starts = [
        (places_of(grid.ladders[0], batches), places_of(grid.ladders[1], seqs))
        for grid in standard_grids(BATCH_SEQ, (int(batches[-1]), int(seqs[-1])))
    ]
    limit = max(len(start[0]) * len(start[1]) for start in starts)
    grids = best_grids(problem, limit, starts, most_work=0)
    for start in starts:
        standard = problem.grid(start)
        assert grids[standard.graphs - 1].cost <= standard.cost * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["elements", "rising"])
@pytest.mark.parametrize("seed", range(3))
def test_descent_is_near_the_optimum(kind, seed):
    """Where no larger bucket is cheaper, the descent ends within a hundredth of the optimum."""
    problem, _, _ = random_problem(seed, kind)
    best = best_grids(problem, 12, [], most_work=math.inf)[-1].cost
    found = best_grids(problem, 12, [], most_work=0)[-1].cost
    assert best <= found * (1 + 1e-12)
    assert found <= 1.01 * best


@examples(50, thorough=100)
@given(cases())
def test_rows_that_are_multiples_are_merged(case):
    """The cost of a grid is the same whichever axis is given, merged or not."""
    problem, requests, unit = case
    for pair in all_grids(problem)[::7]:
        expected = cost_of(requests, unit, *pair)
        ladders = [np.array(ladder) for ladder in pair]
        assert problem.grid(ladders) == (pytest.approx(expected), pair)
        assert problem.price(ladders) == pytest.approx(expected)
        for free in (0, 1):
            assert problem.axis(free, ladders).cost(ladders[free]) == pytest.approx(expected)


def test_merged():
    """Rows that are multiples of each other become one; others stay; zeros are no trouble."""
    requests = {(0, 0): 1, (0, 2): 2, (1, 1): 3}
    multiples = problem_of(requests, np.array([[1.0, 2, 3], [2, 4, 6]]))
    assert len(multiples.axis(1, [np.array([0, 1]), np.array([2])]).unit) == 1
    others = problem_of(requests, np.array([[1.0, 2, 3], [2, 4, 7]]))
    assert len(others.axis(1, [np.array([0, 1]), np.array([2])]).unit) == 2
    for unit in (np.zeros((2, 3)), np.array([[1.0, 2, 3], [0, 0, 0]])):
        problem = problem_of(requests, unit)
        grid = problem.grid([np.array([0, 1]), np.array([2])])
        assert grid.cost == cost_of(requests, unit, (0, 1), (2,))


SETS = st.sets(st.integers(1, 60), min_size=1, max_size=12)


@given(SETS, SETS)
def test_places_of(sizes, candidates):
    """Candidates that do what a ladder does: each is held by what the ladder would have used."""
    candidates = np.array(sorted(candidates))
    top = max(*sizes, int(candidates[-1]))
    ladder = Ladder({*sizes, top})
    places = places_of(ladder, candidates)
    assert places[-1] == len(candidates) - 1
    chosen = candidates[places].tolist()
    assert len(chosen) <= len(ladder)
    for candidate in candidates.tolist():
        assert candidate <= held(chosen, candidate) <= held(ladder, candidate)
