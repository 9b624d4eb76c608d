"""Background: captures off the request path, queued once, bounded, and gone with the process."""

from __future__ import annotations

import dataclasses
import logging
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphWarning,
    PaddingLeakError,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.worker import Background
from tests.helpers.functions import GRID, assert_close, dense, double, floats, stats_of
from tests.helpers.processes import run_script

ROOT = Path(__file__).parents[2]
BACKGROUND = dataclasses.replace(GRID, on_miss="background")
X = floats(0, 2, 4)
PATIENCE_S = 60


class Gate:
    """A job that runs until it is let go."""

    def __init__(self):
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self):
        self.entered.set()
        assert self.open.wait(PATIENCE_S)


@pytest.fixture
def worker():
    worker = Background("test", max_queued=3)
    yield worker
    worker.close()


@pytest.fixture
def gate(worker):
    """The worker's only thread, held."""
    gate = Gate()
    assert worker.submit("gate", gate)
    assert gate.entered.wait(PATIENCE_S)
    yield gate
    gate.open.set()


def test_each_key_is_queued_once(worker, gate):
    """A key that waits or runs is not queued again; one that is done may be."""
    ran = []
    for _ in range(5):
        assert worker.submit("gate", lambda: ran.append("gate"))
        assert worker.submit("a", lambda: ran.append("a"))
    assert len(worker) == 2
    gate.open.set()
    worker.drain()
    assert ran == ["a"]
    assert worker.submit("a", lambda: ran.append("again"))
    worker.drain()
    assert ran == ["a", "again"]


def test_jobs_run_in_order(worker, gate):
    """What was queued first runs first, one at a time."""
    ran = []
    for name in "ab":
        worker.submit(name, lambda name=name: ran.append(name))
    gate.open.set()
    worker.drain()
    assert ran == ["a", "b"]


def test_a_full_queue_refuses(worker, gate):
    """Beyond max_queued a job is refused, not waited for, and taken again when there is room."""
    ran = []
    assert [worker.submit(n, lambda n=n: ran.append(n)) for n in range(4)] == [True] * 2 + [
        False
    ] * 2
    assert len(worker) == 3
    gate.open.set()
    worker.drain()
    assert len(worker) == 0
    assert worker.submit(3, lambda: ran.append(3))
    worker.drain()
    assert ran == [0, 1, 3]


def test_a_job_that_raises_is_logged(worker, caplog):
    """A job that raises is logged with its traceback, and the worker goes on."""

    def fail():
        raise LookupError("not today")

    ran = []
    worker.submit("fail", fail)
    worker.drain()
    worker.submit("next", lambda: ran.append(1))
    worker.drain()
    assert ran == [1]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cudagraph_jax", "ERROR")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_job_that_exits_does_not_kill_the_worker(worker, error):
    """Not even an exit or an interrupt in a job ends the worker."""

    def leave():
        raise error

    ran = []
    worker.submit("leave", leave)
    worker.drain()
    worker.submit("next", lambda: ran.append(1))
    worker.drain()
    assert ran == [1]


class Deaf(logging.Filter):
    """A filter of the log that raises, as a broken handler does."""

    def filter(self, record):
        raise OSError("no log today")


def test_a_worker_that_dies_is_replaced(worker, gate, monkeypatch):
    """Where not even the log takes what a job raised, another worker takes the queue over."""
    deaf = Deaf()
    ran: list[int] = []
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", told.put)

    def fail():
        raise LookupError("not today")

    logger.addFilter(deaf)
    try:
        worker.submit("fail", fail)
        worker.submit("next", lambda: ran.append(1))
        gate.open.set()
        worker.drain()
    finally:
        logger.removeFilter(deaf)
    assert ran == [1]
    assert told.get(timeout=60).exc_type is OSError
    worker.submit("later", lambda: ran.append(2))
    worker.drain()
    assert ran == [1, 2]


