"""Eager answers to calls whose bucket could not be captured, or does not run."""

from __future__ import annotations

from cudagraph_jax._base.log import logger
from cudagraph_jax.capture.capturer import Capturer, Task
from cudagraph_jax.capture.failures import is_final
from cudagraph_jax.dispatch.split import was_donated
from cudagraph_jax.errors import CaptureError, PaddingLeakError
from cudagraph_jax.program.eager import run_eagerly
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree


def answer_eagerly(task: Task) -> PyTree:
    """The plain function's answer."""
    call = task.call
    return run_eagerly(task.target, call.args, call.kwargs, call.sizes)


def without_bucket(capturer: Capturer, task: Task, bucket: Bucket, error: CaptureError) -> PyTree:
    """The answer where `bucket` could not be captured, which is remembered.

    Raises:
        PaddingLeakError: That is why.
    """
    failures, variant = capturer.failures, task.call.variant
    if isinstance(error, PaddingLeakError):
        failures.remember(bucket, variant, error)
        raise error
    # Before the answer, or others would try the same meanwhile; told of after it.
    # One that is known comes from the same attempt, which was waited for.
    is_new = failures.get(bucket, variant) is None and failures.note(bucket, variant, error)
    try:
        outputs = answer_eagerly(task)
    except BaseException:
        # A mistake in the function itself surfaces here, as it would without this package, and may
        # be gone the next time. What XLA could not compile has its pause all the same.
        if is_new and is_final(error):
            failures.forget(bucket, variant)
        raise
    if is_new:
        failures.warn(bucket, variant, error)
    return outputs


def without_entry(capturer: Capturer, task: Task, bucket: Bucket, error: Exception) -> PyTree:
    """The answer where the first run of a new entry failed; the entry is dropped.

    Raises:
        Exception: `error`, where the call's donated arrays are gone.
    """
    failure = CaptureError(f"{bucket} was compiled, but does not run: {error}", stage="run")
    failure.__cause__ = error
    capturer.registry.discard_broken(bucket, task.call.variant, failure)
    if was_donated(task.call, task.target.donate_argnums):
        capturer.failures.note(bucket, task.call.variant, failure)
        raise error
    return without_bucket(capturer, task, bucket, failure)


def without_memory(task: Task, bucket: Bucket, error: BaseException) -> PyTree:
    """The answer where there was no memory for a replay.

    Raises:
        BaseException: `error`, where it is another one, or the call's donated arrays are gone.
    """
    gone = was_donated(task.call, task.target.donate_argnums)
    if gone or not isinstance(error, Exception) or "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    logger.warning("%s runs eagerly at %s: %s", task.target.name, bucket, error)
    return answer_eagerly(task)
