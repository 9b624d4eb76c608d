"""Plans over any named axes."""

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import BucketPlan, CUDAGraphConfig, attention_cost, plan_buckets
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.search import Problem, best_grids
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from tests.helpers.examples import examples
from tests.helpers.exhaustive import least, rounded_up, spent, waste

AXES = ("batch", "src", "tgt")
TRIPLES = [(1, 30, 20), (1, 35, 60), (4, 30, 25), (4, 90, 80)]
PLAN = plan_buckets(TRIPLES, axes=AXES, max_graphs=4)


def elements(*sizes):
    """What a bucket costs by default."""
    return float(math.prod(sizes))


def test_sizes_by_axis():
    """A plan over named axes has a ladder for each of them, in their order."""
    assert PLAN.axes == AXES
    assert list(PLAN.sizes) == list(AXES)
    assert PLAN.sizes["src"] == (35, 90)
    assert PLAN.num_graphs == math.prod(map(len, PLAN.sizes.values())) <= 4
    assert (PLAN.batch_sizes, PLAN.seq_lens) == (PLAN.sizes["batch"], (1,))


def test_forms():
    """Rows, an array, a histogram and an array for each axis are the same sizes."""
    rows = np.array(TRIPLES)
    columns = {axis: rows[:, side] for side, axis in enumerate(AXES)}
    shuffled = {axis: columns[axis].tolist() for axis in reversed(AXES)}
    for sizes in (rows, iter(TRIPLES), dict.fromkeys(TRIPLES, 1), columns, shuffled):
        assert plan_buckets(sizes, axes=list(AXES), max_graphs=4) == PLAN
    single = plan_buckets([5, 9], axes=("src",), max_graphs=1)
    assert single.sizes == {"src": (9,)}
    for one in ({5: 1, 9: 1}, [(5,), (9,)], {"src": [5, 9]}):
        assert plan_buckets(one, axes=("src",), max_graphs=1) == single


@st.composite
def traffic(draw):
    """Requests on 1 to 4 axes, few enough to try all grids of."""
    k, size = draw(st.sampled_from([(1, 12), (2, 5), (3, 4), (4, 3)]))
    row = st.tuples(*[st.integers(1, size)] * k)
    return draw(st.dictionaries(row, st.integers(1, 9), min_size=1, max_size=6))


COSTS = st.sampled_from(
    [
        elements,
        None,
        lambda *sizes: 7.0 + sizes[0] * sum(sizes),
        lambda *sizes: float(1 + sum(3**place * size for place, size in enumerate(sizes)) % 7),
    ]
)


@examples(100, thorough=300)
@given(traffic(), COSTS, st.integers(1, 12), st.data())
def test_against_all_grids(requests, cost, max_graphs, data):
    """On any number of axes the plan is the best of all product grids, where all can be tried."""
    axes = ("a", "b", "c", "d")[: len(next(iter(requests)))]
    multiples = {axis: data.draw(st.integers(1, 3)) for axis in axes}
    plan = plan_buckets(requests, axes=axes, max_graphs=max_graphs, cost=cost, multiples=multiples)
    columns = zip(*requests, strict=True)
    candidates = [
        rounded_up(set(column), multiples[axis]) for axis, column in zip(axes, columns, strict=True)
    ]
    price = cost or elements
    best = least(requests, *candidates, max_graphs, price)
    assert spent(requests, *plan.sizes.values(), price) == pytest.approx(best)
    assert plan.expected_waste == pytest.approx(waste(requests, best, price), abs=1e-9)
    assert plan.num_graphs <= max_graphs
    found = plan.evaluate(requests, cost=cost)
    assert found.overflows == 0
    assert found.waste == pytest.approx(plan.expected_waste, abs=1e-9)