def test_close_drops_what_waits(worker, gate):
    """close() finishes what runs, drops what waits, and refuses what comes later; twice is fine."""
    ran = []
    dropped = threading.Event()
    worker.submit("waits", lambda: ran.append("waits"), dropped=dropped.set)
    closing = threading.Thread(target=worker.close)
    closing.start()
    assert dropped.wait(PATIENCE_S)
    assert not worker.submit("late", lambda: ran.append("late"))
    gate.open.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert not ran
    assert not worker.submit("later", lambda: ran.append("later"))
    worker.drain()
    worker.close()
    assert (ran, len(worker)) == ([], 0)


def test_a_drain_ends_when_the_worker_is_closed(worker, gate):
    """Who waits for the queue is woken when another thread closes it."""
    dropped = threading.Event()
    worker.submit("waits", lambda: None, dropped=dropped.set)
    # A daemon, so that a drain that never ends fails this test and not the process.
    draining = threading.Thread(target=worker.drain, daemon=True)
    draining.start()
    closing = threading.Thread(target=worker.close)
    closing.start()
    assert dropped.wait(PATIENCE_S)
    gate.open.set()
    closing.join(PATIENCE_S)
    draining.join(3)
    assert not draining.is_alive()


def test_all_that_is_dropped_is_told_also_where_telling_raises(worker, gate):
    """Warnings as errors leave nobody untold, and closing still waits for what runs."""
    told: list[str] = []
    are_told = threading.Event()

    def refuse(name):
        told.append(name)
        if len(told) == 2:
            are_told.set()
        raise UserWarning(name)

    for name in ("first", "second"):
        worker.submit(name, gate, dropped=partial(refuse, name))
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(worker.close)
        assert are_told.wait(PATIENCE_S)
        assert not closed.done()
        gate.open.set()
        assert isinstance(closed.exception(PATIENCE_S), UserWarning)
    assert told == ["first", "second"]
    assert not worker.submit("late", gate)


def test_nothing_runs_before_the_first_job():
    """A worker that has nothing to do has no thread."""
    before = threading.active_count()
    worker = Background("idle")
    worker.drain()
    worker.close()
    assert threading.active_count() == before
    assert not worker.submit("late", lambda: None)


def test_many_threads_queue_each_key_once():
    """Sixteen threads that ask for the same keys start each of them once while it is queued."""
    worker = Background("test")
    gate = Gate()
    worker.submit("gate", gate)
    ran: list[int] = []
    barrier = threading.Barrier(16)

    def ask():
        barrier.wait(PATIENCE_S)
        for key in range(20):
            assert worker.submit(key, partial(ran.append, key))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    gate.open.set()
    worker.drain()
    assert sorted(ran) == list(range(20))
    worker.close()


def background(function=double, in_axes=("batch seq",), **options):
    return bucket_jit(function, in_axes=in_axes, config=BACKGROUND, **options)


def test_a_miss_is_served_eagerly_then_replayed():
    """A call is served at once; when its bucket is there, the next one is a replay of it."""
    function = background()
    with function.manager:
        assert_close(function(X), X * 2)
        assert stats_of(function)["eager_by_reason"] == {"queued": 1}
        function.manager.wait()
        assert [entry.key for entry in function.registry.entries()] == [(3, 5)]
        with no_compiles():
            assert_close(function(X), X * 2)
            assert_close(function(floats(1, 3, 5)), floats(1, 3, 5) * 2)
    stats = stats_of(function)
    assert (stats["calls"], stats["captures"], stats["queued"]) == (3, 0, 0)
    assert stats["replays"] == {"exact": 1, "padded": 1, "larger": 0}


