"""Jobs beside their caller, who can be interrupted, may look on, and may leave them behind."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from cudagraph_jax._base.worker import is_wanted

T = TypeVar("T")

GRACE_S = 3.0
"""How long a job that nobody wants any more is waited for, before it is left behind."""

_AT_EXIT_S = 1.0
_AFTER_INTERRUPT_S = 0.5
_POLL_S = 0.05


class LeftBehindError(Exception):
    """A job goes on, but nobody waits for it any more."""


def run_aside(
    job: Callable[[], T],
    *,
    name: str,
    looks_on: Callable[[float], None] = lambda seconds: None,
    clock: Callable[[], float] = time.monotonic,
    thread: Callable[..., threading.Thread] = threading.Thread,
) -> T:
    """What `job` gives, run in a thread that nothing has to wait for.

    Python handles signals in its main thread alone, and not while that is inside XLA, where an
    endless loop would make a process that neither Ctrl-C nor its own end can stop.

    Args:
        job: What is done; it must not depend on the caller's thread.
        name: What the thread is called.
        looks_on: Called by the caller every 50 ms with the seconds since the start.
        clock: Seconds.
        thread: Makes the thread.

    Raises:
        LeftBehindError: The process exits, or the worker that asked for this is closed, and the
            job did not end.
    """
    future: Future[T] = Future()
    # A daemon: the interpreter must be able to exit although it runs.
    beside = thread(target=_settle, args=(job, future), name=name, daemon=True)
    try:
        try:
            beside.start()
        except RuntimeError as error:  # no memory for threads, or the interpreter exits
            if not is_wanted():
                raise LeftBehindError from error
            return job()
        _wait_for(future, looks_on, clock)
        return future.result()
    finally:
        if not future.done():
            _leave([beside])
        del future  # with an error, whose traceback leads back to this frame


@contextmanager
def daemons(workers: int, *, name: str) -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that has a job done in a thread, at the end of which nobody need wait.

    Nothing new begins once the block has ended, and what runs then is waited for half a second.

    Args:
        workers: How many jobs run at a time.
        name: What the threads are called.
    """
    slots, is_over = threading.Semaphore(workers), threading.Event()
    threads: list[threading.Thread] = []

    def work(job: Callable[[], None]) -> None:
        with slots:
            if not is_over.is_set():
                job()

    def begin(job: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=work, args=(job,), name=name, daemon=True))
        threads[-1].start()

    try:
        yield begin
    finally:
        is_over.set()
        _join(threads, _AFTER_INTERRUPT_S)
        _leave(threads)


def _leave(threads: Sequence[threading.Thread]) -> None:
    running = [thread for thread in threads if thread.is_alive()]
    if running:
        # One that ends within XLA while Python finalizes takes the process down with it.
        atexit.register(_join, running, _AT_EXIT_S)


def _join(threads: Sequence[threading.Thread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))


def _settle(job: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)


def _wait_for(
    future: Future[T],
    looks_on: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    start, unwanted_since = clock(), None
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    while not done.wait(_POLL_S):
        now = clock()
        looks_on(now - start)
        if is_wanted():
            continue
        unwanted_since = now if unwanted_since is None else unwanted_since
        if now - unwanted_since >= GRACE_S:
            raise LeftBehindError
