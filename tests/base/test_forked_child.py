"""What a forked child puts right."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest

from cudagraph_jax._base.fork import forkable_lock, put_right_in_child

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks nothing here")


class State:
    """State that was told of a fork."""

    def __init__(self):
        self.forks = 0
        put_right_in_child(self)

    def after_fork(self):
        self.forks += 1


@pytest.fixture
def in_child():
    """Runs a check in a forked child; whether it held."""

    def run(check):
        child = os.fork()
        if child == 0:
            os._exit(0 if check() else 1)
        return os.waitpid(child, 0)[1] == 0

    return run


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_locks_and_state(in_child):
    """In a child a lock that was held is free, and state is told once; the parent keeps both."""
    lock, free, state = forkable_lock(), forkable_lock(), State()
    with lock:
        assert in_child(
            lambda: (
                lock.acquire(blocking=False) and free.acquire(blocking=False) and state.forks == 1
            )
        )
        assert lock.locked()
    assert (free.locked(), state.forks) == (False, 0)


def test_nothing_is_kept_alive():
    """Locks and state go when their owners do, however many there were."""
    lock, state = weakref.ref(forkable_lock()), weakref.ref(State())
    gc.collect()
    assert (lock(), state()) == (None, None)


def test_a_lock_is_a_lock():
    """A forkable lock excludes other threads like any other."""
    lock = forkable_lock()
    assert isinstance(lock, type(threading.Lock()))
    with lock:
        assert not lock.acquire(blocking=False)
