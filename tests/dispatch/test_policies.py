"""Policies and failures: what a call does when its bucket cannot serve it."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    BucketOverflowError,
    CaptureError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphWarning,
    InputShapeError,
    SealedError,
    bucket_jit,
)
from cudagraph_jax.xla.memory import Memory
from tests.helpers.functions import GRID, assert_close, big, double, floats, stats_of
from tests.helpers.memory import ROW, keeps, sized_manager

X = floats(0, 2, 4)


def doubler(**options):
    return bucket_jit(double, in_axes=("batch seq",), config=dataclasses.replace(GRID, **options))


def test_an_untraceable_function_runs_eagerly_once_warned():
    """A function that cannot be traced is right all the same, warns once and is not tried again."""
    runs = []

    def branching(x):
        runs.append(x)
        return x * 2 if x.sum() > 0 else x * 3

    function = bucket_jit(branching, in_axes=("batch seq",), config=GRID)
    ones = np.ones((2, 4), np.float32)
    with pytest.warns(
        CUDAGraphWarning, match="branching runs eagerly at 3x5: cannot trace"
    ) as told:
        assert_close(function(ones), ones * 2)
    assert len(told) == 1
    runs.clear()
    assert_close(function(-ones), -ones * 3)
    assert_close(function(ones), ones * 2)
    assert len(runs) == 2
    assert not any(isinstance(x, jax.core.Tracer) for x in runs)
    stats = stats_of(function)
    assert (stats["failed_buckets"], stats["eager_by_reason"]) == (1, {"failed": 3})
    assert stats["registry"]["num_graphs"] == 0


def test_another_bucket_of_an_untraceable_function_does_not_warn_again():
    """Each bucket is tried once; the same failure is reported once, until reset()."""

    def branching(x):
        return x if x.sum() > 0 else -x

    function = bucket_jit(branching, in_axes=("batch seq",), config=GRID)
    ones = np.ones((4, 5), np.float32)
    with pytest.warns(CUDAGraphWarning, match="reset"):
        function(ones)
    function(ones[:1])
    assert stats_of(function)["failed_buckets"] == 2
    function.manager.reset()
    assert stats_of(function)["failed_buckets"] == 0
    with pytest.warns(CUDAGraphWarning):
        function(ones)


def test_an_error_of_the_function_is_the_functions():
    """What the function raises by itself reaches the caller, and nothing is remembered."""

    def refusing(x):
        raise LookupError("not today")

    function = bucket_jit(refusing, in_axes=("batch seq",), config=GRID)
    for _ in range(2):
        with pytest.raises(LookupError, match="not today"):
            function(X)
    assert stats_of(function)["failed_buckets"] == 0


def test_an_output_that_cannot_be_trimmed_is_an_error():
    """An output whose size is no size of the request says which, and what to declare."""
    function = bucket_jit(lambda x: x.reshape(-1), in_axes=("batch seq",), config=GRID)
    with pytest.raises(InputShapeError, match=r'follows the sizes.*unpad="none"'):
        function(X)
    assert function.registry.num_graphs == 0
    kept = bucket_jit(lambda x: x.reshape(-1), in_axes=("batch seq",), unpad="none", config=GRID)
    assert kept(X).shape == (15,)


@pytest.mark.parametrize("policy", ["eager", "error"])
def test_on_overflow(policy):
    """Outside the limits the policy decides, and the error names every size that is too large."""
    function = doubler(on_overflow=policy)
    too_large = floats(0, 5, 9)
    if policy == "eager":
        assert_close(function(too_large), too_large * 2)
        assert stats_of(function)["eager_by_reason"] == {"overflow": 1}
    else:
        with pytest.raises(BucketOverflowError, match=r"batch=5 .* and seq_len=9"):
            function(too_large)
        assert stats_of(function)["errors_by_reason"] == {"overflow": 1}
    assert function.registry.num_graphs == 0


@pytest.mark.parametrize("unpad", ["none", "device", "padded"])
def test_numbers_of_an_eager_call(unpad):
    """They are the JAX arrays that a bucket gives, and give way to other dtypes where those do."""

    def numbers(x, s, t):
        return s * 2, t * 2, x

    function = bucket_jit(numbers, in_axes=("batch seq", None, None), unpad=unpad, config=GRID)
    for rows in (2, 5):
        found = function(floats(0, rows, 4), 2.0, np.float32(3))
        arrays = [getattr(leaf, "array", leaf) for leaf in found]
        assert all(isinstance(array, jax.Array) for array in arrays), rows
        assert [array.weak_type for array in arrays] == [True, False, False], rows


def test_dtypes_of_an_eager_answer():
    """What the function computes in NumPy has the dtypes that JAX has for it, as in a bucket."""

    def numbers(x):
        wide = np.array([0.1, 0.2]), np.arange(3), np.uint64(3), np.array([True]), 2**31 - 1
        return x, *wide, np.ones(2, jnp.bfloat16)

    function = bucket_jit(numbers, in_axes="batch seq", config=GRID)
    captured, eager = (function(floats(0, rows, 4))[1:] for rows in (2, 5))
    assert stats_of(function)["eager_by_reason"] == {"overflow": 1}
    for one, other in zip(captured, eager, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("unpad", ["host", "none", "device", "padded"])
def test_an_eager_answer_is_the_callers_own(unpad):
    """What is written to the arguments later, or given away of the answer, is not both of them."""
    function = bucket_jit(
        lambda x: (x, x[:1]), in_axes="batch seq", unpad=(unpad, "host"), config=GRID
    )
    memory = np.zeros(5 * 64 + 64, np.uint8)
    place = -memory.ctypes.data % 64  # where JAX goes on in the caller's memory
    x = memory[place : place + 5 * 64].view(np.float32).reshape(5, 16)
    found = jax.block_until_ready(function(x))
    x[:] = 1
    assert [np.asarray(leaf).max() for leaf in found] == [0, 0]
    if unpad != "host":
        array = jnp.zeros((5, 16))
        answer = function(array)[0]
        jax.jit(lambda y: y * 2, donate_argnums=0)(getattr(answer, "array", answer))
        assert not array.is_deleted()


@pytest.mark.parametrize("policy", ["eager", "error"])
def test_on_miss(policy):
    """A bucket that is not captured is not captured in a request where the policy forbids it."""
    function = doubler(on_miss=policy)
    if policy == "eager":
        assert_close(function(X), X * 2)
        assert stats_of(function)["eager_by_reason"] == {"miss": 1}
    else:
        with pytest.raises(SealedError, match="warm it up first"):
            function(X)
        assert stats_of(function)["errors_by_reason"] == {"miss": 1}
    function.warmup(X, progress=False)
    assert_close(function(X), X * 2)
    assert stats_of(function)["hits"] == 1


def test_sealed_calls_use_a_larger_bucket():
    """A sealed manager serves a call from a larger captured bucket, and counts it so."""
    config = CUDAGraphConfig(capture_sizes=(2, 8), capture_seq_lens=(4, 16), warmup_iterations=0)
    function: Any = bucket_jit(
        lambda x, mask: jnp.where(mask, x, 0).sum(1),
        in_axes=("batch seq",),
        mask_argname="mask",
        config=config,
    )
    function(floats(0, 8, 16))
    function.seal()
    for _ in range(2):
        assert_close(function(X), X.sum(1))
        assert_close(function(floats(1, 2, 4)), floats(1, 2, 4).sum(1))
    assert stats_of(function)["replays"] == {"exact": 0, "padded": 0, "larger": 4}
    function.registry.clear()
    assert_close(function(X), X.sum(1))
    assert stats_of(function)["eager_by_reason"] == {"sealed": 1}


def test_sealed_without_lengths_pads_the_batch_alone():
    """Without capture_seq_lens a sealed call takes no longer bucket, only a taller one."""
    config = CUDAGraphConfig(capture_sizes=(2, 8), warmup_iterations=0)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    function(floats(0, 8, 5))
    function.seal()
    function(floats(0, 2, 5))
    function(floats(0, 2, 4))
    stats = stats_of(function)
    assert (stats["replays"]["larger"], stats["eager_by_reason"]) == (1, {"sealed": 1})


def test_paused_keeps_its_graphs():
    """Mode NONE runs eagerly and keeps the graphs; CAPTURE goes on with them."""
    function = doubler()
    function(X)
    function(X)
    function.manager.mode = CUDAGraphMode.NONE
    assert_close(function(X), X * 2)
    assert stats_of(function)["eager_by_reason"] == {"paused": 1}
    function.manager.mode = CUDAGraphMode.CAPTURE
    assert_close(function(X), X * 2)
    assert stats_of(function)["hits"] == 2
    assert function.registry.capture_count == 1


def test_disabled_is_switched_off():
    """A disabled config runs every call eagerly and cannot be switched on."""
    manager = CUDAGraphManager(CUDAGraphConfig.disabled())
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    assert_close(function(X), X * 2)
    assert stats_of(function)["enabled"] is False
    assert stats_of(function)["eager_by_reason"] == {"disabled": 1}
    with pytest.raises(ConfigError, match="enabled=False"):
        manager.mode = CUDAGraphMode.CAPTURE
    manager.mode = CUDAGraphMode.DISABLED


@pytest.mark.parametrize("mode", ["capture", None, 1])
def test_mode_must_be_a_mode(mode):
    """Anything but a member of the enum is refused."""
    with pytest.raises(ConfigError, match="is no CUDAGraphMode"):
        CUDAGraphManager(GRID).mode = mode


def test_without_copies_inputs_must_fit():
    """cudagraph_copy_inputs=False takes a bucket's own shapes untouched and refuses others."""
    function = doubler(cudagraph_copy_inputs=False)
    fits = jnp.asarray(floats(0, 3, 5))
    for _ in range(2):
        assert_close(function(fits), floats(0, 3, 5) * 2)
        with pytest.raises(InputShapeError, match=r"pad them to \(3, 5\)"):
            function(X)
    assert stats_of(function)["errors_by_reason"] == {"unpadded": 2}
    assert_close(function(floats(0, 9, 5)), floats(0, 9, 5) * 2)


