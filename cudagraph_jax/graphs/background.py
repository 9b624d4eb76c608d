"""Captures off the request path: a bounded queue and one worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

logger = logging.getLogger("cudagraph_jax")

MAX_QUEUED = 64
"""Captures that may wait or run; a request beyond that is served all the same, and asks again."""

Job = Callable[[], None]


class Background:
    """Runs jobs in one worker thread, each key queued once.

    The worker starts with a job and ends with the last one. When the interpreter exits, the job
    under way is finished and those that wait are dropped.

    Args:
        name: What the thread is called.
        max_queued: Jobs that may wait or run at a time.
    """

    def __init__(self, name: str, *, max_queued: int = MAX_QUEUED) -> None:
        self._name = name
        self._max_queued = max_queued
        self._changed = threading.Condition()
        self._waiting: dict[Hashable, Job] = {}
        self._running: Hashable | None = None
        self._worker: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting) + (self._running is not None)

    def submit(self, key: Hashable, job: Job) -> bool:
        """Queues `job` unless one of the same key waits or runs; whether one does now."""
        with self._changed:
            if key in self._waiting or key == self._running:
                return True
            if self._closed or len(self) >= self._max_queued:
                return False
            self._waiting[key] = job
            return self._worker is not None or self._start()

    def drain(self) -> None:
        """Waits until nothing waits or runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self)

    def close(self) -> None:
        """Drops what waits, finishes what runs, and takes no more jobs."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self.drain()

    def _start(self) -> bool:
        # Not a daemon: a thread that is killed inside XLA takes the process down with it.
        self._worker = threading.Thread(target=self._work, name=self._name)
        try:
            self._worker.start()
        except RuntimeError:
            self._worker = None
            self._waiting.clear()
            return False  # the interpreter is exiting
        return True

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except BaseException:
                # Nobody waits for the result; the request that queued the job was served. Also
                # SystemExit: a worker that is gone would leave its queue to nobody.
                logger.exception("a capture in the background failed")

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            if not threading.main_thread().is_alive():
                self._waiting.clear()
            if not self._waiting:
                self._worker = None
                self._changed.notify_all()
                return None
            self._running = next(iter(self._waiting))
            return self._waiting.pop(self._running)
