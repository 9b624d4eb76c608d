"""Warm-up: every bucket captured first, then run, so that no recorded graph is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cudagraph_jax._base.lru import Made
from cudagraph_jax.errors import CaptureError, PaddingLeakError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.warm_runs import run_idle
from cudagraph_jax.report.progress import Progress
from cudagraph_jax.report.warmup_report import BucketWarmup, Status, WarmupReport
from cudagraph_jax.shapes.ladder import Bucket

Capture = Callable[[Bucket], Made[CUDAGraphEntry]]
Failed = Callable[[Bucket, CaptureError], None]


def warm_up(
    name: str,
    buckets: Sequence[Bucket],
    capture: Capture,
    *,
    iterations: int,
    leaves: Sequence[object],
    failed: Failed,
    broken: Callable[[CUDAGraphEntry, CaptureError], None],
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupReport:
    """Captures `buckets` in their order, and only then runs each of them.

    On a GPU every new command buffer throws away those that are recorded (FACTS.md, "Command
    buffers"), so that running between captures would be for nothing.

    Args:
        name: The function's name.
        buckets: What to capture.
        capture: Gives the entry of a bucket.
        iterations: Runs of each entry.
        leaves: The leaves of an example call; what is passed through is taken from them.
        failed: Told of a bucket that could not be captured or run.
        broken: Told of an entry that was loaded and does not run, before it is captured.
        progress: Told of every step.
        clock: Seconds.

    Raises:
        PaddingLeakError: In `debug_mode` the padding of a bucket changes its real rows.
    """
    start = clock()
    records: dict[Bucket, BucketWarmup] = {}
    entries: list[CUDAGraphEntry] = []
    with progress.over(len(buckets), f"capturing {name}") as step:
        for bucket in buckets:
            try:
                made = capture(bucket)
            except PaddingLeakError:
                raise
            except CaptureError as error:
                records[bucket] = BucketWarmup(bucket, "failed", error=str(error))
                failed(bucket, error)
            else:
                entries.append(made.value)
                records[bucket] = _record(made)
            step(bucket)
    with progress.over(len(entries), f"warming up {name}") as step:
        for entry in entries:
            try:
                try:
                    run_idle(entry, iterations, leaves=leaves)
                except CaptureError as error:
                    if not entry.is_loaded:
                        raise
                    broken(entry, error)
                    made = capture(entry.bucket)
                    records[entry.bucket] = _record(made)
                    run_idle(made.value, iterations, leaves=leaves)
            except CaptureError as error:
                records[entry.bucket] = BucketWarmup(entry.bucket, "failed", error=str(error))
                failed(entry.bucket, error)
            step(entry.bucket)
    return WarmupReport(name, tuple(records.values()), (clock() - start) * 1e3)


def _record(made: Made[CUDAGraphEntry]) -> BucketWarmup:
    entry = made.value
    how: Status = "loaded" if entry.is_loaded else "captured"
    return BucketWarmup(
        entry.bucket,
        how if made.is_new else "present",
        capture_time_ms=entry.capture_time_ms if made.is_new else 0.0,
        memory_bytes=entry.memory_bytes,
    )
