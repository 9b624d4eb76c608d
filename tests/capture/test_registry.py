"""CUDAGraphRegistry: captured once, found exactly or padded, evicted, freed."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    Bucket,
    CaptureError,
    CUDAGraphConfig,
    CUDAGraphEntry,
    CUDAGraphRegistry,
    InputShapeError,
    bucket_jit,
)
from cudagraph_jax.xla.memory import Memory
from tests.helpers.faults import Told
from tests.helpers.functions import GRID, assert_close, big, double, floats, stats_of, total
from tests.helpers.memory import ROW, SizedCompiler

CONFIG = CUDAGraphConfig(capture_sizes=(1, 4, 8), capture_seq_lens=(8, 16), warmup_iterations=1)


def struct(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_an_entry_is_born_complete():
    """A capture gives an entry with its key, variant, figures and shapes."""
    registry = CUDAGraphRegistry(CONFIG)
    entry = registry.capture(4, 8, total, {"x": (4, 8), "scale": ()})
    assert isinstance(entry, CUDAGraphEntry)
    assert (entry.batch_size, entry.seq_len, entry.key, entry.bucket) == (
        4,
        8,
        (4, 8),
        Bucket(4, 8),
    )
    assert entry.graph_id == 1
    assert entry.capture_time_ms > 0
    assert entry.memory_bytes is None or entry.memory_bytes >= 0
    assert entry.flops is None or entry.flops > 0
    assert (entry.replay_count, entry.total_replay_time_ms, entry.avg_replay_time_ms) == (0, 0, 0)
    assert entry.input_shapes == {"x": struct(4, 8), "scale": struct()}
    assert entry.output_shapes == {"rows": struct(4), "each": struct(4, 8)}
    assert repr(entry) == "CUDAGraphEntry(4x8, total(float32[], float32[·,·]), graph_id=1)"
    assert hash(entry.variant) == hash(entry.variant)


def test_shapes_may_be_tuples_structs_or_arrays():
    """Input shapes are tuples (float32), ShapeDtypeStructs or arrays, in any pytree."""
    registry = CUDAGraphRegistry(CONFIG)
    for shapes in (
        (4, 8),
        [4, 8],
        struct(4, 8),
        np.zeros((4, 8), np.float32),
        jnp.zeros((4, 8)),
    ):
        assert registry.capture(4, 8, double, shapes).input_shapes == struct(4, 8)
    assert registry.capture_count == 1
    tree = registry.capture(4, 8, lambda trees: trees[0], [(4, 8), {"b": struct(4)}])
    assert tree.input_shapes == [struct(4, 8), {"b": struct(4)}]


@pytest.mark.parametrize("shapes", ["4x8", {"x": None, "y": "?"}, (4, 8.5), {"x": object()}])
def test_what_is_no_shape(shapes):
    """Anything else is an error that says what to give."""
    registry = CUDAGraphRegistry(CONFIG)
    with pytest.raises(InputShapeError, match="input_shapes has the leaf"):
        registry.capture(4, 8, double, shapes)
    assert registry.num_graphs == 0


def test_output_shapes_are_checked():
    """output_shapes that are not what the function gives are an error, and nothing is kept."""
    registry = CUDAGraphRegistry(CONFIG)
    good = {"rows": (4,), "each": struct(4, 8)}
    wrong = {
        "shape": {"rows": (5,), "each": (4, 8)},
        "dtype": {"rows": struct(4, dtype=np.int32), "each": (4, 8)},
        "structure": {"rows": (4,)},
    }
    for shapes in wrong.values():
        with pytest.raises(InputShapeError, match="output_shapes do not match what total gives"):
            registry.capture(4, 8, total, {"x": (4, 8), "scale": ()}, shapes)
    assert registry.num_graphs == registry.capture_count == 0
    registry.capture(4, 8, total, {"x": (4, 8), "scale": ()}, good)
    with pytest.raises(InputShapeError, match=r"float32\[5\] was declared, float32\[4\] came"):
        registry.capture(4, 8, total, {"x": (4, 8), "scale": ()}, wrong["shape"])


@pytest.mark.parametrize(
    ("function", "stage"),
    [
        (lambda x: x if x.sum() > 0 else -x, "trace"),
        (lambda x: x @ x, "trace"),
        (lambda x: jnp.asarray([{}]), "trace"),
    ],
)
def test_a_failed_capture_is_not_kept(function, stage):
    """A function that cannot be captured is a CaptureError with its stage, each time anew."""
    registry = CUDAGraphRegistry(CONFIG)
    for _ in range(2):
        with pytest.raises(CaptureError, match=f"cannot {stage}") as caught:
            registry.capture(4, 8, function, (4, 8))
        assert caught.value.stage == stage
    assert registry.num_graphs == registry.capture_count == 0


def test_a_run_that_fails_is_a_failed_capture():
    """A function that compiles but does not run is a CaptureError, and is not kept."""

    def failing(x):
        return jax.pure_callback(refuse, x, x)

    def refuse(x):
        raise RuntimeError("the device is gone")

    registry = CUDAGraphRegistry(CONFIG)
    with pytest.raises(CaptureError, match="4x8 was compiled, but does not run") as caught:
        registry.capture(4, 8, failing, (4, 8))
    assert caught.value.stage == "warm-up"
    assert registry.num_graphs == 0


def test_get_is_exact_then_padded():
    """get finds the exact bucket, else the one the size is padded to, else None."""
    registry = CUDAGraphRegistry(CONFIG)
    padded = registry.capture(4, 8, double, (4, 8))
    exact = registry.capture(3, 7, double, (3, 7))
    assert registry.get(4, 8) is registry.get(2, 5) is padded
    assert registry.get(3, 7) is exact
    assert registry.get(5, 8) is None
    assert registry.has(2, 5)
    assert not registry.has(5, 8)
    assert registry.num_graphs == 2


def test_get_by_variant():
    """Without a variant get gives the one captured last; with one, that one."""
    registry = CUDAGraphRegistry(CONFIG)
    first = registry.capture(4, 8, double, (4, 8))
    second = registry.capture(4, 8, double, struct(4, 8, dtype=np.int32))
    third = registry.capture(4, 8, lambda x: x, (4, 8))
    assert registry.num_graphs == 3
    assert registry.get(4, 8) is third
    for entry in (first, second, third):
        assert registry.get(4, 8, variant=entry.variant) is entry
        assert registry.has(3, 8, variant=entry.variant)
    assert registry.remove(4, 8, variant=second.variant)
    assert not registry.remove(4, 8, variant=second.variant)
    assert not registry.has(4, 8, variant=second.variant)
    assert registry.num_graphs == 2


def test_remove_and_clear():
    """remove takes out exactly one size and says whether there was one; clear takes all."""
    registry = CUDAGraphRegistry(CONFIG)
    entry = registry.capture(4, 8, double, (4, 8))
    assert not registry.remove(3, 8)
    assert registry.remove(4, 8)
    assert not registry.remove(4, 8)
    registry.capture(4, 8, double, (4, 8))
    registry.capture(8, 8, double, (8, 8))
    registry.clear()
    assert (registry.num_graphs, registry.capture_count) == (0, 3)
    assert repr(registry) == "CUDAGraphRegistry(0 graphs, 3 captures)"
    assert_close(entry.replay(floats(0, 2, 3)), floats(0, 2, 3) * 2)


def test_reset_starts_from_zero():
    """reset drops entries and counts; graph ids go on, so that none is used twice."""
    registry = CUDAGraphRegistry(CONFIG)
    registry.capture(4, 8, double, (4, 8)).replay(floats(0, 4, 8))
    registry.reset()
    assert stats_of(registry)["capture_count"] == stats_of(registry)["total_replays"] == 0
    assert registry.capture(4, 8, double, (4, 8)).graph_id == 2


def test_a_capture_in_the_middle_of_a_reset():
    """What is captured while the counts go to zero is counted afterwards."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    x = floats(0, 2, 4)
    function(x)
    manager, registry = function.manager, function.registry
    told_of = []

    def miss():
        told_of.append("a change")
        if len(told_of) == 2:  # by then the function has forgotten its routes, too
            function(x)

    told = Told(miss)
    registry.watch(told)
    manager.reset()
    assert registry.num_graphs == 1
    before = registry.totals.replays
    for _ in range(10):
        function(x)
    assert registry.totals.replays == before + 10
    assert sum(manager.sizes().values()) >= 10


