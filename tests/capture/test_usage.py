"""Upkeep: hot buckets and files in use are written down while a server serves."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import gc
import logging
import os
import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from cudagraph_jax import CUDAGraphManager, GraphStore, StoreError, bucket_jit
from cudagraph_jax.capture.usage import Upkeep
from tests.helpers.functions import GRID, double, floats
from tests.helpers.processes import run_script
from tests.helpers.stores import Failing

ROOT = Path(__file__).parents[2]
BUCKET = str(GRID.bucket_for(2, 3))


def serving(store):
    """A manager in `store`, and a warm function of it."""
    manager = CUDAGraphManager(GRID, store=store)
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    function.warmup(floats(0, 1, 1), progress=False)
    return manager, function


def upkeep_of(manager, **options):
    """Another upkeep of the manager."""
    return Upkeep(manager.registry.shelf, manager.registry, **options)


class Watched(GraphStore):
    """A store that tells what is remembered as hot."""

    def __init__(self, path):
        super().__init__(path)
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def remember_hot(self, hot):
        super().remember_hot(hot)
        self.told.put(hot)


def test_it_writes_while_the_server_serves(tmp_path):
    """The counts are in the store soon after the calls, without an end."""
    store = Watched(tmp_path)
    manager, function = serving(store)
    upkeep = upkeep_of(manager, interval_s=0.01)
    upkeep.begin()
    upkeep.begin()
    for _ in range(3):
        function(floats(0, 2, 3))
    written = 0
    while written < 3:
        written += store.told.get(timeout=60)["double"][BUCKET]
    assert store.hot()["double"][BUCKET] == 3
    upkeep.end()


def test_other_functions_stay(tmp_path):
    """What another server wrote is kept, half of it where it is of the same function."""
    store = GraphStore(tmp_path)
    GraphStore(tmp_path).remember_hot({"other": {"1x1": 7}, "double": {"9x9": 9}})
    os.utime(tmp_path / "hot.json", (10.0**9, 10.0**9))
    manager, function = serving(store)
    function(floats(0, 2, 3))
    manager.close()
    hot = store.hot()
    assert hot["other"] == {"1x1": 7}
    assert hot["double"] == {"9x9": 4, BUCKET: 1}


def test_each_replay_is_written_once(tmp_path):
    """Whatever is written in between, and by whomever, the counts add up in the end."""
    store = GraphStore(tmp_path)
    manager, function = serving(store)
    upkeep = manager.dispatcher.capturer.upkeep
    for _ in range(3):
        function(floats(0, 2, 3))
        upkeep.write()
        upkeep.write()
    store.remember_hot({"double": {BUCKET: 100}})
    function(floats(0, 2, 3))
    manager.close()
    assert store.hot()["double"][BUCKET] == 104


def test_nothing_is_written_without_calls(tmp_path):
    """A warm-up alone, or a store that is only read, changes no counts."""
    manager, _ = serving(GraphStore(tmp_path))
    manager.close()
    assert not (tmp_path / "hot.json").exists()
    manager, function = serving(GraphStore(tmp_path, mode="ro"))
    function(floats(0, 2, 3))
    manager.close()
    assert not (tmp_path / "hot.json").exists()


def test_it_ends_with_its_manager(tmp_path):
    """A manager that nobody holds is collected, and its thread ends."""
    before = set(threading.enumerate())
    manager, function = serving(GraphStore(tmp_path))
    upkeep_of(manager, interval_s=0.01).begin()
    manager.close()
    del manager, function
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


def test_a_dropped_manager_leaves_no_thread(tmp_path):
    """The thread ends when its manager is collected, not a minute later, and stays in no list."""
    manager, function = serving(GraphStore(tmp_path))
    started = []

    def thread(**options):
        started.append(threading.Thread(**options))
        return started[-1]

    upkeep = upkeep_of(manager, interval_s=3600, thread=thread)
    upkeep.begin()
    assert started[0].is_alive()
    del upkeep, manager, function
    gc.collect()
    started[0].join(60)
    assert not started[0].is_alive()


def test_no_more_threads(tmp_path):
    """Where no thread starts nothing is raised, and the counts are written at the end."""

    class Stillborn(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    manager, function = serving(GraphStore(tmp_path))
    upkeep = upkeep_of(manager, thread=Stillborn)
    upkeep.begin()
    function(floats(0, 2, 3))
    upkeep.end()
    assert manager.store.hot() == {"double": {BUCKET: 1}}


def test_while_the_interpreter_exits(tmp_path, monkeypatch):
    """Where nothing can be registered for the exit any more nothing is raised."""
    manager, function = serving(GraphStore(tmp_path))
    upkeep = upkeep_of(manager)

    def too_late(*_):
        raise RuntimeError("the interpreter exits")

    with monkeypatch.context() as patched:
        patched.setattr(atexit, "register", too_late)
        upkeep.begin()
    function(floats(0, 2, 3))
    upkeep.end()
    assert manager.store.hot() == {"double": {BUCKET: 1}}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks nothing here")
def test_a_forked_child_writes_nothing(tmp_path):
    """A child that ends, also one forked while a count was under way, leaves the file alone."""
    done = run_script(FORKS, tmp_path, warnings="ignore")
    assert (done.returncode, done.stderr) == (0, "")
    assert GraphStore(tmp_path).hot() == {"double": {BUCKET: 7}}


FORKS = """
import os, signal, sys
from cudagraph_jax import GraphStore
from tests.helpers.functions import floats
from tests.capture.test_usage import serving

