"""The coordinator of a job, as a process of one: what breaks an exchange breaks those behind it."""

from __future__ import annotations

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
    """Each exchange gives what was said in it, before it what is said already; nothing is left."""
    assert coordinator.said_next() == []
    for text in ("one", "two", "three"):
        assert coordinator.exchange(text, timeout_s=1) == [text]
    assert list(store.told.values()) == [b"three"]
    store.told["cudagraph_jax/3/1"] = b"four"
    assert coordinator.said_next() == ["four"]


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
