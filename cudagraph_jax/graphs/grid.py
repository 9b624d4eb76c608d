"""The grid of one function: every bucket that a call like a given one can be padded to."""

from __future__ import annotations

from cudagraph_jax.errors import CaptureError, SealedError
from cudagraph_jax.graphs.budget import Budget
from cudagraph_jax.graphs.call import Call
from cudagraph_jax.graphs.capturer import Task
from cudagraph_jax.graphs.dispatch import Dispatcher
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.lru import Made
from cudagraph_jax.graphs.program import Program, Target
from cudagraph_jax.graphs.warmup import warm_up
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.report.progress import Progress
from cudagraph_jax.report.warmup import WarmupReport
from cudagraph_jax.shapes.ladder import Bucket


def warm_grid(
    dispatcher: Dispatcher, call: Call, target: Target, *, progress: Progress
) -> WarmupReport:
    """Captures and runs every bucket of the grid for calls like `call`.

    A switched off manager has nothing to warm up: the report is empty.

    Raises:
        ConfigError: The grid does not fit into `max_graphs` or the memory budget; said before the
            first bucket over it is compiled.
        SealedError: The mode does not allow captures.
        InputShapeError: An output that must be trimmed cannot be.
    """
    config = dispatcher.config
    if dispatcher.mode is CUDAGraphMode.DISABLED:
        return WarmupReport(target.name, (), 0.0)
    if dispatcher.mode is not CUDAGraphMode.CAPTURE:
        raise SealedError(
            f"mode={dispatcher.mode.name} does not allow captures: warm up before seal(), or set "
            "mode to CUDAGraphMode.CAPTURE"
        )
    capturer, task = dispatcher.capturer, Task(call, target)
    program = Program(target, call)

    def failed(bucket: Bucket, error: CaptureError) -> None:
        capturer.failures.remember(bucket, call.variant, error)
        dispatcher.registry.discard(bucket, call.variant)

    buckets = grid(dispatcher, call)
    budget = Budget(dispatcher.registry, call.variant, buckets)

    def capture(bucket: Bucket) -> Made[CUDAGraphEntry]:
        budget.check(bucket)
        made = capturer.capture(program, bucket, task)
        budget.add(made.value)
        return made

    report = warm_up(
        target.name,
        buckets,
        capture,
        iterations=config.warmup_iterations,
        leaves=call.leaves,
        failed=failed,
        progress=progress,
    )
    capturer.is_warm = True
    return report


def grid(dispatcher: Dispatcher, call: Call) -> list[Bucket]:
    """The buckets for calls like `call`; sizes that no array carries stay as they are."""
    buckets = dispatcher.config.buckets(seq_len=call.sizes.seq_len)
    return list(
        dict.fromkeys(
            Bucket(
                bucket.batch_size if call.carries_batch else call.sizes.batch_size,
                bucket.seq_len if call.carries_seq else call.sizes.seq_len,
            )
            for bucket in buckets
        )
    )
