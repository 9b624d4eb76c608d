"""A new grid in the place of the old one, while requests go on."""

from __future__ import annotations

import dataclasses
import gc
import threading
import warnings
import weakref
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    BucketPlan,
    CaptureError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphWarning,
    SealedError,
    bucket_jit,
    no_compiles,
    plan_buckets,
)
from cudagraph_jax.dispatch.replan import plan_from, planned_config
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.functions import assert_close, double, floats

POWERS = CUDAGraphConfig(capture_sizes=(4, 8), capture_seq_lens=(16, 32), warmup_iterations=1)


def scaled(x):
    """A function of every element by itself."""
    return jnp.tanh(x) * 3


def function_of(config=POWERS, **options):
    """`scaled`, warm, with its grid."""
    function = bucket_jit(scaled, in_axes=("batch seq",), config=config, **options)
    function.warmup(floats(0, 1, 1))
    return function


def call(function, batch, seq):
    """One checked call."""
    x = floats(batch, batch, seq)
    assert_close(np.asarray(function(x)), np.tanh(x) * 3)


def test_the_grid_follows_the_traffic():
    """After a re-plan what was asked for fits exactly, without a compile or an eager call."""
    function = function_of()
    for _ in range(3):
        call(function, 3, 20)
        call(function, 5, 9)
    plan = function.replan(max_graphs=4, headroom=0.0)
    assert isinstance(plan, BucketPlan)
    function.manager.wait()
    assert function.manager.config.buckets() == plan.buckets()
    assert {entry.bucket for entry in function.registry.entries()} == set(plan.buckets())
    with no_compiles():
        call(function, 3, 20)
        call(function, 5, 9)
    stats = function.stats()
    assert (stats["captures"], stats["eager_calls"], stats["hits"]) == (0, 0, 8)
    assert stats["replays"]["exact"] == 2


def test_nothing_else_of_the_configuration_changes():
    """Policies, limits of memory and options stay; the limits of size follow the plan."""
    config = dataclasses.replace(POWERS, on_miss="eager", on_overflow="error", max_graphs=40)
    function = function_of(config)
    call(function, 3, 20)
    function.replan(max_graphs=1, headroom=0.0)
    function.manager.wait()
    assert function.manager.config == dataclasses.replace(
        config,
        capture_sizes=(3,),
        capture_seq_lens=(20,),
        max_capture_batch_size=None,
        max_capture_seq_len=None,
    )


def test_what_is_no_longer_used_is_freed():
    """The executables of the old grid go; a bucket of both grids stays as it is."""
    function = function_of()
    call(function, 4, 16)
    old = weakref.ref(function.registry.get(8, 32).executable)
    both = function.registry.get(4, 16)
    function.replan(max_graphs=1, headroom=0.0)
    function.manager.wait()
    gc.collect()
    assert old() is None
    assert function.registry.entries() == [both]


def test_what_fits_still_fits():
    """Without `headroom` the largest bucket of today stays; it may go where a limit says so."""
    function = function_of()
    call(function, 3, 20)
    plan = function.replan(max_graphs=4)
    function.manager.wait()
    assert plan.buckets() == ((3, 20), (3, 32), (8, 20), (8, 32))
    call(function, 8, 32)
    assert function.stats()["eager_calls"] == 0
    assert function.replan(max_graphs=4, max_seq_len=24).buckets()[-1] == (8, 24)


def test_sizes_outside_the_limits_get_a_bucket():
    """What was served eagerly before, because it was too large, is replayed after a re-plan."""
    function = function_of()
    call(function, 9, 40)
    function.replan(max_graphs=2, headroom=0.0)
    function.manager.wait()
    call(function, 9, 40)
    assert function.stats()["replays"]["exact"] == 1


def test_too_large_sizes_can_be_left_out():
    """`max_batch_size` and `max_seq_len` keep the plan below them."""
    function = function_of()
    call(function, 9, 40)
    call(function, 2, 12)
    plan = function.replan(max_graphs=2, headroom=0.0, max_batch_size=8, max_seq_len=32)
    function.manager.wait()
    assert plan.buckets() == (Bucket(2, 12),)
    assert function.explain(floats(0, 9, 40)).mode is CUDAGraphMode.NONE


def test_every_program_gets_the_new_grid():
    """Another dtype, and another function of the same manager, are captured too."""
    manager = CUDAGraphManager(POWERS)
    one = function_of(config=None, manager=manager)
    two = bucket_jit(lambda x: x - 1, in_axes=("batch seq",), manager=manager)
    two(floats(0, 2, 2))
    one(np.ones((2, 3), np.int32))
    call(one, 3, 20)
    one.replan(max_graphs=2, headroom=0.0)
    manager.wait()
    with no_compiles():
        call(one, 3, 20)
        one(np.ones((3, 20), np.int32))
        two(floats(0, 3, 20))
    assert len({entry.variant for entry in manager.registry.entries()}) == 3


