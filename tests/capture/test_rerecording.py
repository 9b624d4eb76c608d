"""Captures after warm-up: the others are recorded again where a capture throws them away."""

from __future__ import annotations

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    BucketOverflowError,
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphWarning,
    InputShapeError,
    SealedError,
    bucket_jit,
)
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

X = floats(0, 2, 4)
SHORT = dataclasses.replace(GRID, capture_seq_lens=(5,))


def evicting(config=SHORT, *, evicts=True):
    """A manager on a backend where a new capture throws recorded graphs away, or not."""
    manager = CUDAGraphManager(config)
    capturer = Capturer(manager.registry, captures_evict=lambda: evicts)
    manager.dispatcher = Dispatcher(manager.registry, capturer=capturer)
    return manager


@pytest.mark.parametrize("evicts", [True, False])
def test_a_capture_after_warmup_runs_the_others(evicts):
    """After a warm-up each capture runs every other bucket once and counts it; none before."""
    manager = evicting(evicts=evicts)
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    function(X)
    assert stats_of(manager)["recorded_again"] == 0
    function.warmup(X, progress=False)
    assert stats_of(manager)["recorded_again"] == 0
    manager.registry.remove(1, 5)
    assert_close(function(X[:1]), X[:1] * 2)
    assert stats_of(manager)["recorded_again"] == (2 if evicts else 0)
    other = bucket_jit(lambda x: x + 1, in_axes=("batch seq",), manager=manager)
    assert_close(other(X), X + 1)
    stats = stats_of(manager)
    assert stats["recorded_again"] == (5 if evicts else 0)
    assert (stats["hits"], stats["captures"], stats["calls"]) == (0, 3, 3)


def test_sealing_runs_every_bucket_once():
    """seal() leaves no recorded graph stale: each bucket runs once more, no replay is counted."""
    manager = evicting()
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    function.warmup(X, progress=False)
    function.seal()
    stats = stats_of(manager)
    assert (stats["recorded_again"], stats["hits"], stats["calls"]) == (3, 0, 0)
    assert manager.mode is CUDAGraphMode.REPLAY


def test_a_bucket_with_a_key_is_recorded_again():
    """A bucket of a function that takes a PRNG key does not break captures and seal()."""
    manager = evicting()
    noisy = bucket_jit(
        lambda key, x: x + jax.random.normal(key, (1,), x.dtype),
        in_axes=(None, "batch seq"),
        manager=manager,
    )
    noisy.warmup(jax.random.key(0), X, progress=False)
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    assert_close(function(X), X * 2)
    function.seal()


def test_donated_arguments_are_recorded_again():
    """A bucket that takes donated arrays over is run on others than the caller's."""
    manager = evicting()
    function = bucket_jit(
        lambda state, x: (state + x, x),
        in_axes="batch seq",
        donate_argnums=0,
        manager=manager,
        unpad="none",
    )
    state = jnp.asarray(floats(0, 3, 5))
    function.warmup(state, jnp.asarray(floats(1, 3, 5)), progress=False)
    function.seal()
    assert not state.is_deleted()
    assert stats_of(manager)["recorded_again"] == 3


def test_reset_counts_from_zero():
    """reset() forgets how many buckets were recorded again, with all other counts."""
    manager = evicting()
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    function.warmup(X, progress=False)
    function.seal()
    manager.reset()
    stats = stats_of(manager)
    counts = ("calls", "hits", "captures", "splits", "pieces", "recorded_again", "evictions")
    assert [stats[name] for name in counts] == [0] * len(counts)


def test_every_call_is_counted_once():
    """Each outcome adds one to the calls, and to nothing else that is added up."""
    config = dataclasses.replace(GRID, on_overflow="split")
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    manager = function.manager
    calls = 0

    def check(**expected):
        nonlocal calls
        calls += 1
        stats = stats_of(manager)
        assert stats["calls"] == calls
        assert calls == (
            sum(stats["replays"].values())
            + stats["captures"]
            + stats["splits"]
            + sum(stats["eager_by_reason"].values())
            + sum(stats["errors_by_reason"].values())
        )
        for name, reason in expected.items():
            assert stats[name] == reason if isinstance(reason, int) else stats[name][reason] > 0

    function(X)
    check(captures=1)
    function(X)
    check(replays="padded")
    function(floats(0, 3, 5))
    check(replays="exact")
    function(floats(0, 9, 5))
    check(splits=1)
    with pytest.raises(BucketOverflowError):
        function(floats(0, 9, 9))
    check(errors_by_reason="overflow")
    for bad in (floats(0, 3), "text", np.zeros((2, 2), object)):
        with pytest.raises(InputShapeError):
            function(bad)
        check(errors_by_reason="input")
    with pytest.raises(InputShapeError):
        function()  # type: ignore[call-arg]  # that is the point
    check(errors_by_reason="input")
    with pytest.raises(InputShapeError):
        function(jax.ShapeDtypeStruct((2, 4), np.float32))
    check(errors_by_reason="input")
    assert_close(np.asarray(jax.jit(function)(X)), X * 2)
    check(eager_by_reason="transformed")
    function(X[:0])
    check(eager_by_reason="empty")
    function.seal()
    function(X[:1, :1])
    check(replays="larger")
    manager.mode = CUDAGraphMode.NONE
    function(X)
    check(eager_by_reason="paused")
    manager.mode = CUDAGraphMode.DISABLED
    function(X)
    check(eager_by_reason="disabled")


