"""A warm-up compiles several buckets at a time, and is otherwise the same."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    Bucket,
    CaptureError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    GraphStore,
    bucket_jit,
)
from cudagraph_jax.store import Files
from cudagraph_jax.testing import FakeCompiler
from tests.helpers.functions import GRID, assert_close, double, floats

SIX = 6
PATIENCE_S = 60


def served(compiler, function=double, **options):
    grid: dict[str, Any] = {"capture_sizes": (1, 2, 4), "capture_seq_lens": (4, 8)}
    config = CUDAGraphConfig(warmup_iterations=0, **{**grid, **options})
    manager = CUDAGraphManager(config, compiler=compiler)
    return bucket_jit(function, in_axes=("batch seq",), manager=manager)


@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_the_answers_are_the_same(workers):
    """However many workers there are, every bucket is captured once, in order, and serves."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    steps = []
    report = function.warmup(
        floats(0, 2, 2), workers=workers, progress=lambda done, total, bucket: steps.append(bucket)
    )
    order = sorted(GRID.buckets(), key=lambda bucket: bucket.elements, reverse=True)
    assert [record.bucket for record in report.buckets] == order
    assert steps == order * 2
    assert function.registry.capture_count == report.captured == len(order)
    for bucket in order:
        x = floats(1, *bucket)
        assert_close(function(x), x * 2)


def test_so_many_at_a_time():
    """Two workers compile two at a time once the first is measured, and never more."""
    meet = threading.Barrier(2)
    lock = threading.Lock()
    running, most = 0, 0

    def before(made):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            is_first = len(compiler.made) == 0
        if not is_first and len(compiler.made) < SIX - 1:
            meet.wait(PATIENCE_S)  # would break if buckets were compiled one by one
        with lock:
            running -= 1

    compiler = FakeCompiler(before=before)
    function = served(compiler)
    assert function.warmup(floats(0, 1, 1), progress=False, workers=2).captured == SIX
    assert most == 2


def test_without_a_budget_all_workers_begin_at_once():
    """Where nothing limits the memory, no bucket has to be measured first."""
    meet = threading.Barrier(SIX)
    compiler = FakeCompiler(before=lambda made: meet.wait(PATIENCE_S))
    function = served(compiler, use_memory_pool=False)
    assert function.warmup(floats(0, 1, 1), progress=False, workers=SIX).captured == SIX


def test_nothing_over_the_budget_is_compiled():
    """What does not fit is said before it is compiled, with workers, too."""
    compiler = FakeCompiler(memory_bytes=400 * 1024)
    # Of nearly one size, so that what one needs tells what the next one is going to need.
    function = served(compiler, memory_pool_size_mb=1, capture_sizes=(61, 62, 63, 64))
    with pytest.raises(ConfigError, match="does not fit into memory_pool_size_mb=1"):
        function.warmup(floats(0, 1, 1), progress=False, workers=4)
    assert len(compiler.made) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_what_fails_is_reported(workers):
    """A bucket that does not compile is reported and warned of; the others are captured."""

    def before(made):
        if made.bucket == (2, 8):
            raise RuntimeError("no memory")

    function = served(FakeCompiler(before=before), use_memory_pool=False)
    with pytest.warns(UserWarning, match="no memory"):
        report = function.warmup(floats(0, 1, 1), progress=False, workers=workers)
    assert [tuple(record.bucket) for record in report.failed] == [(2, 8)]
    assert report.captured == SIX - 1


def test_an_interrupt_leaves_nothing_behind():
    """An interrupt ends the warm-up and its workers; the next one begins anew."""
    compiler = FakeCompiler()
    function = served(compiler, use_memory_pool=False)

    def interrupted(done, total, bucket):
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        function.warmup(floats(0, 1, 1), progress=interrupted, workers=3)
    assert threading.active_count() == threads
    assert function.registry.num_graphs == 1
    assert function.warmup(floats(0, 1, 1), progress=False, workers=3).captured == SIX - 1


def test_a_function_that_cannot_be_traced():
    """What cannot be traced is reported for each bucket, as without workers."""
    function = served(FakeCompiler(), lambda x: x if x.sum() > 0 else -x, use_memory_pool=False)
    with pytest.warns(UserWarning, match="cannot trace"):
        report = function.warmup(floats(0, 1, 1), progress=False, workers=3)
    assert len(report.failed) == SIX


def test_other_options_compile_anew():
    """What was begun for another program or other options is not taken."""
    compiler = FakeCompiler()
    function = served(compiler)
    entry_of = function.registry
    function.warmup(np.ones((1, 1), np.float32), progress=False, workers=2)
    first = len(compiler.made)
    function.warmup(jnp.ones((1, 1), jnp.int32), progress=False, workers=2)
    assert len(compiler.made) == 2 * first == entry_of.capture_count


@pytest.mark.parametrize("workers", [0, -1, 1.5, None, True])
def test_wrong_workers(workers):
    """A number of workers is a whole one, 1 or more."""
    function = served(FakeCompiler())
    with pytest.raises(ConfigError, match="workers="):
        function.warmup(floats(0, 1, 1), workers=workers)