def test_a_miss_is_served_from_the_smallest_larger_bucket():
    """A captured bucket that holds the call serves it, with nothing compiled in the request."""
    function = background()
    with function.manager:
        for shape in ((4, 5), (3, 5)):
            function(floats(0, *shape))
            function.manager.wait()
        sizes = (1, 2)
        with no_compiles():
            assert_close(function(floats(2, *sizes)), floats(2, *sizes) * 2)
        entries = {entry.key: entry.replay_count for entry in function.registry.entries()}
        assert entries == {(4, 5): 1, (3, 5): 1}
        function.manager.wait()
        with no_compiles():
            assert_close(function(floats(3, *sizes)), floats(3, *sizes) * 2)
    stats = stats_of(function)
    assert stats["replays"] == {"exact": 1, "padded": 0, "larger": 2}
    assert stats["eager_by_reason"] == {"queued": 1}
    assert stats["registry"]["capture_count"] == 3


def test_captured_buckets_are_warm_and_whole():
    """A bucket from the background equals one from a request, parameters and pytrees included."""
    params = {"w": floats(1, 3, 2), "b": floats(2, 2)}
    function = background(dense, (None, "batch seq ..."))
    x = floats(0, 2, 4, 3)
    with function.manager:
        first = function(params, x)
        function.manager.wait()
        assert_close(function(params, x), first)
        assert_close(function(params, x), np.asarray(dense(params, jnp.asarray(x))))
    assert stats_of(function)["hits"] == 2


def test_a_key_that_is_passed_through_is_captured_in_the_background():
    """A function that takes a PRNG key gets its bucket in the background like any other."""

    def noisy(key, x):
        return x + jax.random.normal(key, (1,), x.dtype)

    function = background(noisy, (None, "batch seq"))
    key = jax.random.key(0)
    with function.manager:
        first = function(key, X)
        function.manager.wait()
        assert_close(function(key, X), first)
    assert stats_of(function)["hits"] == 1


def test_debug_mode_checks_in_the_background(caplog):
    """With debug_mode a bucket that leaks its padding is not published; the next call is told."""
    config = dataclasses.replace(BACKGROUND, debug_mode=True)
    function = bucket_jit(
        lambda x: x - x.mean(1, keepdims=True), in_axes=("batch seq",), config=config
    )
    expected = X - X.mean(1, keepdims=True)
    with function.manager:
        assert_close(function(X), expected)
        function.manager.wait()
        for _ in range(2):
            with pytest.raises(PaddingLeakError, match="padding changes"):
                function(X)
    assert function.registry.num_graphs == 0
    assert stats_of(function)["eager_by_reason"] == {"queued": 1}
    assert stats_of(function)["errors_by_reason"] == {"leak": 2}
    assert stats_of(function)["registry"]["capture_count"] == 1


def test_a_failed_background_capture_is_remembered(caplog):
    """A capture that fails is told of once, and no request is lost, late, or tried again."""

    def branching(x):
        return x * 2 if x.sum() > 0 else x * 3

    function = background(branching)
    ones = np.ones((2, 4), np.float32)
    with function.manager, pytest.warns(CUDAGraphWarning, match="branching runs eagerly") as told:  # noqa: PT031
        for _ in range(3):
            assert_close(function(ones), ones * 2)
            assert_close(function(-ones), -ones * 3)
            function.manager.wait()
    assert len(told) + len(caplog.records) == 1
    stats = stats_of(function)
    assert (stats["calls"], stats["failed_buckets"]) == (6, 1)
    assert sum(stats["eager_by_reason"].values()) == 6
    assert stats["eager_by_reason"]["failed"] >= 4


def test_what_is_queued_keeps_no_arrays():
    """A queued capture does not hold the arrays of the request that asked for it."""
    function = background()
    gate = Gate()
    queue = function.manager.dispatcher.capturer.background
    assert queue.submit("gate", gate)
    x = jnp.asarray(X)
    before = len(jax.live_arrays())
    function(x)
    assert stats_of(function)["queued"] == 2
    assert len(jax.live_arrays()) == before
    gate.open.set()
    function.manager.wait()
    assert_close(function(x), X * 2)
    function.manager.close()


