"""Re-planning under `max_bucket_elements`: the new grid holds what the old one held."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cudagraph_jax import (
    Bucket,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    attention_cost,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.dispatch.replan import plan_from, planned_config
from tests.helpers.functions import assert_close, double, floats

BUDGET = CUDAGraphConfig(
    capture_sizes=(1, 2, 4, 8),
    capture_seq_lens=(4, 8, 16),
    max_bucket_elements=32,
    warmup_iterations=0,
)


@pytest.mark.parametrize("headroom", [None, 0.0])
def test_a_plan_keeps_the_budget(headroom):
    """A new grid is within the budget, and serves what the old one served in pieces."""
    function = bucket_jit(
        double, in_axes="batch seq", config=dataclasses.replace(BUDGET, on_overflow="split")
    )
    for shape in ((8, 4), (8, 16), (8, 16), (7, 16)):
        function(floats(0, *shape))
    for _ in range(2):
        function.manager.replan(headroom=headroom)
        function.manager.wait()
        config = function.manager.config
        assert config.max_bucket_elements == 32
        held = {entry.bucket for entry in function.registry.entries()}
        assert held == set(config.buckets())
        assert all(bucket.elements <= 32 for bucket in held)
        for shape in ((8, 4), (8, 16)):
            x = floats(1, *shape)
            with no_compiles():
                assert_close(function(x), x * 2)


@given(
    st.dictionaries(
        st.builds(Bucket, st.integers(1, 8), st.integers(1, 16)), st.integers(1, 999), min_size=1
    ),
    st.sampled_from(["split", "eager"]),
    st.none() | st.just(0.0),
    st.sampled_from([None, attention_cost(4), lambda batch, seq_len: batch + seq_len]),
)
def test_what_fits_before_a_plan_fits_after(sizes, policy, headroom, cost):
    """A plan has a bucket within the budget for every size that had one, whatever the cost."""
    config = dataclasses.replace(BUDGET, on_overflow=policy)
    fitting = list(filter(config.admits, sizes))
    assume(fitting)
    plan = plan_from(sizes, config, headroom=headroom, cost=cost)
    planned = planned_config(config, plan)
    assert all(map(planned.admits, fitting))
    assert plan.num_graphs <= 12
    assert 0 <= plan.expected_waste <= 1 - 1 / 32**2


def test_a_plan_of_too_few_buckets():
    """Where the buckets are too few to hold all sizes within the budget, the error says so."""
    sizes = {Bucket(8, 4): 9, Bucket(2, 16): 9}
    assert plan_from(sizes, BUDGET, max_graphs=4).num_graphs == 4
    said = r"more than max_bucket_elements=32: no grid of 2 buckets was found that is: raise one of"
    with pytest.raises(ConfigError, match=said):
        plan_from(sizes, BUDGET, max_graphs=2)
    with pytest.raises(ConfigError, match=r'all 1 sizes are above .* set on_overflow="split"'):
        plan_from({Bucket(8, 16): 1}, BUDGET)


def test_a_plan_over_axes_that_not_all_functions_carry(caplog):
    """Rows alone, of which as many as images could not be, still fit after a plan."""
    config = dataclasses.replace(
        BUDGET, capture_seq_lens=None, capture_axes={"height": (8, 16)}, max_bucket_elements=32
    )
    sizes = {Bucket(8, 1): 5, Bucket(4, 1, height=8): 5, Bucket(2, 1, height=15): 5}
    planned = planned_config(config, plan_from(sizes, config))
    assert planned.admits(Bucket(8, 1), ["batch"])
    assert "planned without 5 requests of 15" in caplog.text  # for want of buckets
    assert all(map(planned.admits, list(sizes)[1:]))


@pytest.mark.parametrize(("budget", "left_out"), [(512, False), (1024, False), (511, True)])
def test_a_plan_of_functions_that_carry_different_axes(budget, left_out, caplog):
    """What was served before a plan is served after it; what was not is left out, and told."""
    config = CUDAGraphConfig(
        capture_sizes=(2, 8, 64),
        capture_seq_lens=(8, 64),
        capture_axes={"src": (16, 64)},
        max_bucket_elements=budget,
        on_overflow="eager" if left_out else "error",
        warmup_iterations=0,
    )
    manager = CUDAGraphManager(config)
    rows = bucket_jit(double, in_axes="batch seq", manager=manager)
    sources = bucket_jit(double, in_axes="batch src", manager=manager)
    calls = [(rows, 64, 8), (rows, 8, 64), (sources, 2, 64), (sources, 8, 64), (sources, 2, 16)]
    for function, *shape in calls:
        function(floats(0, *shape))
    plan = manager.replan(max_graphs=12)
    manager.wait()
    assert plan.requests == (2 if left_out else 5)
    text = f"planned without 3 requests of 5, which no bucket within max_bucket_elements={budget}"
    assert left_out == any(each.startswith(text) for each in caplog.messages)
    manager.seal()
    eager = manager.stats()["eager_calls"]
    for function, *shape in calls:
        x = floats(1, *shape)
        assert_close(function(x), x * 2)
    assert (manager.stats()["eager_calls"] > eager) == left_out
