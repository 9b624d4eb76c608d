"""Run by test_mesh.py on eight devices: ragged calls of functions over a mesh of two by four.

Prints what each check raised that is named behind the store's path, in that order, as JSON by its
name. With "before" in the place of names it is the process before a restart, which fills the store.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cudagraph_jax import (
    Batcher,
    BucketedFunction,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    GraphStore,
    InputShapeError,
    Ladder,
    Padded,
    SealedError,
    bucket_jit,
    no_compiles,
    plan_buckets,
)
from cudagraph_jax.program.donation import on_device
from cudagraph_jax.report.warmup_report import WarmupReport

MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
ROWS, COLUMNS, WHOLE = (NamedSharding(MESH, P(*spec)) for spec in (("data",), (None, "model"), ()))


def config_of(*sizes: int, lengths: tuple[int, ...] = (8,), **options) -> CUDAGraphConfig:
    return CUDAGraphConfig(
        capture_sizes=sizes, capture_seq_lens=lengths, warmup_iterations=1, **options
    )


CONFIG = config_of(2, 4)
TABLE = np.linspace(-1, 1, 16 * 8, dtype=np.float32).reshape(16, 8)
STORE = sys.argv[1]

CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


def embed(table, ids, mask):
    rows = jnp.where(mask[..., None], table[ids], 0)
    return rows.sum(1) / mask.sum(1, keepdims=True)


def constrained(x):
    """Names an axis of the mesh that its context has, of an argument and of an output."""
    x = jax.lax.with_sharding_constraint(x, P("data"))
    return jax.lax.with_sharding_constraint(x * 2 + 1, P("data"))


def embedder(function: Callable[..., Any] = embed, **options) -> BucketedFunction:
    options = {"config": CONFIG, "in_shardings": (COLUMNS, ROWS), **options}
    return bucket_jit(function, in_axes=(None, "batch seq"), mask_argname="mask", **options)


def expected(ids) -> np.ndarray:
    return np.asarray(TABLE[np.asarray(ids)].mean(1))


def ids_of(batch: int, seq: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (batch, seq), np.int32)


def refused(match: str, make: Callable[[], object], kind: type[Exception] = ConfigError) -> None:
    with pytest.raises(kind, match=match):
        make()


def is_cut(array: jax.Array, spec: P) -> bool:
    return array.sharding.is_equivalent_to(NamedSharding(MESH, spec), array.ndim)


# What agrees with what: declarations.


@check
def any_sizes_are_answered_and_nothing_compiles():
    function, table = embedder(), jax.device_put(TABLE, COLUMNS)
    report = function.warmup(table, ids_of(1, 1), progress=False)
    assert report.captured == 2, report
    draw = np.random.default_rng(0)
    with no_compiles():
        for seed, (batch, seq) in enumerate(draw.integers((1, 1), (5, 9), (150, 2))):
            ids = ids_of(batch, seq, seed=seed)
            np.testing.assert_allclose(function(table, ids), expected(ids), rtol=1e-5, atol=1e-6)
    assert function.stats()["misses"] == 0
    for entry in function.registry.entries():
        args, _ = entry.executable.call.input_shardings
        assert args[1].is_equivalent_to(ROWS, 2), args


@check
def arrays_that_lie_elsewhere_are_put_where_they_are_declared():
    function, table = embedder(), jax.device_put(TABLE, COLUMNS)
    function.warmup(table, ids_of(1, 1), progress=False)
    second = jax.devices()[1]
    for batch, seq in ((4, 8), (3, 5), (2, 8)):
        ids = ids_of(batch, seq)
        places = [None, second, WHOLE, jax.devices()[0]]
        places += [ROWS, NamedSharding(MESH, P("data", "model"))] if batch == 4 and seq == 8 else []
        arrays = [jax.device_put(ids, place) for place in places]
        arrays += [Padded(array, (batch, seq)) for array in arrays]
        for array in [*arrays, ids, *arrays]:
            with no_compiles():
                found = function(table, array)
            np.testing.assert_allclose(found, expected(ids), rtol=1e-5, atol=1e-6)
    for array in (jax.device_put(ids_of(3, 5)), jax.device_put(ids_of(4, 8), ROWS)):
        with jax.transfer_guard("disallow"):
            found = function(table, array)
        np.testing.assert_allclose(found, expected(array), rtol=1e-5, atol=1e-6)
    assert function.stats()["misses"] == 0


@check
def parameters_go_where_they_are_declared():
    function = embedder()
    for table in (TABLE, jax.device_put(TABLE, COLUMNS), jnp.asarray(TABLE), TABLE):
        for ids in (ids_of(3, 5), ids_of(4, 8)):
            np.testing.assert_allclose(function(table, ids), expected(ids), rtol=1e-5, atol=1e-6)
    assert function.registry.num_graphs == 1, function.registry.entries()
    for place in (jax.devices()[1], WHOLE):  # as under `jit`
        table = jax.device_put(TABLE, place)
        for made in (function, embedder()):
            refused("table lies on", partial(made, table, ids_of(4, 8)), InputShapeError)
        warm = partial(embedder().warmup, table, ids_of(4, 8), progress=False)
        refused("table lies on", warm, InputShapeError)
    everything = embedder(in_shardings=ROWS)
    warm = partial(everything.warmup, jax.device_put(TABLE, COLUMNS), ids_of(4, 8), progress=False)
    refused("table lies on", warm, InputShapeError)
    np.testing.assert_allclose(function(TABLE, ids_of(4, 8)), expected(ids_of(4, 8)), rtol=1e-5)


@check
def what_is_no_sharding_of_this_function_is_refused():
    def make(in_shardings, in_axes=(None, "batch seq"), function=lambda w, x: x * w):
        return lambda: bucket_jit(
            function, in_axes=in_axes, in_shardings=in_shardings, config=CONFIG
        )

    other = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    refused("NamedSharding over a mesh", make((None, P("data"))))
    refused(
        "NamedSharding over a mesh",
        make((None, jax.sharding.SingleDeviceSharding(jax.devices()[0]))),
    )
    refused("NamedSharding over a mesh", make((None, NamedSharding(MESH.abstract_mesh, P("data")))))
    refused("two meshes", make((WHOLE, NamedSharding(other, P("data")))))
    refused("in_axes has 2 entries, and in_shardings 1", make((ROWS,)))
    refused("in_shardings has 3 entries", make((None, ROWS, None), "batch seq"))
    refused("has 2 dimension.*of 3", make((None, NamedSharding(MESH, P("data", None, None)))))
    refused("passed by keyword", make((None, ROWS), "batch", lambda x, *, k: x))
    with pytest.raises(ConfigError, match="'w', which is static"):
        bucket_jit(
            lambda w, x: x * w,
            in_axes=(None, "batch"),
            in_shardings=(WHOLE, ROWS),
            static_argnames="w",
        )
    late = bucket_jit(
        lambda w, x: x["a"] * w,
        in_axes=(None, "batch ..."),
        in_shardings=(ROWS, {"b": ROWS}),
        config=CONFIG,
    )
    refused("in_shardings of x.*does not match", lambda: late(1.0, {"a": np.ones((2, 3))}))
    for w, match in ((1.0, "w has 0 dimension.*of 1"), (np.ones(3, np.float32), "w has 3 in dim")):
        late = bucket_jit(
            lambda w, x: x * w.sum(),
            in_axes=(None, "batch ..."),
            in_shardings=(ROWS, None),
            config=CONFIG,
        )
        refused(match, partial(late, w, np.ones((2, 3), np.float32)))
        refused(match, partial(late.warmup, w, np.ones((2, 3), np.float32)))


# Divisibility.


@check
def sizes_that_the_mesh_does_not_divide_are_refused_with_the_multiple():
    uneven = config_of(1, 2, 3, 4)
    refused(
        r"capture_sizes=\(1, 2, 3, 4\) has 1, 3, .* batch into 2 parts.*capture_sizes=\(2, 4\)",
        lambda: embedder(config=uneven),
    )
    refused("into 2 parts", lambda: embedder(config=None, manager=CUDAGraphManager(uneven)))
    both = NamedSharding(MESH, P("data", "model"))
    lengths = config_of(2, lengths=(6, 8))
    refused(r"capture_seq_lens=\(8,\)", lambda: embedder(config=lengths, in_shardings=(None, both)))
    named = config_of(2, capture_axes={"width": (6, 8)})
    refused(
        r"capture_axes\['width'\]=\(6, 8\) has 6, .* as capture_axes\['width'\]=\(8,\)",
        lambda: bucket_jit(
            jnp.sin,
            in_axes="batch width",
            in_shardings=NamedSharding(MESH, P(None, ("data", "model"))),
            config=named,
        ),
    )
    # At the first use, where only the arrays say which dimension is which.
    late = bucket_jit(
        lambda x: x["a"] * 2,
        in_axes={"a": "... batch"},
        in_shardings={"a": NamedSharding(MESH, P(None, "data"))},
        config=uneven,
    )
    example = {"a": np.ones((5, 2), np.float32)}
    refused("multiples of 2", lambda: late.warmup(example, progress=False))
    refused("multiples of 2", lambda: late(example))
    # Of arrays that bring their shardings it is known in a warm-up.
    brings = bucket_jit(jnp.sin, in_axes="batch seq", config=uneven)
    cut = jax.device_put(np.ones((2, 8), np.float32), ROWS)
    refused("multiples of 2", lambda: brings.warmup(cut, progress=False))
    # A warm-up that is refused changes nothing for calls in NumPy.
    ones = np.ones((2, 3), np.float32)
    served = bucket_jit(jnp.sin, in_axes="batch seq", config=CONFIG)
    served.warmup(ones, progress=False)
    served.seal()
    with pytest.raises(SealedError):
        served.warmup(jax.device_put(np.ones((2, 8), np.float32), ROWS), progress=False)
    with no_compiles():
        np.testing.assert_allclose(served(ones), np.sin(ones), rtol=1e-5)
    assert served.stats()["registry"]["total_replays"] == 1


@check
def the_default_grid_is_rounded_up():
    function = embedder(config=None)
    even = Ladder.powers_of_two(256).rounded(2)
    assert function.manager.config.capture_sizes == even
    assert function.manager.multiples == {"batch": 2}
    assert Ladder((1, 3, 10, 12)).rounded(4) == (4, 12)
    # Whoever made the manager.
    config = CUDAGraphConfig(capture_seq_lens=(8,), warmup_iterations=0)
    manager = CUDAGraphManager(config)
    shared = embedder(config=config, manager=manager)
    assert manager.config.capture_sizes == even
    assert embedder(config=config, manager=manager).manager is manager
    assert shared.manager.multiples == {"batch": 2}
    quarters = NamedSharding(MESH, P("model"))
    fourth = bucket_jit(jnp.sin, in_axes="batch seq", in_shardings=quarters, manager=manager)
    assert fourth.manager.config.capture_sizes == Ladder.powers_of_two(256).rounded(4)
    first_call = bucket_jit(
        lambda x: x["ids"] * 2,
        in_axes={"ids": "batch seq"},
        in_shardings={"ids": NamedSharding(MESH, P("data"))},
        manager=CUDAGraphManager(config),
    )
    np.testing.assert_array_equal(first_call({"ids": ids_of(1, 5)}), 2 * ids_of(1, 5))
    assert first_call.manager.config.capture_sizes == even
    # But not beside what is captured.
    taken = CUDAGraphManager(config)
    captured = bucket_jit(jnp.sin, in_axes="batch seq", manager=taken)
    captured(np.ones((1, 8), np.float32))
    refused("multiples of 2", lambda: embedder(config=None, manager=taken))
    assert (taken.multiples, taken.config) == ({}, config)
    # What somebody chose is not raised.
    six = Mesh(np.array(jax.devices()[:6]), ("data",))
    by_six = NamedSharding(six, P("data"))
    for largest in (257, 300, None):
        limited = dataclasses.replace(config, max_capture_batch_size=largest)

        def make(limited=limited):
            return bucket_jit(jnp.sin, in_axes="batch seq", in_shardings=by_six, config=limited)

        if largest == 257:
            refused("max_capture_batch_size=257 is below 258.*multiples of 6", make)
        else:
            assert make().manager.config.max_batch_size == (largest or 258)


@check
def multiples_go_with_their_function():
    config = config_of(2, 4)
    manager = CUDAGraphManager(config)
    first = embedder(config=None, manager=manager)
    cut = NamedSharding(MESH, P(None, "model"))
    second = bucket_jit(jnp.sin, in_axes="batch seq", in_shardings=cut, manager=manager)
    quarters = (None, NamedSharding(MESH, P("model")))
    with pytest.raises(ConfigError, match="multiples of 4"):
        embedder(config=None, manager=manager, in_shardings=quarters)
    second(np.ones((1, 1), np.float32))
    assert manager.multiples == {"batch": 2, "seq": 4}
    del first
    assert manager.multiples == {"seq": 4}
    del second
    assert manager.multiples == {}


@check
def lengths_that_nobody_pads_are_no_part_of_a_plan():
    config = CUDAGraphConfig(capture_sizes=(2, 4, 8), warmup_iterations=0)
    function = bucket_jit(
        lambda x: x * 2,
        in_axes="batch seq",
        in_shardings=NamedSharding(MESH, P("data", "model")),
        config=config,
    )
    for rows in (1, 3, 6, 6):
        function(np.ones((rows, 1), np.float32))
    plan = function.replan(max_graphs=2)
    assert plan.seq_lens == (1,), plan
    with function.manager:
        function.manager.wait()
    assert function.manager.config.capture_sizes == plan.batch_sizes


@check
def a_plan_keeps_to_the_multiples():
    config = config_of(2, 4, 16, lengths=(8, 16))
    function = embedder(config=config, in_shardings=(None, NamedSharding(MESH, P("data", "model"))))
    table, draw = jnp.asarray(TABLE), np.random.default_rng(0)
    function.warmup(table, ids_of(1, 1), progress=False)
    for batch, seq in draw.integers((1, 1), (14, 14), (40, 2)):
        function(table, ids_of(batch, seq))
    plan = function.replan(max_graphs=6)
    with function.manager:
        function.manager.wait()
    grid = function.manager.config
    assert (grid.capture_sizes, grid.capture_seq_lens) == (plan.batch_sizes, plan.seq_lens)
    assert not any(size % 2 for size in plan.batch_sizes), plan
    assert not any(size % 4 for size in plan.seq_lens), plan
    with no_compiles():
        for batch, seq in draw.integers((1, 1), (14, 14), (40, 2)):
            ids = ids_of(batch, seq)
            np.testing.assert_allclose(function(table, ids), expected(ids), rtol=1e-5, atol=1e-6)
    own = plan_buckets([(3, 5), (7, 9)], max_graphs=2, multiples=function.manager.multiples)
    assert (own.batch_sizes[-1], own.seq_lens[-1]) == (8, 12), own
    odd = plan_buckets([(3, 5)], max_graphs=1)
    refused("multiples of 2", lambda: embedder(config=CUDAGraphConfig.from_plan(odd)))


# The mesh of the context.


@check
def the_mesh_of_the_request_holds_wherever_the_function_runs():
    x = np.ones((3, 5), np.float32)
    policies: list[dict[str, Any]] = [
        {},
        {"on_miss": "background"},
        {"on_miss": "eager"},
        {"debug_mode": True},
    ]
    policies += [{"on_overflow": "split"}, {"on_overflow": "exact"}]
    for policy in policies:
        config = dataclasses.replace(CONFIG, **policy)
        function = bucket_jit(constrained, in_axes="batch seq", config=config)
        with jax.set_mesh(MESH), function.manager:
            for size in (4, 3, 6, 7, 4):
                given = np.resize(x, (size, 5))
                np.testing.assert_array_equal(function(given), given * 2 + 1)
            function.manager.wait()
            np.testing.assert_array_equal(function(x[:2]), x[:2] * 2 + 1)
        assert not function.manager.dispatcher.capturer.failures.remembered, config
        entries = [e for e in function.registry.entries() if e.batch_size % 2 == 0]
        assert all(is_rows(e.executable.call.output_shardings) for e in entries), entries
        assert entries or config.on_miss == "eager"


def is_rows(sharding) -> bool:
    return sharding.is_equivalent_to(ROWS, 2)


@check
def an_uneven_eager_answer_is_traced_once():
    ran: list[int] = []

    def counted(x):
        ran.append(len(x))
        return constrained(x)

    function = bucket_jit(counted, in_axes="batch seq", config=config_of(2, on_miss="eager"))
    with jax.set_mesh(MESH):
        for size in (3, 3, 5, 5, 3):
            x = np.full((size, 5), size, np.float32)
            np.testing.assert_array_equal(function(x), x * 2 + 1)
        assert ran == [3, 3, 5], ran  # once to see that it takes no uneven parts
        with no_compiles():
            function(x)
        for size in range(7, 41, 2):
            function(np.ones((size, 5), np.float32))
        ran.clear()
        function(x)
        assert ran == [3]  # it is not kept for ever


@check
def a_warm_up_and_a_plan_have_the_mesh_of_their_caller():
    config = config_of(2, 4, 8)
    function = bucket_jit(constrained, in_axes="batch seq", config=config)
    x = np.ones((1, 5), np.float32)
    with jax.set_mesh(MESH):
        assert not function.warmup(x, progress=False, workers=2).failed
        for size in (1, 2, 5, 6):
            function(np.resize(x, (size, 5)))
        plan = function.replan(max_graphs=3)  # with one of 6
    function.manager.wait()  # as may be in a thread without it
    assert function.manager.config.capture_sizes == plan.batch_sizes
    assert all(is_rows(e.executable.call.output_shardings) for e in function.registry.entries())
    with jax.set_mesh(MESH):
        function.manager.dispatcher.capturer.record_again()
        with no_compiles():
            np.testing.assert_array_equal(function(np.resize(x, (3, 5))), np.full((3, 5), 3.0))


@check
def threads_with_other_meshes_have_programs_of_their_own():
    other = Mesh(MESH.devices.T, ("model", "data"))
    function = bucket_jit(
        lambda x: x * jax.sharding.get_abstract_mesh().shape.get("data", 1),
        in_axes="batch seq",
        config=CONFIG,
        unpad="none",
    )
    x = jnp.ones((4, 8))
    meshes = [MESH, None, Mesh(MESH.devices[:1], ("model", "data")), MESH, other, None]
    for given in (x, np.ones((4, 8), np.float32), x):
        for mesh in meshes:
            sizes = 1 if mesh is None else mesh.shape["data"]
            with jax.set_mesh(mesh):
                assert float(function(given)[0, 0]) == sizes, mesh
    with jax.set_mesh(Mesh(MESH.devices[:, :2], ("data", "model"))):
        reason = function.explain(x).reason
    assert ", not Mesh(axis_sizes=(2, 2)" in reason, reason


@check
def a_batcher_runs_under_the_mesh_it_was_given_items_under():
    function = bucket_jit(constrained, in_axes="batch seq", config=CONFIG)
    rows = [np.full(n, n, np.float32) for n in (3, 8, 1, 5, 2)]
    with jax.set_mesh(MESH):
        function.warmup(rows[0][None], progress=False)
        with Batcher(function) as batcher:
            for row, answer in zip(rows, batcher.map(rows), strict=True):
                np.testing.assert_array_equal(answer, row * 2 + 1)
            function.manager.mode = type(function.manager.mode).NONE  # by the plain function
            np.testing.assert_array_equal(batcher.submit(rows[0]).result(), rows[0] * 2 + 1)


@check
def a_batcher_cuts_its_calls_as_declared():
    function, table = (
        embedder(config=config_of(2, 4, lengths=(4, 8))),
        jax.device_put(TABLE, COLUMNS),
    )
    function.warmup(table, ids_of(1, 1), progress=False)
    rows = [ids_of(1, n, seed=n)[0] for n in (3, 8, 1, 5, 2) * 8]
    with Batcher(function, table) as batcher, no_compiles():
        for row, answer in zip(rows, batcher.map(rows), strict=True):
            np.testing.assert_allclose(answer, expected(row[None])[0], rtol=1e-5, atol=1e-6)
        plan = batcher.replan()
        assert not any(size % 2 for size in plan.batch_sizes), plan


@check
def a_batcher_puts_parameters_in_their_place_once():
    compiled: list[object] = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    function = embedder(config=config_of(2, lengths=(4, 8)))
    function.warmup(TABLE, ids_of(1, 1), progress=False)
    rows = [ids_of(1, n, seed=n)[0] for n in (3, 8, 1, 5, 2)]
    for table in (TABLE, jax.device_put(TABLE)):
        with Batcher(function, table) as batcher:
            for _ in range(2):
                jax.clear_caches()
                compiled.clear()
                for row, answer in zip(rows, batcher.map(rows), strict=True):
                    np.testing.assert_allclose(answer, expected(row[None])[0], rtol=1e-5, atol=1e-6)
                assert not compiled, compiled
                batcher.update(table)


# What the caller gets.


@check
def outputs_on_the_device_stay_cut():
    for unpad in ("padded", "none", "device"):
        function = bucket_jit(
            lambda x: x * 2, in_axes="batch seq", in_shardings=ROWS, unpad=unpad, config=CONFIG
        )
        for rows, columns in ((4, 8), (4, 5), (2, 3), (3, 8), (1, 1)):
            x = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
            found = function(x)
            whole = found.array if unpad == "padded" else found
            spec = P() if unpad == "device" and rows % 2 else P("data")
            assert is_cut(whole, spec), (unpad, rows, columns, whole.sharding)
            np.testing.assert_array_equal(np.asarray(found)[:rows, :columns], x * 2)


@check
def a_chain_stays_on_its_devices():
    both = NamedSharding(MESH, P("data", "model"))
    first = bucket_jit(
        lambda x: x + 1, in_axes="batch seq", in_shardings=both, unpad="padded", config=CONFIG
    )
    same = bucket_jit(lambda h: h * 2, in_axes="batch seq", in_shardings=both, config=CONFIG)
    takes = bucket_jit(lambda h: h * 2, in_axes="batch seq", config=CONFIG)
    other = bucket_jit(lambda h: h * 2, in_axes="batch seq", in_shardings=ROWS, config=CONFIG)
    for size in ((3, 5), (4, 8), (2, 1)):
        x = np.ones(size, np.float32)
        for function, way in (
            (same, "on the device"),
            (takes, "on the device"),
            (other, "cut in another"),
        ):
            for _ in range(2):
                passed = first(x)
                assert is_cut(passed.array, P("data", "model"))
                np.testing.assert_array_equal(function(passed), np.full(size, 4.0))
            with no_compiles():
                function(first(x))
            reason = function.explain(passed).reason
            assert size == (4, 8) or way in reason, reason
    same.warmup(np.ones((1, 1), np.float32), progress=False)
    with jax.transfer_guard_device_to_host("disallow"), no_compiles():
        jax.block_until_ready(first(np.ones((3, 5), np.float32)))


@check
def what_is_passed_on_and_divides_no_longer_is_answered_without_a_bucket():
    first = bucket_jit(
        lambda x: x + 1, in_axes="batch seq", in_shardings=ROWS, unpad="padded", config=CONFIG
    )
    eager = dataclasses.replace(CONFIG, on_miss="eager")
    second = bucket_jit(lambda h: h * 2, in_axes="batch seq", config=eager)
    passed = first(np.ones((3, 5), np.float32))
    np.testing.assert_array_equal(second(passed), np.full((3, 5), 4.0))
    np.testing.assert_array_equal(jax.jit(second)(passed), np.full((3, 5), 4.0))


@check
def arrays_put_elsewhere_on_purpose_leave_the_routes_of_others():
    function = bucket_jit(jnp.sin, in_axes="batch seq", in_shardings=ROWS, config=CONFIG)
    x = np.ones((4, 8), np.float32)
    placed = jax.device_put(x, ROWS)
    function(x)
    function(placed)
    remembered = dict(function._routes.exact), dict(function._routes.numpy)
    assert all(remembered), remembered
    with jax.set_mesh(MESH):
        whole = jnp.asarray(x)  # on all devices
    for _ in range(3):
        np.testing.assert_allclose(function(whole), np.sin(x), rtol=1e-5)
    assert (function._routes.exact, function._routes.numpy) == remembered


@check
def a_warm_up_with_cut_arrays_serves_numpy():
    function = bucket_jit(embed, in_axes=(None, "batch seq"), mask_argname="mask", config=CONFIG)
    table = jax.device_put(TABLE, COLUMNS)
    function(table, ids_of(3, 5))  # another program, which is not to serve on
    example = jax.device_put(ids_of(2, 8), ROWS)
    assert function.warmup(table, example, progress=False).captured == 2
    graphs = function.registry.num_graphs
    draw = np.random.default_rng(0)
    with no_compiles():
        for batch, seq in draw.integers((1, 1), (5, 9), (40, 2)):
            ids = ids_of(batch, seq)
            np.testing.assert_allclose(function(table, ids), expected(ids), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                function(table, ids=ids), expected(ids), rtol=1e-5, atol=1e-6
            )
        np.testing.assert_allclose(function(table, example), expected(example), rtol=1e-5)
        np.testing.assert_allclose(function(table, jnp.asarray(example)), expected(example))
    assert function.registry.num_graphs == graphs
    away = jax.device_put(TABLE, jax.devices()[1])  # beside which it cannot be over the mesh
    np.testing.assert_allclose(function(away, ids_of(3, 5)), expected(ids_of(3, 5)), rtol=1e-5)


@check
def what_is_padded_ahead_is_where_it_is_declared():
    function, table = embedder(), jax.device_put(TABLE, COLUMNS)
    function.warmup(table, ids_of(1, 1), progress=False)
    for batch, seq in ((3, 5), (4, 8)):
        ids = ids_of(batch, seq)
        for given in (ids, jnp.asarray(ids), jax.device_put(ids, WHOLE), jax.device_put(ids)):
            with no_compiles():
                ahead = function.pad(table, given)
                assert is_cut(ahead[1].array, P("data")), ahead[1].array.sharding
                found = function(*ahead)
            np.testing.assert_allclose(found, expected(ids), rtol=1e-5, atol=1e-6)
    assert function.stats()["misses"] == 0


def ways_to_give(array: np.ndarray) -> list[Any]:
    """In NumPy, somewhere by chance, and on one device on purpose."""
    return [array, jnp.asarray(array), jax.device_put(array, jax.devices()[0])]


@check
def what_is_given_in_numpy_and_by_jax_has_routes_of_its_own():
    def of_two(x, y):
        return x * 2 + y

    def of_a_tree(tree):
        return tree["x"] * 2 + tree["y"]

    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    pairs = [(one, other) for one in ways_to_give(x) for other in ways_to_give(x)]
    for order in (pairs, pairs[::-1]):
        jax.clear_caches()  # or what was compiled for another function would do
        two = bucket_jit(of_two, in_axes="batch seq", in_shardings=ROWS, config=CONFIG)
        tree = bucket_jit(of_a_tree, in_axes="batch seq", in_shardings=ROWS, config=CONFIG)
        other_cut = bucket_jit(
            of_two, in_axes="batch seq", in_shardings=(WHOLE, ROWS), config=CONFIG
        )
        other_cut.warmup(x, x, progress=False)
        two.warmup(x, x, progress=False)
        tree.warmup({"x": x, "y": x}, progress=False)
        two.seal()
        tree.seal()
        for one, other in [*order, *order[::-1]]:
            with no_compiles():
                answers = [two(one, other), two(one, y=other), tree({"x": one, "y": other})]
                for found in (*answers, other_cut(one, other)):
                    np.testing.assert_array_equal(found, x * 3)
                part = two(one[:4], other)
            np.testing.assert_array_equal(part, x * 3)
        assert two.stats()["misses"] == tree.stats()["misses"] == 0


@check
def what_xla_cuts_by_itself_is_cut_on_the_host():
    def cuts(w, x, mask):
        mask = jax.lax.with_sharding_constraint(mask, ROWS)
        return jnp.where(mask, jax.lax.with_sharding_constraint(x, ROWS) * w, 0)

    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    w = jax.device_put(np.float32(2), WHOLE)
    for order in (ways_to_give(x), ways_to_give(x)[::-1]):
        jax.clear_caches()
        function = bucket_jit(cuts, in_axes=(None, "batch seq"), mask_argname="mask", config=CONFIG)
        function.warmup(w, x, progress=False)
        (entry, *_) = function.registry.entries()
        assert entry.executable.call.input_shardings[0][1].is_equivalent_to(ROWS, 2)
        for given in [*order, *order[::-1]]:
            with no_compiles():
                np.testing.assert_array_equal(function(w, given), x * 2)
                np.testing.assert_array_equal(function(w, Padded(given, (3, 5))), x[:3, :5] * 2)
                np.testing.assert_array_equal(function(w, np.asarray(given)[:3]), x[:3] * 2)
        by_chance = jnp.asarray(x[:3])
        with jax.transfer_guard("disallow"), no_compiles():
            np.testing.assert_array_equal(function(w, by_chance), x[:3] * 2)
        assert function.stats()["misses"] == 0
        manager = CUDAGraphManager(CONFIG)
        for given in [*order, *order[::-1]]:
            np.testing.assert_array_equal(
                manager.execute_or_capture(4, 8, single_cut, {"x": given, "w": w}), x * 2
            )
        with no_compiles():
            for given in order:
                manager.execute_or_capture(4, 8, single_cut, {"x": given, "w": w})


def single_cut(inputs):
    return jax.lax.with_sharding_constraint(inputs["x"], ROWS) * inputs["w"]


@check
def meshes_of_one_shape_and_other_devices_are_told_apart():
    turned = Mesh(MESH.devices[::-1, ::-1], MESH.axis_names)
    assert turned.abstract_mesh is MESH.abstract_mesh
    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    function = bucket_jit(constrained, in_axes="batch seq", config=CONFIG, unpad="none")
    for given in (x, x[:3], jnp.asarray(x), x):
        for mesh in (MESH, turned, MESH):
            with jax.set_mesh(mesh):
                found = function(given)
                assert found.sharding.mesh == mesh
                np.testing.assert_array_equal(np.asarray(found)[: len(given)], given * 2 + 1)
    assert function.registry.num_graphs == 2
    with no_compiles():
        for given in (x, x[:3]):
            for mesh in (MESH, turned, MESH):
                with jax.set_mesh(mesh):
                    assert function(given).sharding.mesh == mesh


@check
def nothing_is_copied_that_is_not_to_be():
    config = dataclasses.replace(CONFIG, cudagraph_copy_inputs=False)
    function: Any = bucket_jit(jnp.sin, in_axes="batch seq", in_shardings=ROWS, config=config)
    x = np.ones((4, 8), np.float32)
    for _ in range(2):
        for given in (x, jax.device_put(x, ROWS)):
            np.testing.assert_allclose(function(given), np.sin(x), rtol=1e-5)
        for given in (jnp.asarray(x), jax.device_put(x, WHOLE), Padded(jnp.asarray(x), (4, 8))):
            refused(
                "x lies elsewhere.*cudagraph_copy_inputs", partial(function, given), InputShapeError
            )
    function, ids = embedder(config=config), ids_of(4, 8)
    for table in (TABLE, jnp.asarray(TABLE), jax.device_put(TABLE, COLUMNS)):  # what is no input
        np.testing.assert_allclose(function(table, ids), expected(ids), rtol=1e-5, atol=1e-6)


@check
def a_warm_up_with_more_dimensions_says_nothing_of_fewer():
    function = bucket_jit(lambda x: x * 2, in_axes="batch ...", config=CONFIG)
    three = jax.device_put(
        np.ones((2, 3, 4), np.float32), NamedSharding(MESH, P("data", None, "model"))
    )
    function.warmup(three, progress=False)
    for shape in ((2, 3, 4), (3, 5), (4,)):
        x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(function(x), x * 2)
    assert not function.manager.dispatcher.capturer.failures.remembered


@check
def a_warm_up_with_what_jax_makes_under_a_mesh_serves_numpy():
    function = bucket_jit(jnp.sin, in_axes="batch seq", config=CONFIG)
    x = np.ones((4, 8), np.float32)
    with jax.set_mesh(MESH):
        made = jnp.asarray(x)
        function.warmup(made, progress=False)
        function.seal()
        with no_compiles():
            for given in (made, x, x[:3], jax.device_put(x), made, x):
                np.testing.assert_allclose(function(given), np.sin(x[: len(given)]), rtol=1e-5)
    assert function.stats()["misses"] == 0


# Together with the rest.


@check
def an_entry_takes_what_its_function_takes():
    table = jnp.asarray(TABLE)
    function = bucket_jit(
        lambda table, ids: table[ids].sum(1),
        in_axes=(None, "batch seq"),
        in_shardings=(COLUMNS, ROWS),
        pad_values=15,
        config=CONFIG,
    )
    ids = ids_of(3, 8)
    answer = function(table, ids)
    (entry,) = function.registry.entries()
    for given in (ids, jnp.asarray(ids), jax.device_put(ids, jax.devices()[1])):
        np.testing.assert_array_equal(entry.replay((table, given)), answer)
    assert entry.input_shapes


@check
def a_call_within_a_trace_has_its_mesh():
    function = bucket_jit(constrained, in_axes="batch seq", config=CONFIG)
    x = np.ones((3, 5), np.float32)
    with jax.set_mesh(MESH):
        for _ in range(2):
            found = jax.jit(lambda y: y + function(x) + function(x=x))(jnp.ones(()))
            np.testing.assert_array_equal(found, np.full((3, 5), 7.0))
        np.testing.assert_array_equal(function(x), np.full((3, 5), 3.0))
        np.testing.assert_array_equal(function(x=x), np.full((3, 5), 3.0))
    assert function.registry.num_graphs == 1  # within a trace it is the same program


@check
def every_policy_answers():
    policies: list[dict[str, Any]] = [{"on_overflow": how} for how in ("eager", "split", "exact")]
    policies += [{"on_miss": "background"}, {"on_miss": "eager"}, {"debug_mode": True}]
    for policy in policies:
        for unpad in (
            ("host", "device", "padded") if policy == {"on_overflow": "split"} else ("host",)
        ):
            # Operation by operation it runs once: each is compiled for each size.
            ran = embed if policy == {"on_overflow": "eager"} else jax.jit(embed)
            function = embedder(ran, config=dataclasses.replace(CONFIG, **policy), unpad=unpad)
            with function.manager:
                for batch in (3, 4, 7):
                    ids = ids_of(batch, 8)
                    found = np.asarray(function(jnp.asarray(TABLE), ids))
                    np.testing.assert_allclose(found, expected(ids), rtol=1e-5, atol=1e-6)
                function.manager.wait()
            assert not function.manager.dispatcher.capturer.failures.remembered, policy


@check
def donated_arrays_are_used_up():
    function = bucket_jit(
        lambda state, x: (state + x, x.sum(1)),
        in_axes="batch seq",
        in_shardings=ROWS,
        donate_argnums=0,
        unpad=("none", "host"),
        config=CONFIG,
    )
    for place in (ROWS, WHOLE, None, jax.devices()[2]):
        state = jax.device_put(np.ones((4, 8), np.float32), place)
        found, _ = function(state, np.ones((4, 8), np.float32))
        assert is_cut(found, P("data"))
        np.testing.assert_array_equal(found, 2.0)
        again, _ = function(found, np.ones((4, 8), np.float32))
        assert found.is_deleted()
        np.testing.assert_array_equal(again, 3.0)
    # What the executable does not take stays where it was given.
    for place in (jax.devices()[2], None):
        given = jax.device_put(np.ones(3, np.float32), place)
        copies = on_device([given], [np.zeros(4, np.float32)], [0], homes=[[None]])
        assert copies[0].sharding == given.sharding


@check
def meshes_whose_axes_are_explicit():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    columns, rows = NamedSharding(mesh, P(None, None)), NamedSharding(mesh, P("data"))
    function = bucket_jit(
        lambda w, x, mask: jnp.where(mask, x, 0) @ w,
        in_axes=(None, "batch seq"),
        in_shardings=(columns, rows),
        mask_argname="mask",
        config=CONFIG,
        unpad="device",
        out_axes="batch _",
    )
    w = np.ones((8, 3), np.float32)
    with jax.set_mesh(mesh):
        function.warmup(w, np.ones((1, 8), np.float32), progress=False)
        for batch in (1, 2, 3, 4):
            np.testing.assert_array_equal(function(w, np.ones((batch, 8), np.float32)), 8.0)


@check
def captures_from_many_threads_under_the_mesh():
    function = bucket_jit(constrained, in_axes="batch seq", config=CONFIG)
    wrong: list[object] = []

    def serve(seed: int) -> None:
        draw = np.random.default_rng(seed)
        with jax.set_mesh(MESH if seed % 2 else None):
            for batch, seq in draw.integers((1, 1), (5, 9), (30, 2)):
                x = np.full((batch, seq), seed, np.float32)
                try:
                    if np.any(function(x) != 2 * seed + 1):
                        wrong.append((seed, batch, seq))
                except Exception as error:  # without a mesh the function cannot be traced
                    if seed % 2:
                        wrong.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not wrong, wrong


# A restart.


def stored() -> list[BucketedFunction]:
    """Two functions over the mesh: by what is declared, and by the mesh of their caller."""
    store = GraphStore(STORE)
    return [
        embedder(store=store, fingerprint="v1"),
        embedder(store=store, name="unnamed"),
        bucket_jit(constrained, in_axes="batch seq", config=CONFIG, store=store),
    ]


def warm(functions: list[BucketedFunction]) -> list[WarmupReport]:
    named, unnamed, in_context = functions
    table = jax.device_put(TABLE, COLUMNS)
    reports = [
        function.warmup(table, ids_of(1, 1), progress=False) for function in (named, unnamed)
    ]
    with jax.set_mesh(MESH):
        reports.append(in_context.warmup(np.ones((1, 1), np.float32), progress=False))
    return reports


@check
def a_restarted_process_loads_what_is_over_a_mesh():
    functions = stored()
    for function, report in zip(functions, warm(functions), strict=True):
        assert (report.loaded, report.captured, len(report.failed)) == (2, 0, 0), (function, report)
    table = jax.device_put(TABLE, COLUMNS)
    for batch in (1, 2, 3, 4):
        ids = ids_of(batch, 5)
        for function in functions[:2]:
            np.testing.assert_allclose(function(table, ids), expected(ids), rtol=1e-5, atol=1e-6)
        with jax.set_mesh(MESH):
            np.testing.assert_array_equal(functions[2](ids.astype(np.float32)), ids * 2 + 1)


def main() -> None:
    if sys.argv[2:] == ["before"]:
        print(json.dumps([str(report) for report in warm(stored())]))
        return
    checks = {function.__name__: function for function in CHECKS}
    found: dict[str, str] = {}
    for function in map(checks.__getitem__, sys.argv[2:]):
        try:
            function()
        except BaseException:
            found[function.__name__] = traceback.format_exc()
        else:
            found[function.__name__] = ""
    print(json.dumps(found))


if __name__ == "__main__":
    main()
