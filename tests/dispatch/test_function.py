"""BucketedFunction: the answer is the plain function's, at every size, by every way of calling."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cudagraph_jax import (
    CaptureError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    InputShapeError,
    SealedError,
    bucket_jit,
    no_compiles,
)
from tests.helpers.examples import as_a_whole, examples
from tests.helpers.functions import (
    GRID,
    KINDS,
    PARAMS,
    TABLE,
    assert_close,
    dense,
    double,
    embed,
    floats,
    row_norms,
    stats_of,
    tokens,
)

batches = st.integers(1, GRID.max_batch_size)
lengths = st.integers(1, GRID.max_seq_len)
seeds = st.integers(0, 2**16)


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def served(request):
    kind = request.param
    function = kind.bucketed()
    assert not function.warmup(*kind.arguments(0, 2, 3), progress=False).failed
    return kind, function


@examples(4, thorough=6, suppress_health_check=[HealthCheck.too_slow])
@given(batch=batches, seq=lengths, seed=seeds, on_device=st.booleans())
def test_real_rows_are_the_eager_ones(served, batch, seq, seed, on_device):
    """Inside the limits the real rows are those of the plain function, from host or device."""
    kind, function = served
    args = kind.arguments(seed, batch, seq)
    given_args = jax.device_put(args) if on_device else args
    with no_compiles():
        found = function(*given_args)
    assert_close(found, kind.plain(args, batch, seq), kind.tolerance)


def test_warm_calls_never_compile(served):
    """After warm-up no size inside the limits captures, compiles or runs eagerly."""
    kind, function = served
    before = stats_of(function)
    with no_compiles():
        for batch in range(1, GRID.max_batch_size + 1):
            for seq in range(1, GRID.max_seq_len + 1):
                function(*kind.arguments(0, batch, seq))
    after = stats_of(function)
    calls = GRID.max_batch_size * GRID.max_seq_len
    assert after["hits"] == before["hits"] + calls
    assert after["registry"]["capture_count"] == before["registry"]["capture_count"]


def test_ten_thousand_random_calls_compile_nothing():
    """10,000 calls of random sizes after warm-up compile nothing and are all right."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 4, 16), capture_seq_lens=(8, 32), warmup_iterations=1
    )
    function = bucket_jit(embed, in_axes=(None, "batch seq"), config=config)
    function.warmup(TABLE, tokens(0, 1, 1), progress=False)
    draw = random.Random(0)
    pool = tokens(0, 16, 32)
    with no_compiles():
        for _ in range(10_000):
            ids = pool[: draw.randint(1, 16), : draw.randint(1, 32)]
            assert np.array_equal(function(TABLE, ids), TABLE[ids])
    assert stats_of(function)["calls"] == stats_of(function)["hits"] == 10_000


