"""Ladders, configurations and sizes that tests are drawn from."""

from __future__ import annotations

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from cudagraph_jax import Bucket, CUDAGraphConfig, Ladder
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.testing import configs, ladders, sizes
from tests.helpers.examples import ANY

WIDE = CUDAGraphConfig(capture_sizes=(4, 100, 1000), capture_seq_lens=(64, 5000))
POLICIES = {
    "on_miss": ("capture", "background", "eager", "error"),
    "on_overflow": ("eager", "split", "exact", "error"),
}


def sizes_to(limit: int) -> st.SearchStrategy[int]:
    return st.integers(1, limit)


@given(st.data(), sizes_to(40), sizes_to(6))
def test_ladders_are_inside_their_limits(data, max_size, max_rungs):
    """A ladder has from one to `max_rungs` sizes, none above `max_size`."""
    ladder = data.draw(ladders(max_size=max_size, max_rungs=max_rungs))
    assert isinstance(ladder, Ladder)
    assert 1 <= len(ladder) <= max_rungs
    assert 1 <= ladder[0] <= ladder.max <= max_size


def test_every_ladder_may_be_drawn():
    """From the shortest to the whole of a small range."""
    assert find(ladders(), lambda ladder: True) == Ladder((1,))
    for rungs in ((3,), (1, 3), (2, 3), (1, 2, 3)):
        assert find(ladders(max_size=3), rungs.__eq__)


@pytest.mark.parametrize("limits", [{"max_size": 0}, {"max_rungs": 0}])
def test_limits_of_ladders(limits):
    """A ladder without a size, or with a size below 1, is refused when it is asked for."""
    (name,) = limits
    with pytest.raises(ConfigError, match=f"{name}=0 is below 1: a ladder has a size"):
        ladders(**limits)


@given(st.data(), sizes_to(20), sizes_to(40))
def test_configurations_are_inside_their_limits(data, max_batch_size, max_seq_len):
    """A configuration has a grid of at most these sizes, and takes no longer sequences."""
    config = data.draw(configs(max_batch_size=max_batch_size, max_seq_len=max_seq_len))
    assert config.max_batch_size == max(config.capture_sizes) <= max_batch_size
    assert config.max_seq_len <= max_seq_len
    assert CUDAGraphConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in POLICIES.items() for value in values]
)
def test_every_policy_may_be_drawn(name, value):
    """Each policy is one that may be drawn, with lengths that are padded and with others."""
    for is_padded in (True, False):

        def wanted(config: CUDAGraphConfig, is_padded: bool = is_padded) -> bool:
            has_lengths = config.capture_seq_lens is not None
            return getattr(config, name) == value and has_lengths is is_padded

        assert wanted(find(configs(), wanted, settings=ANY))


@pytest.mark.parametrize("is_limited", [True, False])
def test_budgets_and_axes_may_be_drawn(is_limited):
    """A grid of further axes is drawn where they are named, and a budget that leaves buckets."""

    def wanted(config: CUDAGraphConfig) -> bool:
        assert set(config.capture_axes) == {"height", "src"}
        assert max(config.capture_axes["height"]) <= 5
        assert config.buckets()
        return (config.max_bucket_elements is not None) is is_limited

    drawn = configs(max_sizes={"height": 5, "src": 3})
    assert wanted(find(drawn, wanted, settings=ANY))
    assert not find(configs(), lambda config: True).capture_axes


@given(configs(on_miss="error", capture_sizes=(2, 6), max_graphs=3))
def test_fields_that_are_not_drawn(config):
    """What is given is kept, and the rest is drawn."""
    assert (config.on_miss, config.capture_sizes, config.max_graphs) == ("error", (2, 6), 3)


@given(configs(capture_seq_lens=None, max_capture_seq_len=9), configs(capture_seq_lens=(3, 7)))
def test_given_lengths(unpadded, padded):
    """Lengths that are given hold, whatever `max_seq_len` says of those that are drawn."""
    assert (unpadded.capture_seq_lens, unpadded.max_seq_len) == (None, 9)
    assert padded.capture_seq_lens == (3, 7)


def test_a_field_that_there_is_not():
    """A misspelt field is refused, and the nearest one is named."""
    with pytest.raises(ConfigError, match="on_miss"):
        find(configs(on_mis="error"), lambda config: True)
    with pytest.raises(ConfigError, match=r"max_sizes=.* and capture_axes=.* both say which axes"):
        find(configs(max_sizes={"h": 4}, capture_axes={"w": (3,)}), lambda config: True)


@given(st.data(), configs())
def test_sizes_are_inside_the_limits(data, config):
    """Any size that is drawn is one that the configuration takes."""
    size = data.draw(sizes(config))
    assert isinstance(size, Bucket)
    assert config.should_use_cudagraph(*size)


@given(st.data(), configs(), sizes_to(20), sizes_to(40))
def test_narrower_limits(data, config, max_batch_size, max_seq_len):
    """Limits narrow those of the configuration, and never widen them."""
    narrow = sizes(config, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    batch, seq = data.draw(narrow)
    assert 1 <= batch <= min(max_batch_size, config.max_batch_size)
    assert 1 <= seq <= min(max_seq_len, config.max_seq_len)


@pytest.mark.parametrize("batch", [1, 4, 5, 100, 101, 1000])
@pytest.mark.parametrize("seq", [1, 64, 65, 5000])
def test_every_edge_may_be_drawn(batch, seq):
    """1, a bucket's size, one above it and the largest one, along each axis."""
    assert find(sizes(WIDE), lambda size: size == (batch, seq), settings=ANY)


def test_sizes_are_drawn_towards_the_edges():
    """About half of the batches are at one of six edges, which are six of a thousand sizes."""
    drawn: list[Bucket] = []

    @settings(max_examples=500, database=None, derandomize=True)
    @given(sizes(WIDE))
    def collect(size: Bucket) -> None:
        drawn.append(size)

    collect()
    at_edges = [size for size in drawn if size.batch_size in (1, 4, 5, 100, 101, 1000)]
    assert 0.3 < len(at_edges) / len(drawn) < 0.95
    assert {size.seq_len for size in drawn} > {1, 64, 65, 5000}


def test_a_limit_is_an_edge():
    """A limit between two buckets is drawn, and no bucket above it."""
    found = {
        find(sizes(WIDE, max_batch_size=50, max_seq_len=3), at.__eq__)
        for at in [(50, 3), (4, 1), (5, 3)]
    }
    assert len(found) == 3


def test_sizes_shrink_to_the_smallest():
    """What fails at all sizes is shown for one row of one element."""
    assert find(sizes(WIDE), lambda size: True) == Bucket(1, 1)
    assert find(sizes(WIDE), lambda size: size.batch_size > 6) == Bucket(7, 1)


def test_limits_of_sizes():
    """A limit below one row or one element is refused when it is asked for."""
    with pytest.raises(ConfigError, match="max_batch_size=0 is below 1: a call has one row"):
        sizes(WIDE, max_batch_size=0)
    with pytest.raises(ConfigError, match="max_seq_len=0 is below 1: a call has one row"):
        sizes(WIDE, max_seq_len=0)