def test_an_unknown_compiler_option_is_an_error():
    """A compiler option that XLA does not know is an error, not a reason to run eagerly."""
    function = doubler(compiler_options={"xla_no_such_option": "1"})
    with pytest.raises(ConfigError, match="'xla_no_such_option': correct compiler_options"):
        function(X)
    assert function.registry.num_graphs == 0


def test_a_bucket_beyond_the_whole_budget_runs_eagerly():
    """A bucket that alone needs more than the budget is reported and served eagerly."""
    manager = sized_manager(keeps, capture_sizes=(1, 8))
    function = bucket_jit(big, in_axes=("batch _",), manager=manager)
    x = floats(0, 8, 1)
    with pytest.warns(CUDAGraphWarning, match="more than the whole budget of 1,048,576"):
        assert_close(function(x), np.asarray(big(jnp.asarray(x))))
    function(x[:1])
    assert [entry.key for entry in function.registry.entries()] == [(1, 1)]


def test_dropped_buckets_are_freed():
    """An executable is freed when its bucket is removed, evicted or cleared."""

    def alive():
        gc.collect()
        return len(jax.local_devices()[0].client.live_executables())

    config = dataclasses.replace(GRID, max_graphs=4)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    jax.block_until_ready(jnp.zeros(3))
    before = alive()
    for batch in (1, 3, 4):
        for seq in (2, 5):
            function(floats(0, batch, seq))
            function(floats(0, batch, seq))
    assert alive() == before + 4
    assert function.registry.remove(4, 5)
    assert alive() == before + 3
    function.registry.clear()
    assert alive() == before
    function(X)
    function.manager.reset()
    assert alive() == before