def test_functions_of_one_pytree_too():
    """The specification's calls are re-planned like those of `bucket_jit`."""
    manager = CUDAGraphManager(POWERS)
    x = floats(0, 3, 20)
    manager.execute_or_capture(3, 20, scaled, x)
    manager.replan(max_graphs=1, headroom=0.0)
    manager.wait()
    with no_compiles():
        assert_close(manager.execute_or_capture(3, 20, scaled, x), np.tanh(x) * 3)
    assert manager.registry.entries()[0].single_input


def test_no_call_waits_or_compiles_meanwhile():
    """Calls from other threads during the change are all replays, and right."""
    function = function_of()
    done, problems = threading.Event(), []

    def work(seed: int) -> None:
        n = 0
        while not done.is_set() or n < 20:
            n += 1
            try:
                call(function, 1 + (n + seed) % 8, 1 + (n * seed) % 32)
            except BaseException as error:  # told of below
                problems.append(error)
                return

    for seed in range(20):
        call(function, 1 + seed % 8, 32 - seed % 8)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 5, 7)]
    for thread in threads:
        thread.start()
    for graphs in (6, 9, 4):
        function.replan(max_graphs=graphs, headroom=(8, 32))
        function.manager.wait()
    done.set()
    for thread in threads:
        thread.join()
    stats = function.stats()
    assert problems == []
    assert (stats["captures"], stats["eager_calls"]) == (0, 0)
    assert stats["hits"] == stats["calls"]


def test_a_failing_capture_leaves_the_old_grid(monkeypatch):
    """If a bucket of the new grid cannot be captured, nothing changes, and a warning says why."""

    def picky(x):
        if x.shape[1] == 20:
            raise ValueError("no twenty")
        return x * 2

    function = bucket_jit(picky, in_axes=("batch seq",), config=POWERS)
    function.warmup(floats(0, 1, 1))
    function(floats(0, 3, 20))
    with pytest.warns(CUDAGraphWarning, match="the old grid stays: .*no twenty"):  # noqa: PT031
        function.replan(max_graphs=1, headroom=0.0)
        function.manager.wait()
    assert function.manager.config == POWERS
    assert function.registry.num_graphs == len(POWERS.buckets())
    assert_close(function(floats(0, 3, 20)), floats(0, 3, 20) * 2)


def test_over_the_budget():
    """A grid over the memory budget is not put in place."""

    def wide(x):
        return (x[:, :, None] * jnp.ones((1, 1, 4096))).sort(axis=1).sum(-1)

    config = dataclasses.replace(
        POWERS, capture_sizes=(1,), capture_seq_lens=(2,), memory_pool_size_mb=1
    )
    function = bucket_jit(wide, in_axes=("batch seq",), config=config)
    function.warmup(floats(0, 1, 1))
    function(floats(0, 30, 30))
    with pytest.warns(CUDAGraphWarning, match="the budget is 1,048,576"):  # noqa: PT031
        function.replan(max_graphs=1, headroom=0.0)
        function.manager.wait()
    assert function.manager.config == config


def test_a_reset_meanwhile():
    """A reset while the new grid is being captured wins: nothing is put in place."""
    entered, go_on = threading.Event(), threading.Event()

    def slow(x):
        if x.shape[1] == 20:
            entered.set()
            go_on.wait(60)
        return x * 2

    function = bucket_jit(slow, in_axes=("batch seq",), config=POWERS)
    function.warmup(floats(0, 1, 1))
    go_on.set()
    function(floats(0, 3, 17))
    function.manager.registry.sizes.add(Bucket(3, 20), 50)
    go_on.clear()
    with pytest.warns(CUDAGraphWarning, match="dropped meanwhile"):  # noqa: PT031
        function.replan(max_graphs=1, headroom=0.0)
        assert entered.wait(60)
        function.manager.reset()
        go_on.set()
        function.manager.wait()
    assert function.manager.config == POWERS
    assert function.registry.num_graphs == 0


@pytest.mark.parametrize("mode", [CUDAGraphMode.REPLAY, CUDAGraphMode.NONE, CUDAGraphMode.DISABLED])
def test_only_where_captures_are_allowed(mode):
    """A sealed, paused or switched off manager refuses."""
    function = function_of()
    call(function, 3, 20)
    function.manager.mode = mode
    with pytest.raises(SealedError, match=f"mode={mode.name} does not allow captures"):
        function.replan(max_graphs=2, headroom=0.0)


