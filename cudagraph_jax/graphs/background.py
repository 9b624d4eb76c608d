"""Captures off the request path: a bounded queue and one worker."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait

logger = logging.getLogger("cudagraph_jax")

MAX_QUEUED = 64
"""Captures that may wait; a request beyond that is served all the same, and asks again."""


class Background:
    """Runs jobs in one worker thread, each key queued once.

    The worker starts with the first job. When the interpreter exits, the job under way is
    finished and those that wait are dropped.

    Args:
        name: What the thread is called.
        max_queued: Jobs that may wait or run at a time.
    """

    def __init__(self, name: str, *, max_queued: int = MAX_QUEUED) -> None:
        self._name = name
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._queued: dict[Hashable, Future[None]] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._closed = False

    def __len__(self) -> int:
        return len(self._queued)

    def submit(self, key: Hashable, job: Callable[[], None]) -> bool:
        """Queues `job` unless one of the same key is queued; whether one is queued now."""
        with self._lock:
            if key in self._queued:
                return True
            if self._closed or len(self._queued) >= self._max_queued:
                return False
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix=self._name)
            try:
                future = self._executor.submit(self._run, job)
            except RuntimeError:
                return False  # the interpreter is exiting
            self._queued[key] = future
        future.add_done_callback(lambda done: self._forget(key))
        return True

    def drain(self) -> None:
        """Waits until nothing is queued."""
        while True:
            with self._lock:
                queued = list(self._queued.values())
            if not queued:
                return
            wait(queued)

    def close(self) -> None:
        """Drops what waits, finishes what runs, and takes no more jobs."""
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(cancel_futures=True)

    def _forget(self, key: Hashable) -> None:
        with self._lock:
            self._queued.pop(key, None)

    @staticmethod
    def _run(job: Callable[[], None]) -> None:
        # The pool works its queue off before it lets the interpreter exit.
        if not threading.main_thread().is_alive():
            return
        try:
            job()
        except Exception:
            # Nobody waits for the result; the request that queued the job was served.
            logger.exception("a capture in the background failed")
