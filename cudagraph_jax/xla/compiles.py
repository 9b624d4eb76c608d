"""What JAX itself reports about compiling, through `jax.monitoring`.

The events' names are not promised (FACTS.md, "Compiling, freeing, counting"). Where they are
absent `compiles_are_reported` says so, instead of a count of zero that would prove nothing.
"""

from __future__ import annotations

import threading
from functools import cache
from types import TracebackType
from typing import Self

import jax
import numpy as np

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Counts the process's XLA compiles between entering and leaving.

    An executable that is read from JAX's persistent cache is reported as a compile and as a hit:
    it is not counted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._cache_hits = 0

    @property
    def events(self) -> int:
        """Compiles and reads from the persistent cache together."""
        with self._lock:
            return len(self._names)

    @property
    def compiles(self) -> int:
        """Programs that XLA compiled."""
        with self._lock:
            return len(self._names) - self._cache_hits

    @property
    def names(self) -> list[str]:
        """What was compiled, or read from the persistent cache, in that order."""
        with self._lock:
            return list(self._names)

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            with self._lock:
                self._names.append(str(kwargs.get("fun_name", "a program")))

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event == CACHE_HIT_EVENT:
            with self._lock:
                self._cache_hits += 1


@cache
def compiles_are_reported() -> bool:
    """Whether this JAX reports its compiles: found out, once, by compiling something small."""
    with CompileCounter() as counter:
        jax.jit(lambda x: x + 1).lower(np.float32(0)).compile()
    return counter.events > 0