def test_a_closed_manager():
    """A closed manager captures nothing in the background, and says so."""
    function = function_of()
    call(function, 3, 20)
    function.manager.close()
    with pytest.raises(CUDAGraphError, match="is closed"):
        function.replan(max_graphs=2, headroom=0.0)


def test_before_any_request():
    """Without requests there is nothing to plan from."""
    with pytest.raises(ConfigError, match="no sizes were asked for"):
        function_of().replan(max_graphs=2)


def test_more_than_the_limit_of_graphs():
    """A plan that could not be held is refused before anything is captured."""
    function = function_of(dataclasses.replace(POWERS, max_graphs=12))
    for batch in range(1, 9):
        call(function, batch, 20 - batch)
    function(np.ones((2, 3), np.int32))
    with pytest.raises(ConfigError, match="16 buckets for all programs, but max_graphs=12"):
        function.replan(max_graphs=8, headroom=0.0)


def test_sizes_that_no_array_carries():
    """A function that is given its sequence length has the new grid for each one it was given."""
    config = CUDAGraphConfig(capture_sizes=(4, 8), capture_seq_lens=(16, 32), warmup_iterations=0)
    manager = CUDAGraphManager(config)
    x = floats(0, 3, 7)
    for seq in (16, 32):
        assert_close(manager.execute_or_capture(3, seq, double, x), x * 2)
    manager.replan(max_graphs=2, headroom=0.0)
    manager.wait()
    assert sorted(entry.key for entry in manager.registry.entries()) == [(3, 16), (3, 32)]
    with no_compiles():
        for seq in (16, 32):
            assert_close(manager.execute_or_capture(3, seq, double, x), x * 2)


def test_the_limit_counts_what_each_program_needs():
    """A program that pads one axis needs fewer graphs than the grid has buckets."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(8, 16), max_graphs=6)
    manager = CUDAGraphManager(config)
    both = bucket_jit(lambda x: x + 1, in_axes=("batch seq",), manager=manager)
    rows = bucket_jit(lambda x: x + 1, in_axes=("batch _",), manager=manager)
    for batch, seq in ((1, 5), (3, 13), (2, 7)):
        both(floats(0, batch, seq))
    rows(floats(0, 1, 3))
    plan = manager.replan(max_graphs=4, headroom=0.0)
    manager.wait()
    assert plan.num_graphs == 4
    assert manager.registry.num_graphs == 6


def test_a_sequence_that_is_not_padded():
    """Without a sequence ladder there is no grid, unless no sequence was ever asked for."""
    config = CUDAGraphConfig(capture_sizes=(1, 2, 4))
    with pytest.raises(ConfigError, match="give capture_seq_lens"):
        plan_from({Bucket(2, 7): 3}, config)
    rows = bucket_jit(lambda x: x * 2, in_axes=("batch",), config=config)
    rows(floats(0, 3))
    rows.replan(headroom=0.0)
    rows.manager.wait()
    assert tuple(rows.manager.config.capture_sizes) == (3,)
    assert rows.manager.config.capture_seq_lens is None


@pytest.mark.parametrize("name", ["max_batch_size", "max_seq_len", "max_graphs"])
def test_wrong_options(name):
    """A limit that is no positive integer is named."""
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name}=0 is below 1"):
        plan_from({Bucket(2, 7): 3}, POWERS, **options)


def test_sizes_count_every_call_once():
    """Replays, captures, eager and split calls are all counted by what was asked for."""
    config = dataclasses.replace(POWERS, on_overflow="split")
    function = bucket_jit(scaled, in_axes=("batch seq",), config=config)
    for batch, seq in ((3, 20), (3, 20), (4, 16), (17, 20), (17, 20)):
        call(function, batch, seq)
    function(np.zeros((0, 4), np.float32))
    expected = {Bucket(3, 20): 2, Bucket(4, 16): 1, Bucket(17, 20): 2}
    assert function.manager.sizes() == expected
    assert function.manager.sizes() == expected
    function.registry.clear()
    assert function.manager.sizes() == expected
    function.manager.reset()
    assert function.manager.sizes() == {}


def test_older_requests_fade():
    """A re-plan halves what was counted before it, and forgets no size."""
    function = function_of()
    for _ in range(4):
        call(function, 3, 20)
    call(function, 8, 32)
    for _ in range(3):
        plan = function.replan(max_graphs=4, headroom=0.0)
        function.manager.wait()
        assert plan.buckets()[-1] == (8, 32)
        assert function.manager.sizes() == {Bucket(3, 20): 2, Bucket(8, 32): 1}
    call(function, 3, 20)
    assert function.manager.sizes() == {Bucket(3, 20): 3, Bucket(8, 32): 1}


def test_sealing_waits_for_it():
    """`seal()` finishes a re-plan that is queued, and nothing compiles afterwards."""
    function = function_of()
    call(function, 3, 20)
    function.replan(max_graphs=1, headroom=0.0)
    function.seal()
    assert {entry.bucket for entry in function.registry.entries()} == {Bucket(3, 20)}
    with no_compiles(), warnings.catch_warnings():
        call(function, 3, 20)


def test_limits_above_the_ladders_stay():
    """What was captured at its own size before is captured after, unless that is given up."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 2, 4),
        capture_seq_lens=(8, 16),
        max_capture_batch_size=64,
        max_capture_seq_len=128,
        warmup_iterations=0,
    )
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=config)
    function(floats(0, 3, 10))
    for headroom, mode in ((None, CUDAGraphMode.CAPTURE), (0.0, CUDAGraphMode.NONE)):
        options: Any = {} if headroom is None else {"headroom": headroom}
        function.replan(max_graphs=4, **options)
        function.manager.wait()
        assert function.explain(floats(0, 5, 10)).mode is mode
        assert function.explain(floats(0, 50, 100)).mode is mode


