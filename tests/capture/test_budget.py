"""Budget: a grid that does not fit is refused before the first bucket over it is compiled."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CaptureError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphWarning,
    GraphStore,
    bucket_jit,
)
from cudagraph_jax.capture.failures import Failures
from cudagraph_jax.xla.memory import Memory
from tests.helpers.functions import GRID, assert_close, big, double, floats, stats_of
from tests.helpers.memory import ROW, borrows, keeps, sized_manager

QUIET = {"progress": False}


def big_function(sizes, **options):
    manager = sized_manager(keeps, capture_sizes=sizes, **options)
    return bucket_jit(big, in_axes=("batch _",), manager=manager)


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
    manager = sized_manager(lambda bucket: Memory(ROW), capture_sizes=(1,), capture_seq_lens=(8, 9))
    function = bucket_jit(big, in_axes=("batch seq",), manager=manager)
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


def fixed_function(sizes, **options):
    """Keeps 400 kB for a bucket, however many rows."""
    manager = sized_manager(lambda bucket: Memory(ROW), capture_sizes=sizes, **options)
    return bucket_jit(double, in_axes=("batch _",), manager=manager)


def test_a_bucket_over_the_whole_budget_ends_the_warmup():
    """The first bucket that can never fit is an error with its size; no other one is compiled."""
    function = big_function((1, 2, 8, 16, 32))
    with pytest.raises(ConfigError) as caught:
        function.warmup(floats(0, 1, 1), **QUIET)
    assert (function.registry.capture_count, function.registry.num_graphs) == (1, 0)
    assert isinstance(caught.value.__cause__, CaptureError)
    said = str(caught.value)
    for part in ("memory_pool_size_mb=1", "big at 32x1 needs", "1,048,576", "raise"):
        assert part in said


def test_memory_that_does_not_shrink():
    """Where small buckets need as much as large ones, the one that drives another out says so."""
    function = fixed_function((4, 16, 64))
    with pytest.raises(ConfigError, match="64x1 had to leave when 4x1 was captured") as caught:
        function.warmup(floats(0, 1, 1), **QUIET)
    assert (function.registry.capture_count, function.registry.evictions) == (3, 1)
    assert "memory_pool_size_mb=1: 3 buckets need" in str(caught.value)


def test_what_fits_just_is_not_refused():
    """A grid whose small buckets need less than their share of the largest is captured."""
    report = fixed_function((16, 64)).warmup(floats(0, 1, 1), **QUIET)
    assert report.captured == 2


@pytest.mark.filterwarnings("ignore:.* closes over arrays")
def test_a_larger_bucket_that_comes_later_needs_no_less(tmp_path):
    """With hot buckets first, too, a bucket that does not fit is said before it is compiled."""
    store = GraphStore(tmp_path)
    store.remember_hot({"heavy": {"2x1": 9, "1x1": 8}})
    config = CUDAGraphConfig(capture_sizes=(1, 2, 4), memory_pool_size_mb=12, warmup_iterations=0)
    manager = CUDAGraphManager(config, store=store)
    weights = jnp.arange(700_000.0)

    def heavy(x):
        return x + weights.sum()

    other = bucket_jit(lambda x: heavy(x) + 1, in_axes=("batch _",), manager=manager, name="other")
    other(floats(0, 1, 1))
    function = bucket_jit(heavy, in_axes=("batch _",), manager=manager)
    with pytest.raises(ConfigError, match="and the next one, 4x1, needs about"):
        function.warmup(floats(0, 1, 1), **QUIET)
    assert [entry.key for entry in function.registry.entries()] == [(1, 1), (2, 1), (1, 1)]
    assert (function.registry.capture_count, function.registry.evictions) == (3, 0)


def jumping(x):
    return x + 1


def test_the_last_bucket_may_not_drive_one_out():
    """A bucket that needs more than was estimated, also the last one, is no silent eviction."""
    needs = {4: Memory(400_000), 2: Memory(16), 1: Memory(800_000)}
    manager = sized_manager(lambda bucket: needs[bucket.batch_size], capture_sizes=(1, 2, 4))
    function = bucket_jit(jumping, in_axes=("batch _",), manager=manager)
    with pytest.raises(ConfigError) as caught:
        function.warmup(floats(0, 1, 1), **QUIET)
    assert (function.registry.capture_count, function.registry.evictions) == (3, 1)
    said = str(caught.value)
    assert "memory_pool_size_mb=1: 3 buckets need" in said
    assert "the budget is 1,048,576, so that jumping at 4x1 had to leave" in said
    assert "when 1x1 was captured: raise it" in said


def test_other_arguments_of_the_same_function_keep_their_buckets():
    """A warm-up for another static value does not drive out the buckets of the first one."""

    def scaled(x, *, by):
        return x * by

    config = dataclasses.replace(GRID, max_graphs=8)
    function: Any = bucket_jit(scaled, in_axes=("batch seq",), static_argnames="by", config=config)
    function.warmup(floats(0, 2, 4), by=2, **QUIET)
    with pytest.raises(ConfigError) as caught:
        function.warmup(floats(0, 2, 4), by=3, **QUIET)
    assert (function.registry.num_graphs, function.registry.evictions) == (6, 0)
    said = str(caught.value)
    assert "6 buckets beside the 6 of other functions or arguments" in said
    assert "max_graphs=8" in said
    assert "reset()" in said
    function.manager.reset()
    assert function.warmup(floats(0, 2, 4), by=3, **QUIET).captured == 6


def test_memory_of_other_functions_is_not_taken():
    """A grid that would fit alone is refused where another function holds the memory."""
    first = big_function((2,))
    second = bucket_jit(
        lambda x: big(x + 1), in_axes=("batch _",), manager=first.manager, name="second"
    )
    first.warmup(floats(0, 1, 1), **QUIET)
    with pytest.raises(ConfigError, match="big at 2x1 had to leave when 2x1 was captured"):
        second.warmup(floats(0, 1, 1), **QUIET)


def test_buckets_outside_the_grid_may_go():
    """What was captured on the way, outside the grid, leaves for a grid that fits without it."""
    config = dataclasses.replace(GRID, max_graphs=6, on_overflow="exact")
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    function(floats(0, 9, 9))
    assert function.warmup(floats(0, 2, 4), **QUIET).captured == 6
    assert (function.registry.num_graphs, function.registry.evictions) == (6, 1)


def test_a_reset_meanwhile_is_no_eviction():
    """Buckets that are dropped on purpose during a warm-up are not held against the budget."""
    config = dataclasses.replace(GRID, max_graphs=6)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    resets = [function.manager.reset]

    def progress(done, total, bucket):
        if done == 3 and resets:
            resets.pop()()

    function.warmup(floats(0, 2, 4), progress=progress)
    assert function.registry.num_graphs == 3


def test_an_over_budget_bucket_is_compiled_once():
    """A bucket over the whole budget is said in plain words, served eagerly, and never retried."""
    clock = itertools.count(step=1000.0)
    function = big_function((4,))
    manager = function.manager
    manager.dispatcher.capturer.failures = Failures(clock=lambda: next(clock))
    x = floats(0, 4, 1)
    with pytest.warns(CUDAGraphWarning) as told:  # noqa: PT031
        for _ in range(3):
            assert_close(function(x), np.asarray(big(jnp.asarray(x))))
    assert function.registry.capture_count == 1
    (warning,) = told
    said = str(warning.message)
    assert "big at 4x1 needs 1,600,000 bytes" in said
    assert "1,048,576" in said
    assert "not tried again" in said
    explained = str(function.explain(x))
    for text in (said, explained):
        assert "Variant(" not in text
        assert "PyTreeDef" not in text


def test_temporary_memory_is_no_sum():
    """Buckets of temporary memory that fit one by one fit together: a run gives it back."""
    manager = sized_manager(borrows, capture_sizes=(1, 2))
    function = bucket_jit(double, in_axes=("batch _",), manager=manager)
    report = function.warmup(floats(0, 1, 1), **QUIET)
    assert report.captured == 2
    assert stats_of(function)["registry"]["memory_bytes"] == 2 * 1000 + 2 * ROW


def test_alternating_buckets_compile_once_each():
    """Traffic between two buckets that borrow most of the pool compiles each of them once."""
    manager = sized_manager(borrows, capture_sizes=(1, 2))
    function = bucket_jit(double, in_axes=("batch _",), manager=manager)
    for batch in (1, 2, 1, 2, 1, 2):
        function(floats(0, batch, 1))
    assert (function.registry.capture_count, function.registry.evictions) == (2, 0)


def test_one_bucket_that_borrows_too_much_drives_nobody_out():
    """What alone borrows more than the pool is refused by name; the others stay."""
    manager = sized_manager(borrows, capture_sizes=(1, 2, 8))
    function = bucket_jit(double, in_axes=("batch _",), manager=manager)
    for batch in (1, 2):
        function(floats(0, batch, 1))
    with pytest.warns(CUDAGraphWarning, match="double at 8x1 needs 3,201,000 bytes"):
        function(floats(0, 8, 1))
    assert (function.registry.num_graphs, function.registry.evictions) == (2, 0)


def test_less_temporary_memory_is_asked_for_before_a_bucket_is_refused():
    """A bucket that fits where XLA runs its operations one by one is compiled like that."""
    manager = sized_manager(
        borrows, one_by_one=lambda bucket: Memory(1000, ROW), capture_sizes=(1, 8)
    )
    function = bucket_jit(double, in_axes=("batch _",), manager=manager)
    assert function.warmup(floats(0, 1, 1), **QUIET).captured == 2
    small, large = sorted(function.registry.entries(), key=lambda entry: entry.key)
    assert (small.memory_bytes, large.memory_bytes) == (ROW + 1000, ROW + 1000)
    assert (dict(small.options), list(large.options)) == ({}, ["xla_cpu_scheduler_type"])


def side_by_side(x):
    """8 operations that XLA runs at once, each with 1 MiB of temporary memory for 8 rows."""
    wide = x[:, None] * jnp.ones((1, 1 << 15))
    return sum(jnp.sort(wide * by, axis=-1).mean(1) for by in range(1, 9))


def test_xla_runs_operations_one_by_one_where_memory_is_short():
    """Operations that would take more than the pool at once are compiled to take it in turn."""
    config = CUDAGraphConfig(capture_sizes=(8,), memory_pool_size_mb=4, warmup_iterations=0)
    function = bucket_jit(side_by_side, in_axes=("batch",), config=config)
    x = np.arange(1, 8, dtype=np.float32)
    assert_close(function(x), 36 * x)
    wide = bucket_jit(
        side_by_side,
        in_axes=("batch",),
        config=dataclasses.replace(config, memory_pool_size_mb=1024),
    )
    wide(x)
    (frugal,), (entry,) = function.registry.entries(), wide.registry.entries()
    assert (frugal.memory_bytes or 0) < 2**22 < (entry.memory_bytes or 0)


def spare(function, free):
    """The same with so many bytes free of each device."""
    function.manager.dispatcher.capturer.free_bytes = lambda device: free
    return function


def test_a_device_without_room_is_said_before_anything_is_compiled():
    """Inputs and outputs of the largest bucket that are more than is free end the warm-up."""
    function = spare(bucket_jit(double, in_axes=("batch seq",), config=GRID), 63)
    with pytest.raises(ConfigError, match=r"needs 160 bytes of .* but 63 are free"):
        function.warmup(floats(0, 2, 4), **QUIET)
    assert function.registry.capture_count == 0
    assert spare(function, 160).warmup(floats(0, 2, 4), **QUIET).captured == 6


def test_temporary_memory_is_compared_before_the_first_run():
    """Temporary memory that is more than is free is said as soon as the compiler tells it."""
    manager = sized_manager(borrows, capture_sizes=(1, 2), warmup_iterations=1)
    function = spare(bucket_jit(double, in_axes=("batch _",), manager=manager), ROW)
    with pytest.raises(ConfigError, match=f"double at 2x1 needs {2 * ROW + 16:,} bytes of"):
        function.warmup(floats(0, 1, 1), **QUIET)
    assert function.registry.capture_count == 1


def test_what_is_passed_through_is_on_the_device():
    """Parameters count for nothing: they are there before the warm-up."""
    function = bucket_jit(
        lambda w, x: x + w.sum(), in_axes=(None, "batch seq"), config=GRID, name="scaled"
    )
    spare(function, 4096).warmup(np.ones((1024, 1024), np.float32), floats(0, 2, 4), **QUIET)
    assert function.registry.capture_count == 6


def test_a_device_that_does_not_tell_refuses_nothing():
    """Where the backend does not say what is free, as on a CPU, nothing is refused."""
    function = spare(bucket_jit(double, in_axes=("batch seq",), config=GRID), None)
    assert function.warmup(floats(0, 2, 4), **QUIET).captured == 6