@settings(max_examples=25)
@given(
    batch=st.integers(0, 9),
    seq=st.integers(0, 7),
    layout=st.sampled_from(["C", "F", "reversed", "read-only", "device", "strided"]),
)
def test_any_size_and_layout(batch, seq, layout):
    """Empty, inside or beyond the limits, in any memory layout: the answer is the function's."""
    x = floats(batch, batch, seq)
    laid_out = {
        "C": lambda: x,
        "F": lambda: np.asfortranarray(x),
        "reversed": lambda: x[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": lambda: np.broadcast_to(x, x.shape),
        "device": lambda: jnp.asarray(x),
        "strided": lambda: np.repeat(x, 2, axis=0)[::2],
    }[layout]()
    assert_close(doubler(laid_out), x * 2, 0)


doubler = bucket_jit(double, in_axes=("batch seq",), config=GRID)


def test_inputs_are_left_alone():
    """A call changes neither the caller's arrays nor answers that were given before."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    x = floats(0, 3, 4)
    kept = x.copy()
    first = function(x)
    expected = first.copy()
    for seed in range(20):
        function(floats(seed, 3, 4))
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(first, expected)


def test_cold_bucket_is_captured_once_for_64_threads():
    """64 threads that ask for one cold bucket get one capture and 64 right answers."""
    function = bucket_jit(dense, in_axes=(None, "batch seq ..."), config=GRID)
    x = floats(0, 2, 3, 3)
    gate = threading.Barrier(64)

    def call(_):
        gate.wait()
        return function(PARAMS, x)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(call, range(64)))
    for answer in answers:
        assert_close(answer, KINDS["dense"].plain((PARAMS, x), 2, 3))
    stats = stats_of(function)
    assert stats["registry"]["capture_count"] == 1
    assert (stats["captures"], stats["hits"], stats["calls"]) == (1, 63, 64)


def test_counts_add_up_under_threads():
    """However many threads call at once, every call is counted exactly once."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    each, threads = 60, 16

    def work(seed):
        draw = random.Random(seed)
        for _ in range(each):
            x = floats(0, draw.randint(0, 5), draw.randint(1, 6))
            np.testing.assert_array_equal(function(x), x * 2)
            if draw.random() < 0.02:
                stats_of(function)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    stats = stats_of(function)
    assert stats["calls"] == each * threads
    assert stats["hits"] + stats["captures"] + stats["eager_calls"] == each * threads
    assert sum(stats["replays"].values()) == stats["hits"] == stats["registry"]["total_replays"]
    assert stats["captures"] == stats["registry"]["num_graphs"] == 6
    assert (
        sum(graph["replay_count"] for graph in stats["registry"]["graphs"].values())
        == (stats["hits"])
    )


def test_elements_and_waste_are_exact():
    """Real and padded elements are those of the replays, and waste is their ratio."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    for batch, seq in [(3, 5), (2, 4), (1, 1)]:
        function(floats(0, batch, seq))
    stats = stats_of(function)
    assert stats["real_elements"] == 15 + 8 + 1
    assert stats["padded_elements"] == 0 + (15 - 8) + (2 - 1)
    assert stats["waste"] == pytest.approx(8 / 32)
    assert stats["replays"] == {"exact": 1, "padded": 2, "larger": 0}


def test_stats_are_json():
    """Statistics survive JSON unchanged, whatever happened before."""
    function = bucket_jit(embed, in_axes=(None, "batch seq"), config=GRID)
    function(TABLE, tokens(0, 2, 2))
    function(TABLE, tokens(0, 9, 9))
    stats = stats_of(function)
    assert json.loads(json.dumps(stats)) == stats
    assert list(stats["registry"]["graphs"]) == ["3x2"]
    assert "3x2" in function._repr_html_()
    assert "<table>" in function._repr_html_()


def test_two_functions_of_one_manager_do_not_share():
    """Two functions with the same sizes and dtypes each have a graph of their own."""
    manager = CUDAGraphManager(GRID)
    twice = bucket_jit(lambda x: x * 2, in_axes="batch seq", manager=manager)
    negated = bucket_jit(lambda x: -x, in_axes="batch seq", manager=manager)
    x = floats(0, 2, 2)
    for _ in range(2):
        assert_close(twice(x), x * 2)
        assert_close(negated(x), -x)
    assert manager.registry.num_graphs == 2
    assert set(stats_of(manager)["registry"]["graphs"]) == {
        "3x2",
        f"3x2#{manager.registry.entries()[-1].graph_id}",
    }


def test_two_dtypes_do_not_share():
    """The same sizes in another dtype are another graph, with answers of that dtype."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    for _ in range(2):
        for dtype in (np.float32, np.int32, np.int8, np.float16, jnp.bfloat16):
            x = tokens(0, 2, 2).astype(dtype)
            assert_close(function(x), x * dtype(2), 0)
    assert function.registry.num_graphs == 5


def test_params_alternate():
    """Parameters of another dtype or shape are another graph, and both go on being right."""
    function = bucket_jit(dense, in_axes=(None, "batch seq ..."), config=GRID)
    x = floats(0, 2, 4, 3)
    wider = {"w": floats(1, 3, 6), "b": floats(2, 6)}
    halved = {name: value.astype(jnp.bfloat16) for name, value in PARAMS.items()}
    for _ in range(3):
        for params in (PARAMS, wider, halved, jax.device_put(PARAMS)):
            found = function(params, x)
            assert_close(found, dense(jax.tree.map(jnp.asarray, params), jnp.asarray(x)))
    assert function.registry.num_graphs == 3
    assert stats_of(function)["captures"] == 3


NUMBERS: dict[str, Any] = {
    "int": 2,
    "float": 2.0,
    "True": True,
    "np.int32": np.int32(2),
    "np.float32": np.float32(2),
    "np.float64": np.float64(2),
    "weak array": jnp.asarray(2),
    "array": jnp.asarray(2, jnp.int32),
}


@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [
        (np.int8, "int", "np.int32"),
        (np.int8, "np.int32", "int"),
        (np.int8, "weak array", "array"),
        (np.int8, "array", "True"),
        (np.int8, "int", "float"),
        (jnp.bfloat16, "float", "np.float32"),
        (jnp.bfloat16, "np.float32", "float"),
        (np.float32, "int", "np.float64"),
    ],
)
def test_numbers_keep_their_dtype(dtype, first, second):
    """A passed-through number promotes as in the plain function, whatever came before it."""
    function = bucket_jit(lambda x, n: x * n, in_axes=("batch seq", None), config=GRID)
    x = jnp.full((3, 5), 100, dtype)
    for name in (first, second, first):
        assert_close(function(x, NUMBERS[name]), x * NUMBERS[name], 0)