def test_one_capture_for_64_threads():
    """64 threads that capture one bucket get one entry and one capture."""
    registry = CUDAGraphRegistry(CONFIG)
    gate = threading.Barrier(64)

    def capture(_):
        gate.wait()
        return registry.capture(4, 8, double, (4, 8))

    with ThreadPoolExecutor(64) as pool:
        entries = list(pool.map(capture, range(64)))
    assert len({id(entry) for entry in entries}) == 1
    assert registry.capture_count == registry.num_graphs == 1


def test_a_failure_reaches_every_waiter():
    """Threads that wait for a capture that fails all get a CaptureError with its stage."""
    registry = CUDAGraphRegistry(CONFIG)
    gate = threading.Barrier(16)

    def capture(_):
        gate.wait()
        with pytest.raises(CaptureError) as caught:
            registry.capture(4, 8, lambda x: x if x.sum() else -x, (4, 8))
        return caught.value.stage

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(capture, range(16))) == {"trace"}
    assert registry.num_graphs == 0


def test_the_least_recently_used_goes_first():
    """Beyond max_graphs the bucket whose last replay is longest ago is dropped."""
    registry = CUDAGraphRegistry(CUDAGraphConfig(max_graphs=2, warmup_iterations=0))
    first = registry.capture(1, 8, double, (1, 8))
    registry.capture(2, 8, double, (2, 8))
    first.replay(floats(0, 1, 8))
    registry.capture(4, 8, double, (4, 8))
    assert [entry.key for entry in registry.entries()] == [(1, 8), (4, 8)]
    assert registry.evictions == 1


