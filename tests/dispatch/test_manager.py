"""CUDAGraphManager: the specification's calls, and the mode table through them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import (
    Bucket,
    BucketOverflowError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphWarning,
    InputShapeError,
    SealedError,
    bucket_jit,
)
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of, tokens, total

CAPTURE, REPLAY, NONE, DISABLED = (
    CUDAGraphMode.CAPTURE,
    CUDAGraphMode.REPLAY,
    CUDAGraphMode.NONE,
    CUDAGraphMode.DISABLED,
)
X = floats(0, 2, 4)
SMALL = CUDAGraphConfig(capture_sizes=(3,), capture_seq_lens=(5,), warmup_iterations=0)
WITH_LARGER = CUDAGraphConfig(capture_sizes=(3, 6), capture_seq_lens=(5,), warmup_iterations=0)


def inputs_of(batch, seq):
    return {"x": floats(0, batch, seq), "scale": np.float32(2)}


def answer(inputs):
    return {"rows": inputs["x"].sum(1), "each": inputs["x"] * 2}


CAPTURED, LARGER, ABSENT, OUTSIDE = "captured", "only a larger one", "not captured", "outside"


@pytest.mark.parametrize(
    ("mode", "column", "policies", "expected"),
    [
        (CAPTURE, CAPTURED, {}, REPLAY),
        (CAPTURE, ABSENT, {}, CAPTURE),
        (CAPTURE, LARGER, {}, CAPTURE),
        (CAPTURE, ABSENT, {"on_miss": "eager"}, NONE),
        (CAPTURE, ABSENT, {"on_miss": "error"}, SealedError),
        (CAPTURE, OUTSIDE, {}, NONE),
        (CAPTURE, OUTSIDE, {"on_overflow": "error"}, BucketOverflowError),
        (REPLAY, CAPTURED, {}, REPLAY),
        (REPLAY, CAPTURED, {"on_miss": "error"}, REPLAY),
        (REPLAY, LARGER, {}, REPLAY),
        (REPLAY, LARGER, {"on_miss": "error"}, REPLAY),
        (REPLAY, ABSENT, {}, NONE),
        (REPLAY, ABSENT, {"on_miss": "error"}, SealedError),
        (REPLAY, OUTSIDE, {}, NONE),
        (REPLAY, OUTSIDE, {"on_overflow": "error"}, BucketOverflowError),
        (NONE, CAPTURED, {}, NONE),
        (NONE, ABSENT, {"on_miss": "error"}, NONE),
        (NONE, OUTSIDE, {"on_overflow": "error"}, NONE),
        (DISABLED, CAPTURED, {}, DISABLED),
        (DISABLED, ABSENT, {"on_miss": "error"}, DISABLED),
        (DISABLED, OUTSIDE, {"on_overflow": "error"}, DISABLED),
    ],
    ids=str,
)
def test_mode_table(mode, column, policies, expected):
    """What get_mode_for_batch says is what execute_or_capture does, in every cell of the table."""
    manager = CUDAGraphManager(dataclasses.replace(WITH_LARGER, **policies))
    if column is not OUTSIDE and column is not ABSENT:
        batch = 3 if column is CAPTURED else 6
        assert manager.capture_graph(batch, 5, total, inputs_of(batch, 5)) is not None
    manager.mode = mode
    sizes = (9, 9) if column is OUTSIDE else (2, 4)
    inputs = inputs_of(*sizes)
    before = stats_of(manager)
    if isinstance(expected, CUDAGraphMode):
        assert manager.get_mode_for_batch(*sizes) is expected
        assert manager.should_capture(*sizes) == (expected is CAPTURE)
        assert_close(manager.execute_or_capture(*sizes, total, inputs), answer(inputs))
    else:
        assert manager.get_mode_for_batch(*sizes) is NONE
        with pytest.raises(expected):
            manager.execute_or_capture(*sizes, total, inputs)
    after = stats_of(manager)
    happened = {key: after[key] - before[key] for key in ("hits", "captures", "eager_calls")}
    assert happened == {
        "hits": int(expected is REPLAY),
        "captures": int(expected is CAPTURE),
        "eager_calls": int(expected in (NONE, DISABLED)),
    }
    assert after["calls"] == before["calls"] + 1
    assert manager.is_enabled() == (mode is not DISABLED) == after["enabled"]
    assert after["mode"] == mode.value


@settings(max_examples=25)
@given(batch=st.integers(0, 6), seq=st.integers(0, 7), dtype=st.sampled_from(["f4", "i4", "?"]))
def test_execute_or_capture_is_the_function(shared, batch, seq, dtype):
    """For every size and dtype execute_or_capture gives what the function gives."""
    x = tokens(batch, batch, seq).astype(dtype)
    expected = x.astype("f4") * 3, x.sum(1, dtype="f4" if dtype == "f4" else "i4")
    found = shared.execute_or_capture(batch, seq, both, {"x": x, "w": np.float32(3)})
    assert_close(found, expected)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))


def both(tree):
    return tree["x"] * tree["w"], jnp.sum(tree["x"], 1)


@pytest.fixture(scope="module")
def shared():
    return CUDAGraphManager(GRID)


def test_an_array_of_the_batchs_size_by_chance():
    """An array whose first size happens to be the batch's or the bucket's breaks nothing."""

    def dense(inputs):
        return inputs["x"] @ inputs["w"]

    manager = CUDAGraphManager(CUDAGraphConfig(capture_sizes=(2, 4, 8), warmup_iterations=0))
    w = floats(1, 8, 8)
    for batch in (8, 7, 4, 8):
        inputs = {"x": floats(0, batch, 8), "w": w}
        with warnings.catch_warnings():
            # At batch 8 the guess is wrong, is said once, and the call runs eagerly.
            warnings.simplefilter("ignore", CUDAGraphWarning)
            outputs = manager.execute_or_capture(batch, 1, dense, inputs)
        assert_close(outputs, inputs["x"] @ w)


def test_an_array_of_the_buckets_size_by_chance():
    """A square weight of the request's size, in a bucket that is larger, is not padded wrongly."""

    def dense(inputs):
        return inputs["x"] @ inputs["w"]

    manager = CUDAGraphManager(CUDAGraphConfig(capture_sizes=(4,), warmup_iterations=0))
    x, w = floats(0, 3, 3), floats(1, 3, 3)
    with pytest.warns(CUDAGraphWarning):
        assert_close(manager.execute_or_capture(3, 1, dense, {"x": x, "w": w}), x @ w)


