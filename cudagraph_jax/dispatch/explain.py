"""A decision in words."""

from __future__ import annotations

from collections.abc import Iterator

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.decision import (
    Decision,
    Reason,
    has_every_length,
    larger_limits,
    limits,
)
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.dispatch.nearest import nearest_entry
from cudagraph_jax.graphs.entry import homes_in
from cudagraph_jax.graphs.pads import ways_in
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.call import Call
from cudagraph_jax.program.program import Program, request_for
from cudagraph_jax.report.explanation import Explanation
from cudagraph_jax.shapes.ladder import Bucket

_MISSING = (
    Reason.MISS,
    Reason.QUEUED,
    Reason.REFUSED,
    Reason.LARGER,
    Reason.SEALED,
    Reason.OVERFLOW,
    Reason.FAILED,
)

_WARM_UP = "warm up with arguments like these first"
_WARM_UP_AND_SEAL = "warm up with arguments like these before seal()"
_WHATEVER_THE_SIZE = {
    Reason.EMPTY: ("a call without elements has no bucket", ""),
    Reason.PAUSED: ("the mode is NONE", "set mode to CUDAGraphMode.CAPTURE"),
    Reason.DISABLE_JIT: ("jax.disable_jit is on", "leave it off to replay"),
    Reason.DISABLED: ("the manager is switched off", "set enabled=True, and mode to CAPTURE"),
}


def explain(dispatcher: Dispatcher, call: Call) -> Explanation:
    """What would be done with a call, why, and what to change; nothing is run."""
    decision = dispatcher.decide(call)
    reason, remedy = _words(dispatcher, call, decision)
    if decision.reason in _MISSING:
        entries = dispatcher.registry.entries()
        own = decision.bucket or dispatcher.bucket_for(call)
        if decision.reason is Reason.LARGER:
            own = dispatcher.bucket_for(call)
        near = nearest_entry(entries, call, own)
        reason = f"{reason}; {near}" if near else reason
    if ways := "; ".join(_ways_of_padded(call, decision)):
        reason = f"{reason}; {ways}"
    shelf, bucket = dispatcher.registry.shelf, decision.bucket
    if shelf is not None and decision.mode is CUDAGraphMode.CAPTURE and bucket is not None:
        executable = request_for(Program(call), bucket, config=dispatcher.config)
        reason = f"{reason}; {shelf.explain(executable)}"
    return Explanation(
        name=call.variant.name,
        mode=decision.mode,
        sizes=call.sizes,
        bucket=decision.bucket,
        reason=reason,
        remedy=remedy,
        error=decision.error is not None,
    )


def _ways_of_padded(call: Call, decision: Decision) -> Iterator[str]:
    """What becomes of each `Padded` among the arguments of a call."""
    if decision.error is not None:
        return
    bucket, homes = decision.serving_bucket, homes_in(decision.entry)
    for name, way_in in ways_in(call, call.sizes if bucket is None else bucket, homes):
        if bucket is None:
            yield f"the real part of {name} goes through the host, which waits for it"
        else:
            yield f"{name} {way_in}"


def _words(dispatcher: Dispatcher, call: Call, decision: Decision) -> tuple[str, str]:
    """Why, and what to change."""
    if decision.error is not None:
        problem, _, remedy = str(decision.error).rpartition(": ")
        if decision.reason is Reason.OVERFLOW:
            problem = f'{problem}, and on_overflow="{dispatcher.config.on_overflow}"'
        return problem, remedy
    if decision.entry is not None:
        return _replayed(dispatcher, call, decision)
    if decision.mode is CUDAGraphMode.CAPTURE and decision.reason is not Reason.SPLIT:
        return _captured(dispatcher.config, call, decision)
    return _eager(dispatcher, call, decision)