def test_the_memory_budget():
    """Beyond the budget the least recently used is dropped; one alone beyond it is an error."""
    config = CUDAGraphConfig(memory_pool_size_mb=1, warmup_iterations=0)
    compiler = SizedCompiler(lambda bucket: Memory(ROW * bucket.batch_size, 1000))
    registry = CUDAGraphRegistry(config, compiler=compiler)
    entries = [registry.capture(1, seq, big, (1, seq)) for seq in (2, 3)]
    assert stats_of(registry)["memory_bytes"] == 2 * ROW + 1000
    entries[0].replay(floats(0, 1, 2))
    registry.capture(1, 4, big, (1, 4))
    assert [entry.key for entry in registry.entries()] == [(1, 2), (1, 4)]
    with pytest.raises(CaptureError, match="more than the whole budget of 1,048,576"):
        registry.capture(8, 2, big, (8, 2))
    assert registry.num_graphs == 2
    unlimited = CUDAGraphRegistry(
        CUDAGraphConfig(memory_pool_size_mb=1, use_memory_pool=False, warmup_iterations=0)
    )
    assert (unlimited.capture(8, 2, big, (8, 2)).memory_bytes or 0) > 2**20


def test_the_clock_is_injected():
    """Capture times are those of the clock that was given."""
    ticks = itertools.count(step=0.25)
    registry = CUDAGraphRegistry(CONFIG, clock=lambda: next(ticks))
    entry = registry.capture(4, 8, double, (4, 8))
    assert entry.capture_time_ms == registry.capture_ms == 500  # to lower, and to compile
    assert stats_of(registry)["capture_time_ms"] == 500