def test_capture_graph_is_found_by_execute_or_capture():
    """What capture_graph captured ahead is what a request replays, also by chance sizes."""
    manager = CUDAGraphManager(
        CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0)
    )

    def scaled(inputs):
        return inputs["x"] * jnp.sum(inputs["w"])

    inputs = {"x": floats(0, 3, 5), "w": floats(1, 4, 7)}
    entry: Any = manager.capture_graph(3, 5, scaled, inputs)
    assert entry.key == (4, 8)
    manager.execute_or_capture(3, 5, scaled, inputs)
    assert (stats_of(manager)["hits"], manager.registry.capture_count) == (1, 1)


def test_two_functions_do_not_share():
    """Two functions with the same sizes and dtypes never share a graph."""
    manager = CUDAGraphManager(SMALL)
    for _ in range(2):
        assert_close(manager.execute_or_capture(2, 4, double, X), X * 2)
        assert_close(manager.execute_or_capture(2, 4, jnp.negative, X), -X)
        assert_close(
            manager.execute_or_capture(2, 4, total, inputs_of(2, 4)), answer(inputs_of(2, 4))
        )
    assert manager.registry.num_graphs == 3
    assert stats_of(manager)["hits"] == 3


def test_two_dtypes_do_not_share():
    """Two dtypes with the same sizes never share a graph."""
    manager = CUDAGraphManager(SMALL)
    for _ in range(2):
        for dtype in (np.float32, np.int32, np.float16):
            x: Any = tokens(0, 2, 4).astype(dtype)
            assert_close(manager.execute_or_capture(2, 4, double, x), x * dtype(2))
    assert manager.registry.num_graphs == 3


def test_an_unhashable_function():
    """A callable that cannot be hashed is told apart by its identity."""

    @dataclasses.dataclass
    class Scale:
        by: float

        def __call__(self, x):
            return x * self.by

    manager = CUDAGraphManager(SMALL)
    twice, thrice = Scale(2.0), Scale(3.0)
    for _ in range(2):
        assert_close(manager.execute_or_capture(2, 4, twice, X), X * np.float32(2))
        assert_close(manager.execute_or_capture(2, 4, thrice, X), X * np.float32(3))
    assert manager.registry.num_graphs == 2


def test_bound_methods_are_one_function():
    """A bound method is a new object at each look, and still the same function."""

    class Model:
        def run(self, x):
            return x * 2

    manager, model = CUDAGraphManager(SMALL), Model()
    for _ in range(3):
        manager.execute_or_capture(2, 4, model.run, X)
    assert manager.registry.capture_count == 1