def test_the_specifications_calls_are_counted_too():
    """Calls of execute_or_capture that are refused are counted as errors, like all others."""
    manager = CUDAGraphManager(GRID)
    assert_close(manager.execute_or_capture(2, 4, double, X), X * 2)
    assert stats_of(manager)["calls"] == 1
    with pytest.raises(InputShapeError):
        manager.execute_or_capture(-1, 4, double, X)
    assert stats_of(manager)["calls"] == 2
    with pytest.raises(InputShapeError):
        manager.execute_or_capture(2, 4, double, X, input_shapes=(9, 9))
    assert stats_of(manager)["calls"] == 3
    with pytest.raises(InputShapeError):
        manager.execute_or_capture(2, 4, double, "text")
    assert stats_of(manager)["calls"] == 4


def test_counts_are_exact_under_threads():
    """Sixteen threads with hits, misses, eviction, errors and failures: each call counts once."""
    config = dataclasses.replace(GRID, max_graphs=4, warmup_iterations=0)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    wrong: list[object] = []
    barrier = threading.Barrier(16)

    def work(seed):
        draw = np.random.default_rng(seed)
        barrier.wait(60)
        for _ in range(40):
            shape = tuple(int(size) for size in draw.integers(0, 7, 2))
            x = floats(seed, *shape)
            try:
                if draw.random() < 0.1:
                    function(x[0] if len(x) else x[..., None])
                    wrong.append("no error")
                elif not np.allclose(function(x), x * 2):
                    wrong.append(shape)
            except InputShapeError:
                pass
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    stats = stats_of(function)
    assert stats["calls"] == 16 * 40
    assert stats["errors_by_reason"].keys() == {"input"}
    assert function.registry.num_graphs <= 4


def test_a_bucketed_function_inside_another():
    """A bucketed function called in the body of another one is part of it."""
    manager = CUDAGraphManager(GRID)
    inner = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    outer = bucket_jit(lambda x: inner(x) + 1, in_axes=("batch seq",), manager=manager)
    for _ in range(2):
        assert_close(outer(X), X * 2 + 1)
        assert_close(inner(X), X * 2)
    stats = stats_of(manager)
    assert (stats["captures"], stats["hits"], manager.registry.num_graphs) == (2, 2, 2)
    assert stats["eager_by_reason"].keys() == {"transformed"}


def test_a_bucketed_function_on_constants_inside_another():
    """A bucketed function may be called on constants while another one is captured."""
    manager = CUDAGraphManager(GRID)
    inner = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    outer = bucket_jit(
        lambda x: x + inner(np.ones((1, 2), np.float32)).sum(),
        in_axes=("batch seq",),
        manager=manager,
    )
    for _ in range(2):
        assert_close(outer(X), X + 4)


def test_the_same_function_with_other_axes():
    """One function bound twice to a manager, along different axes, never shares a bucket."""
    manager = CUDAGraphManager(GRID)

    def shifted(x):
        return x + jnp.arange(x.shape[0], dtype=x.dtype)[:, None] * 10

    rows = bucket_jit(shifted, in_axes=("batch seq",), manager=manager)
    columns = bucket_jit(shifted, in_axes=("seq batch",), manager=manager)
    for shape in ((2, 4), (3, 3), (4, 2), (3, 5)):
        x = floats(0, *shape)
        expected = x + np.arange(shape[0], dtype=np.float32)[:, None] * 10
        for _ in range(2):
            assert_close(rows(x), expected)
            assert_close(columns(x), expected)
    assert stats_of(manager)["calls"] == 16


def test_failing_captures_do_not_stop_others():
    """A bucket that fails leaves those that are captured, and their counts, alone."""
    manager = evicting()
    good = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    good.warmup(X, progress=False)
    bad = bucket_jit(lambda x: x if x.sum() > 0 else -x, in_axes=("batch seq",), manager=manager)
    with pytest.warns(CUDAGraphWarning):
        bad(X)
    assert_close(good(X), X * 2)
    assert stats_of(manager)["recorded_again"] == 0
    good.seal()
    with pytest.raises(SealedError):
        good.warmup(X, progress=False)
