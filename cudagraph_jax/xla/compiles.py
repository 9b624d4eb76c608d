"""What JAX itself reports about compiling, through `jax.monitoring`.

The events' names are not promised (docs/xla.md, "Compiling, freeing, counting"). Where they are
absent `compiles_are_reported` says so, instead of a count of zero that would prove nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import TracebackType
from typing import Self

import jax
import jax.monitoring
import numpy as np

from cudagraph_jax._base.changes import counted
from cudagraph_jax.errors import UnexpectedCompileError
from cudagraph_jax.xla.stages import REFUSAL, tracing_refusals

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Counts the process's XLA compiles between entering and leaving.

    An executable that is read from JAX's persistent cache is reported as a compile and as a hit:
    it is not counted.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._cache_hits = itertools.count()

    @property
    def events(self) -> int:
        """Compiles and reads from the persistent cache together."""
        return len(self._names)

    @property
    def compiles(self) -> int:
        """Programs that XLA compiled."""
        return len(self._names) - counted(self._cache_hits)

    @property
    def names(self) -> list[str]:
        """What was compiled, or read from the persistent cache, in that order."""
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
            self._names.append(str(kwargs.get("fun_name", "a program")))

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event == CACHE_HIT_EVENT:
            next(self._cache_hits)


@cache
def compiles_are_reported() -> bool:
    """Whether this JAX reports its compiles: found out, once, by compiling something small."""
    with CompileCounter() as counter:
        jax.jit(lambda x: x + 1).lower(np.float32(0)).compile()
    return counter.events > 0


@contextmanager
def no_compiles() -> Iterator[None]:
    """Lets nothing compile in this thread, padding and trimming included.

    Cached `jax.jit` calls, captured buckets, NumPy and transfers pass. It stands on
    `jax.no_tracing`, which stops a trace before it compiles; a `Lowered.compile()` needs no trace
    and is reported when it ends.

    Raises:
        UnexpectedCompileError: Something inside had to be traced or compiled. Calls of this
            package raise it at once; a bare JAX call raises JAX's own RuntimeError inside the
            block and this one on the way out.

    Example:
        >>> import jax, numpy as np
        >>> half = jax.jit(lambda x: x / 2).lower(np.ones(3, np.float32)).compile()
        >>> with no_compiles():
        ...     half(np.ones(3, np.float32)).shape
        (3,)
    """
    owner = threading.get_ident()

    def on_duration(event: str, duration_secs: float, **kwargs: object) -> None:
        if event == COMPILE_EVENT and threading.get_ident() == owner:
            raise UnexpectedCompileError(f"{kwargs.get('fun_name', 'a program')} {REFUSAL}")

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        with jax.no_tracing(True), tracing_refusals():
            yield
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)


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
        if event == CACHE_HIT_EVENT and heard is not None:
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
