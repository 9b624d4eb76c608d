"""Jobs in other threads: a queue with one worker, and jobs beside their caller."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, TypeVar

from cudagraph_jax._base.changes import Changes, start_thread
from cudagraph_jax._base.fork import put_right_in_child
from cudagraph_jax._base.log import logger

MAX_QUEUED = 64
"""Jobs that may wait or run; one beyond that is not taken."""

Job = Callable[[], None]


class WaitingJob(NamedTuple):
    """A job that waits.

    Attributes:
        job: What is done.
        dropped: Told if it is not.
    """

    job: Job
    dropped: Job


class Worker(threading.Thread):
    """A thread that the interpreter waits for, but that is no reason for it to live.

    Attributes:
        is_wanted: Whether what it does is of any use still.
    """

    is_wanted: Callable[[], bool] = staticmethod(lambda: True)


def is_wanted() -> bool:
    """Whether what this thread does is wanted: not if its worker is closed or the process exits."""
    thread = threading.current_thread()
    return thread.is_wanted() if isinstance(thread, Worker) else True


class Background:
    """Runs jobs in one worker thread, each key queued once.

    The worker starts with a job and ends with the last one. When the interpreter exits, the job
    under way is finished and those that wait are dropped; it does not exit while any thread that
    is no daemon goes on, also after the main thread. A forked child begins with an empty queue.

    Args:
        name: What the thread is called.
        max_queued: Jobs that may wait or run at a time.
        thread: Makes the worker, from `target` and `name`.
    """

    def __init__(
        self,
        name: str,
        *,
        max_queued: int = MAX_QUEUED,
        thread: Callable[..., threading.Thread] = Worker,
    ) -> None:
        self._name = name
        self._max_queued = max_queued
        self._thread = thread
        self._closed = False
        self._lacks_thread = False
        self.after_fork()
        put_right_in_child(self)

    def __len__(self) -> int:
        return len(self._waiting) + (self._running is not None)

    def after_fork(self) -> None:
        """Begins with an empty queue and no worker; in a child, the parent has both."""
        self._changes = Changes()
        self._waiting: dict[Hashable, WaitingJob] = {}
        self._running: Hashable | None = None
        self._worker: threading.Thread | None = None

    def submit(self, key: Hashable, job: Job, *, dropped: Job = lambda: None) -> bool:
        """Queues `job` unless one of the same key waits or runs; whether one does now.

        `dropped` is called if it is dropped while it waits; not when the interpreter exits.
        """
        if key in self._waiting or key == self._running:
            return self._ensure_worker()
        if self._closed or len(self) >= self._max_queued:
            return False
        queued = WaitingJob(job, dropped)
        if self._waiting.setdefault(key, queued) is not queued:
            return self._ensure_worker()
        if self._closed or len(self) > self._max_queued:  # by another thread, in between
            return self._waiting.pop(key, None) is not queued
        return self._ensure_worker()

    def runs_here(self) -> bool:
        """Whether this is called from a job."""
        return threading.current_thread() is self._worker

    def accepts(self, key: Hashable) -> bool:
        """Whether a job of this key waits or runs, or may be queued."""
        known = key in self._waiting or key == self._running
        return known or not (self._closed or len(self) >= self._max_queued)

    def clear(self) -> None:
        """Drops what waits."""
        taken = [self._waiting.pop(key, None) for key in list(self._waiting)]
        waiting = [queued for queued in taken if queued is not None]
        self._changes.tell()
        with ExitStack() as told:
            # All of them, also where warnings are errors.
            for queued in reversed(waiting):
                told.callback(queued.dropped)

    def drain(self) -> None:
        """Waits until nothing waits or runs; not from a job, which would wait for itself."""
        if self.runs_here():
            return
        if self._waiting:
            self._ensure_worker()
        self._changes.wait_for(lambda: not self)

    def close(self, *, wait: bool = True) -> None:
        """Drops what waits, finishes what runs, and takes no more jobs.

        Args:
            wait: Whether to wait for what runs.
        """
        self._closed = True
        try:
            self.clear()
        finally:
            if wait:
                self.drain()

    def _claim(self, worker: threading.Thread) -> bool:
        """Makes `worker` the one that works, if there is none; whether there was none."""
        self._worker = worker if self._worker is None else self._worker
        return self._worker is worker

    def _ensure_worker(self) -> bool:
        """Starts a worker where there is none; whether there is one now.

        An interrupt may have left a job behind without one.
        """
        return self._worker is not None or self._start()

    def _start(self) -> bool:
        """Starts a worker, which claims its place itself; where that cannot be, drops what waits.

        Whoever comes in between, and waits for the jobs, finds none and starts one, too: of several
        one works.
        """
        # Not a daemon: a thread that is killed inside XLA takes the process down with it.
        worker = self._thread(target=self._work, name=self._name)
        if isinstance(worker, Worker):
            worker.is_wanted = lambda: not self._closed and process_goes_on()
        if not process_goes_on():
            self._give_up()
            return False
        if not start_thread(worker, failed=self._give_up):
            return self._worker is not None
        self._lacks_thread = False
        return True

    def _give_up(self, error: BaseException | None = None) -> None:
        """Drops what waits, for want of a worker."""
        if self._worker is not None:
            return
        self._waiting.clear()
        self._changes.tell()
        # At the interpreter's exit nobody misses it.
        at_exit = threading.current_thread() is threading.main_thread() and "shutdown" in str(error)
        if error is not None and not at_exit:
            if not self._lacks_thread:
                logger.warning("nothing runs in the background for now: %s", error)
            self._lacks_thread = True

    def _work(self) -> None:
        worker = threading.current_thread()
        if self._worker is not worker and not self._claim(worker):
            return
        try:
            while True:
                while (job := self._next()) is not None:
                    try:
                        job()
                    except BaseException:
                        # Nobody waits for the result; the request that queued it was served.
                        logger.exception("a job in the background failed")
                self._worker = None
                self._changes.tell()
                # Who queued a job before that has left it to this worker.
                if not self._waiting or not self._claim(worker):
                    return
        except BaseException:
            # A handler of the log that raises, say. Another worker takes the queue over.
            self._running = self._worker = None
            try:
                if self._waiting:
                    self._start()
            finally:
                self._changes.tell()
            raise

    def _next(self) -> Job | None:
        self._running = None
        if not process_goes_on():
            self._waiting.clear()
        for key in list(self._waiting):
            self._running = key  # before it leaves, so that it is always in one of the two
            if (queued := self._waiting.pop(key, None)) is not None:
                return queued.job
            self._running = None
        return None


def process_goes_on() -> bool:
    """Whether there is a thread, other than workers, that the interpreter waits for.

    It waits for all that are no daemons before it runs `atexit` functions or says that it is
    finalizing, so that this is how a worker learns that only workers are waited for.
    """
    main = threading.main_thread()
    # Before Python 3.13 an interrupt in the middle of `is_alive` ends the main thread for good, as
    # far as `threading` knows (python/cpython#89437): it does not ask for itself.
    return (
        threading.current_thread() is main
        or main.is_alive()
        or any(
            thread.is_alive() and not thread.daemon and not isinstance(thread, Worker)
            for thread in threading.enumerate()
        )
    )


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

    Nothing new begins once the block has ended, and what runs then is waited for half a second; the
    end of the process waits for all of it, so that a job has to end.

    Args:
        workers: How many jobs run at a time.
        name: What the threads are called.
    """
    slots, is_over = threading.Semaphore(workers), threading.Event()
    # Not by threads: a `join` that a signal ends takes the thread for ended (bpo-45274).
    ends: list[threading.Event] = []

    def work(job: Callable[[], None], end: threading.Event) -> None:
        try:
            with slots:
                if not is_over.is_set():
                    job()
        finally:
            end.set()

    def begin(job: Callable[[], None]) -> None:
        end = threading.Event()
        ends.append(end)
        try:
            threading.Thread(target=work, args=(job, end), name=name, daemon=True).start()
        except RuntimeError:
            end.set()
            raise

    try:
        yield begin
    finally:
        is_over.set()
        try:
            deadline = time.monotonic() + _AFTER_INTERRUPT_S
            for end in ends:
                end.wait(max(0.0, deadline - time.monotonic()))
        finally:  # a second signal may end that, too
            if not all(end.is_set() for end in ends):
                atexit.register(_outlast, ends)


def _leave(threads: Sequence[threading.Thread]) -> None:
    running = [thread for thread in threads if thread.is_alive()]
    if running:
        # One that is within XLA while Python finalizes takes the process down with it.
        atexit.register(_join, running, _AT_EXIT_S)


def _join(threads: Sequence[threading.Thread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))


def _outlast(ends: Sequence[threading.Event]) -> None:
    """Until all have come, whatever asks the process to end meanwhile: it does."""
    for end in ends:
        while not end.is_set():
            with suppress(SystemExit):
                end.wait()


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