@pytest.mark.parametrize("max_graphs", [12, 30])
@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_products_of_the_axes_own_optima(seed, max_graphs):
    """However the buckets are shared among the axes, their own best ladders waste no less."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(4, 0.8, (400, 2)).astype(int) + 1
    requests = np.column_stack([draw.integers(1, 60, 400), lengths])
    plan = plan_buckets(requests, axes=AXES, max_graphs=max_graphs)
    own = [
        [plan_buckets(column, axes=("x",), max_graphs=share + 1).sizes["x"] for share in range(30)]
        for column in requests.T
    ]
    for shares in product(range(1, max_graphs + 1), repeat=3):
        if math.prod(shares) <= max_graphs:
            grid = [own[side][share - 1] for side, share in enumerate(shares)]
            held = [
                np.array(ladder)[np.searchsorted(ladder, column)]
                for ladder, column in zip(grid, requests.T, strict=True)
            ]
            other = 1 - math.fsum(requests.prod(axis=1)) / math.fsum(np.prod(held, axis=0))
            assert plan.expected_waste <= other + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_descent_is_near_the_optimum(seed):
    """On three axes, too, the descent ends within a hundredth of the optimum."""
    draw = np.random.default_rng(seed)
    shape = (5, 6, 14)
    sizes = [np.sort(draw.choice(np.arange(1, 99), count, replace=False)) for count in shape]
    places = [draw.integers(0, count, 200) for count in shape]
    unit = np.multiply.outer(np.multiply.outer(sizes[0], sizes[1]), sizes[2]).astype(np.float64)
    problem = Problem.of(places, np.ones(200), unit)
    best = best_grids(problem, 18, [], most_work=math.inf)
    found = best_grids(problem, 18, [], most_work=0)
    for ours, theirs in zip(found, best, strict=True):
        assert theirs.cost * (1 - 1e-12) <= ours.cost <= 1.01 * theirs.cost


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 5), st.integers(1, 9)), st.integers(1, 9), min_size=1, max_size=6
    ),
    st.integers(1, 9),
)
def test_batch_and_seq_are_two_of_many_axes(requests, max_graphs):
    """The default axes by their names, or in the other order, give the same ladders."""
    plan = plan_buckets(requests, max_graphs=max_graphs)
    assert plan_buckets(requests, axes=("batch", "seq"), max_graphs=max_graphs) == plan
    turned = plan_buckets(
        {size[::-1]: count for size, count in requests.items()},
        axes=("seq", "batch"),
        max_graphs=max_graphs,
    )
    assert turned.expected_waste == pytest.approx(plan.expected_waste, abs=1e-12)
    config = CUDAGraphConfig.from_plan(turned)
    assert config.buckets() == turned.buckets()


def test_many_sizes_on_many_axes():
    """Elements are planned for without a table of all buckets, however many there would be."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 500, (2000, 4))
    plan = plan_buckets(sizes, axes=("a", "b", "c", "d"), max_graphs=24)
    assert plan.evaluate(sizes).waste == pytest.approx(plan.expected_waste)
    with pytest.raises(ConfigError) as caught:
        plan_buckets(sizes, axes=("batch", "b", "c", "d"), max_graphs=24, cost=elements)
    counts = [f"{len(np.unique(column)):,}" for column in sizes.T]
    assert str(caught.value) == (
        f"sizes have {counts[0]} batch sizes, {counts[1]} of b, {counts[2]} of c and {counts[3]} "
        "of d, too many to try each with each: set multiples, or plan from fewer requests"
    )


def test_multiples():
    """Each axis has its own multiple; those of batch and seq have keywords of their own."""
    plan = plan_buckets(TRIPLES, axes=AXES, max_graphs=4, multiples={"src": 8}, batch_multiple=4)
    assert plan.sizes["batch"] == (4,)
    assert all(size % 8 == 0 for size in plan.sizes["src"])
    pairs = [(1, 9), (3, 20)]
    assert plan_buckets(pairs, max_graphs=2, multiples={"seq": 8}) == plan_buckets(
        pairs, max_graphs=2, seq_multiple=8
    )


@pytest.mark.parametrize(
    ("headroom", "largest"),
    [
        ({"tgt": 128}, [4, 90, 128]),
        ({"tgt": 3}, [4, 90, 80]),
        ((8, 9, 100), [8, 90, 100]),
        (0.5, [6, 135, 120]),
    ],
)
def test_headroom(headroom, largest):
    """Headroom is for the axes that it names, for each in their order, or a part of all."""
    plan = plan_buckets(TRIPLES, axes=AXES, max_graphs=4, headroom=headroom)
    assert [ladder.max for ladder in plan.sizes.values()] == largest
    assert plan_buckets([5], axes=("src",), max_graphs=1, headroom=9).sizes["src"] == (9,)


def test_cost():
    """A cost is a function of the sizes in the order of the axes."""
    plan = plan_buckets(TRIPLES, axes=AXES, max_graphs=2, cost=lambda batch, src, tgt: float(tgt))
    assert plan.sizes == {"batch": (4,), "src": (90,), "tgt": (25, 80)}


def test_repr_and_text():
    """A plan names its axes wherever it shows itself."""
    plan = BucketPlan.of(
        {"batch": Ladder((4,)), "source": Ladder((35, 90))},
        expected_waste=0.25,
        requests=4,
        curve=PLAN.curve[:1],
        comparison=(),
    )
    assert repr(plan) == "BucketPlan(2 buckets: batch 1 x source 2, expected waste 25.0%)"
    assert str(plan).splitlines()[:5] == [
        "BucketPlan(2 buckets: batch 1 x source 2, expected waste 25.0%) from 4 requests",
        "",
        "batch   4",
        "source  35, 90",
        "",
    ]
    assert "<td>source</td>" in plan._repr_html_().replace(' class="t"', "")


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        plan_buckets([(1, 9), (2, 30)], max_graphs=2),
        plan_buckets([5, 9], axes=("seq",), max_graphs=2),
        plan_buckets(TRIPLES, axes=AXES, max_graphs=8, max_padding=0.9),
    ],
    ids=repr,
)
def test_json_and_back(plan):
    """A plan goes through JSON and comes back equal."""
    assert BucketPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("d", [{}, None, [], {**PLAN.to_dict(), "sizes": {"src": [1]}}])
