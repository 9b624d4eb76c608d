"""Warm-up: every bucket captured first, then run, so that no recorded graph is lost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import jax

from cudagraph_jax._base.lru import CacheItem
from cudagraph_jax._base.text import error_text
from cudagraph_jax.capture.budget import Budget, check_device
from cudagraph_jax.capture.capturer import Capturer, is_stale
from cudagraph_jax.capture.peers import CAPTURES_TAKE, PEERS
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import (
    CaptureError,
    ConfigError,
    CUDAGraphWarning,
    PaddingLeakError,
    SealedError,
)
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.pads import refuse_parameters_elsewhere
from cudagraph_jax.graphs.warm_runs import run_idle
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.call import Call, spans_processes
from cudagraph_jax.program.eager import run_eagerly
from cudagraph_jax.program.program import Program, request_for
from cudagraph_jax.report.progress import Progress
from cudagraph_jax.report.warmup_report import BucketWarmup, Status, WarmupReport
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.stages import is_of_traced

Capture = Callable[[Bucket], CacheItem[CUDAGraphEntry]]
Failed = Callable[[Bucket, CaptureError], None]


def warm_up(
    name: str,
    buckets: Sequence[Bucket],
    capture: Capture,
    *,
    iterations: int,
    call: Call,
    failed: Failed,
    broken: Callable[[CUDAGraphEntry, CaptureError], None],
    progress: Progress,
    timeout_s: float = CAPTURES_TAKE * 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupReport:
    """Captures `buckets` in their order, and only then runs each of them.

    On a GPU every new command buffer throws away those that are recorded (docs/xla.md, "Command
    buffers"), so that running between captures would be for nothing.

    Args:
        name: The function's name.
        buckets: What to capture.
        capture: Gives the entry of a bucket.
        iterations: Runs of each entry.
        call: An example call; the entries are run on its rows.
        failed: Told of a bucket that could not be captured or run.
        broken: Told of an entry that does not run, before another one takes its place.
        progress: Told of every step.
        timeout_s: How long a run may take that several processes share.
        clock: Seconds.

    Raises:
        DistributedError: A run that several processes share failed on one of them alone.
        PaddingLeakError: In `debug_mode` the padding of a bucket changes its real rows.
    """
    start = clock()
    records: dict[Bucket, BucketWarmup] = {}

    def attempt(
        bucket: Bucket, make: Callable[[], CacheItem[CUDAGraphEntry] | None]
    ) -> CUDAGraphEntry | None:
        try:
            made = make()
        except PaddingLeakError:
            raise
        except CaptureError as error:
            records[bucket] = BucketWarmup(bucket, "failed", error=str(error))
            failed(bucket, error)
            return None
        if made is None:
            return None
        records[bucket] = _record(made)
        return made.value

    with progress.over(len(buckets), f"capturing {name}", phase="compile") as step:
        entries = []
        for bucket in buckets:
            if (entry := attempt(bucket, partial(capture, bucket))) is not None:
                entries.append(entry)
            step(bucket)
    with progress.over(len(entries), f"warming up {name}", phase="run") as step:

        def tell(entry: CUDAGraphEntry, seconds: float) -> None:
            step.note(entry.bucket, f"for {seconds:.0f} s so far")

        def run(entry: CUDAGraphEntry) -> None:
            once = partial(run_idle, entry, iterations, call=call, tell=tell, clock=clock)
            PEERS.run_together(entry, once, timeout_s=timeout_s)

        for entry in entries:
            attempt(entry.bucket, partial(_run_or_compile, entry, run, capture, broken))
            step(entry.bucket)
    return WarmupReport(name, tuple(records.values()), (clock() - start) * 1e3)


def _run_or_compile(
    entry: CUDAGraphEntry,
    run: Callable[[CUDAGraphEntry], None],
    capture: Capture,
    broken: Callable[[CUDAGraphEntry, CaptureError], None],
) -> CacheItem[CUDAGraphEntry] | None:
    """Runs an entry; what takes the place of one that was loaded and does not run, else None."""
    try:
        run(entry)
        return None
    except CaptureError as error:
        broken(entry, error)
        if not entry.is_loaded:
            raise
    made = capture(entry.bucket)
    return _run_or_compile(made.value, run, capture, broken) or made


def _record(made: CacheItem[CUDAGraphEntry]) -> BucketWarmup:
    entry = made.value
    how: Status = "loaded" if entry.is_loaded else "captured"
    return BucketWarmup(
        entry.bucket,
        how if made.is_new else "present",
        capture_time_ms=entry.capture_time_ms if made.is_new else 0.0,
        memory_bytes=entry.memory_bytes,
        temporary_bytes=entry.memory.temporary_bytes if entry.memory else 0,
        closed_over_bytes=entry.closed_over_bytes,
    )


def warm_grid(
    capturer: Capturer, call: Call, *, progress: Progress, workers: int = 1
) -> WarmupReport:
    """Captures and runs every bucket of the grid for calls like `call`.

    A switched off manager has nothing to warm up: the report is empty. While `jax.disable_jit` is
    on nothing is compiled, since every call runs the plain function: all buckets are `"failed"`.

    Args:
        capturer: Whose grid.
        call: An example call.
        progress: Told of every step.
        workers: How many buckets XLA compiles at a time, at most.

    Raises:
        ConfigError: The grid does not fit into `max_graphs` or the memory budget; said before the
            first bucket over it is compiled, as far as the ones before tell what it needs. Or a
            bucket needs more to run than is free of its device, or none of them has few enough
            elements at a length that is not padded, or that length is outside the limits, or a mesh
            does not divide a size.
        SealedError: The mode does not allow captures.
        InputShapeError: An output that must be trimmed cannot be.
        CaptureError: No bucket can be traced, and neither does the plain function take the example;
            or it closes over a traced value, so that a call is the plain function's.
        DistributedError: It spans processes that do not agree on it.
    """
    config, mode = capturer.registry.config, capturer.gate.mode
    buckets = config.grid(call.carried, call.sizes)
    facts = {
        "grid": " ".join(map(str, buckets)),
        "mode": mode.name,
        "disable_jit": str(jax.config.jax_disable_jit),  # type: ignore[attr-defined]
    }
    with PEERS.agreeing_on_warmup(call, config, facts):
        if mode is CUDAGraphMode.DISABLED:
            return WarmupReport(call.target.name, (), 0.0)
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # not in JAX's stubs
            return _without_jit(config, call)
        return capturer.gate.within(partial(_warm, capturer, call, progress, workers))


def _warm(
    capturer: Capturer, call: Call, progress: Progress, workers: int, is_admitted: bool
) -> WarmupReport:
    if not is_admitted:
        raise sealed_error(capturer.gate.mode)
    refuse_parameters_elsewhere(call)
    multiples = capturer.program_of(call).multiples
    capturer.registry.require(call.variant.function, multiples)
    while True:
        config = capturer.registry.config
        report = _warm_grid(capturer, call, progress, workers)
        if capturer.registry.config == config:
            return report
        # There is another grid by now.
        for entry in capturer.registry.entries():
            if is_stale(entry.program, entry.bucket, config, capturer.registry.config):
                capturer.registry.discard(entry.bucket, entry.variant)


def _without_jit(config: CUDAGraphConfig, call: Call) -> WarmupReport:
    why = "jax.disable_jit is on, so every call runs the plain function: leave it off to warm up"
    warnings.warn(f"{call.target.name} is not warmed up: {why}", CUDAGraphWarning, stacklevel=4)
    buckets = config.grid(call.carried, call.sizes)
    failed = tuple(BucketWarmup(bucket, "failed", error=why) for bucket in buckets)
    return WarmupReport(call.target.name, failed, 0.0)


def _warm_grid(capturer: Capturer, call: Call, progress: Progress, workers: int) -> WarmupReport:
    target = call.target
    registry, config = capturer.registry, capturer.registry.config
    buckets = _grid(config, call)
    program = capturer.program_of(call)
    budget = Budget(registry, call.variant, buckets)
    largest = max(buckets, key=lambda bucket: bucket.elements)
    check_device(program, largest, capturer.free_bytes)
    captured: set[CUDAGraphEntry] = set()

    def capture(bucket: Bucket) -> CacheItem[CUDAGraphEntry]:
        budget.check(bucket)
        begin_from(bucket)
        try:
            made = capturer.capture(call, bucket, in_warmup=True)
        except CaptureError as error:
            budget.refuse(error)
            raise
        budget.add(made.value)
        check_device(program, bucket, capturer.free_bytes, memory=made.value.memory)
        captured.add(made.value)
        return made

    # What a store says is in use may be something else on each process, and that a function spreads
    # its arrays over several is known when it is compiled.
    hot: Mapping[str, int] = {}
    if registry.shelf is not None and jax.process_count() == 1:
        hot = registry.shelf.hot(target.name)
    order = _hottest_first(hot, buckets)
    with (
        _loading_ahead(registry, program, order),
        _compiling_ahead(registry, program, order, budget, workers) as begin_from,
        _remembering(capturer, call, order) as failures,
    ):
        report = warm_up(
            target.name,
            order,
            capture,
            iterations=config.warmup_iterations,
            call=call,
            failed=failures.__setitem__,
            broken=registry.discard_broken,
            progress=progress,
            timeout_s=CAPTURES_TAKE * config.process_timeout_s,
        )
    capturer.end_warmup(captured if report.captured or report.loaded else None)
    return report


@contextmanager
def _remembering(
    capturer: Capturer, call: Call, buckets: Sequence[Bucket]
) -> Iterator[dict[Bucket, CaptureError]]:
    """A dictionary for what fails in the block, at the end of which all of it is told.

    Where no bucket can be traced it may be the function itself that has a mistake. That is raised
    as it would be without this package, and nothing is remembered: the next one may be without.
    """
    failures: dict[Bucket, CaptureError] = {}
    try:
        yield failures
        traced = next(filter(is_of_traced, failures.values()), None)
        if traced is not None:
            raise traced
        are_traces = all(error.stage == "trace" for error in failures.values())
        if are_traces and len(failures) == len(buckets) and (mistake := _mistake_of(call)):
            failures.clear()
            raise CaptureError(
                f"{call.target.name} itself fails on the example of the warm-up: "
                f"{type(mistake).__name__}: {error_text(mistake)}",
                stage="trace",
            ) from mistake
    finally:
        for bucket, error in failures.items():
            capturer.failures.remember(bucket, call.variant, error)


def _mistake_of(call: Call) -> Exception | None:
    """What the plain function raises of `call`; None where that has shapes in place of arrays."""
    is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in call.leaves)
    if is_abstract or spans_processes(call.variant.leaves):
        return None
    try:
        run_eagerly(call)
    except Exception as error:
        return error
    return None


def _grid(config: CUDAGraphConfig, call: Call) -> tuple[Bucket, ...]:
    buckets, seq_len = config.grid(call.carried, call.sizes), call.sizes.seq_len
    is_alone = config.capture_seq_lens is None and "seq" in call.carried
    if is_alone and not 1 <= seq_len <= config.max_seq_len:
        raise ConfigError(
            f"the warm-up of {call.target.name} has an example of seq_len={seq_len}, which without "
            "capture_seq_lens is the one length that it captures, and calls of it are outside the "
            f"limits, 1 to {config.max_seq_len}: give another example, or capture_seq_lens"
        )
    if not buckets:
        raise ConfigError(
            f"{call.target.name} at {call.sizes} has no bucket within "
            f"max_bucket_elements={config.max_bucket_elements}: raise it, or warm up with a "
            "shorter example"
        )
    return buckets


def _hottest_first(hot: Mapping[str, int], buckets: Sequence[Bucket]) -> list[Bucket]:
    """The order of a warm-up: by how often a store says they were replayed, then the largest."""
    return sorted(
        buckets, key=lambda bucket: (hot.get(str(bucket), 0), bucket.elements), reverse=True
    )


def _loading_ahead(
    registry: CUDAGraphRegistry, program: Program, order: Sequence[Bucket]
) -> AbstractContextManager[None]:
    """Has the store's executables loaded by several threads while they are captured in order."""
    if registry.shelf is None:
        return nullcontext()
    absent = [bucket for bucket in order if registry.find(bucket, program.variant) is None]
    return registry.shelf.loading_ahead(
        request_for(program, bucket, config=registry.config, is_stored=True) for bucket in absent
    )


@contextmanager
def _compiling_ahead(
    registry: CUDAGraphRegistry,
    program: Program,
    order: Sequence[Bucket],
    budget: Budget,
    workers: int,
) -> Iterator[Callable[[Bucket], None]]:
    """A function that has a bucket compiled and, in threads, those that come next."""
    places = {bucket: place for place, bucket in enumerate(order)}
    with registry.compiling_ahead(workers) as begin:

        def begin_from(bucket: Bucket) -> None:
            first = places[bucket]
            coming = order[first : first + workers]
            for place, other in enumerate(coming):
                if place and not budget.has_room(coming[: place + 1]):
                    return  # what it needs is known better when its turn comes
                if registry.find(other, program.variant) is None:
                    is_stored = registry.shelf is not None
                    begin(request_for(program, other, config=registry.config, is_stored=is_stored))

        yield begin_from


def sealed_error(mode: CUDAGraphMode) -> SealedError:
    """What is raised where buckets should be captured while `mode` does not allow it."""
    return SealedError(
        f"mode={mode.name} does not allow captures: warm up before seal(), or set mode to "
        "CUDAGraphMode.CAPTURE"
    )
