"""What the buckets of a grid are taken to cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import Bucket
from cudagraph_jax.batching.lane import plausible


def test_an_outlier_does_not_price_a_bucket_out():
    """One that seems to cost more than a larger one counts as half-way, so that it runs again."""
    costs = {Bucket(1, 29): 1.4, Bucket(1, 49): 66.0, Bucket(1, 74): 1.9, Bucket(4, 49): 3.7}
    assert plausible(costs) == pytest.approx([1.4, (1.4 + 1.9) / 2, 1.9, 3.7])


def test_what_is_measured_stands_where_it_can_be():
    """Costs that grow with the bucket are as measured, and nothing is made up without any."""
    costs = {Bucket(1, 8): 1.0, Bucket(1, 16): 1.5, Bucket(4, 8): 1.2, Bucket(4, 16): 3.0}
    assert plausible(costs) == list(costs.values())
    assert plausible({}) == []


@given(
    st.dictionaries(
        st.builds(Bucket, st.integers(1, 4), st.integers(1, 4), height=st.integers(1, 3)),
        st.floats(0.1, 100),
        max_size=12,
    )
)
def test_none_costs_more_than_a_larger_one(costs):
    """Whatever is measured, a bucket counts as no dearer than any that holds more was measured."""
    bounded = plausible(costs)
    for bucket, cost in zip(costs, bounded, strict=True):
        larger = [costs[other] for other in costs if other != bucket and other.holds(bucket)]
        assert 0 < cost <= costs[bucket]
        assert all(cost <= price for price in larger)
