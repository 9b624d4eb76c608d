"""Whether JAX's own persistent cache gave an executable."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax
import jax.monitoring

_HIT = "/jax/compilation_cache/cache_hits"
"""Not promised by JAX: without it nothing is counted."""

# Shared by all listeners, because JAX skips one where another thread removes the one before it.
_seen = threading.local()


@contextmanager
def cache_hits() -> Iterator[list[str]]:
    """The hits of this thread while the block runs, each once or more, in the list that it gives.

    It listens for itself: the process may clear JAX's listeners at any time.
    """
    hits: list[str] = []

    def hear(event: str, **_: object) -> None:
        heard = getattr(_seen, "hits", None)
        if event == _HIT and heard is not None:
            heard.append(event)

    outer, _seen.hits = getattr(_seen, "hits", None), hits
    jax.monitoring.register_event_listener(hear)
    try:
        yield hits
    finally:
        _seen.hits = outer
        # Of what was cleared meanwhile JAX says that it is not there, with one error or another.
        with suppress(AssertionError, ValueError, AttributeError):
            jax.monitoring.unregister_event_listener(hear)
