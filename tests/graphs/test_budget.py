"""Budget: a grid that does not fit is refused before the first bucket over it is compiled."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import ConfigError, CUDAGraphConfig, CUDAGraphManager, bucket_jit
from tests.graphs.functions import GRID, assert_close, double, floats

QUIET = {"progress": False}


def big(x):
    """Needs 400 kB of temporary memory a row."""
    wide = jnp.sort(jnp.broadcast_to(x[:, :1], (x.shape[0], 100_000)) * jnp.arange(100_000.0), 1)
    return wide[:, ::50_000]


def big_function(sizes, **options):
    config = CUDAGraphConfig(
        capture_sizes=sizes, memory_pool_size_mb=1, warmup_iterations=0, **options
    )
    return bucket_jit(big, in_axes=("batch _",), config=config)


def test_more_buckets_than_graphs():
    """A grid of more buckets than max_graphs is refused with both numbers; nothing is compiled."""
    config = dataclasses.replace(GRID, max_graphs=5)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    with pytest.raises(ConfigError, match=r"6 buckets, more than max_graphs=5"):
        function.warmup(floats(0, 2, 4), **QUIET)
    assert function.registry.capture_count == 0
    enough = dataclasses.replace(GRID, max_graphs=6)
    function = bucket_jit(double, in_axes=("batch seq",), config=enough)
    assert len(function.warmup(floats(0, 2, 4), **QUIET).buckets) == 6
    assert function.registry.num_graphs == 6


def test_a_grid_without_lengths_counts_its_batches():
    """Only the buckets that a call can be padded to count against max_graphs."""
    config = dataclasses.replace(GRID, max_graphs=3)
    function = bucket_jit(double, in_axes=("batch _",), config=config)
    assert len(function.warmup(floats(0, 2, 4), **QUIET).buckets) == 3


def test_more_memory_than_the_budget():
    """The first bucket over the memory budget is not compiled; the error has all the sizes."""
    function = big_function((1, 2))
    with pytest.raises(ConfigError) as caught:
        function.warmup(floats(0, 1, 1), **QUIET)
    assert [entry.key for entry in function.registry.entries()] == [(2, 1)]
    assert function.registry.capture_count == 1
    (entry,) = function.registry.entries()
    said = str(caught.value)
    for part in ("memory_pool_size_mb=1", "1x1", "1,048,576", f"{entry.memory_bytes:,}"):
        assert part in said
    x = floats(1, 2, 1)
    assert_close(function(x), np.asarray(big(jnp.asarray(x))))


def test_without_a_pool_there_is_no_budget():
    """use_memory_pool=False switches the memory budget off."""
    function = big_function((1, 2), use_memory_pool=False)
    assert len(function.warmup(floats(0, 1, 1), **QUIET).buckets) == 2


def test_a_grid_that_fits_may_be_warmed_up_again():
    """A second warm-up of a grid that is held needs no more memory, and is no error."""
    config = CUDAGraphConfig(
        capture_sizes=(1,), capture_seq_lens=(8, 9), memory_pool_size_mb=1, warmup_iterations=0
    )
    function = bucket_jit(big, in_axes=("batch seq",), config=config)
    for length in (9, 8):
        function(floats(0, 1, length))
    assert function.registry.num_graphs == 2
    function.warmup(floats(0, 1, 1), **QUIET)
    assert (function.registry.num_graphs, function.registry.capture_count) == (2, 2)


def test_functions_that_share_a_manager_fit_together():
    """Two grids that fit one after the other do not drive each other out without a word."""
    manager = CUDAGraphManager(dataclasses.replace(GRID, max_graphs=8))
    first = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    second = bucket_jit(lambda x: x + 1, in_axes=("batch seq",), manager=manager)
    first.warmup(floats(0, 2, 4), **QUIET)
    with pytest.raises(ConfigError, match="max_graphs=8"):
        second.warmup(floats(0, 2, 4), **QUIET)
    assert (manager.registry.num_graphs, manager.registry.evictions) == (6, 0)
