"""Several processes that serve one address: started, ended together, begun anew when they crash."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from prometheus_client.multiprocess import mark_process_dead

logger = logging.getLogger("cudagraph_jax.server")

_POLL_S = 0.1
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_LONG_S = 300.0
"""One that lived so long does not crash each time that it begins."""

_FAILED = 1
"""The status of a worker that says itself why it cannot serve: another one could not, either."""


class ServerProcess:
    """One process, and its successors.

    Args:
        start: Starts one.
        folder: Where they write their metrics.
    """

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], folder: str) -> None:
        self._start, self._folder = start, folder
        self._wait_s = _FIRST_WAIT_S
        self._begins_at: float | None = None
        self.process, self._began_at = start(), time.monotonic()

    def look_after(self) -> int | None:
        """Begins one anew that crashed, a while later; the status of one that ended by itself."""
        status = self.process.poll()
        if status is None or status in (0, _FAILED):
            return status
        now = time.monotonic()
        if self._begins_at is None:
            logger.error("worker %d died with status %d", self.process.pid, status)
            if now > self._began_at + _LONG_S:
                self._wait_s = _FIRST_WAIT_S
            self._begins_at, self._wait_s = (
                now + self._wait_s,
                min(2 * self._wait_s, _LONGEST_WAIT_S),
            )
        if now >= self._begins_at:
            self.let_go()
            self._begins_at, self._began_at, self.process = None, now, self._start()
        return None

    def let_go(self) -> None:
        """Leaves nothing behind of one that ended."""
        with self.process:  # which waits, and closes the pipe
            pass
        # What was open there is not any more.
        mark_process_dead(self.process.pid, self._folder)  # type: ignore[no-untyped-call]

    def send(self, number: int) -> None:
        """Sends a signal, if anybody is there."""
        if self.process.poll() is None:
            self.process.send_signal(number)


def supervise(command: Sequence[str], *, workers: int, listener: socket.socket) -> int:
    """Serves by several processes until SIGTERM or SIGINT; the exit status.

    A worker ends with this process, however that ends: it reads the other end of its standard
    input. One that crashes is begun anew; one that fails with an error ends all. Call it in the
    main thread.

    Args:
        command: What each runs; the number of the listening file descriptor is appended.
        workers: How many.
        listener: What they accept connections from.

    Returns:
        0 if all ended as they were told, else 1.
    """
    told: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(listener)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cudagraph-jax-metrics-"))
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder}

        def start() -> subprocess.Popen[bytes]:
            number = listener.fileno()
            return subprocess.Popen(
                [*command, str(number)],
                pass_fds=(number,),
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process, which tells them
            )

        crew = [ServerProcess(start, folder) for _ in range(workers)]
        try:
            with _signals(told, crew):
                status = _watch(crew, told)
        finally:
            for worker in crew:
                worker.process.kill()  # none of those that ended
                worker.let_go()
        return status


@contextmanager
def _signals(told: list[int], crew: Sequence[ServerProcess]) -> Iterator[None]:
    """Passes on the signals that end the server."""

    def end(number: int, frame: object) -> None:
        told.append(number)
        for worker in crew:
            worker.send(number)

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _watch(crew: Sequence[ServerProcess], told: list[int]) -> int:
    while not told and all(worker.look_after() is None for worker in crew):
        time.sleep(_POLL_S)
    # Also one that was begun while the signal came; the others take it for the same signal.
    for worker in crew:
        worker.send(signal.SIGTERM)
    # One that had not begun yet ends by the signal itself, and has lost nothing.
    ended_well = [worker.process.wait() in (0, -signal.SIGTERM) for worker in crew]
    return 0 if told and all(ended_well) else 1


def end_with_parent() -> None:
    """Has a worker drain and end when the process of `supervise` is gone, however it went."""

    def wait() -> None:
        os.read(0, 1)  # of a pipe whose other end it holds, and never writes to
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="cudagraph-jax-parent", daemon=True).start()
