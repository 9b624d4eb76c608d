"""The captured bucket that is nearest to a call, and what is said of one that none serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.dispatch.decision import larger_limits, limits
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import AbstractLeaf, Call, Variant, argument_leaf_names
from cudagraph_jax.shapes.ladder import Bucket, axis_name
from cudagraph_jax.xla.settings import setting_differences


def nearest_entry(entries: Sequence[CUDAGraphEntry], call: Call, bucket: Bucket) -> str:
    """The entry of the call's function that is nearest to `bucket`, in words; empty without one.

    The fewest differing fields come first, then the nearest size.

    Args:
        entries: What is captured.
        call: The call.
        bucket: What the call is padded to.
    """
    candidates = [
        (list(_differences(entry, call, bucket)), entry)
        for entry in entries
        if entry.variant.function == call.variant.function
    ]
    if not candidates:
        return ""
    differences, entry = min(
        candidates,
        key=lambda found: (len(found[0]), abs(found[1].bucket.elements - bucket.elements)),
    )
    return f"the nearest captured bucket is {entry.bucket}, with {' and '.join(differences)}"


def _differences(entry: CUDAGraphEntry, call: Call, bucket: Bucket) -> Iterator[str]:
    for axis, needs in bucket.sizes.items():
        has = entry.bucket.sizes.get(axis)
        if has != needs:
            yield f"{axis_name(axis)} {has}, not {needs}"
    yield from variant_differences(entry.variant, call)


def variant_differences(variant: Variant, call: Call) -> Iterator[str]:
    """What `variant` has instead of what the program of `call` has, in words."""
    for captured, given in zip_longest(variant.statics, call.variant.statics):
        if captured != given:
            yield f"static argument {_static(captured)}, not {_static(given)}"
    yield from setting_differences(variant.settings, call.variant.settings)
    if variant.structure != call.variant.structure:
        yield "another pytree of arguments"
        return
    names = argument_leaf_names(call.declared.argument_names, call.args, call.kwargs)
    for name, captured_leaf, leaf in zip(names, variant.leaves, call.variant.leaves, strict=True):
        if captured_leaf != leaf:
            yield f"{name} of {_field(captured_leaf, leaf)}"


def _static(static: tuple[str, object, object] | None) -> str:
    return "absent" if static is None else f"{static[0]}={static[2]!r}"


def _field(captured: AbstractLeaf, given: AbstractLeaf) -> str:
    if captured.dtype != given.dtype:
        return f"dtype {captured.dtype}, not {given.dtype}"
    if captured.shape != given.shape:
        return f"shape {captured}, not {given}"
    if captured.weak_type != given.weak_type:
        return "a weak type" if captured.weak_type else "a fixed type"
    return "another sharding"


def overflow_notice(
    registry: CUDAGraphRegistry, call: Call, took_ms: float, *, is_sealed: bool
) -> str:
    """What an eager call outside the limits took, what a bucket would, and how to have one.

    Args:
        registry: Whose buckets are compared with; nothing is compiled for this.
        call: The call.
        took_ms: Its milliseconds.
        is_sealed: Whether the manager captures nothing more.
    """
    config, sizes = registry.config, call.sizes
    entries = [entry for entry in registry.entries() if entry.variant == call.variant]
    near = min(entries, key=lambda entry: abs(entry.bucket.elements - sizes.elements), default=None)
    known = "none of its buckets is captured to compare with"
    if near is not None:
        known = f"its nearest bucket, {near.bucket}, took {near.capture_time_ms:,.0f} ms to capture"
        # Of outputs that stay on the device the time is that of the dispatch.
        if near.replay_count and (call.target.unpad == "host" or near.waits):
            known += f", once, and takes {near.avg_replay_time_ms:,.1f} ms to replay"
    remedy = larger_limits(config, sizes, call.carried)
    if is_sealed:
        remedy += ", and warm up before seal()"
    else:
        remedy += ', or set on_overflow="exact", which captures each such size once'
    return (
        f"{call.target.name} ran eagerly at {sizes}, outside the limits, "
        f"{limits(config, sizes, call.carried)}: {took_ms:,.1f} ms, with what "
        f'had to be compiled for that; {known}. With on_overflow="eager" every such call runs '
        f"operation by operation: {remedy}. Said once for this function"
    )


def sealed_notice(
    registry: CUDAGraphRegistry, call: Call, took_ms: float, *, bucket: Bucket
) -> str:
    """What an eager call took that a sealed manager has no bucket for, and how to have one.

    Args:
        registry: What is captured.
        call: The call.
        took_ms: Its milliseconds.
        bucket: What it would be padded to, or its pieces.
    """
    near = nearest_entry(registry.entries(), call, bucket) or "none of its buckets is captured"
    return (
        f"{call.target.name} ran eagerly at {call.sizes}, since {bucket} is not captured and the "
        f"manager is sealed: {took_ms:,.1f} ms, with what had to be compiled for that; {near}. "
        "Every such call runs operation by operation: warm up with arguments like these before "
        'seal(), or set on_miss="error", which refuses them. Said once for this function'
    )


def lengths_notice(registry: CUDAGraphRegistry, call: Call, bucket: Bucket) -> str | None:
    """What is said where requests are captured one length after the other; None of the first.

    Args:
        registry: What is captured.
        call: The call.
        bucket: What is captured for it.
    """
    lengths = {entry.seq_len for entry in registry.entries() if entry.variant == call.variant}
    others = len(lengths - {bucket.seq_len})
    if not others:
        return None
    return (
        f"{call.target.name} has {bucket} captured for a call, beside {others} other length(s): "
        "without capture_seq_lens each length is a bucket of its own, compiled when it comes. Give "
        "the lengths that calls are padded to, such as capture_seq_lens=(64, 128, 256). Said once "
        "for this function"
    )
