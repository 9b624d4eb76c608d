"""`plan_buckets`: its arguments, what they may be and what is said of what they may not."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.planner import plan_buckets
from cudagraph_jax.shapes.ladder import Bucket

LENGTHS = st.dictionaries(st.integers(1, 30), st.integers(1, 9), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("headroom", "batch", "seq"),
    [
        (None, 3, 100),
        (128, 3, 128),
        (np.int64(128), 3, 128),
        (50, 3, 100),
        ((8, 50), 8, 100),
        ((1, 300), 3, 300),
        (0.0, 3, 100),
        (0.1, 4, 110),
        (0.07, 4, 107),
        (0.25, 4, 125),
        (1.0, 6, 200),
        (np.float32(0.25), 4, 125),
    ],
    ids=repr,
)
def test_headroom(headroom, batch, seq):
    """The largest bucket goes as far as asked, and never less far than the largest size."""
    plan = plan_buckets([(1, 100), (3, 20)], max_graphs=4, headroom=headroom)
    assert (plan.batch_sizes.max, plan.seq_lens.max) == (batch, seq)
    assert plan.num_graphs <= 4


def test_headroom_leaves_an_axis_of_ones():
    """A fraction of headroom gives no batches to who has lengths alone."""
    plan = plan_buckets([8, 80], max_graphs=2, headroom=0.5)
    assert (plan.batch_sizes, plan.seq_lens.max) == ((1,), 120)


def test_calls_of_the_cost():
    """A cost is asked with plain integers, once for each pair of candidates and size at most."""
    calls: Counter[tuple[int, int]] = Counter()

    def cost(batch, seq):
        assert (type(batch), type(seq)) == (int, int)
        calls[batch, seq] += 1
        return float(batch * seq)

    draw = np.random.default_rng(0)
    sizes = np.stack([draw.integers(1, 21, 500), draw.integers(1, 101, 500)], axis=1)
    plan = plan_buckets(sizes, max_graphs=16, cost=cost)
    standard = sum(row.graphs for row in plan.comparison)
    assert calls.total() <= 20 * 100 + 500 + standard


def test_huge_sizes():
    """Sizes up to 2**53 are planned without overflow; tables of standard sizes are left out."""
    plan = plan_buckets([(2**31, 2**31), (2**53, 2**53), (1, 1)], max_graphs=4)
    assert (plan.batch_sizes, plan.seq_lens) == ((2**31, 2**53), (2**31, 2**53))
    assert [row.name for row in plan.comparison] == ["powers of two"]
    plan = plan_buckets({5: 2**52, 2**53 - 1: 1}, max_graphs=1)
    assert plan.requests == 2**52 + 1
    assert 0.999 < plan.expected_waste < 1


def test_too_many_sizes_on_both_axes():
    """Sizes that would need a table beyond memory are an error that says what to do."""
    sizes = np.stack([np.arange(1, 5001)] * 2, axis=1)
    with pytest.raises(ConfigError) as caught:
        plan_buckets(sizes, max_graphs=4, cost=lambda batch, seq: float(batch * seq))
    assert str(caught.value) == (
        "sizes have 5,000 batch sizes and 5,000 sequence lengths, too many to try each with each: "
        "set batch_multiple or seq_multiple, or plan from fewer requests"
    )
    assert plan_buckets(sizes, max_graphs=1, seq_multiple=500, batch_multiple=500).num_graphs == 1
    # A formula needs no table.
    assert plan_buckets(sizes, max_graphs=4).batch_sizes.max == 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_graphs": 0}, "max_graphs=0 is below 1: give a size of 1 or more"),
        ({"max_graphs": 2.0}, "max_graphs=2.0 is not an integer: give a size of 1 or more"),
        (
            {"cost": "elements"},
            "cost='elements' is no function: give one of (batch, seq_len), such as "
            "attention_cost(768), or None for the elements",
        ),
        ({"batch_multiple": 0}, "batch_multiple=0 is below 1: give a size of 1 or more"),
        ({"seq_multiple": 0}, "seq_multiple=0 is below 1: give a size of 1 or more"),
        ({"seq_multiple": "8"}, "seq_multiple='8' is not an integer: give a size of 1 or more"),
        (
            {"seq_multiple": 2**60},
            "headroom and seq_multiple ask for a bucket of 1152921504606846976, above 2**53: set a "
            "smaller one",
        ),
        (
            {"headroom": 2**60},
            "headroom and seq_multiple ask for a bucket of 1152921504606846976, above 2**53: set a "
            "smaller one",
        ),
        (
            {"headroom": True},
            "headroom=True is not an integer: give a size of 1 or more",
        ),
        ({"headroom": -5}, "headroom=-5 is below 1: give a size of 1 or more"),
        ({"headroom": 0}, "headroom=0 is below 1: give a size of 1 or more"),
        ({"headroom": "9"}, "headroom='9' is not an integer: give a size of 1 or more"),
        (
            {"headroom": (4, 0.5)},
            "headroom[1]=0.5 is not an integer: give a size of 1 or more",
        ),
        (
            {"headroom": (1, 2, 3)},
            "headroom=(1, 2, 3) has 3 sizes: give a seq_len, a (batch, seq_len) or a fraction such "
            "as 0.25",
        ),
        (
            {"headroom": -0.5},
            "headroom=-0.5 is no fraction: give 0.0 or more, such as 0.25, or a size",
        ),
        (
            {"headroom": math.nan},
            "headroom=nan is no fraction: give 0.0 or more, such as 0.25, or a size",
        ),
        (
            {"headroom": math.inf},
            "headroom=inf is no fraction: give 0.0 or more, such as 0.25, or a size",
        ),
    ],
    ids=repr,
)
def test_bad_arguments(arguments, message):
    """What is no argument is named with its value and what to give instead."""
    with pytest.raises(ConfigError) as caught:
        plan_buckets([5, 9], **{"max_graphs": 2, **arguments})
    assert str(caught.value) == message


def test_a_huge_fraction():
    """A fraction beyond all sizes is refused as a size, not by an overflow."""
    with pytest.raises(ConfigError, match=r"headroom and seq_multiple ask for a bucket of"):
        plan_buckets([5], max_graphs=2, headroom=1e300)


@settings(max_examples=30)
@given(LENGTHS, st.integers(1, 5))
def test_forms_of_sizes(sizes, max_graphs):
    """Arrays, lists, tuples, iterators and histograms of the same sizes give equal plans."""
    assume(sum(sizes.values()) > 1)
    each = [size for size, count in sizes.items() for _ in range(count)]
    plan = plan_buckets(sizes, max_graphs=max_graphs)
    forms = (
        each,
        tuple(each),
        iter(each),
        np.array(each, np.int32),
        np.array(each, np.float64),
        [(1, size) for size in each],
        Counter(each),
        {(1, size): count for size, count in sizes.items()},
        {Bucket(1, size): count for size, count in sizes.items()},
    )
    for form in forms:
        assert plan_buckets(form, max_graphs=max_graphs) == plan


def test_a_cost_that_raises():
    """A cost's own error is the caller's to see."""

    def cost(batch, seq):
        raise LookupError("no time for this size")

    with pytest.raises(LookupError, match="no time for this size"):
        plan_buckets([5, 9], max_graphs=2, cost=cost)


def test_a_cost_for_other_requests():
    """A plan that is tried with what is no cost says the same."""
    plan = plan_buckets([5, 9], max_graphs=2)
    with pytest.raises(ConfigError, match="cost=3 is no function"):
        plan.evaluate([5], cost=3)  # type: ignore[arg-type]  # what fails on purpose


@pytest.mark.parametrize(
    ("axes", "cost"),
    [
        (("batch", "src", "tgt"), lambda batch, seq: float(batch * seq)),
        (("batch", "seq"), lambda rows: 1.0 * rows),
        (("batch", "seq"), lambda batch, *, seq: float(batch * seq)),
        (("batch", "src", "tgt"), np.multiply),
        (("batch", "seq"), np.sqrt),
    ],
)
def test_a_cost_of_other_arguments(axes, cost):
    """A cost that does not take a size on each axis is refused with those that it is given."""
    names = ", ".join("seq_len" if axis == "seq" else axis for axis in axes)
    with pytest.raises(ConfigError, match=rf"cost=.* takes .*: give a function of \({names}\)$"):
        plan_buckets([(1,) * len(axes)], axes=axes, max_graphs=2, cost=cost)
    two: list[Any] = [np.multiply] * (len(axes) == 2)
    for taken in (*two, max, lambda *sizes: float(max(sizes)), lambda a, b, c=1: float(a)):
        plan_buckets([(1,) * len(axes)], axes=axes, max_graphs=2, cost=taken)