def test_a_plan_that_fails_again_is_logged_again(caplog):
    """Python shows a warning once; the log has each plan that was not put in place."""
    compiled: list[object] = []

    def once(wanted, lowering, *, clock):
        if compiled:
            raise CaptureError("no compiler today", stage="compile")
        compiled.append(wanted)
        return lowering.compile(compiler_options=wanted.options, clock=clock)

    manager = CUDAGraphManager(POWERS, compiler=once)
    function = bucket_jit(scaled, in_axes="batch seq", manager=manager)
    function(floats(0, 3, 5))
    for _ in range(2):
        with pytest.warns(CUDAGraphWarning, match="not put in place"):  # noqa: PT031
            function.replan(max_graphs=2, headroom=0.0)
            function.manager.wait()
    assert caplog.text.count("was not put in place") == 2


def test_axes_that_a_function_does_not_carry():
    """A function without an axis asks for no bucket of it, be it 1 or any other."""
    config = CUDAGraphConfig(
        capture_sizes=(2, 4), capture_axes={"src": (8, 16, 32)}, warmup_iterations=0
    )
    manager = CUDAGraphManager(config)
    encoder = bucket_jit(double, in_axes="batch src", manager=manager)
    ranker = bucket_jit(double, in_axes="batch", manager=manager)
    for size in (20, 20, 24, 31):
        encoder(floats(0, 3, size))
        ranker(floats(0, 1))
        ranker(floats(0, 2))
    plan = manager.replan(max_graphs=8, headroom=0.0)
    manager.wait()
    assert min(plan.sizes["src"]) >= 20
    assert plan_buckets(manager.sizes(), axes=plan.axes, max_graphs=8).sizes == plan.sizes
    with no_compiles():
        for size in (20, 31):
            assert_close(encoder(floats(0, 3, size)), floats(0, 3, size) * 2)
        assert_close(ranker(floats(0, 3)), floats(0, 3) * 2)


def test_axes_not_carried_under_a_budget():
    """What is within the budget without an axis stays so, whatever others have of that axis."""
    config = CUDAGraphConfig(
        capture_sizes=(2, 64), capture_axes={"src": (8, 16)}, max_bucket_elements=64
    )
    asked = {Bucket(2, 1, src=9): 5, Bucket(60, 1): 3, Bucket(2, 1, src=16): 1}
    planned = planned_config(config, plan_from(asked, config, max_graphs=9))
    assert planned.admits(Bucket(60, 1))
    assert planned.admits(Bucket(2, 1, src=16))


def test_multiples_and_the_most_padding():
    """A new grid keeps to multiples and to a bound on padding, as any plan."""
    function = bucket_jit(
        double,
        in_axes="batch src",
        config=CUDAGraphConfig(
            capture_sizes=(4,), capture_axes={"src": (64,)}, warmup_iterations=0
        ),
    )
    for size in (9, 17, 33, 60):
        function(floats(0, 4, size))
    plan = function.replan(multiples={"src": 8}, max_padding=0.5, max_graphs=9, headroom=0.0)
    assert all(size % 8 == 0 for size in plan.sizes["src"])
    assert plan.worst_padding is not None
    assert plan.worst_padding <= 0.5
    with pytest.raises(ConfigError, match=r"max_padding=0\.1 cannot be kept to"):
        function.replan(max_padding=0.1, max_graphs=1)
    with pytest.raises(ConfigError, match="multiples has 'scr', which is no axis"):
        function.replan(multiples={"scr": 8})
