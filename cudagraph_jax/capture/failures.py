"""Captures that failed: remembered, reported once, tried again after a growing pause."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from cudagraph_jax.errors import CaptureError, CUDAGraphWarning, PaddingLeakError
from cudagraph_jax.program.call import Variant
from cudagraph_jax.program.function_ref import FunctionRef
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.stages import is_of_traced

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0
_FINAL = ("trace", "lower", "check", "budget")

MAX_REMEMBERED = 1024
"""Failures kept; beyond that the oldest is forgotten, and may be tried again."""


class Failure(NamedTuple):
    """What is known of a bucket that could not be captured.

    Attributes:
        error: Why.
        attempts: How often it was tried.
        retry_at: When it may be tried again, by the clock; infinity: never.
    """

    error: CaptureError
    attempts: int
    retry_at: float


class Failures:
    """The failed captures of one manager.

    A function that cannot be traced or lowered is not tried again for that bucket, nor is a bucket
    that needs more than the whole memory budget. What failed to compile or to run may work later,
    when there is memory again: the pause before the next try doubles each time, so that a failing
    bucket cannot eat the server.

    Args:
        clock: Seconds on any scale that grows.

    Attributes:
        remembered: What failed, by bucket and variant; not to be changed.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.remembered: dict[tuple[Bucket, Variant], Failure] = {}
        self._reported: dict[tuple[FunctionRef, str], object] = {}

    def __len__(self) -> int:
        return len(self.remembered)

    def snapshot(self) -> list[tuple[Bucket, Variant, CaptureError]]:
        """What is remembered now, the oldest first."""
        return [(*key, failure.error) for key, failure in list(self.remembered.items())]

    def get(self, bucket: Bucket, variant: Variant) -> CaptureError | None:
        """Why this bucket is not tried now; None if it may be."""
        failure = self.remembered.get((bucket, variant))
        if failure is None or self._clock() >= failure.retry_at:
            return None
        return failure.error

    def forget(self, bucket: Bucket, variant: Variant) -> None:
        """Forgets a bucket, because it was captured."""
        if self.remembered:
            self.remembered.pop((bucket, variant), None)

    def forget_function(self, function: FunctionRef) -> None:
        """Forgets a function, because it is gone."""
        for bucket, variant in list(self.remembered):
            if variant.function == function:
                self.remembered.pop((bucket, variant), None)
        for cause in list(self._reported):
            if cause[0] == function:
                self._reported.pop(cause, None)

    def clear(self) -> None:
        """Forgets all, so that every bucket is tried again."""
        self.remembered.clear()
        self._reported.clear()

    def remember(self, bucket: Bucket, variant: Variant, error: CaptureError) -> None:
        """Keeps `error`, and warns of it the first time that this function fails like this."""
        if self.note(bucket, variant, error):
            self.warn(bucket, variant, error)

    def note(self, bucket: Bucket, variant: Variant, error: CaptureError) -> bool:
        """Keeps `error`; whether it is new, and not that of the same attempt."""
        if variant.function.is_gone or is_of_traced(error):
            return False  # nobody will call it again, or the next call closes over another value
        # Others go on behind it, or end their own sentence.
        text = str(error).rstrip(". ")
        before = self.remembered.get((bucket, variant))
        if (
            before is not None
            and (before.error.stage, str(before.error)) == (error.stage, text)
            and self._clock() < before.retry_at
        ):
            return False  # from somebody who waited for the same attempt
        attempts = 1 if before is None else before.attempts + 1
        pause = min(FIRST_PAUSE_S * 2 ** (attempts - 1), LONGEST_PAUSE_S)
        retry_at = math.inf if is_final(error) else self._clock() + pause
        # Without its traceback, whose frames would keep the caller's arrays alive.
        kept = CaptureError(text, stage=error.stage)
        if isinstance(error, PaddingLeakError):
            kept = PaddingLeakError(text)
        self.remembered.pop((bucket, variant), None)
        self.remembered[bucket, variant] = Failure(kept, attempts, retry_at)
        _shorten(self.remembered)
        return True

    def warn(self, bucket: Bucket, variant: Variant, error: CaptureError) -> None:
        """Warns of `error` the first time that this function fails like this."""
        cause = (variant.function, f"{error.stage}:{type(error.__cause__).__name__}")
        if isinstance(error, PaddingLeakError):
            return  # a leak is raised, not warned of
        own = object()
        if self._reported.setdefault(cause, own) is not own:
            return
        _shorten(self._reported)
        again = "It is tried again later, after a pause that doubles each time"
        if is_final(error):
            again = "It is not tried again for this bucket; reset() forgets that"
        warnings.warn(
            f"{variant.name} runs eagerly at {bucket}: {str(error).rstrip('. ')}. {again}",
            CUDAGraphWarning,
            stacklevel=3,
        )


def is_final(error: CaptureError) -> bool:
    """Whether trying again would be for nothing."""
    return error.stage in _FINAL


def _shorten(known: dict[Any, Any]) -> None:
    for key in list(known)[: max(0, len(known) - MAX_REMEMBERED)]:
        known.pop(key, None)
