"""Captures that failed: remembered, reported once, not tried again."""

from __future__ import annotations

import threading
import warnings

from cudagraph_jax.errors import CaptureError, CUDAGraphWarning
from cudagraph_jax.graphs.variant import Variant
from cudagraph_jax.shapes.ladder import Bucket


class Failures:
    """The failed captures of one manager."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: dict[tuple[Bucket, Variant], CaptureError] = {}
        self._reported: set[tuple[object, str]] = set()

    def __len__(self) -> int:
        return len(self._errors)

    def get(self, bucket: Bucket, variant: Variant) -> CaptureError | None:
        """Why this bucket could not be captured; None if it was not tried or did not fail."""
        return self._errors.get((bucket, variant))

    def clear(self) -> None:
        """Forgets all, so that every bucket is tried again."""
        with self._lock:
            self._errors.clear()
            self._reported.clear()

    def remember(self, bucket: Bucket, variant: Variant, error: CaptureError) -> None:
        """Keeps `error`, and warns of it the first time that this function fails like this."""
        cause = (variant.function, f"{error.stage}:{type(error.__cause__).__name__}")
        with self._lock:
            self._errors[bucket, variant] = error
            if cause in self._reported:
                return
            self._reported.add(cause)
        warnings.warn(
            f"{variant.name} runs eagerly at {bucket}: {error}. It is not tried again for this "
            "bucket; reset() forgets that",
            CUDAGraphWarning,
            stacklevel=2,
        )