def test_a_full_queue_loses_no_request():
    """While the queue is full calls are served all the same, and captured when they ask again."""
    function = background()
    capturer = function.manager.dispatcher.capturer
    capturer.background = Background("small", max_queued=1)
    gate = Gate()
    assert capturer.background.submit("gate", gate)
    assert_close(function(X), X * 2)
    assert stats_of(function)["queued"] == 1
    gate.open.set()
    function.manager.wait()
    assert function.registry.num_graphs == 0
    assert_close(function(X), X * 2)
    function.manager.wait()
    assert function.registry.num_graphs == 1
    function.manager.close()


def test_a_closed_manager_serves_on():
    """After `with manager:` calls are served, and nothing is captured in the background."""
    function = background()
    with function.manager as manager:
        assert manager is function.manager
        function(X)
        manager.wait()
    for _ in range(2):
        assert_close(function(floats(0, 4, 5)), floats(0, 4, 5) * 2)
        assert_close(function(X), X * 2)
        function.manager.wait()
    assert function.registry.num_graphs == 1
    assert stats_of(function)["eager_by_reason"] == {"queued": 1, "refused": 2}
    assert stats_of(function)["hits"] == 2
    assert "full or closed" in function.explain(floats(0, 4, 5)).reason


def test_with_manager_closes_after_an_error():
    """An error inside `with manager:` goes through, and the worker ends all the same."""
    manager = CUDAGraphManager(BACKGROUND)
    with pytest.raises(LookupError), manager:
        raise LookupError
    assert not manager.dispatcher.capturer.background.submit("late", lambda: None)


def test_without_copies_no_larger_bucket_serves():
    """cudagraph_copy_inputs=False never pads, so a missing bucket is served eagerly meanwhile."""
    config = dataclasses.replace(BACKGROUND, cudagraph_copy_inputs=False)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    with function.manager:
        for shape in ((4, 5), (3, 5)):
            assert_close(function(floats(0, *shape)), floats(0, *shape) * 2)
            function.manager.wait()
    assert stats_of(function)["eager_by_reason"] == {"queued": 2}


def test_paused_and_disabled_queue_nothing():
    """Modes that run eagerly ask for no capture."""
    function = background()
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.DISABLED):
        function.manager.mode = mode
        assert_close(function(X), X * 2)
        assert stats_of(function)["queued"] == 0
    function.manager.close()


def test_sealing_finishes_what_is_queued():
    """seal() captures what is queued; from then on no size is captured."""
    function = background()
    for batch in (1, 2, 4):
        function(floats(0, batch, 4))
    function.seal()
    assert function.manager.mode is CUDAGraphMode.REPLAY
    assert stats_of(function)["queued"] == 0
    captured = function.registry.capture_count
    assert {entry.key for entry in function.registry.entries()} == {(1, 5), (3, 5), (4, 5)}
    with no_compiles():
        for batch in (1, 2, 3, 4):
            for seq in range(1, 6):
                x = floats(batch, batch, seq)
                assert_close(function(x), x * 2)
    function(floats(0, 9, 9))
    function.manager.wait()
    assert function.registry.capture_count == captured
    assert stats_of(function)["eager_by_reason"] == {"overflow": 1, "queued": 3}
    function.manager.close()


def test_explain_says_that_a_larger_bucket_serves_meanwhile():
    """explain() names the bucket that would serve, and that the own one comes in the background."""
    function = background()
    with function.manager:
        function(floats(0, 4, 5))
        function.manager.wait()
        said = str(function.explain(floats(0, 1, 2)))
    assert "background" in said
    assert "4x5" in said
    assert "no capture is allowed" not in said


