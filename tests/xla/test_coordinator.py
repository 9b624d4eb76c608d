"""The coordinator of a job, as a process of one: what breaks an exchange breaks those behind it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cudagraph_jax import DistributedError
from cudagraph_jax.xla.coordinator import Coordinator
from tests.helpers.coordinators import Store


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def coordinator(store):
    return Coordinator(lambda: store)


def test_what_is_said(store, coordinator):
    """Each exchange gives what was said in it, and nothing of it is left."""
    for text in ("one", "two", "three"):
        assert coordinator.exchange(text, timeout_s=1) == [text]
    assert list(store.told.values()) == [b"three"]


def test_a_failure_elsewhere(store, coordinator):
    """It is seen before this process comes to say anything; that another one is there is none."""
    assert coordinator.failure_elsewhere() == ""
    store.told["cudagraph_jax/0/1"] = b'["a call", {"outcome": "ready"}, ""]'
    assert coordinator.failure_elsewhere() == ""
    store.told["cudagraph_jax/0/2"] = b'["a call", {"outcome": "ValueError: no"}, ""]'
    assert coordinator.failure_elsewhere() == "ValueError: no"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt(store, coordinator, interrupt):
    """It goes through, and nothing is exchanged again: the others may have gone on."""

    def at_barrier():
        raise interrupt

    store.at_barrier = at_barrier
    with pytest.raises(interrupt):
        coordinator.exchange("one", timeout_s=1)
    store.at_barrier = lambda: None
    with pytest.raises(DistributedError, match="was interrupted while it waited"):
        coordinator.exchange("two", timeout_s=1)


def test_a_text_that_is_not_there(store, coordinator):
    """The process that did not say it is named."""
    store.at_barrier = store.told.clear
    for _ in range(2):
        with pytest.raises(DistributedError, match="process 0 did not come within 1 s"):
            coordinator.exchange("one", timeout_s=1)


def test_what_all_refuse(coordinator):
    """It is raised as it is when all have said so; what is said besides is given to all."""
    error = ValueError("too large")
    with pytest.raises(ValueError, match="too large") as caught:
        coordinator.compare("a call", {}, timeout_s=1, refused=error)
    assert caught.value is error
    assert coordinator.compare("a call", {"sizes": "1x2"}, timeout_s=1, said="here") == ["here"]


def test_a_second_thread(store, coordinator):
    """It comes in its turn, so that the others can come to it, too, and is refused there."""
    inside, goes_on = threading.Event(), threading.Event()

    def at_barrier():
        inside.set()
        assert goes_on.wait(20)

    store.at_barrier = at_barrier
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(coordinator.compare, "one", {}, timeout_s=1)
        assert inside.wait(20)
        second = pool.submit(coordinator.compare, "two", {}, timeout_s=1)
        goes_on.set()
        assert first.result() == [""]
        # It may have come when the first one had gone already.
        if (error := second.exception()) is not None:
            assert isinstance(error, DistributedError)
            assert "two threads of this process" in str(error)


def test_a_signal_handler_in_the_middle(store, coordinator):
    """It is refused at once, as it cannot wait for what it interrupts."""
    errors = []

    def at_barrier():
        with pytest.raises(DistributedError, match="a signal handler") as caught:
            coordinator.compare("two", {}, timeout_s=1)
        errors.append(caught.value)

    store.at_barrier = at_barrier
    assert coordinator.compare("one", {}, timeout_s=1) == [""]
    assert len(errors) == 1


def test_it_is_broken_off(coordinator):
    """The first reason is the one that is given."""
    coordinator.break_off("why")
    coordinator.break_off("and so")
    with pytest.raises(DistributedError, match=r"^why$"):
        coordinator.exchange("one", timeout_s=1)


def test_it_is_broken_off_in_the_middle(store, coordinator):
    """What all have said is given, and nothing is exchanged again, as by what a led call fails."""
    store.at_barrier = lambda: coordinator.break_off("why")
    assert coordinator.exchange("one", timeout_s=1) == ["one"]
    with pytest.raises(DistributedError, match=r"^why$"):
        coordinator.exchange("two", timeout_s=1)
