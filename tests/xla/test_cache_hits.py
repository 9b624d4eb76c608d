"""Hits of JAX's own cache: of this thread alone, and heard whatever became of JAX's listeners."""

from __future__ import annotations

import threading

import jax
import jax.monitoring

from cudagraph_jax.xla.compiles import cache_hits

HIT = "/jax/compilation_cache/cache_hits"


def hear(event: str = HIT) -> None:
    """JAX reports an event."""
    jax.monitoring.record_event(event)


def test_hits_inside_count():
    """A hit inside the block counts; another event, a hit before it and one after it do not."""
    hear()
    with cache_hits() as hits:
        hear("/jax/another")
        assert hits == []
        hear()
        assert hits == [HIT]
    hear()
    assert hits == [HIT]


def test_hits_of_other_threads_do_not():
    """What another thread reads meanwhile is a hit of its own."""
    theirs = []

    def read():
        with cache_hits() as hits:
            hear()
            theirs.extend(hits)

    with cache_hits() as hits:
        for target in (hear, read):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert hits == []
        hear()
    assert set(hits) == set(theirs) == {HIT}


def test_after_the_listeners_were_cleared():
    """A process that clears JAX's listeners, before or inside the block, loses no later hits."""
    for _ in range(2):
        with cache_hits() as hits:
            hear()
            jax.monitoring.clear_event_listeners()
        assert hits == [HIT]


def test_no_listener_stays():
    """Each block removes what it registered: hits are not heard twice."""
    for _ in range(3):
        with cache_hits() as hits:
            hear()
        assert hits == [HIT]
