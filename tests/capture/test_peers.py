"""Comparisons among processes, as in a job of one: by several threads, refused, interrupted."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from cudagraph_jax import DistributedError
from cudagraph_jax.capture.peers import Peers
from cudagraph_jax.xla.coordinator import Coordinator
from tests.helpers.coordinators import Store


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def peers(store):
    return Peers(Coordinator(lambda: store))


def test_what_all_refuse(peers):
    """It is raised as it is when all have said so; what is said besides is given to all."""
    error = ValueError("too large")
    with pytest.raises(ValueError, match="too large") as caught:
        peers.compare("a call", {}, timeout_s=1, refused=error)
    assert caught.value is error
    assert peers.compare("a call", {"sizes": "1x2"}, timeout_s=1, said="here") == ["here"]


def test_a_second_thread(store, peers):
    """It comes in its turn, so that the others can come to it, too, and is refused there."""
    inside, goes_on = threading.Event(), threading.Event()

    def at_barrier():
        inside.set()
        assert goes_on.wait(20)

    store.at_barrier = at_barrier
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(peers.compare, "one", {}, timeout_s=1)
        assert inside.wait(20)
        second = pool.submit(peers.compare, "two", {}, timeout_s=1)
        goes_on.set()
        assert first.result() == [""]
        # It may have come when the first one had gone already.
        if (error := second.exception()) is not None:
            assert isinstance(error, DistributedError)
            assert "two threads of this process" in str(error)


def test_a_signal_handler_in_the_middle(store, peers):
    """It is refused at once, as it cannot wait for what it interrupts."""
    errors = []

    def at_barrier():
        with pytest.raises(DistributedError, match="a signal handler") as caught:
            peers.compare("two", {}, timeout_s=1)
        errors.append(caught.value)

    store.at_barrier = at_barrier
    assert peers.compare("one", {}, timeout_s=1) == [""]
    assert len(errors) == 1


def test_an_interrupt_where_others_are_told(peers):
    """Nobody is told, since that would wait; whatever comes next fails."""
    with (
        pytest.raises(KeyboardInterrupt),
        peers.telling("the warm-up of embed", {}, timeout_s=1),
    ):
        raise KeyboardInterrupt
    with pytest.raises(DistributedError, match="the warm-up of embed spans several processes"):
        peers.compare("one", {}, timeout_s=1)


class Shared(NamedTuple):
    """What `run_together` asks of an entry that processes share."""

    variant: Any
    bucket: str = "1x1"
    is_shared: bool = True


def test_an_interrupt_in_a_run(peers):
    """It goes through, and nothing is compared again: others may wait within the run."""

    def run(*, looks_on):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        peers.run_together(Shared(SimpleNamespace(name="embed")), run, timeout_s=1)
    with pytest.raises(DistributedError, match="a run of embed 1x1 spans several processes"):
        peers.compare("one", {}, timeout_s=1)


def test_what_is_led(peers):
    """One function at a time, until it is not led any more."""
    with peers.leading("embed"):
        assert peers.led == "embed"
        with pytest.raises(DistributedError, match="embed is led already"), peers.leading("head"):
            pass
        assert peers.led == "embed"
    assert peers.led is None