def test_declared_shapes_are_checked():
    """input_shapes and output_shapes of a call that do not fit are errors, before any capture."""
    manager = CUDAGraphManager(SMALL)
    with pytest.raises(
        InputShapeError, match=r"input_shapes do not match.*float32\[2, 5\] was decl"
    ):
        manager.execute_or_capture(2, 4, double, X, input_shapes=(2, 5))
    with pytest.raises(InputShapeError, match="input_shapes do not match"):
        manager.execute_or_capture(2, 4, double, X, input_shapes={"x": (2, 4)})
    with pytest.raises(InputShapeError, match="output_shapes do not match what double gives"):
        manager.execute_or_capture(2, 4, double, X, output_shapes=(3, 5))
    with pytest.raises(InputShapeError, match="output_shapes do not match"):
        manager.capture_graph(2, 4, double, (2, 4), (2, 9))
    assert manager.registry.num_graphs == 0
    assert_close(
        manager.execute_or_capture(2, 4, double, X, input_shapes=(2, 4), output_shapes=(2, 4)),
        X * 2,
    )


def test_capture_graph_where_it_may_not():
    """capture_graph gives None outside the limits and where the mode forbids a capture."""
    manager = CUDAGraphManager(SMALL)
    assert manager.capture_graph(9, 4, double, (9, 4)) is None
    manager.mode = REPLAY
    assert manager.capture_graph(2, 4, double, (2, 4)) is None
    manager.mode = CAPTURE
    entry: Any = manager.capture_graph(2, 4, double, (2, 4), (2, 4))
    assert entry.key == (3, 5)
    manager.seal()
    assert manager.capture_graph(2, 4, double, (2, 4)) is entry
    manager.mode = DISABLED
    assert manager.capture_graph(2, 4, double, (2, 4)) is None
    assert manager.registry.capture_count == 1


def test_replay_graph():
    """replay_graph pads, runs and trims a captured bucket, and gives None where there is none."""
    manager = CUDAGraphManager(SMALL)
    assert manager.replay_graph(2, 4, X) is None
    entry: Any = manager.capture_graph(2, 4, double, (2, 4))
    assert_close(manager.replay_graph(2, 4, X), X * 2)
    assert_close(manager.replay_graph(3, 5, floats(0, 3, 5)), floats(0, 3, 5) * 2)
    assert entry.replay_count == 2
    assert manager.replay_graph(9, 4, floats(0, 9, 4)) is None
    for mode, replays in [(NONE, False), (DISABLED, False), (REPLAY, True)]:
        manager.mode = mode
        assert (manager.replay_graph(2, 4, X) is not None) == replays


def test_replay_graph_picks_by_the_inputs():
    """Of several captured dtypes the inputs' own is replayed; two functions are an error."""
    manager = CUDAGraphManager(SMALL)
    manager.capture_graph(2, 4, double, (2, 4))
    manager.capture_graph(2, 4, double, jax.ShapeDtypeStruct((2, 4), np.int32))
    assert_close(manager.replay_graph(2, 4, X), X * 2)
    assert_close(manager.replay_graph(2, 4, tokens(0, 2, 4)), tokens(0, 2, 4) * 2)
    with pytest.raises(InputShapeError, match="give the same dtypes"):
        manager.replay_graph(2, 4, X.astype(np.float16))
    manager.capture_graph(2, 4, jnp.negative, (2, 4))
    with pytest.raises(CUDAGraphError, match="2 functions are captured for 3x5"):
        manager.replay_graph(2, 4, X)


def test_replay_graph_leaves_bucket_jit_alone():
    """Buckets of a bucket_jit function take its arguments, and are not replayed by a pytree."""
    manager = CUDAGraphManager(SMALL)
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    function(X)
    assert manager.replay_graph(2, 4, X) is None
    entry: Any = manager.registry.get(2, 4)
    assert_close(entry.replay((X,)), X * 2)
    assert entry.input_shapes == (jax.ShapeDtypeStruct((3, 5), np.float32),)


def test_an_untraceable_function_runs_eagerly():
    """A function that cannot be traced is run eagerly, warned of once, and not tried again."""

    def branching(x):
        return x * 2 if x.sum() > 0 else x * 3

    manager = CUDAGraphManager(SMALL)
    ones = np.ones((2, 4), np.float32)
    with pytest.warns(CUDAGraphWarning, match="branching runs eagerly") as told:
        assert_close(manager.execute_or_capture(2, 4, branching, ones), ones * 2)
    assert len(told) == 1
    assert_close(manager.execute_or_capture(2, 4, branching, -ones), ones * -3)
    assert stats_of(manager)["eager_by_reason"] == {"failed": 2}