def _replayed(dispatcher: Dispatcher, call: Call, decision: Decision) -> tuple[str, str]:
    own = dispatcher.bucket_for(call)
    if decision.reason is Reason.EXACT:
        return "a bucket of exactly this size is captured", ""
    if decision.reason is Reason.PADDED:
        return f"it is padded to {decision.bucket}, which is captured", ""
    if decision.in_background:
        return f"its own bucket {own} is being captured in the background meanwhile", ""
    known = dispatcher.capturer.failures.get(own, call.variant)
    if known is not None:
        return f"its own bucket {own} could not be captured before: {known}", ""
    if decision.is_passing:
        return f"its own bucket {own} is not captured, and the queue is full or closed", ""
    return (
        f"its own bucket {own} is not captured, and no capture is allowed now",
        _WARM_UP_AND_SEAL,
    )


def _warm_up(config: CUDAGraphConfig, call: Call, bucket: Bucket | None) -> str:
    """What to change; no warm-up captures a bucket above its ladder and within its limit."""
    if has_every_length(config, call):
        return f"give capture_seq_lens, so that lengths share buckets, or {_WARM_UP}"
    if bucket is None or bucket in config.grid(call.carried, bucket):
        return _WARM_UP
    return "add a larger bucket, since its own is within the limits and not on the grid"


def _captured(config: CUDAGraphConfig, call: Call, decision: Decision) -> tuple[str, str]:
    if decision.reason is Reason.OVERFLOW:
        remedy = larger_limits(config, call.sizes, call.carried)
        return 'it is outside the limits and on_overflow="exact"', remedy
    policy = f'{decision.bucket} is not captured yet and on_miss="{config.on_miss}"'
    return policy, _warm_up(config, call, decision.bucket)


def _eager(dispatcher: Dispatcher, call: Call, decision: Decision) -> tuple[str, str]:
    bucket = decision.bucket or dispatcher.bucket_for(call)
    failure = dispatcher.capturer.failures.get(bucket, call.variant)
    match decision.reason:
        case Reason.SPLIT | Reason.OVERFLOW:
            return _outside(dispatcher, call, decision)
        case Reason.MISS | Reason.QUEUED | Reason.REFUSED:
            why, remedy = _uncaptured(bucket, decision)
            return why, remedy and _warm_up(dispatcher.config, call, bucket)
        case Reason.SEALED if failure is None:
            return f"{bucket} is not captured, and no capture is allowed now", _WARM_UP_AND_SEAL
        case reason if reason in _WHATEVER_THE_SIZE:
            return _WHATEVER_THE_SIZE[reason]
    return f"its bucket could not be captured before: {failure}", "mend that, then reset()"


def _outside(dispatcher: Dispatcher, call: Call, decision: Decision) -> tuple[str, str]:
    """The words for a call outside the limits that no bucket of its own serves."""
    config, is_sealed = dispatcher.config, dispatcher.mode is not CUDAGraphMode.CAPTURE
    rows = f"pieces of {decision.piece_rows} rows"
    if decision.reason is Reason.SPLIT:
        return f'it is served in {rows}, and joined, as on_overflow="split" says', ""
    if decision.piece_rows:
        why = f'its {rows} (on_overflow="split") have no captured bucket'
        return why, _WARM_UP_AND_SEAL if is_sealed else _WARM_UP
    beyond = limits(config, call.sizes, call.carried)
    remedy = larger_limits(config, call.sizes, call.carried)
    why = f'it is larger than the limits, {beyond}, and on_overflow="eager" runs it eagerly'
    if is_sealed:
        return why, f"{remedy}, and warm up before seal()"
    return why, f'{remedy}, or set on_overflow="exact" to capture its own size'


def _uncaptured(bucket: Bucket, decision: Decision) -> tuple[str, str]:
    """The words for a call whose bucket is not captured yet, though it may be."""
    missing = f"{bucket} is not captured yet"
    match decision.reason:
        case Reason.MISS:
            return f'{missing} and on_miss="eager"', _WARM_UP
        case Reason.REFUSED:
            return f"{missing}, and the queue of captures is full or closed", _WARM_UP
    if not decision.in_background:
        return f"{bucket} is being captured by this very thread", ""
    background = "it is captured in the background, and no larger bucket holds the call"
    return f"{missing}; {background}", _WARM_UP
