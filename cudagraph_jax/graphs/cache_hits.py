"""Whether JAX's own persistent cache gave an executable."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import jax

_HIT = "/jax/compilation_cache/cache_hits"
"""Not promised by JAX: without it nothing is counted."""


@contextmanager
def cache_hits() -> Iterator[list[str]]:
    """The hits of this thread while the block runs, in the list that it gives."""
    hits: list[str] = []
    seen = _listening()
    outer, seen.hits = getattr(seen, "hits", None), hits
    try:
        yield hits
    finally:
        seen.hits = outer


@cache
def _listening() -> threading.local:
    """The hits of each thread, heard by one listener for the whole process."""
    seen = threading.local()

    def hear(event: str, **_: object) -> None:
        hits = getattr(seen, "hits", None)
        if event == _HIT and hits is not None:
            hits.append(event)

    jax.monitoring.register_event_listener(hear)
    return seen