store = GraphStore(sys.argv[1])
manager, function = serving(store)
for _ in range(3):
    function(floats(0, 2, 3))
upkeep = manager.dispatcher.capturer.upkeep
upkeep._is_writing = True  # as if a thread of the parent were in the middle of it
child = os.fork()
if not child:
    signal.alarm(60)  # a child that hangs is killed
    upkeep.write()
    manager.close()
    os._exit(0 if store.hot() == {} else 1)
assert os.waitpid(child, 0)[1] == 0
upkeep._is_writing = False
for _ in range(4):
    function(floats(0, 2, 3))
"""


def test_what_cannot_be_written_is_logged(tmp_path, monkeypatch, caplog):
    """A full disk costs the counts, and no request."""
    store = GraphStore(tmp_path)
    manager, function = serving(store)
    function(floats(0, 2, 3))

    def full(hot):
        raise StoreError("no space left on device")

    monkeypatch.setattr(store, "remember_hot", full)
    upkeep = manager.dispatcher.capturer.upkeep
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # as it is tried every minute
            upkeep.write()
        manager.close()
    assert caplog.text.count("the hot buckets are not written down: no space left on device") == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_directory_that_is_only_read(tmp_path, code, caplog):
    """Of a mount that is only read nobody is warned at the end."""
    serving(GraphStore(tmp_path))[0].close()
    manager, function = serving(GraphStore(tmp_path, files=Failing("create", code)))
    function(floats(0, 2, 3))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        manager.close()
    assert caplog.text == ""
    assert manager.store.hot() == {}


def test_what_was_not_written_is_written_the_next_time(tmp_path, monkeypatch):
    """A disk that was full for a while costs no counts."""
    store = GraphStore(tmp_path)
    manager, function = serving(store)
    upkeep = manager.dispatcher.capturer.upkeep

    def full(hot):
        raise StoreError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "remember_hot", full)
        function(floats(0, 2, 3))
        upkeep.write()
    function(floats(0, 2, 3))
    manager.close()
    assert store.hot() == {"double": {BUCKET: 2}}


def test_a_manager_that_is_switched_off(tmp_path):
    """A disabled manager with a store closes without writing."""
    config = dataclasses.replace(GRID, enabled=False)
    with CUDAGraphManager(config, store=GraphStore(tmp_path)) as manager:
        assert manager.store is not None
    assert not (tmp_path / "hot.json").exists()
