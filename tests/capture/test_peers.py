"""Comparisons among processes, as in a job of one: by several threads, refused, interrupted."""

from __future__ import annotations

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


def test_an_interrupt_where_others_are_told(peers):
    """Nobody is told, since that would wait; whatever comes next fails."""
    with (
        pytest.raises(KeyboardInterrupt),
        peers.telling("the warm-up of embed", timeout_s=1),
    ):
        raise KeyboardInterrupt
    with pytest.raises(DistributedError, match="the warm-up of embed spans several processes"):
        peers.coordinator.compare("one", {}, timeout_s=1)


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
        peers.coordinator.compare("one", {}, timeout_s=1)


def test_what_is_led(peers):
    """One function at a time, until it is not led any more."""
    with peers.leading("embed"):
        assert peers.led == "embed"
        with pytest.raises(DistributedError, match="embed is led already"), peers.leading("head"):
            pass
        assert peers.led == "embed"
    assert peers.led is None