def test_single_in_axes_stands_for_every_argument():
    """One specification for all arguments holds for each of them, in any dtypes."""
    function = bucket_jit(lambda a, b: a + b, in_axes="batch seq", config=GRID)
    a = floats(0, 3, 4)
    for b in (tokens(1, 3, 4), floats(2, 3, 4), tokens(3, 3, 4).astype(np.int8)):
        for _ in range(2):
            assert_close(function(a, b), jnp.asarray(a) + b)


def test_callable_objects_and_methods():
    """Bound methods and callable objects are served like functions."""

    class Model:
        def __init__(self, scale):
            self.scale = scale

        def __call__(self, x):
            return x * self.scale

        def run(self, x):
            return x + self.scale

    x = floats(0, 2, 2)
    model = Model(3.0)
    assert_close(bucket_jit(model, in_axes="batch seq", config=GRID)(x), x * np.float32(3))
    assert_close(bucket_jit(model.run, in_axes="batch seq", config=GRID)(x), x + np.float32(3))


def test_it_looks_like_the_function():
    """Name and docstring are the function's; the repr counts the graphs."""
    function: Any = bucket_jit(embed, in_axes=(None, "batch seq"), config=GRID)
    assert function.__name__ == "embed"
    assert function.__wrapped__ is embed
    assert repr(function) == "BucketedFunction(embed, 0 graphs)"
    named = bucket_jit(embed, in_axes=(None, "batch seq"), config=GRID, name="vectors")
    named(TABLE, tokens(0, 2, 2))
    assert repr(named) == "BucketedFunction(vectors, 1 graphs)"


def test_names_that_act_on_a_terminal():
    """A name is only text: whatever it holds, a repr is one line that acts on no terminal."""
    function = bucket_jit(lambda x: x, in_axes="batch seq", config=GRID, name="f\x1b[31m\u202e\n")
    function(floats(0, 2, 2))
    assert repr(function) == "BucketedFunction(f\ufffd[31m\ufffd , 1 graphs)"
    (entry,) = function.registry.entries()
    assert repr(entry).startswith("CUDAGraphEntry(3x2, f\ufffd[31m\ufffd (")


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("sizes", [(3, 5), (2, 4)], ids=["exact", "padded"])
def test_under_transformations_it_is_the_function(warm, sizes):
    """Under jit, vmap and grad nothing is captured and the answer is the plain function's."""
    function = bucket_jit(dense, in_axes=(None, "batch seq ..."), config=GRID)
    params, x = jax.device_put(PARAMS), floats(0, *sizes, 3)
    if warm:
        function(params, x)
        function(params, x)
    graphs = function.registry.num_graphs
    plain = dense(params, x)
    assert_close(jax.jit(function)(params, x), plain)
    stacked = jnp.stack([x, x + 1])
    assert_close(
        jax.vmap(function, (None, 0))(params, stacked), jax.vmap(dense, (None, 0))(params, stacked)
    )
    gradient = jax.grad(lambda params: jnp.sum(function(params, x)))(params)
    assert_close(gradient, jax.grad(lambda params: jnp.sum(dense(params, x)))(params))
    by_x = jax.grad(lambda x: jnp.sum(function(params, x)))(x)
    assert_close(by_x, jax.grad(lambda x: jnp.sum(dense(params, x)))(x))
    assert function.registry.num_graphs == graphs


def test_under_transformations_the_mask_is_all_real():
    """Under a transformation the mask covers the real sizes, and keywords go through."""
    kind = KINDS["masked pooling"]
    function = kind.bucketed()
    ids = tokens(0, 2, 3)
    expected = kind.plain((TABLE, ids), 2, 3)
    assert_close(jax.jit(function)(TABLE, ids), expected)
    assert_close(jax.jit(lambda table: function(table, ids=ids))(TABLE), expected)
    assert stats_of(function)["eager_by_reason"] == {"transformed": 2}


