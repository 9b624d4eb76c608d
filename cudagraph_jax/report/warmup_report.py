"""What a warm-up did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cudagraph_jax._base.html import escaped, styled, table_fragment
from cudagraph_jax._base.text import one_line, text_table
from cudagraph_jax.report.summary import Pairs, alerts, tiles
from cudagraph_jax.report.words import exact, seconds, things
from cudagraph_jax.shapes.ladder import Bucket

Status = Literal["captured", "loaded", "present", "failed"]

_HEADER = ("bucket", "status", "capture ms", "memory bytes", "error")
_MANY = 100


@dataclass(frozen=True, slots=True)
class BucketWarmup:
    """What became of one bucket.

    Attributes:
        bucket: Its sizes.
        status: `"captured"` now, `"loaded"` from the store, `"present"` before, or `"failed"`.
        capture_time_ms: Milliseconds to compile or load it; 0 if it was present or failed.
        memory_bytes: What it needs alone: what it keeps, and its temporary memory; None if the
            compiler does not say.
        error: Why it failed.
        temporary_bytes: The part of `memory_bytes` that a run gives back.
        closed_over_bytes: The part of it that are arrays which the function closes over.
    """

    bucket: Bucket
    status: Status
    capture_time_ms: float = 0.0
    memory_bytes: int | None = None
    error: str | None = None
    temporary_bytes: int = 0
    closed_over_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up did, bucket by bucket.

    Attributes:
        name: The function's name.
        buckets: One record for each bucket, in the order of their captures.
        total_ms: Milliseconds of the whole warm-up.
    """

    name: str
    buckets: tuple[BucketWarmup, ...]
    total_ms: float

    @property
    def captured(self) -> int:
        """How many buckets were compiled now."""
        return self._count("captured")

    @property
    def loaded(self) -> int:
        """How many buckets were loaded from the store."""
        return self._count("loaded")

    @property
    def failed(self) -> tuple[BucketWarmup, ...]:
        """The buckets that could not be captured or run."""
        return tuple(record for record in self.buckets if record.status == "failed")

    def __repr__(self) -> str:
        counts = Counter(record.status for record in self.buckets)
        shown = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        name = one_line(self.name)
        return f"WarmupReport({name}: {shown or 'no buckets'}, {self.total_ms:.0f} ms)"

    def __str__(self) -> str:
        failed = [one_line(f"FAILED {record.bucket}: {record.error}") for record in self.failed]
        table = text_table(_HEADER[:-1], [row[:-1] for row in _rows(self.buckets)])
        return "\n".join([repr(self), *failed, table]).rstrip()

    def _repr_html_(self) -> str:
        """The failures first."""
        order = sorted(self.buckets, key=lambda record: record.status != "failed")
        left_out = len(order) - _MANY
        note = f"<p>{things(left_out, 'more bucket')} not shown.</p>" if left_out > 0 else ""
        failed = things(len(self.failed), "bucket")
        return styled(
            f"<p><b>Warm-up of {escaped(self.name)}</b></p>",
            tiles(self._headline()),
            alerts([f"{failed} failed; calls of that size run eagerly."] if self.failed else []),
            table_fragment("Buckets", _HEADER, _rows(order[:_MANY])),
            note,
        )

    def _headline(self) -> Pairs:
        compile_ms = self._milliseconds("captured")
        kept = sum((record.memory_bytes or 0) - record.temporary_bytes for record in self.buckets)
        memory = kept + max((record.temporary_bytes for record in self.buckets), default=0)
        closed_over = sum(record.closed_over_bytes for record in self.buckets)
        return [
            ("captured", exact(self.captured)),
            *([("loaded", exact(self.loaded))] if self.loaded else []),
            ("present before", exact(self._count("present"))),
            ("failed", exact(len(self.failed))),
            ("in all", seconds(self.total_ms / 1e3)),
            ("of it compiling", seconds(compile_ms / 1e3)),
            *(
                [("of it loading", seconds(self._milliseconds("loaded") / 1e3))]
                if self.loaded
                else []
            ),
            ("memory bytes", exact(memory)),
            *([("of it closed over", exact(closed_over))] if closed_over else []),
        ]

    def _milliseconds(self, status: Status) -> float:
        return sum(record.capture_time_ms for record in self.buckets if record.status == status)

    def _count(self, status: Status) -> int:
        return sum(record.status == status for record in self.buckets)


def _rows(records: Sequence[BucketWarmup]) -> list[tuple[str, ...]]:
    return [
        (
            str(record.bucket),
            record.status,
            f"{record.capture_time_ms:,.0f}" if record.status in ("captured", "loaded") else "–",
            "" if record.memory_bytes is None else exact(record.memory_bytes),
            record.error or "",
        )
        for record in records
    ]
