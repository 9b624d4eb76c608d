"""What a bucket costs."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.costs import (
    ELEMENTS,
    PolynomialCost,
    attention_cost,
    cost_of_each,
    cost_table,
    measured_cost,
)

TERMS = st.floats(0, 100, allow_subnormal=False)
POLYNOMIALS = st.builds(PolynomialCost, constant=TERMS, rows=TERMS, elements=TERMS, pairs=TERMS)
SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=5).map(np.array)


@given(POLYNOMIALS, SIZES, SIZES)
def test_polynomial(cost, batches, seqs):
    """A polynomial gives one size, a table and pairs the same costs, those of its formula."""
    table = cost_table(cost, batches, seqs)
    for row, batch in zip(table, batches.tolist(), strict=True):
        for found, seq in zip(row.tolist(), seqs.tolist(), strict=True):
            terms = (cost.constant, cost.rows * batch, cost.elements * batch * seq)
            assert found == pytest.approx(sum(terms) + cost.pairs * batch * seq**2)
            assert found == cost(batch, seq)
            assert type(cost(batch, seq)) is float
    short = min(len(batches), len(seqs))
    pairs = cost_of_each(cost, batches[:short], seqs[:short])
    np.testing.assert_array_equal(pairs, np.diagonal(table)[:short])


@given(SIZES, SIZES)
def test_function(batches, seqs):
    """Any function of two integers is a cost, whatever kind of number it gives."""
    kinds: list[Any] = [int, float, np.float32, np.int64, np.array]
    table = cost_table(lambda batch, seq: kinds[seq % 5](batch * seq), batches, seqs)
    np.testing.assert_array_equal(table, np.outer(batches, seqs))
    assert table.dtype == np.float64


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, "1.5", None, 1j, [1, 2], 10**400])
def test_bad_cost(value):
    """What is no number of 0 or more is named with its size."""
    message = (
        f"cost(batch=2, seq_len=8)={value!r:.60} is no number from 0 to 1e100: give a cost that is "
        "one for every size"
    )
    for asked in (cost_table, cost_of_each):
        with pytest.raises(ConfigError) as caught:
            asked(lambda batch, seq: value if seq == 8 else 1.0, np.array([2, 2]), np.array([4, 8]))
        assert str(caught.value) == message


def test_the_costs_own_error():
    """What a cost raises goes through as it is."""
    with pytest.raises(ZeroDivisionError):
        cost_table(lambda batch, seq: 1 / 0, np.array([1]), np.array([1]))
    with pytest.raises(TypeError, match="'int' object is not subscriptable"):
        cost_table(lambda batch, seq: batch[seq], np.array([1]), np.array([1]))


@pytest.mark.parametrize("term", ["constant", "rows", "elements", "pairs"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None])
def test_bad_term(term, value):
    """A polynomial has no negative term, so that a larger bucket never costs less."""
    with pytest.raises(ConfigError) as caught:
        PolynomialCost(**{term: value})
    assert str(caught.value) == f"{term}={value!r} is no term: give a number of 0 or more"


def test_elements():
    """The default cost is the bucket's elements."""
    assert ELEMENTS(3, 7) == 21.0
    assert repr(ELEMENTS) == "PolynomialCost(constant=0.0, rows=0.0, elements=1.0, pairs=0.0)"


def test_attention():
    """A layer's cost per token and per pair of positions, counted by hand for a small one."""
    assert attention_cost(8) == PolynomialCost(elements=4 * 64 + 2 * 8 * 32, pairs=16.0)
    assert attention_cost(8, mlp_size=10) == PolynomialCost(elements=4 * 64 + 160, pairs=16.0)
    assert attention_cost(8)(2, 3) == 2 * (3 * 768 + 9 * 16)


@pytest.mark.parametrize("width", [0, -1, True, 2.0, "8"])
def test_bad_width(width):
    """A width is a positive integer."""
    message = f"={width!r} is no width: give an integer of 1 or more"
    with pytest.raises(ConfigError) as caught:
        attention_cost(width, mlp_size=1)
    assert str(caught.value) == "hidden_size" + message
    with pytest.raises(ConfigError) as caught:
        attention_cost(8, mlp_size=width)
    assert str(caught.value) == "mlp_size" + message


def entry(batch, seq, time_ms):
    """What `measured_cost` reads of an entry."""
    return SimpleNamespace(batch_size=batch, seq_len=seq, cost_ms=time_ms)


def older(batch, seq, time_ms, replays=1):
    """What it reads of figures that have no `cost_ms`."""
    return SimpleNamespace(
        batch_size=batch, seq_len=seq, replay_count=replays, avg_replay_time_ms=time_ms
    )


GRID = [(batch, seq) for batch in (1, 2, 4, 8) for seq in (16, 64, 256, 1024)]


