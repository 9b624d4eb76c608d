"""A grid from the first part of a stream."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import CUDAGraphConfig
from cudagraph_jax.demo import DemoError
from cudagraph_jax.demo.planned.prefix_plan import (
    first_tenth,
    likely_sizes,
    plan_grid,
    powers_of_two,
    with_grid,
)
from cudagraph_jax.demo.traffic import micro_batches

lengths_strategy = st.lists(st.integers(1, 256), min_size=1, max_size=60)


def stream(lengths, max_size=16):
    return micro_batches([[1] * length for length in lengths], max_size=max_size)


def test_powers_of_two():
    """The grid that one guesses holds every micro-batch of the demo."""
    config = powers_of_two()
    assert config.capture_sizes == (1, 2, 4, 8, 16)
    assert config.capture_seq_lens == (16, 32, 64, 128, 256)
    assert (config.max_batch_size, config.max_seq_len) == (16, 256)


def test_with_grid():
    """Another grid has its own limits, and the same policies."""
    config = CUDAGraphConfig(capture_sizes=(8,), capture_seq_lens=(64,), on_miss="error")
    assert with_grid(config, (2,), (16,)) == CUDAGraphConfig(
        capture_sizes=(2,), capture_seq_lens=(16,), on_miss="error"
    )


@pytest.mark.parametrize(
    ("count", "seen"), [(2, 1), (4, 2), (6, 3), (30, 3), (31, 4), (74, 8), (128, 13)]
)
def test_first_tenth(count, seen):
    """A tenth, rounded up; three at least, but never more than half."""
    batches = stream([5] * count, max_size=1)
    assert len(batches) == count
    assert first_tenth(batches) == seen


def test_too_short_a_stream():
    """A stream that cannot be divided is refused, with what to do."""
    with pytest.raises(DemoError, match=r"^1 micro-batch is too few .* raise --limit"):
        first_tenth(stream([5]))


@given(lengths_strategy, st.integers(1, 16))
def test_every_batch_size_is_equally_likely(lengths, max_size):
    """Each batch size comes equally often, with lengths that were seen."""
    by_batch: collections.Counter = collections.Counter()
    for (batch, length), count in likely_sizes(lengths, max_size=max_size).items():
        assert length in lengths
        by_batch[batch] += count
    assert set(by_batch) == set(range(1, max_size + 1))
    # Each of the lengths is rounded by itself.
    assert all(abs(count - 10_000) <= len(lengths) for count in by_batch.values())


def test_a_batch_is_as_long_as_its_longest():
    """The sizes come as often as in micro-batches that are really drawn."""
    lengths = [10] * 80 + [30] * 15 + [200] * 5
    random = np.random.default_rng(0)
    drawn = random.choice(lengths, (20_000, 8)).max(axis=1)
    expected = likely_sizes(lengths, max_size=8)
    for length in (10, 30, 200):
        assert expected[8, length] / 10_000 == pytest.approx((drawn == length).mean(), abs=0.02)


@settings(max_examples=20)
@given(lengths_strategy)
def test_plan(lengths):
    """The plan has no more buckets than the guess, and holds the largest micro-batch."""
    config = powers_of_two()
    plan = plan_grid(stream(lengths), config)
    assert plan.num_graphs <= len(config.buckets())
    assert (plan.batch_sizes.max, plan.seq_lens.max) == (16, 256)


def test_plan_wastes_less():
    """On a stream like the part that was seen the plan pads half as much as powers of two."""
    lengths = np.random.default_rng(0).integers(8, 200, 4000).tolist()
    batches = stream(lengths)
    seen = first_tenth(batches)
    sizes = np.array([batch.shape for batch in batches[seen:]])
    config = powers_of_two()
    planned = with_grid(config, *_ladders(plan_grid(batches[:seen], config)))

    def padded(grid):
        return sum(grid.bucket_for(*size).elements for size in sizes.tolist()) - sizes.prod(1).sum()

    assert padded(planned) <= padded(config) / 2


def _ladders(plan):
    return plan.batch_sizes, plan.seq_lens