def test_stats():
    """Statistics are JSON, with the specification's keys and one record for each graph."""
    registry = CUDAGraphRegistry(CONFIG)
    entry = registry.capture(4, 8, double, (4, 8))
    other = registry.capture(4, 8, double, struct(4, 8, dtype=np.int32))
    for size in (2, 4, 4):
        entry.replay(floats(0, size, 8))
    stats = stats_of(registry)
    assert json.loads(json.dumps(stats)) == stats
    assert (stats["num_graphs"], stats["capture_count"], stats["total_replays"]) == (2, 2, 3)
    assert stats["avg_replay_time_ms"] == pytest.approx(stats["total_replay_time_ms"] / 3)
    assert list(stats["graphs"]) == ["4x8", f"4x8#{other.graph_id}"]
    graph = stats["graphs"]["4x8"]
    assert (graph["batch_size"], graph["seq_len"], graph["replay_count"]) == (4, 8, 3)
    assert graph["waste"] == pytest.approx(1 - (2 + 4 + 4) / 12)
    assert entry.avg_replay_time_ms == pytest.approx(entry.total_replay_time_ms / 3)


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 8), (4, 5), (4, 8)])
def test_replay_pads_and_trims(batch, seq):
    """An entry replays inputs of its size or smaller, and trims the outputs."""
    entry = CUDAGraphRegistry(CONFIG).capture(4, 8, total, {"x": (4, 8), "scale": ()})
    x = floats(0, batch, seq)
    for inputs in ({"x": x, "scale": np.float32(2)}, {"x": jnp.asarray(x), "scale": 2.0}):
        if isinstance(inputs["scale"], float):
            inputs["scale"] = jnp.float32(2)
        assert_close(entry.replay(inputs), {"rows": x.sum(1), "each": x * 2})
    assert entry.replay_count == 2


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": floats(0, 5, 8), "scale": np.float32(1)}, r"\(5, 8\), more than the bucket 4x8"),
        ({"x": floats(0, 4, 9), "scale": np.float32(1)}, r"\(4, 9\), more than the bucket 4x8"),
        ({"x": floats(0, 4, 8)}, "the inputs have the structure"),
        ({"x": np.ones((4, 8), np.int32), "scale": np.float32(1)}, "give the same dtypes"),
        ({"x": floats(0, 4, 8), "scale": floats(0, 2)}, "give the same dtypes and other dim"),
        ({"x": floats(0, 4), "scale": np.float32(1)}, "1 dimension"),
        ({"x": [1.0], "scale": np.float32(1)}, "structure"),
    ],
)
def test_replay_refuses_what_was_not_captured(inputs, said):
    """Inputs of another kind than the entry's are an error that says what was captured."""
    entry = CUDAGraphRegistry(CONFIG).capture(4, 8, total, {"x": (4, 8), "scale": ()})
    with pytest.raises(InputShapeError, match=said):
        entry.replay(inputs)
    assert entry.replay_count == 0


def test_sizes_that_no_array_carries():
    """Where no array carries a size, it is the bucket's own."""
    entry = CUDAGraphRegistry(CONFIG).capture(4, 16, double, (4, 3))
    assert_close(entry.replay(floats(0, 2, 3)), floats(0, 2, 3) * 2)
    assert entry.key == (4, 16)


def test_what_has_taken_the_place_of_a_broken_entry_stays():
    """An entry that does not run is dropped, and not another one that has its key by then."""
    registry = CUDAGraphRegistry(CONFIG)
    broken = registry.capture(4, 8, double, (4, 8))
    registry.remove(4, 8)
    sound = registry.capture(4, 8, double, (4, 8))
    registry.discard_broken(broken, CaptureError("it does not run", stage="run"))
    assert registry.entries() == [sound]
    registry.discard_broken(sound, CaptureError("it does not run", stage="run"))
    assert registry.num_graphs == 0
