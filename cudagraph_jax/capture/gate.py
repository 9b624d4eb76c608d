"""The mode of a manager, and who is inside a capture while it changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cudagraph_jax._base.fork import put_right_in_child
from cudagraph_jax.modes import CUDAGraphMode


class CaptureGate:
    """Admits captures while the mode is CAPTURE, and can wait for those it has admitted.

    Args:
        mode: The mode to begin with.
    """

    def __init__(self, mode: CUDAGraphMode) -> None:
        self._mode = mode
        self.after_fork()
        put_right_in_child(self)

    def after_fork(self) -> None:
        """Begins with nobody inside; in a child, that is where they are."""
        # Taken by `with`, which an interrupt cannot cut in two, unlike that of a Condition.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._inside: dict[object, int] = {}
        self._settling: set[int] = set()

    @property
    def mode(self) -> CUDAGraphMode:
        """The most that may be done; setting it is effective for the next admission."""
        return self._mode

    @mode.setter
    def mode(self, mode: CUDAGraphMode) -> None:
        with self._lock:
            self._mode = mode

    @contextmanager
    def admission(self) -> Iterator[bool]:
        """Whether the block may capture; `settle` waits for its end if so."""
        ticket, thread = object(), threading.get_ident()
        try:
            with self._lock:
                admitted = self._mode is CUDAGraphMode.CAPTURE
                if admitted:
                    self._inside[ticket] = thread
            yield admitted
        finally:
            try:
                self._leave(ticket, thread)
            except BaseException:  # the second of two interrupts
                self._leave(ticket, thread)
                raise

    @property
    def is_inside(self) -> bool:
        """Whether this thread is inside."""
        return threading.get_ident() in self._inside.values()

    def _leave(self, ticket: object, thread: int) -> None:
        with self._lock:
            self._inside.pop(ticket, None)
            if thread not in self._inside.values():
                self._settling.discard(thread)
            self._changed.notify_all()

    def settle(self, *, is_waited_for: bool = False) -> None:
        """Waits until no other thread is inside.

        From inside it does not wait for those that have called this from inside themselves, which
        would be for ever.

        Args:
            is_waited_for: Whether such threads may wait for the caller, as for a worker.
        """
        thread = threading.get_ident()
        with self._lock:
            if thread in self._inside.values():
                self._settling.add(thread)
                self._changed.notify_all()
            elif not is_waited_for:
                self._changed.wait_for(lambda: not self._inside)
                return
            self._changed.wait_for(lambda: self._settling.issuperset(self._inside.values()))
