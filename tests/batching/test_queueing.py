"""`benchmarks/queueing.py`: its virtual time agrees with what can be computed by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cudagraph_jax.shapes.ladder import Bucket

if not (Path(__file__).parents[2] / "benchmarks").is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

from benchmarks.queueing import (
    LEAST,
    Figures,
    Policies,
    arrivals,
    most_within,
    simulated,
    table,
)

COSTS = {Bucket(*size): 2.0 + size[0] * size[1] / 100 for size in product((1, 4, 16), (8, 32))}
LENGTHS = np.random.default_rng(0).integers(1, 33, 200).tolist()


@pytest.mark.parametrize("name", [*Policies(COSTS, COSTS).all()])
def test_who_comes_alone_waits_for_nobody(name):
    """Where texts come rarely each takes what a single row of its length costs."""
    took = simulated(arrivals(200, 0.01), LENGTHS, Policies(COSTS, COSTS).all()[name])
    alone = [COSTS[Bucket(1, 8 if length <= 8 else 32)] / 1e3 for length in LENGTHS]
    np.testing.assert_allclose(took, alone, rtol=1e-6)


def test_a_queue_of_one_server():
    """Texts that come at once are answered one call behind the other, each exactly once."""
    policies = Policies(COSTS, COSTS)
    took = simulated(np.zeros(3), [5, 30, 6], policies.one_by_one)
    np.testing.assert_allclose(took * 1e3, np.cumsum([2.08, 2.32, 2.08]))
    (one,) = set(simulated(np.zeros(3), [5, 30, 6], policies.fifo))
    assert one == pytest.approx(COSTS[Bucket(4, 32)] / 1e3)


def test_the_table():
    """At a low rate the median of the least cost is that of single rows, and at a high one more."""
    found = table(LENGTHS, COSTS, COSTS, rates=(0.001, 0.95))
    alone = np.median([COSTS[Bucket(1, 8 if length <= 8 else 32)] for length in LENGTHS])
    assert found[0.001][LEAST].p50_ms == pytest.approx(alone)
    assert found[0.95][LEAST].p50_ms > alone


def test_what_is_good():
    """Texts a second that were answered in time, over the time that all took."""
    figures = Figures.of(np.array([0.0, 1.0]), np.array([0.1, 1.0]), within_s=0.5)
    assert figures.good == pytest.approx(0.5)


def test_capacity():
    """The rate for a limit keeps to it, and one that is a tenth higher does not."""
    policy = Policies(COSTS, COSTS).least_cost

    def p99_ms(rate):
        return np.percentile(simulated(arrivals(200, rate), LENGTHS, policy), 99) * 1e3

    rate = most_within(LENGTHS, COSTS, 10.0, policy=policy, most=3000)
    assert p99_ms(rate) <= 10.0 < p99_ms(rate * 1.1)
    assert most_within(LENGTHS, COSTS, 0.1, policy=policy, most=3000) == 0
