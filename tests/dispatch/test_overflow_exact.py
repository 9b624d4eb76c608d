"""on_overflow="exact": sizes outside the limits get a bucket of their own."""

from __future__ import annotations

import dataclasses
import gc
import os
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphMode,
    CUDAGraphWarning,
    SealedError,
    bucket_jit,
    no_compiles,
)
from tests.helpers.examples import IS_THOROUGH
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

EXACT = dataclasses.replace(GRID, on_overflow="exact")
LARGE = ((9, 4), (2, 9), (9, 9))


def exact(function=double, **options):
    config = dataclasses.replace(EXACT, **options)
    return bucket_jit(function, in_axes=("batch seq",), config=config)


@pytest.mark.parametrize(("batch", "seq"), LARGE)
def test_that_very_size_is_captured(batch, seq):
    """A size outside the limits is captured as it is, and replayed from then on."""
    function = exact()
    x = floats(0, batch, seq)
    assert function.explain(x).mode is CUDAGraphMode.CAPTURE
    assert_close(function(x), x * 2)
    with no_compiles():
        assert_close(function(x), x * 2)
    assert [entry.key for entry in function.registry.entries()] == [(batch, seq)]
    stats = stats_of(function)
    assert (stats["captures"], stats["replays"]["exact"], stats["calls"]) == (1, 1, 2)
    assert stats["eager_by_reason"] == {}


def test_exact_buckets_are_evicted_like_others():
    """max_graphs bounds them too, and what was used last stays."""
    function = exact(max_graphs=2)
    for shape in LARGE:
        function(floats(0, *shape))
    assert [entry.key for entry in function.registry.entries()] == [(2, 9), (9, 9)]
    assert stats_of(function)["evictions"] == 1
    assert_close(function(floats(0, *LARGE[0])), floats(0, *LARGE[0]) * 2)


def test_exact_is_refused_when_sealed():
    """A sealed manager replays the large sizes that it has and refuses others."""
    function = exact()
    known, unknown = floats(0, 9, 4), floats(0, 2, 9)
    function(known)
    function.seal()
    with no_compiles():
        assert_close(function(known), known * 2)
        with pytest.raises(SealedError, match=r'sealed manager refuses on_overflow="exact"'):
            function(unknown)
    stats = stats_of(function)
    assert stats["errors_by_reason"] == {"sealed": 1}
    assert stats["calls"] == 3
    assert function.explain(unknown).error
    function.manager.mode = CUDAGraphMode.CAPTURE
    assert_close(function(unknown), unknown * 2)


def test_a_large_size_that_fails_is_explained():
    """A large size that could not be captured is served eagerly, and explain() says why."""
    function = exact(lambda x: x if x.sum() > 0 else -x)
    x = np.ones((2, 9), np.float32)
    with pytest.warns(CUDAGraphWarning, match="2x9"):
        assert_close(function(x), x)
    assert_close(function(-x), x)
    assert stats_of(function)["eager_by_reason"] == {"failed": 2}
    assert "cannot trace" in str(function.explain(x))


def test_the_nearest_bucket_of_a_refused_size_differs_in_something():
    """Where a size is refused, the nearest bucket that explain() names differs from that size."""
    function = exact()
    function(floats(0, 3, 9))
    function.seal()
    reason = function.explain(floats(0, 2, 9)).reason
    assert not reason.endswith("with ")
    if "nearest" in reason:
        assert "batch 3, not 2" in reason


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow  # only XLA's own executables hold memory
def test_more_sizes_than_are_kept():
    """Forty sizes with max_graphs=8 leave eight executables, and memory for as many."""
    if jax.default_backend() != "cpu":
        pytest.skip("what executables hold is on the device, and compiling takes long there")
    table = np.arange(2**18 - 1, dtype=np.float32)  # a constant of each executable, of 1 MiB
    config = CUDAGraphConfig(
        capture_sizes=(1,), max_capture_seq_len=2000, max_graphs=8, warmup_iterations=0
    )
    function = bucket_jit(
        lambda x: jnp.asarray(table)[x], in_axes=("batch seq",), out_axes="batch seq", config=config
    )
    executables: list[weakref.ref] = []
    resident: list[int] = []
    sizes = 80 if IS_THOROUGH else 40
    for seq in range(1, sizes + 1):
        assert function(np.full((1, seq), seq, np.int32))[0, -1] == seq
        entry = function.registry.entries()[-1]
        assert entry.key == (1, seq)
        executables.append(weakref.ref(entry.executable.call))
        del entry
        if seq % (sizes // 4) == 0:
            gc.collect()
            assert sum(reference() is not None for reference in executables) == 8
            resident.append(resident_bytes())
    stats = stats_of(function)
    captured, evicted = stats["captures"], stats["evictions"]
    assert (captured, evicted, function.registry.num_graphs) == (sizes, sizes - 8, 8)
    # The tables alone of what was captured meanwhile would take more than three times that.
    assert resident[-1] - resident[0] < sizes * 3 / 4 * table.nbytes / 3
