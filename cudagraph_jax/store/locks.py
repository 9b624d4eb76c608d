"""Locks across processes, so that servers that start together compile each bucket once.

Needs the package filelock, `pip install 'cudagraph-jax[store]'`; without it no lock is ever had,
and each server compiles for itself. The system holds these locks (flock), so that those of a
killed process are free at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cudagraph_jax._base.log import logger
from cudagraph_jax.errors import ConfigError

LOCK = ".lock"

_POLL_S = 0.05


def checked_timeout(timeout_s: object, *, name: str = "timeout_s") -> float:
    """`timeout_s` as a number of seconds that ends.

    Raises:
        ConfigError: It is negative, infinite or no number.
    """
    if isinstance(timeout_s, int | float) and math.isfinite(timeout_s) and timeout_s >= 0:
        return float(timeout_s)
    raise ConfigError(f"{name}={timeout_s!r:.80} is no time to wait: give seconds, 0 or more")


@contextmanager
def held(
    path: Path,
    *,
    timeout_s: float,
    is_over: Callable[[], bool] = lambda: False,
    on_wait: Callable[[], object] = lambda: None,
) -> Iterator[bool]:
    """A lock, held inside the context.

    Args:
        path: Its file.
        timeout_s: How long to wait for another holder.
        is_over: Whether to wait no longer, asked every 50 ms.
        on_wait: Called once before the first wait.

    Yields:
        Whether it was had; not, after any error of the system.
    """
    with ExitStack() as stack:
        yield _acquire(stack, path, timeout_s, is_over, on_wait)


def is_exiting() -> bool:
    """Whether the interpreter exits, and waits for the threads that are no daemons."""
    return not threading.main_thread().is_alive()


def _acquire(
    stack: ExitStack,
    path: Path,
    timeout_s: float,
    is_over: Callable[[], bool],
    on_wait: Callable[[], object],
) -> bool:
    try:
        from filelock import FileLock, Timeout
    except (ImportError, OSError):  # not installed, or no file can be opened
        return False
    deadline, is_waiting = time.monotonic() + timeout_s, False
    try:
        lock = FileLock(str(path), mode=0o600)
        while True:
            try:
                lock.acquire(timeout=0, poll_interval=0)
            except Timeout:
                rest_s = deadline - time.monotonic()
                if rest_s <= 0 or is_over():
                    return False
                if not is_waiting:
                    is_waiting = True
                    on_wait()
                time.sleep(min(_POLL_S, rest_s))
            else:
                break
    except (OSError, NotImplementedError) as error:  # the second where a file system has no locks
        # What either writes is whole.
        logger.info("%s: no lock (%s); two servers may compile the same bucket", path, error)
        return False
    stack.callback(lock.release)
    return True