@pytest.mark.parametrize(
    "cost",
    [
        PolynomialCost(elements=1e-3),
        PolynomialCost(constant=0.25),
        PolynomialCost(constant=0.1, rows=0.02, elements=1e-3, pairs=1e-6),
        PolynomialCost(constant=2.0, pairs=1e-7),
        attention_cost(384),
    ],
)
def test_measured_from_exact_times(cost):
    """From the times of a polynomial the fit is that polynomial, without terms that it lacks."""
    fitted = measured_cost([entry(*size, cost(*size)) for size in GRID])
    for name in ("constant", "rows", "elements", "pairs"):
        expected = getattr(cost, name)
        assert getattr(fitted, name) == (pytest.approx(expected, rel=1e-6) if expected else 0.0)


TIMES = st.lists(st.floats(1e-4, 1e4), min_size=len(GRID), max_size=len(GRID))


@given(TIMES)
def test_measured_is_monotone(times):
    """Whatever the times, no term is negative, and the fit is of use at all sizes."""
    timed = [entry(*size, time) for size, time in zip(GRID, times, strict=True)]
    fitted = measured_cost(timed)
    table = cost_table(fitted, np.arange(1, 20), np.arange(1, 20))
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    assert (table > 0).all()


def test_measured_noise():
    """Times that are a hundredth off give costs that are a few hundredths off at most."""
    cost = PolynomialCost(constant=0.1, rows=0.02, elements=1e-3, pairs=1e-6)
    noise = np.random.default_rng(0).normal(1, 0.01, len(GRID))
    fitted = measured_cost(
        [entry(*size, cost(*size) * factor) for size, factor in zip(GRID, noise, strict=True)]
    )
    for size in [*GRID, (16, 2048)]:
        assert fitted(*size) == pytest.approx(cost(*size), rel=0.05)


def test_measured_along_one_length():
    """Where batches alone differ, the time is put down to elements, which lengths have too."""
    fitted = measured_cost([entry(batch, 128, 0.5 + 0.128 * batch) for batch in (1, 2, 4)])
    assert fitted.elements == pytest.approx(1e-3)
    assert fitted == PolynomialCost(constant=fitted.constant, elements=fitted.elements)


@pytest.mark.parametrize(
    ("entries", "buckets"),
    [
        ([], 0),
        ([entry(1, 8, 1.0)], 1),
        ([entry(1, 8, 1.0), entry(1, 8, 2.0)], 1),
        ([entry(1, 8, 1.0), entry(2, 8, None), entry(4, 8, 0.0)], 1),
        ([older(1, 8, 1.0), older(2, 8, 2.0, replays=0), older(4, 8, 0.0)], 1),
    ],
)
def test_too_few_times(entries, buckets):
    """Fewer than two different buckets with times are too few for a fit."""
    with pytest.raises(ConfigError) as caught:
        measured_cost(entries)
    assert str(caught.value) == (
        f"entries hold times of {buckets} different buckets, too few to fit a cost to: warm "
        "up, or serve requests in two or more whose outputs go to the host"
    )


def test_measured_from_a_registry():
    """The entries of a registry are what the fit reads."""
    registry = CUDAGraphRegistry()
    for batch in (1, 2, 4):
        shape = jax.ShapeDtypeStruct((batch, 8), np.float32)
        captured = registry.capture(batch, 8, lambda x: x + 1, shape)
        captured.replay(np.zeros((batch, 8), np.float32))
    cost = measured_cost(registry.entries())
    assert cost(4, 8) >= cost(1, 8) > 0


def test_a_time_to_dispatch_is_no_cost():
    """What nobody waited for has no cost, however often it was replayed."""
    config = CUDAGraphConfig(capture_sizes=(1, 2), warmup_iterations=0)
    function = bucket_jit(lambda x: x + 1, in_axes="batch seq", unpad="none", config=config)
    for batch in (1, 2) * 3:
        function(np.zeros((batch, 8), np.float32))
    entries = function.registry.entries()
    assert {entry.cost_ms for entry in entries} == {None}
    assert min(entry.avg_replay_time_ms for entry in entries) > 0
    with pytest.raises(ConfigError, match="times of 0 different buckets"):
        measured_cost(entries)
    function.warmup(np.zeros((1, 8), np.float32), progress=False)
    with pytest.raises(ConfigError, match="times of 0 different buckets"):
        measured_cost(entries)


def test_figures_of_an_older_version():
    """Figures without a cost are fitted by their mean times, as they were before."""
    cost = PolynomialCost(constant=0.1, elements=1e-3)
    fitted = measured_cost([older(*size, cost(*size)) for size in GRID])
    assert fitted.elements == pytest.approx(1e-3)


def test_a_registry_is_no_collection():
    """The registry itself in place of its entries is refused, with what to give."""
    registry: Any = CUDAGraphRegistry()
    with pytest.raises(ConfigError, match=r"no collection .*: give registry.entries\(\)"):
        measured_cost(registry)
