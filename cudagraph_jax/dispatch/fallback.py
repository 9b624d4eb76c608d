"""Answers to calls whose bucket could not be captured, or does not run."""

from __future__ import annotations

import jax

from cudagraph_jax._base.log import logger
from cudagraph_jax._base.text import error_text
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.capture.failures import is_final
from cudagraph_jax.capture.peers import PEERS
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.dispatch.split import was_donated
from cudagraph_jax.errors import CaptureError, InputShapeError, PaddingLeakError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.warm_runs import runs
from cudagraph_jax.program.call import Call, argument_leaf_names
from cudagraph_jax.program.eager import run_eagerly
from cudagraph_jax.program.padded import Padded
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree


def eager_answer(registry: CUDAGraphRegistry, call: Call) -> PyTree:
    """The plain function's answer.

    Raises:
        DistributedError: Several processes run it together, as its arrays or its buckets show.
    """
    return run_eagerly(call, is_shared=PEERS.spans(call, registry.entries))


def refuse_alone(entry: CUDAGraphEntry, error: Exception) -> None:
    """Raises where other processes run what failed here: there is no other answer for this one.

    Raises:
        DistributedError: They do. Their next collective would meet another one of this process.
    """
    if entry.is_shared:
        raise PEERS.failed(f"{entry.variant.name} at {entry.bucket}", error) from error


def without_bucket(capturer: Capturer, call: Call, bucket: Bucket, error: CaptureError) -> PyTree:
    """The answer where `bucket` could not be captured, which is remembered.

    Raises:
        PaddingLeakError: That is why.
        CaptureError: Several processes run it together, so that there is no other answer.
    """
    if PEERS.spans(call, capturer.registry.entries):
        raise error  # nothing is remembered, since each would try again in its own time
    failures, variant = capturer.failures, call.variant
    if isinstance(error, PaddingLeakError):
        failures.remember(bucket, variant, error)
        raise error
    # Before the answer, or others would try the same meanwhile; told of after it.
    # One that is known comes from the same attempt, which was waited for.
    is_new = failures.get(bucket, variant) is None and failures.note(bucket, variant, error)
    try:
        outputs = eager_answer(capturer.registry, call)
    except BaseException:
        # A mistake in the function itself surfaces here, as it would without this package, and may
        # be gone the next time. What XLA could not compile has its pause all the same.
        if is_new and is_final(error):
            failures.forget(bucket, variant)
        raise
    if is_new:
        failures.warn(bucket, variant, error)
    return outputs


def without_entry(
    capturer: Capturer, call: Call, entry: CUDAGraphEntry, error: Exception
) -> PyTree:
    """The answer where the first run of a new entry failed; an entry that does not run is dropped.

    Raises:
        Exception: `error`, where the entry does run, so that the arguments are to blame, as under
            `jit`: an array that is donated twice, say; or where the donated arrays are gone.
    """
    bucket = entry.bucket
    if not is_out_of_memory(error) and runs(entry):
        try:
            raise error
        finally:
            del error  # whose traceback leads back to this frame
    failure = CaptureError(
        f"{bucket} was compiled, but does not run: {error_text(error)}", stage="run"
    )
    failure.__cause__ = error
    capturer.registry.discard_broken(entry, failure)
    if was_donated(call, call.target.donate_argnums):
        capturer.failures.note(bucket, call.variant, failure)
        raise error
    return without_bucket(capturer, call, bucket, failure)


def without_memory(call: Call, bucket: Bucket, error: BaseException) -> PyTree:
    """The answer where there was no memory for a replay.

    Raises:
        BaseException: `error`, where it is another one, or the call's donated arrays are gone.
    """
    if not is_out_of_memory(error) or was_donated(call, call.target.donate_argnums):
        raise error
    logger.warning("%s runs eagerly at %s: %s", call.target.name, bucket, error_text(error))
    return run_eagerly(call)


def is_of_deleted(error: BaseException) -> bool:
    """Whether an array was used whose buffer is gone; JAX has no one class for this."""
    return isinstance(error, RuntimeError | ValueError) and "been deleted" in error_text(error)


def refuse_deleted(call: Call, error: BaseException) -> None:
    """Raises, in the place of JAX's words for it, where an array of `call` is gone.

    Raises:
        InputShapeError: One is; the message names it.
    """
    if not is_of_deleted(error):
        return
    names = argument_leaf_names(call.declared.argument_names, call.args, call.kwargs)
    for name, leaf in zip(names, call.leaves, strict=True):
        if isinstance(leaf, jax.Array | Padded) and leaf.is_deleted():
            raise InputShapeError(
                f"{name} is deleted, as an array is that was donated to an earlier call "
                "(donate_argnums): pass what that call returned, or give it a copy"
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory for a run."""
    return isinstance(error, Exception) and "RESOURCE_EXHAUSTED" in error_text(error)
