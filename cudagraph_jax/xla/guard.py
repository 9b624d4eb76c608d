"""`no_compiles()`: proof that a piece of code compiles nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.monitoring

from cudagraph_jax.errors import UnexpectedCompileError
from cudagraph_jax.xla.compiles import COMPILE_EVENT


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
            raise UnexpectedCompileError(f"{kwargs.get('fun_name', 'a program')} {_COMPILED}")

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        with jax.no_tracing(True), tracing_refusals():
            yield
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)


@contextmanager
def tracing_refusals() -> Iterator[None]:
    """Raises JAX's refusal to trace inside `no_compiles()` as an `UnexpectedCompileError`."""
    try:
        yield
    except UnexpectedCompileError:
        raise
    except RuntimeError as error:
        # JAX has no class of its own for this; the option's name is in every such message.
        if "no_tracing" not in str(error):
            raise
        raise UnexpectedCompileError(f"a function {_COMPILED} ({error})") from error


_COMPILED = (
    "had to be compiled inside no_compiles(): warm the bucket up first, keep sizes inside the "
    'limits, and pad and trim in NumPy (unpad="host")'
)
