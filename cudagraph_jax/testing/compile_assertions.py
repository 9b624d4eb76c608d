"""Assertions on what JAX compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.xla.compiles import CompileCounter, compiles_are_reported


@contextmanager
def assert_compiles(n: int) -> Iterator[None]:
    """Fails unless JAX compiles exactly `n` programs in the block, in whichever thread.

    Cached calls, captured buckets and what is read from JAX's persistent cache are no compiles. An
    operation that runs outside of `jax.jit` is one where its shape is new.

    Raises:
        AssertionError: It compiled more or fewer; the message has the names of all.
        ConfigError: `n` is below 0, or this JAX does not report its compiles.

    Example:
        >>> import jax, numpy as np
        >>> @jax.jit
        ... def halved(x):
        ...     return x / 2
        >>> with assert_compiles(2):
        ...     for size in (1, 2, 1, 2):
        ...         _ = halved(np.ones(size, np.float32))
    """
    check_countable(n, are_reported=compiles_are_reported())
    with CompileCounter() as counter:
        yield
    if counter.compiles != n:
        listed = ", ".join(counter.names) or "nothing"
        raise AssertionError(f"{counter.compiles} programs were compiled, expected {n}: {listed}")


@contextmanager
def assert_no_compiles() -> Iterator[None]:
    """Fails if JAX compiles anything in the block, in whichever thread.

    `cudagraph_jax.no_compiles()` is for code: it stops the first compile of its own thread, with
    its traceback. This one lets all of them pass, and names them at the end.

    Raises:
        AssertionError: Something was compiled; the message has the names.
        ConfigError: This JAX does not report its compiles.
    """
    with assert_compiles(0):
        yield


def check_countable(n: int, *, are_reported: bool) -> None:
    """Raises where `n` compiles cannot be told from another number of them.

    Raises:
        ConfigError: `n` is below 0, or compiles are not reported, so that a count says nothing.
    """
    if n < 0:
        raise ConfigError(f"n={n} is below 0: a block compiles no program or more")
    if not are_reported:
        raise ConfigError(
            "this JAX does not report its compiles, so none can be counted: use no_compiles()"
        )