@pytest.mark.parametrize("options", [{}, {"debug_mode": True}, {"on_miss": "background"}], ids=str)
def test_what_closes_over_a_traced_value_is_the_function(options):
    """What is made within a transformation, of its values, is the plain function without a word."""
    config = dataclasses.replace(GRID, **options)
    x, made = floats(0, 2, 3), []

    def total(scale):
        made.append(bucket_jit(lambda x: x * scale, in_axes="batch seq", config=config))
        return made[-1](x).sum() + made[-1](x + 1).sum()

    for transform, scale in ((jax.jit, 2.0), (jax.grad, 2.0), (jax.vmap, jnp.arange(3.0))):
        expected = transform(lambda scale: (x * scale).sum() + ((x + 1) * scale).sum())(scale)
        assert_close(transform(total)(scale), expected)
    for function in made:
        function.manager.wait()
        assert function.registry.num_graphs == 0
        assert not function.manager.dispatcher.capturer.failures.remembered
    known = {} if "on_miss" in options else {"transformed": 2}
    assert known.items() <= stats_of(made[0])["eager_by_reason"].items()


def test_within_named_axes_it_is_the_function():
    """What names an axis of `jax.vmap` is captured at none of its sizes, and is without a word."""

    def means(x):
        return x / jax.lax.psum(1, "rows") + jax.lax.psum(x, "rows")

    function = bucket_jit(means, in_axes="batch seq", config=GRID)
    x = floats(0, 2, 3)
    for rows in (3, 4):
        found, expected = (
            jax.vmap(lambda y, own=own: own(x) + y, axis_name="rows")(jnp.zeros(rows))
            for own in (function, means)
        )
        assert_close(found, expected)
    assert function.registry.num_graphs == 0
    assert stats_of(function)["eager_by_reason"] == {"transformed": 2}


def test_what_closes_over_a_traced_value_is_not_captured_ahead():
    """A warm-up, and whoever captures by hand, is told so."""

    def warmed(scale):
        function = bucket_jit(lambda x: x * scale, in_axes="batch seq", config=GRID)
        function.warmup(floats(0, 2, 3), progress=False)

    def captured(scale):
        struct = jax.ShapeDtypeStruct((2, 3), np.float32)
        CUDAGraphManager(GRID).capture_graph(2, 3, lambda x: x * scale, struct)

    for ahead in (warmed, captured):
        with pytest.raises(CaptureError, match="closes over a value that is traced"):
            jax.jit(ahead)(2.0)


def test_masks_of_sizes_that_are_symbols():
    """A function with a mask is exported for any sizes, as the plain one is."""
    function = bucket_jit(row_means, in_axes="batch seq", mask_argname="mask", config=GRID)
    shape = jax.export.symbolic_shape("rows, length")
    exported = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct(shape, np.float32))
    x = floats(0, 2, 3)
    assert_close(exported.call(x), x.mean(axis=1))


def row_means(x, *, mask):
    """The mean of what is real of each row."""
    return jnp.where(mask, x, 0).sum(axis=1) / mask.sum(axis=1)


@pytest.mark.parametrize("shares", [True, False], ids=["one manager", "two managers"])
def test_a_bucketed_function_inside_another(shares):
    """The inner function becomes a part of the outer one's program, and serves calls of its own."""
    manager = CUDAGraphManager(GRID)
    inner = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    outer = bucket_jit(
        lambda x: inner(x) + 1,
        in_axes=("batch seq",),
        manager=manager if shares else CUDAGraphManager(GRID),
        name="outer",
    )
    x = floats(0, 2, 3)
    assert_close(outer(x), x * 2 + 1)
    assert {entry.variant.name for entry in outer.registry.entries()} == {"outer"}
    assert set(stats_of(inner)["eager_by_reason"]) == {"transformed"}
    with no_compiles():
        assert_close(outer(x), x * 2 + 1)
    assert_close(inner(x), x * 2)
    assert {entry.variant.name for entry in inner.registry.entries()} >= {"double"}


def test_overflow_runs_eagerly_with_the_mask():
    """Beyond the limits a masked function gets a mask of ones and answers as asked for."""
    kind = KINDS["masked pooling"]
    function = kind.bucketed()
    args = kind.arguments(0, 9, 9)
    found = function(*args)
    assert isinstance(found, np.ndarray)
    assert_close(found, kind.plain(args, 9, 9))
    assert stats_of(function)["eager_by_reason"] == {"overflow": 1}


