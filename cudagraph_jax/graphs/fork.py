"""A forked child says so, instead of hanging on threads that only its parent has."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from cudagraph_jax.errors import CUDAGraphError


class ForkGuard:
    """Notices that this process was forked from one that had used JAX.

    Args:
        forget: Called in the child, so that calls which would be served at once are decided anew
            and meet `check`.

    Attributes:
        was_used: Whether anything was captured, in this process or its parent.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        self.was_used = False
        self._was_forked = False
        self._forget = weakref.WeakMethod(forget)
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _notice(this()))

    def check(self) -> None:
        """Raises in a child of a process that had used JAX.

        Raises:
            CUDAGraphError: This is such a process.
        """
        if self._was_forked:
            raise CUDAGraphError(
                "this process was forked from one that had used JAX, whose threads do not survive "
                'a fork: start workers with the "spawn" method'
            )

    def notice(self) -> None:
        """Called in a new child."""
        self._was_forked = self.was_used
        forget = self._forget()
        if self._was_forked and forget is not None:
            forget()


def _notice(guard: ForkGuard | None) -> None:
    if guard is not None:
        guard.notice()