def test_counts_add_up_under_threads():
    """16 threads of calls are counted exactly, and each cold bucket is captured once."""
    manager = CUDAGraphManager(GRID)

    def work(seed):
        for step in range(30):
            batch, seq = 1 + (seed + step) % 5, 1 + step % 6
            x = floats(0, batch, seq)
            assert_close(manager.execute_or_capture(batch, seq, double, x), x * 2)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    stats = stats_of(manager)
    assert stats["calls"] == 16 * 30
    assert stats["hits"] + stats["captures"] + stats["eager_calls"] == 16 * 30
    assert stats["captures"] == stats["registry"]["capture_count"] == 6
    assert json.loads(json.dumps(stats)) == stats


def test_specification_keys():
    """stats() keeps the specification's keys."""
    stats = stats_of(CUDAGraphManager(SMALL))
    assert {"enabled", "mode", "registry"} <= set(stats)
    assert set(stats["registry"]) >= {
        "num_graphs",
        "capture_count",
        "total_replays",
        "total_replay_time_ms",
        "avg_replay_time_ms",
        "graphs",
    }
    assert set(stats) >= {"hits", "misses", "evictions", "waste", "compile_seconds"}


def test_reset_keeps_the_mode():
    """reset drops graphs, counts and failures, and leaves the mode."""
    manager = CUDAGraphManager(SMALL)
    manager.execute_or_capture(2, 4, double, X)
    manager.execute_or_capture(2, 4, double, X)
    manager.seal()
    manager.reset()
    assert manager.mode is REPLAY
    stats = stats_of(manager)
    assert (stats["calls"], stats["captures"], stats["registry"]["num_graphs"]) == (0, 0, 0)
    assert stats["evictions"] == 0
    assert repr(manager) == "CUDAGraphManager(REPLAY, 0 graphs)"


def test_defaults():
    """Without a config the default one holds, and the mode is CAPTURE."""
    manager = CUDAGraphManager()
    assert manager.config == CUDAGraphConfig()
    assert manager.mode is CAPTURE
    assert manager.should_capture(3, 100)
    assert not manager.should_capture(300, 100)
    assert manager.get_mode_for_batch(0, 4) is NONE
    assert manager.config.bucket_for(3, 100) == Bucket(4, 100)


def test_inputs_that_do_not_carry_the_sizes():
    """Sizes that no array carries are the caller's word, and nothing is padded."""
    manager = CUDAGraphManager(SMALL)
    x = floats(0, 7)
    for _ in range(2):
        assert_close(manager.execute_or_capture(2, 4, double, x), x * 2)
    assert stats_of(manager)["hits"] == 1
    assert [entry.key for entry in manager.registry.entries()] == [(2, 4)]


def test_what_cannot_be_called():
    """It is refused by every call that takes a function."""
    manager, none = CUDAGraphManager(SMALL), cast(Any, None)
    with pytest.raises(ConfigError, match="function=None cannot be called"):
        manager.execute_or_capture(2, 4, none, X)
    with pytest.raises(ConfigError, match="function=None cannot be called"):
        manager.capture_graph(2, 4, none, (2, 4))
    with pytest.raises(ConfigError, match="function=None cannot be called"):
        manager.registry.capture(2, 4, none, (2, 4))
    assert manager.registry.num_graphs == 0


def test_a_mode_for_what_is_no_size():
    """Text in place of a size is refused like everywhere else."""
    text: Any = "1"
    with pytest.raises(InputShapeError, match="batch_size='1' is no integer"):
        CUDAGraphManager().get_mode_for_batch(text, 2)


@pytest.mark.parametrize("is_captured", [False, True])
def test_under_a_transformation(is_captured):
    """With tracers `execute_or_capture` is simply the function, and nothing is held against it."""
    manager = CUDAGraphManager(GRID)
    x = floats(0, 2, 4)
    if is_captured:
        manager.execute_or_capture(2, 4, double, x)
    found = jax.jit(lambda x: manager.execute_or_capture(2, 4, double, x))(x)
    np.testing.assert_allclose(found, x * 2)
    stats = manager.stats()
    assert stats["eager_by_reason"] == {"transformed": 1}
    assert (stats["failed_buckets"], stats["errors_by_reason"]) == (0, {})
