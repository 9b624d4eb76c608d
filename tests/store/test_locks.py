"""Locks across processes."""

import os
import sys
import threading
import time
import warnings

import pytest

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.store import GraphStore
from tests.helpers.processes import run_script
from tests.helpers.stores import FILE, IDENTITY, KEY


@pytest.fixture
def store(tmp_path):
    return GraphStore(tmp_path / "graphs")


def test_excludes(store):
    """One holder at a time for one identity; others are free; afterwards so is this one."""
    with store.lock(IDENTITY, 0) as first, GraphStore(store.path).lock(IDENTITY, 0) as second:
        assert (first, second) == (True, False)
        with store.lock({"n": 1}, 0) as other:
            assert other
    with store.lock(IDENTITY, 0) as again:
        assert again


def test_waits_for_the_holder(store):
    """Who waits gets the lock as soon as the holder is done."""
    waiting, had = threading.Event(), []

    def wait():
        waiting.set()
        with store.lock(IDENTITY, 60) as is_mine:
            had.append(is_mine)

    with store.lock(IDENTITY, 0):
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait()
    thread.join()
    assert had == [True]


def test_waits_are_told(store):
    """Who waits is told so once before; who need not, or does not want to, is not."""
    told: list[str] = []
    with store.lock(IDENTITY, 1, on_wait=lambda: told.append("free")):
        with store.lock(IDENTITY, 0, on_wait=lambda: told.append("one try")):
            pass
        with store.lock(IDENTITY, 0.2, on_wait=lambda: told.append("waits")):
            pass
    assert told == ["waits"]


def test_waits_no_longer_than_stated(store):
    """After the stated time who waits goes on without the lock."""
    with store.lock(IDENTITY, 0):
        start = time.monotonic()
        with store.lock(IDENTITY, 0.2) as had:
            assert not had
        assert 0.2 <= time.monotonic() - start < 5


def test_a_wait_is_ended(store):
    """Whoever waits goes on at once when waiting is stopped; later waits are single tries."""
    waiter, had = GraphStore(store.path), []
    waiting = threading.Event()

    def wait():
        waiting.set()
        with waiter.lock(IDENTITY, 600) as is_mine:
            had.append(is_mine)

    with store.lock(IDENTITY, 0):
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert waiting.wait(60)
        assert thread.is_alive()
        waiter.stop_waiting()
        thread.join(60)
        assert had == [False]
        wait()
        assert had == [False, False]
    wait()
    assert had == [False, False, True]


EXITS = """
import atexit, sys, threading
from cudagraph_jax.store import GraphStore

holder, waiter = GraphStore(sys.argv[1]), GraphStore(sys.argv[1])
held, waiting = holder.lock({"n": 1}, 0), threading.Event()
assert held.__enter__()
atexit.register(held.__exit__, None, None, None)  # after the threads have ended

def wait():
    waiting.set()
    with waiter.lock({"n": 1}, 600) as had:
        print(had)

threading.Thread(target=wait).start()
waiting.wait()
"""


def test_the_interpreter_exits(store):
    """A thread that the interpreter waits for does not wait for a lock any more."""
    done = run_script(EXITS, store.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_errors_inside_are_the_callers(store):
    """What is raised under the lock passes, also an OSError, and the lock is free again."""
    for error in (TimeoutError("mine"), KeyError("mine")):

        def fail(error=error):
            with store.lock(IDENTITY, 0) as had:
                assert had
                raise error

        with pytest.raises(type(error), match="mine"):
            fail()
    with store.lock(IDENTITY, 0) as had:
        assert had


def test_without_filelock(store, monkeypatch):
    """Without the package no lock is had, nobody waits, and nothing is written."""
    monkeypatch.setitem(sys.modules, "filelock", None)
    with store.lock(IDENTITY, 60) as had:
        assert not had
    assert os.listdir(store.path) == []


def test_without_a_directory(store):
    """In a directory that was deleted no lock is had, and it is not made again."""
    store.path.rmdir()
    with store.lock(IDENTITY, 60) as had:
        assert not had
    assert not store.path.exists()


def test_a_link_in_the_way(store, tmp_path):
    """A link where the lock should be is not followed: no lock is had, and its target stays."""
    (tmp_path / "target").write_text("mine")
    (store.path / f"{FILE}.lock").symlink_to(tmp_path / "target")
    with store.lock(IDENTITY, 60) as had:
        assert not had
    assert (tmp_path / "target").read_text() == "mine"


def test_where_others_can_write(store):
    """In a directory that others can write a lock is had only if a key makes it safe."""
    store.path.chmod(0o770)
    with store.lock(IDENTITY, 0) as had:
        assert not had
    with GraphStore(store.path, key=KEY).lock(IDENTITY, 0) as had:
        assert had


def test_no_warnings(store):
    """Locking warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with store.lock(IDENTITY, 0):
            pass


@pytest.mark.parametrize("timeout_s", [-1, float("inf"), float("nan"), None, "1"])
def test_timeouts(store, timeout_s):
    """A wait without an end is a configuration error, before anything is locked."""
    with pytest.raises(ConfigError, match="is no time to wait: give seconds, 0 or more"):
        store.lock(IDENTITY, timeout_s)
