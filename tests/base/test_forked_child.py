"""What a forked child puts right."""

from __future__ import annotations

import gc
import os
import weakref

import pytest

from cudagraph_jax._base.fork import put_right_in_child

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
def test_state_is_told(in_child):
    """State is told once in a child, and not at all in the parent."""
    state = State()
    assert in_child(lambda: state.forks == 1)
    assert state.forks == 0


def test_nothing_is_kept_alive():
    """State goes when its owner does."""
    state = weakref.ref(State())
    gc.collect()
    assert state() is None