EXITS = """
import logging, sys, threading
import jax, numpy as np
from cudagraph_jax import CUDAGraphConfig, bucket_jit

logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("cudagraph_jax").setLevel("INFO")

def slow(x):
    if isinstance(x, jax.core.Tracer):
        threading.main_thread().join(1)  # so that this capture ends while the interpreter exits
    return x * 2

config = CUDAGraphConfig(on_miss="background", capture_sizes=(1, 2, 3, 4))
function = bucket_jit(slow, in_axes=("batch seq",), out_axes="batch seq", config=config)
for batch in range(1, 5):
    function(np.ones((batch, 3), np.float32))
assert function.stats()["queued"] == 4, function.stats()
print("served", function.stats()["calls"])
"""


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)"])
def test_the_interpreter_exits_with_work_queued(ending):
    """A process that ends with captures queued finishes the one under way and drops the others."""
    done = run_script(EXITS + ending)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("served 4\n")
    assert done.stdout.count("captured") <= 1


def test_the_interpreter_does_not_wait_for_what_only_workers_and_daemons_want():
    """Neither daemons nor the workers of other managers keep queued captures alive at the end."""
    ending = """
other = bucket_jit(slow, in_axes=("batch seq",), out_axes="batch seq", config=config)
for batch in range(1, 5):
    other(np.ones((batch, 3), np.float32))
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
    done = run_script(EXITS + ending, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("captured") <= 2


AFTER_MAIN = """
import threading
import numpy as np
from cudagraph_jax import CUDAGraphConfig, bucket_jit

config = CUDAGraphConfig(on_miss="background", capture_sizes=(1, 2, 3, 4))
function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)

def serve():
    threading.main_thread().join()
    for batch in range(1, 5):
        x = np.ones((batch, 3), np.float32)
        function(x)
        {then}
        assert np.array_equal(function(x), x * 2)
    print(function.registry.num_graphs, function.stats()["hits"], flush=True)

threading.Thread(target=serve).start()
"""


STARTS_NO_LATE_THREADS = (3, 12, 0) <= sys.version_info[:3] <= (3, 12, 2)
"""These start no thread once the main one has ended (python/cpython#113964)."""


def test_captures_go_on_after_the_main_thread():
    """A server whose main thread has ended gets its buckets, or is told once why it does not."""
    done = run_script(AFTER_MAIN.format(then="function.manager.wait()"))
    assert done.returncode == 0
    if STARTS_NO_LATE_THREADS:
        assert done.stdout == "0 0\n"
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("nothing runs in the background for now: can't create")
    else:
        assert (done.stdout, done.stderr) == ("4 4\n", "")


def test_the_last_thread_does_not_wait_for_its_captures():
    """When the last server thread ends, too, what is queued is dropped and the process ends."""
    done = run_script(AFTER_MAIN.format(then=""), timeout=60)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_calls_at_exit_are_served():
    """An atexit function may call: it is served, and no thread is started that nobody awaits."""
    script = """
import atexit, threading
import numpy as np
from cudagraph_jax import CUDAGraphConfig, bucket_jit

config = CUDAGraphConfig(on_miss="background", capture_sizes=(1, 2))
function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)

@atexit.register
def last():
    print(function(np.ones((2, 3), np.float32)).sum(), function.stats()["queued"])
    assert threading.active_count() == 1
"""
    done = run_script(script)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "12.0 0\n")


def test_without_threads_nothing_is_captured_and_that_is_said_once(caplog):
    """Where no thread can be started, jobs are refused and one warning says why, until one can."""
    broken = True

    class Fragile(threading.Thread):
        def start(self):
            if broken:
                raise RuntimeError("can't start new thread")
            super().start()

    worker = Background("fragile", thread=Fragile)
    ran: list[int] = []
    for _ in range(3):
        assert not worker.submit("a", lambda: ran.append(1))
    assert len(worker) == 0
    worker.drain()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cudagraph_jax", "WARNING")
    assert "nothing runs in the background for now" in record.message
    assert "can't start new thread" in record.message
    broken = False
    assert worker.submit("a", lambda: ran.append(1))
    worker.drain()
    assert ran == [1]
    broken = True
    assert not worker.submit("a", lambda: ran.append(1))
    assert len(caplog.records) == 2
    worker.close()
