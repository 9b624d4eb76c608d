"""What a fork leaves behind: workers that are gone, and JAX that hangs."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from cudagraph_jax.errors import CUDAGraphError


class Inherited(Protocol):
    """State that other threads work on, and that a forked child has to put right."""

    def after_fork(self) -> None:
        """Called in the child, whose only thread is the one that forked."""


class _Process:
    """What is known of this process.

    Attributes:
        has_used_jax: Whether this package ran or compiled anything with JAX, here or in a parent.
        is_forked: Whether that was in a parent, so that JAX would wait for threads it lacks.
        inherited: Those of `put_right_in_child`.
    """

    def __init__(self) -> None:
        self.has_used_jax = False
        self.is_forked = False
        self.inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()

    def after_fork(self) -> None:
        """Makes a process of a new child, whose other threads are not there."""
        self.is_forked = self.has_used_jax
        for state in list(self.inherited):
            state.after_fork()


# A process forks as a whole, and JAX's threads serve all of it.
_process = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.after_fork)


def use_jax() -> None:
    """Called before anything runs or compiles, so that a forked child raises instead of hanging.

    Raises:
        CUDAGraphError: This process was forked from one that had used JAX.
    """
    if _process.is_forked:
        raise CUDAGraphError(
            "this process was forked from one that had used JAX, whose threads do not survive "
            'a fork: start workers with the "spawn" method'
        )
    _process.has_used_jax = True


def put_right_in_child(state: Inherited) -> None:
    """Calls `state.after_fork` in every forked child, for as long as `state` lives."""
    _process.inherited.add(state)
