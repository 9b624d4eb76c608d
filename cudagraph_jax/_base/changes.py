"""Waiting until something has become so, without a lock, and threads that start as a whole.

Python runs a signal handler, a finalizer, or what raises KeyboardInterrupt between any two steps of
a thread, also with a lock in its hand: who waits for the lock then waits for a handler, which may
wait for them. So the state that threads share here is kept without locks. It is read and changed by
single operations of dictionaries, lists and attributes, which nobody cuts in two, and whoever finds
that it came second gives way. A handler may then call anything.
"""

from __future__ import annotations

import _thread
import itertools
import queue
import threading
from collections.abc import Callable


class Changes:
    """Tells those who wait that something has changed.

    `threading.Condition` and `threading.Event` have a lock, which a handler finds taken by the code
    that it interrupts, and which an interrupt leaves taken.
    """

    def __init__(self) -> None:
        self._waiting: dict[queue.SimpleQueue[None], None] = {}

    def wait_for(self, holds: Callable[[], object]) -> None:
        """Returns once `holds()` is true; it is asked again whenever `tell` is called."""
        told: queue.SimpleQueue[None] = queue.SimpleQueue()
        try:
            self._waiting[told] = None  # before it is asked, so that no change is missed
            while not holds():
                told.get()
        finally:
            self._waiting.pop(told, None)

    def tell(self) -> None:
        """Has everybody who waits look again; called after the change."""
        for told in list(self._waiting):
            told.put(None)


def counted(counter: itertools.count[int]) -> int:
    """How often `next` was called on a counter that began at 0; reading it changes nothing."""
    return int(repr(counter)[len("count(") : -1])


def start_thread(
    thread: threading.Thread, *, failed: Callable[[BaseException], None] = lambda error: None
) -> bool:
    """Starts `thread`, also where a signal interrupts that; whether it runs.

    `Thread.start` waits for the new thread on a condition. An interrupt there may leave its lock
    taken, and then the new thread waits for ever, and the process for it at its end. Signals
    interrupt the main thread alone, so that another one starts what the main thread asks for.

    Args:
        thread: The thread.
        failed: Called with the error where it cannot be started, also after an interrupt.
    """
    outcome: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def start() -> None:
        is_started = False
        try:
            thread.start()
            is_started = True
        except RuntimeError as error:
            # Memory; or Python 3.12.0 to 3.12.2 after the main thread (python/cpython#113964).
            failed(error)
        finally:
            outcome.put(is_started)

    if threading.current_thread() is not threading.main_thread():
        start()
        return outcome.get()
    try:
        _thread.start_new_thread(start, ())
    except RuntimeError as error:
        failed(error)
        return False
    return outcome.get()
