"""The package's logger: captures and evictions at INFO, decisions at DEBUG. Its server has others.

It has no handler of its own, not even `logging.NullHandler`: where the application configures
nothing, Python prints what went wrong in a worker thread to stderr, and drops the rest.
"""

from __future__ import annotations

import logging
from contextlib import suppress

logger = logging.getLogger("cudagraph_jax")


def log_in_worker(level: int, message: str, *args: object, is_error: bool = False) -> None:
    """Logs from a thread that others wait for, whatever the application's handlers raise.

    Args:
        level: As for `logging`, and so are the next two.
        message: What happened.
        *args: Of the message.
        is_error: Whether the exception that is being handled is shown.
    """
    with suppress(BaseException):
        logger.log(level, message, *args, exc_info=is_error)
