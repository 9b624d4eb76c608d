"""What a grid does to observed sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax.planning.costs import ELEMENTS, PolynomialCost
from cudagraph_jax.planning.evaluation import Evaluation, evaluate, standard_grids, waste
from cudagraph_jax.planning.observed import BATCH_SEQ as AXES
from cudagraph_jax.planning.observed import Observed
from cudagraph_jax.shapes.ladder import Ladder
from tests.helpers.exhaustive import spent
from tests.helpers.exhaustive import waste as part

REQUESTS = st.dictionaries(
    st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(1, 9), min_size=1, max_size=9
)
LADDERS = st.sets(st.integers(1, 20), min_size=1, max_size=5).map(Ladder)


@given(REQUESTS, LADDERS, LADDERS)
def test_evaluate(requests, batches, seqs):
    """Requests that fit are counted at the cost of their bucket, the others as overflows."""
    cost = PolynomialCost(constant=3, rows=2, elements=1, pairs=1)
    fitting = {
        (batch, seq): count
        for (batch, seq), count in requests.items()
        if batch <= batches.max and seq <= seqs.max
    }
    found = evaluate(Observed.of(requests), (batches, seqs), cost)
    used = [{ladder.fit(size) for size in sizes} for ladder, sizes in _axes(fitting, batches, seqs)]
    assert found.graphs == len(used[0]) * len(used[1])
    assert found.requests == sum(requests.values())
    assert found.overflows == sum(requests.values()) - sum(fitting.values())
    wasted = part(fitting, spent(fitting, batches, seqs, cost), cost)
    assert found.waste == pytest.approx(wasted, abs=1e-11)


def _axes(requests, batches, seqs):
    return (batches, [batch for batch, _ in requests]), (seqs, [seq for _, seq in requests])


def test_nothing_fits():
    """Where every request is larger than the largest bucket, nothing is wasted."""
    found = evaluate(Observed.of([100, 200]), ((1,), (64,)), ELEMENTS)
    assert found == Evaluation(graphs=0, requests=2, overflows=2, waste=0.0)


def test_known_ideal():
    """A cost is not asked for sizes that what they cost together is known of."""
    asked = []

    def cost(batch, seq):
        asked.append((batch, seq))
        return float(seq)

    found = evaluate(Observed.of([3, 4, 9]), ((1,), (4, 16)), cost, ideal=16.0)
    assert found.waste == 1 - 16 / 24
    assert asked == [(1, 4), (1, 16)]


@pytest.mark.parametrize(
    ("ideal", "cost", "expected"),
    [
        (3.0, 4.0, 0.25),
        (4.0, 4.0, 0.0),
        (6.0, 4.0, -0.5),
        (0.0, 0.0, 0.0),
        (0.0, 4.0, 1.0),
        (1 + 1e-14, 1.0, 0.0),
        (1 - 1e-14, 1.0, 0.0),
    ],
)
def test_waste(ideal, cost, expected):
    """The part of the cost beyond the ideal; rounding is no waste, and has no sign."""
    assert repr(waste(ideal, cost)) == repr(expected)


SIZES = st.integers(1, 3000)


@settings(max_examples=50)
@given(SIZES, SIZES)
def test_standard_grids_hold_everything(batch, seq):
    """Each standard grid holds the largest sizes; vLLM's and SGLang's end there."""
    powers, *others = standard_grids(AXES, (batch, seq))
    assert [grid.name for grid in (powers, *others)] == ["powers of two", "vLLM", "SGLang"]
    for grid in others:
        assert [ladder.max for ladder in grid.ladders] == [batch, seq]
    assert batch <= powers.ladders[0].max < 2 * batch
    assert seq <= powers.ladders[1].max < max(2 * seq, 17)


def test_standard_grids():
    """The ladders themselves; an axis that has size 1 alone needs none."""
    powers, vllm, sglang = standard_grids(AXES, (1, 40))
    assert powers.ladders == ((1,), (16, 32, 64))
    assert vllm.ladders == ((1,), Ladder.vllm(40))
    assert sglang.ladders == ((1,), Ladder.sglang(40))
    powers, vllm, sglang = standard_grids(AXES, (6, 1))
    assert powers.ladders == ((1, 2, 4, 8), (1,))
    assert vllm.ladders == (Ladder.vllm(6), (1,))


def test_standard_grids_of_huge_sizes():
    """Above a million only powers of two are left: the others would not fit into memory."""
    assert len(standard_grids(AXES, (1, 2**20))) == 3
    (powers,) = standard_grids(AXES, (1, 2**20 + 1))
    assert powers.ladders[1].max == 2**21
    (powers,) = standard_grids(AXES, (2**53, 1))
    np.testing.assert_array_equal(powers.ladders[0], 2 ** np.arange(54))