def test_without_seq_the_sequence_is_one():
    """A function without a sequence axis has buckets of sequence length 1."""
    function = bucket_jit(row_norms, in_axes=("batch _",), config=GRID)
    function(floats(0, 2, 7))
    assert [entry.key for entry in function.registry.entries()] == [(3, 1)]


def test_without_batch_the_batch_is_one():
    """A function without a batch axis has buckets of batch 1."""
    function = bucket_jit(double, in_axes=("seq",), config=GRID)
    assert_close(function(floats(0, 4)), floats(0, 4) * 2)
    assert [entry.key for entry in function.registry.entries()] == [(1, 5)]


def test_without_captured_lengths_each_length_is_its_own_bucket():
    """`capture_seq_lens=None` pads the batch alone."""
    config = CUDAGraphConfig(capture_sizes=(4,), max_capture_seq_len=6, warmup_iterations=0)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    for seq in (2, 3, 6, 7):
        assert_close(function(floats(0, 2, seq)), floats(0, 2, seq) * 2)
    assert [entry.key for entry in function.registry.entries()] == [(4, 2), (4, 3), (4, 6)]


def test_seal_refuses_warmup():
    """A sealed function does not warm up, and a disabled one has nothing to warm up."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    function.seal()
    assert function.manager.mode is CUDAGraphMode.REPLAY
    with pytest.raises(SealedError, match="mode=REPLAY does not allow captures"):
        function.warmup(floats(0, 1, 1))
    off = bucket_jit(double, in_axes=("batch seq",), config=CUDAGraphConfig.disabled())
    assert off.warmup(floats(0, 1, 1)).buckets == ()


@pytest.mark.parametrize("how", ["remove", "clear", "reset"])
def test_dropped_entries_are_captured_again(how):
    """Routes to a removed, cleared or reset bucket are forgotten: the next call captures anew."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    x = floats(0, 2, 2)
    function(x)
    function(x)
    drop = {
        "remove": lambda: function.registry.remove(3, 2),
        "clear": function.registry.clear,
        "reset": function.manager.reset,
    }[how]
    drop()
    assert function.registry.num_graphs == 0
    assert_close(function(x), x * 2)
    assert function.registry.num_graphs == 1
    assert function.registry.capture_count == (1 if how == "reset" else 2)


class Calls(RuleBasedStateMachine):
    """Any sequence of calls, drops, mode changes and parameter changes."""

    def __init__(self):
        super().__init__()
        config = CUDAGraphConfig(
            capture_sizes=(2, 4), capture_seq_lens=(3,), max_graphs=2, warmup_iterations=0
        )
        self.function = bucket_jit(as_a_whole(embed), in_axes=(None, "batch seq"), config=config)
        self.table = TABLE
        self.calls = 0

    @rule(batch=st.integers(0, 5), seq=st.integers(0, 4), device=st.booleans())
    def call(self, batch, seq, device):
        ids = tokens(batch + seq, batch, seq)
        found = self.function(self.table, jnp.asarray(ids) if device else ids)
        self.calls += 1
        assert_close(found, self.table[ids], 0)

    @rule(batch=st.integers(1, 5))
    def replay_is_not_eager(self, batch):
        decision = self.function.explain(self.table, tokens(0, batch, 2))
        before = stats_of(self.function)
        self.function(self.table, tokens(0, batch, 2))
        self.calls += 1
        after = stats_of(self.function)
        replayed = after["hits"] == before["hits"] + 1
        assert replayed == (decision.mode is CUDAGraphMode.REPLAY)

    @rule(dtype=st.sampled_from([np.float32, np.float16]), width=st.integers(1, 2))
    def other_params(self, dtype, width):
        self.table = TABLE[:, :width].astype(dtype)

    @rule(batch=st.sampled_from([2, 4]))
    def remove(self, batch):
        held = self.function.registry.has(batch, 3)
        assert self.function.registry.remove(batch, 3) == held

    @rule(mode=st.sampled_from(list(CUDAGraphMode)))
    def set_mode(self, mode):
        self.function.manager.mode = mode

    @rule()
    def clear(self):
        self.function.registry.clear()

    @rule()
    def reset(self):
        self.function.manager.reset()
        self.calls = 0

    @precondition(lambda self: self.function.manager.mode is CUDAGraphMode.CAPTURE)
    @rule()
    def warm_up(self):
        try:
            self.function.warmup(self.table, tokens(0, 1, 1), progress=False)
        except ConfigError:
            # The buckets of another table are in the way, and are not driven out in silence.
            self.function.registry.clear()
            self.function.warmup(self.table, tokens(0, 1, 1), progress=False)
        assert self.function.registry.num_graphs == 2

    @invariant()
    def every_call_is_counted(self):
        stats = stats_of(self.function)
        assert stats["calls"] == self.calls
        assert stats["hits"] + stats["captures"] + stats["eager_calls"] == self.calls

    @invariant()
    def limits_hold(self):
        assert self.function.registry.num_graphs <= 2
        assert (
            len(stats_of(self.function)["registry"]["graphs"]) == self.function.registry.num_graphs
        )


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=8, stateful_step_count=20)