def test_a_dropped_function_is_freed():
    """With the function goes everything that it captured."""

    def alive():
        gc.collect()
        return len(jax.local_devices()[0].client.live_executables())

    before = alive()
    function = doubler()
    function(X)
    function(X)
    assert alive() == before + 1
    del function
    assert alive() == before


def test_the_budget_is_shared_by_least_recent_use():
    """The memory budget drops the bucket whose last use is longest ago."""
    manager = sized_manager(
        lambda bucket: Memory(ROW), capture_sizes=(1,), capture_seq_lens=(1, 2, 3)
    )
    function = bucket_jit(big, in_axes=("batch seq",), manager=manager)
    one, two, three = (floats(0, 1, seq) for seq in (1, 2, 3))
    function(one)
    weight = function.registry.entries()[0].memory_bytes
    assert weight is not None
    assert 2 * weight <= 2**20 < 3 * weight
    function(two)
    function(one)
    function(three)
    assert {entry.key for entry in function.registry.entries()} == {(1, 1), (1, 3)}
    assert stats_of(function)["evictions"] == 1
    function(two)
    assert {entry.key for entry in function.registry.entries()} == {(1, 3), (1, 2)}


def test_counts_survive_eviction():
    """Replays of a bucket that was evicted stay in the totals."""
    function = doubler(max_graphs=1)
    for batch in (1, 3, 4, 1):
        for _ in range(3):
            function(floats(0, batch, 5))
    stats = stats_of(function)
    assert (stats["hits"], stats["captures"], stats["evictions"]) == (8, 4, 3)
    assert stats["registry"]["capture_count"] == 4
    assert stats["registry"]["total_replays"] == 8
    assert stats["compile_seconds"] > 0


def test_capture_error_names_its_stage():
    """The stage that failed is part of the error."""
    registry = doubler().registry
    with pytest.raises(CaptureError, match="cannot trace float") as caught:
        registry.capture(3, 5, float, (3, 5))
    assert caught.value.stage == "trace"