def test_errors_of_the_compiler_keep_their_stage():
    """A capture that fails in a worker raises what it raised there."""

    def before(made):
        raise CaptureError("gone", stage="compile")

    function = served(FakeCompiler(before=before), use_memory_pool=False)
    with pytest.warns(UserWarning, match="gone"):
        report = function.warmup(floats(0, 1, 1), progress=False, workers=2)
    assert {record.error for record in report.failed} == {"gone"}


def test_requests_meanwhile_compile_nothing_twice():
    """A request takes what the warm-up has begun for its bucket, and the warm-up what is there."""
    both = threading.Barrier(2)
    first: list[object] = []

    def meet(made):
        if not first:  # the bucket that is captured; by now the next one is begun, too
            first.append(made)
            both.wait(PATIENCE_S)

    compiler = FakeCompiler(runs=True, before=meet)
    function = served(compiler)
    x = floats(0, 4, 4)

    def ask():
        both.wait(PATIENCE_S)
        for size in [(4, 8), (4, 4), (2, 8), (2, 4), (1, 8), (1, 4)]:
            function(floats(0, *size))

    asking = threading.Thread(target=ask)
    asking.start()
    function.warmup(x, workers=3, progress=False)
    asking.join(PATIENCE_S)
    assert sorted(compiler.made) == sorted(set(compiler.made))
    assert function.registry.capture_count == SIX
    assert_close(function(x), x * 2)


def test_a_store_is_filled_in_parallel(tmp_path):
    """With a store, too, buckets are compiled by several threads; a restart loads them all."""
    threads: set[str] = set()

    def traced_by(x):
        traced.add(threading.current_thread().name)
        return x * 2

    traced: set[str] = set()
    kept: list[object] = []  # what is hot is written when a function goes
    for captured, loaded in ((SIX, 0), (0, SIX)):
        function = bucket_jit(
            traced_by,
            in_axes="batch seq",
            config=CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(4, 8)),
            store=GraphStore(tmp_path, files=Watched(threads)),
        )
        kept.append(function)
        report = function.warmup(floats(0, 1, 1), progress=False, workers=3)
        assert (report.captured, report.loaded, report.failed) == (captured, loaded, ())
        assert_close(function(floats(1, 2, 3)), floats(1, 2, 3) * 2)
    assert threads == {"cudagraph-jax-compile"}
    assert traced == {threading.current_thread().name}


class Watched(Files):
    """System calls of a store, which tell what threads write."""

    def __init__(self, threads: set[str]) -> None:
        self._threads = threads

    def sync(self, file: int) -> None:
        self._threads.add(threading.current_thread().name)
        super().sync(file)


def test_servers_on_one_store_share_the_work(tmp_path):
    """Warm-ups with workers that begin together on one store compile each bucket once."""
    pytest.importorskip("filelock")
    start = threading.Barrier(2)

    def warm():
        function = bucket_jit(
            double,
            in_axes="batch seq",
            config=CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(4, 8)),
            store=GraphStore(tmp_path),
        )
        start.wait(PATIENCE_S)
        return function.warmup(floats(0, 1, 1), progress=False, workers=3)

    with ThreadPoolExecutor(2) as pool:
        reports = [done.result(PATIENCE_S) for done in [pool.submit(warm) for _ in range(2)]]
    assert sum(report.captured for report in reports) == SIX
    assert sum(report.loaded for report in reports) == SIX


def test_an_interrupt_does_not_wait_for_compiles():
    """An interrupt ends a warm-up although its workers compile on, and nothing new begins."""
    end, begun = threading.Event(), threading.Event()

    def before(made):
        if compiler.made:  # the first bucket is there, and the others take for ever
            begun.set()
            end.wait(PATIENCE_S)

    compiler = FakeCompiler(before=before)
    function = served(compiler, use_memory_pool=False)

    def interrupted(done, total, bucket):
        assert begun.wait(PATIENCE_S)
        raise KeyboardInterrupt

    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            function.warmup(floats(0, 1, 1), progress=interrupted, workers=2)
        took_s = time.monotonic() - started
    finally:
        end.set()
    assert took_s < PATIENCE_S / 2
    assert len(compiler.made) <= 3


def test_one_worker_compiles_aside_as_well():
    """XLA hears of no signal while it compiles, so that it never does where Ctrl-C is handled."""
    threads = set()
    compiler = FakeCompiler(before=lambda made: threads.add(threading.current_thread()))
    served(compiler).warmup(floats(0, 1, 1), progress=False)
    assert threads
    assert threading.main_thread() not in threads


def test_the_phases_have_names(capsys):
    """`progress=print` says what is done with each bucket, which equals the bucket itself."""
    function = served(FakeCompiler(), capture_sizes=(2,), capture_seq_lens=(4,))
    function.warmup(floats(0, 1, 1), progress=print)
    assert capsys.readouterr().out == "1 1 compile 2x4\n1 1 run 2x4\n"
    buckets = []
    function.warmup(floats(0, 1, 1), progress=lambda done, total, bucket: buckets.append(bucket))
    assert buckets == [Bucket(2, 4)] * 2
    assert [bucket.phase for bucket in buckets] == ["compile", "run"]
    assert buckets[0].elements == 8