def test_a_failed_bucket_serves_every_waiter():
    """Threads that wait for a bucket that cannot be captured all get the eager answer."""

    def untraceable(x):
        return x * 2 if float(x.sum()) != 0 else x

    function = bucket_jit(untraceable, in_axes=("batch seq",), config=GRID)
    x = np.ones((2, 2), np.float32)
    gate = threading.Barrier(8)

    def call(_):
        gate.wait()
        return function(x)

    with (
        pytest.warns(UserWarning, match="untraceable runs eagerly") as caught,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = list(pool.map(call, range(8)))
    for answer in answers:
        assert_close(answer, x * 2)
    assert len(caught) == 1
    assert function.registry.num_graphs == 0
    assert stats_of(function)["eager_by_reason"] == {"failed": 8}


def test_disable_jit():
    """Under `jax.disable_jit` the plain function runs, and explain() says so."""
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=GRID)
    x = floats(0, 2, 4)
    function(x)
    for _ in range(2):
        with jax.disable_jit():
            assert_close(function(x), x * 2)
            assert "disable_jit" in function.explain(x).reason
    assert_close(function(x), x * 2)
    stats = stats_of(function)
    assert stats["eager_by_reason"] == {"disable_jit": 2}
    assert (stats["calls"], stats["hits"]) == (4, 1)


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_mask_of_constants_inside_another_trace(is_warm):
    """A function that takes a mask serves constants while another is traced."""
    inner = bucket_jit(
        lambda x, *, mask: (x * mask).sum(axis=1),
        in_axes="batch seq",
        out_axes="batch",
        mask_argname="mask",
        config=GRID,
    )
    constant = floats(0, 3, 5)
    if is_warm:
        inner.warmup(constant, progress=False)
        inner.seal()
    found = jax.jit(lambda x: x + inner(constant).sum())(np.float32(1))
    np.testing.assert_allclose(found, 1 + constant.sum(), rtol=1e-5)
    assert_close(inner(constant), constant.sum(axis=1))
    assert stats_of(inner)["failed_buckets"] == 0


def stepped(cache, x):
    return {"k": cache["k"] + x[:, None], "v": cache["v"] * 2}, x + 1


def cached(rows, length=5):
    return {name: jnp.full((rows, length, 3), 2.0) for name in "kv"}


def test_state_in_a_pytree_is_found_by_its_first_array(monkeypatch):
    """A hit whose sizes a pytree carries takes no pytree apart, and gives the plain answer."""
    function: Any = bucket_jit(
        stepped, in_axes=("batch seq _", "batch _"), unpad="none", donate_argnums=0, config=GRID
    )
    x = jnp.ones((3, 3))
    function(cached(3), x)
    with monkeypatch.context() as patch:
        patch.setattr(type(function), "_call_bound", None)
        state, answer = function(cached(3), x)
    np.testing.assert_allclose(state["k"], 3)
    np.testing.assert_allclose(state["v"], 4)
    np.testing.assert_allclose(answer, 2)
    # Other pytrees, arrays on the host and other sizes are decided as before.
    other: Any = bucket_jit(lambda tree, x: (tree, x), in_axes="batch seq _", config=GRID)
    for first in (cached(3), list(cached(3).values()), floats(0, 3, 5, 3), cached(2)):
        rows = jax.tree.leaves(first)[0].shape[0]
        for second in (floats(0, rows, 5, 3), jnp.ones((rows, 5, 3))):
            for _ in range(2):
                found, same = other(first, second)
                jax.tree.map(np.testing.assert_array_equal, found, first)
                np.testing.assert_array_equal(same, second)
    stats = stats_of(function)
    assert (stats["calls"], stats["replays"]["exact"]) == (2, 1)
    with pytest.raises(InputShapeError, match="float64"):
        other({**cached(3), "v": np.ones((3, 5, 3))}, jnp.ones((3, 5, 3)))
