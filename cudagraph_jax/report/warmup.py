"""What a warm-up did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.tables import html_table, text_table

Status = Literal["captured", "present", "failed"]

_HEADER = ("bucket", "status", "capture ms", "memory bytes", "error")


@dataclass(frozen=True, slots=True)
class BucketWarmup:
    """What became of one bucket.

    Attributes:
        bucket: Its sizes.
        status: `"captured"` now, `"present"` before, or `"failed"`.
        capture_time_ms: Milliseconds to compile it now; 0 if it was present or failed.
        memory_bytes: Code and temporary memory as the compiler reports it; None if it does not.
        error: Why it failed.
    """

    bucket: Bucket
    status: Status
    capture_time_ms: float = 0.0
    memory_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up did, bucket by bucket.

    Attributes:
        name: The function's name.
        buckets: One record for each bucket, the largest first.
        total_ms: Milliseconds of the whole warm-up.
    """

    name: str
    buckets: tuple[BucketWarmup, ...]
    total_ms: float

    @property
    def captured(self) -> int:
        """How many buckets were captured now."""
        return self._count("captured")

    @property
    def failed(self) -> tuple[BucketWarmup, ...]:
        """The buckets that could not be captured or run."""
        return tuple(record for record in self.buckets if record.status == "failed")

    def __repr__(self) -> str:
        counts = Counter(record.status for record in self.buckets)
        shown = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        return f"WarmupReport({self.name}: {shown or 'no buckets'}, {self.total_ms:.0f} ms)"

    def __str__(self) -> str:
        return f"{self!r}\n{text_table(_HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(repr(self), _HEADER, self._rows())

    def _count(self, status: Status) -> int:
        return sum(record.status == status for record in self.buckets)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                str(record.bucket),
                record.status,
                f"{record.capture_time_ms:.0f}",
                "" if record.memory_bytes is None else f"{record.memory_bytes:,}",
                record.error or "",
            )
            for record in self.buckets
        ]