def test_no_plan(d):
    """What `to_dict` did not give is refused."""
    with pytest.raises(ConfigError, match=r"is no plan: give what to_dict\(\) gave"):
        BucketPlan.from_dict(d)


def test_a_plan_is_a_configuration():
    """The ladders of all axes are those of the configuration, and the plan's buckets its grid."""
    config = CUDAGraphConfig.from_plan(PLAN)
    assert config.buckets() == PLAN.buckets()
    assert len(PLAN.buckets()) == PLAN.num_graphs
    assert config.capture_axes == {axis: PLAN.sizes[axis] for axis in ("src", "tgt")}
    plan = plan_buckets([3, 5], axes=("batch",), max_graphs=2)
    assert plan.buckets() == (Bucket(3, 1), Bucket(5, 1))
    assert CUDAGraphConfig.from_plan(plan).buckets() == plan.buckets()


EXPECTED = (
    "expected (batch, src, tgt) tuples (N, 3), a mapping of these to counts, or of each axis to "
    "its sizes (N,)"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": ("src", "tgt", "src")}, "axes has 'src' twice: name each axis once"),
        ({"axes": ()}, 'axes=() are no names: give a tuple, such as ("batch", "src")'),
        ({"axes": "src"}, 'axes=\'src\' are no names: give a tuple, such as ("batch", "src")'),
        (
            {"axes": ("a b", "c", "d")},
            "axes has 'a b', which is no name: give one that an identifier may have, such as "
            '"src"',
        ),
        (
            {"sizes": [(1, 2, 3), (4, 5)]},
            "sizes[1]=(4, 5) has 2 numbers, but the axes are batch, src, tgt: " + EXPECTED,
        ),
        (
            {"sizes": np.array([(4, 5)])},
            "sizes[0]=[4, 5] has 2 numbers, but the axes are batch, src, tgt: " + EXPECTED,
        ),
        (
            {"sizes": [7, 8]},
            "sizes[0]=7 has 1 number, but the axes are batch, src, tgt: " + EXPECTED,
        ),
        (
            {"sizes": {(1, 2, 3, 4): 1}},
            "sizes[0]=[1, 2, 3, 4] has 4 numbers, but the axes are batch, src, tgt: " + EXPECTED,
        ),
        (
            {"sizes": [(1, 2, 3), (4, 0, 6)]},
            "sizes[1]=[4, 0, 6] is below 1: give whole numbers from 1 to 2**53",
        ),
        (
            {"sizes": {"batch": [1], "src": [2], "trg": [3]}},
            "sizes has 'trg', which is no axis: did you mean 'tgt'? (batch, src, tgt)",
        ),
        (
            {"sizes": {"batch": [1], "src": [2]}},
            "sizes lacks the axis 'tgt': give its sizes beside ['batch', 'src']",
        ),
        (
            {"sizes": {"batch": [1], "src": [2], "tgt": [3, 4]}},
            "sizes have the shapes {'batch': (1,), 'src': (1,), 'tgt': (2,)}: give as many sizes "
            "(N,) on each axis",
        ),
        (
            {"multiples": {"srx": 8}},
            "multiples has 'srx', which is no axis: did you mean 'src'? (batch, src, tgt)",
        ),
        (
            {"multiples": {"src": 0}},
            "multiples['src']=0 is below 1: give a size of 1 or more",
        ),
        ({"multiples": 8}, 'multiples=8 is no mapping: give one, such as {"src": 8}'),
        (
            {"multiples": {"batch": 8}, "batch_multiple": 4},
            "batch_multiple=4, but there is multiples['batch']=8 too: leave one out",
        ),
        ({"seq_multiple": 8}, "seq_multiple=8, but there is no axis 'seq': leave one out"),
        (
            {"headroom": 128},
            "headroom=128 does not say which axis it is for: give a mapping, such as "
            '{"tgt": 128}, or a fraction such as 0.25',
        ),
        (
            {"headroom": (1, 2)},
            "headroom=(1, 2) has 2 sizes: give a (batch, src, tgt) or a fraction such as 0.25",
        ),
        (
            {"headroom": {"trg": 2}},
            "headroom has 'trg', which is no axis: did you mean 'tgt'? (batch, src, tgt)",
        ),
        (
            {"cost": attention_cost(8)},
            f"cost={attention_cost(8)!r} is one of (batch, seq_len), but the axes are batch, src, "
            "tgt: give a function of (batch, src, tgt), or None for the elements",
        ),
        (
            {"cost": 3},
            "cost=3 is no function: give one of (batch, src, tgt), or None for the elements",
        ),
        (
            {"cost": lambda *sizes: -1.0},
            "cost(batch=1, src=30, tgt=20)=-1.0 is no number from 0 to 1e100: give a cost that is "
            "one for every size",
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, message):
    """What does not fit the axes is named with its value and what to give instead."""
    with pytest.raises(ConfigError) as caught:
        plan_buckets(**{"sizes": TRIPLES, "axes": AXES, "max_graphs": 4, **arguments})
    assert str(caught.value) == message
