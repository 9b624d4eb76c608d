"""What is done with a call, and why: the mode table as a pure function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from enum import Enum
from typing import NamedTuple

import jax

from cudagraph_jax.capture.peers import PEERS
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import (
    BucketOverflowError,
    CaptureError,
    CUDAGraphError,
    DistributedError,
    InputShapeError,
    PaddingLeakError,
    SealedError,
)
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.replay_counts import Fit
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.call import Call
from cudagraph_jax.shapes.ladder import Bucket, axis_name


class Reason(Enum):
    """Why a call is served as it is; the keys of the counts in `stats()`."""

    EXACT = "exact"
    PADDED = "padded"
    LARGER = "larger"
    MISS = "miss"
    OVERFLOW = "overflow"
    EMPTY = "empty"
    PAUSED = "paused"
    DISABLED = "disabled"
    SEALED = "sealed"
    FAILED = "failed"
    UNPADDED = "unpadded"
    SPLIT = "split"
    QUEUED = "queued"
    INPUT = "input"
    RUN = "run"
    LEAK = "leak"
    MEMORY = "memory"
    REFUSED = "refused"
    TRANSFORMED = "transformed"
    DISABLE_JIT = "disable_jit"


_FITS = {Reason.EXACT: Fit.EXACT, Reason.PADDED: Fit.PADDED, Reason.LARGER: Fit.LARGER}


class Decision(NamedTuple):
    """What is done with a call.

    Attributes:
        mode: REPLAY, CAPTURE, or NONE and DISABLED for an eager run.
        reason: Why.
        bucket: The bucket that the call is, or would be, padded to; None outside the limits.
        entry: The captured bucket that serves it, for REPLAY.
        error: What is raised instead of running eagerly; None in general.
        in_background: Whether the bucket is to be captured in the background meanwhile.
        is_passing: Whether the next call of this size may be served in another way.
        piece_rows: The rows of the pieces that it is served in, as far as these have buckets; 0:
            it is not cut.
        pieces: What is done with the pieces, by their sizes.
        is_agreed: Whether several processes do the same.
    """

    mode: CUDAGraphMode
    reason: Reason
    bucket: Bucket | None = None
    entry: CUDAGraphEntry | None = None
    error: CUDAGraphError | None = None
    in_background: bool = False
    is_passing: bool = False
    piece_rows: int = 0
    pieces: tuple[Decision, ...] = ()
    is_agreed: bool = False

    def __str__(self) -> str:
        bucket = self.bucket if self.entry is None else self.entry.bucket
        where = "no bucket" if bucket is None else f"bucket {bucket}"
        raised = "" if self.error is None else f", raises {type(self.error).__name__}"
        queued = ", captured in the background" if self.in_background else ""
        return f"{self.mode.name}, {where}, {self.reason.value}{queued}{raised}"

    @property
    def has_bucket(self) -> bool:
        """Whether a bucket serves the call, or is captured for it."""
        return self.entry is not None or self.mode is CUDAGraphMode.CAPTURE

    def agreed(
        self, call: Call, config: CUDAGraphConfig, held: Callable[[], list[CUDAGraphEntry]]
    ) -> Decision:
        """The same, where the processes that the call spans, if any, have agreed to it.

        What a process refuses is raised when all of them have learnt it.

        Args:
            call: The call.
            config: How long they wait for each other.
            held: All that is captured.

        Raises:
            DistributedError: They have not, or it is what a process decides alone.
            CUDAGraphError: What all of them refuse it with.
        """
        if self.is_agreed or not PEERS.spans(call, held):
            return self
        parts = (self, *self.pieces)
        PEERS.agree_on_call(
            call,
            decision="; in pieces: ".join(map(str, parts)),
            entries=[part.entry for part in parts if part.entry is not None],
            refused=self.error or self._unshareable(call),
            config=config,
        )
        return self._replace(is_agreed=True)

    def _unshareable(self, call: Call) -> DistributedError | None:
        """Why this is nothing that several processes do together, such as to run eagerly."""
        parts = self.pieces or (self,)
        if all(part.has_bucket and not part.in_background for part in parts):
            return None
        return DistributedError(
            f"{call.target.name} at {call.sizes} spans several processes and would be served so: "
            f"{self}. What one of them runs eagerly or captures in the background another may not: "
            'warm the bucket up, with on_miss="capture", and for what is outside the limits add '
            'larger buckets or set on_overflow="split" or "exact"'
        )

    @property
    def serving_bucket(self) -> Bucket | None:
        """The bucket that serves the call; None where none does, or several do."""
        if self.entry is not None:
            return self.entry.bucket
        return self.bucket if self.mode is CUDAGraphMode.CAPTURE else None

    @property
    def fit(self) -> Fit:
        """How the call fits the entry that serves it."""
        return _FITS[self.reason]


class Holdings(NamedTuple):
    """What a manager has for one call.

    Attributes:
        find: The entry of exactly this bucket.
        find_larger: The smallest entry that holds the call, whatever its bucket.
        failed: Why a bucket could not be captured before.
        is_capturing_here: Whether this very thread captures it, so that the call is of a signal
            handler in the middle of that, or of the function itself.
        queues: Whether it waits to be captured in the background, or may be queued.
        fits_untouched: Whether the arrays of the call are at the bucket's size already.
    """

    find: Callable[[Bucket], CUDAGraphEntry | None]
    find_larger: Callable[[], CUDAGraphEntry | None]
    failed: Callable[[Bucket], CaptureError | None]
    is_capturing_here: Callable[[Bucket], bool] = lambda bucket: False
    queues: Callable[[Bucket], bool] = lambda bucket: True
    fits_untouched: Callable[[Bucket], bool] = lambda bucket: False


def decide(
    config: CUDAGraphConfig,
    mode: CUDAGraphMode,
    sizes: Bucket,
    carried: Collection[str],
    holdings: Holdings,
) -> Decision:
    """The decision for one call; the table is in docs/misses.md.

    Args:
        config: Limits and policies.
        mode: The most that may be done.
        sizes: The call's.
        carried: The axes that its arrays carry.
        holdings: What is captured.
    """
    none = CUDAGraphMode.NONE
    if mode is CUDAGraphMode.DISABLED:
        return Decision(mode, Reason.DISABLED)
    if mode is none:
        return Decision(none, Reason.PAUSED)
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # not in JAX's stubs
        return Decision(none, Reason.DISABLE_JIT)
    if sizes.is_empty:
        return Decision(none, Reason.EMPTY)
    exact = holdings.find(sizes)
    if exact is not None:
        return Decision(CUDAGraphMode.REPLAY, Reason.EXACT, sizes, exact)
    if not config.admits(sizes, carried):
        return _overflow(config, mode, sizes, carried, holdings)
    bucket = config.padded(sizes, carried)
    may_copy = config.cudagraph_copy_inputs
    if not (may_copy or bucket == sizes or holdings.fits_untouched(bucket)):
        return Decision(none, Reason.UNPADDED, bucket, error=_unpadded(sizes, bucket))
    padded = holdings.find(bucket)
    if padded is not None:
        return Decision(CUDAGraphMode.REPLAY, Reason.PADDED, bucket, padded)
    if mode is CUDAGraphMode.REPLAY:
        return _sealed(config, bucket, holdings)
    return _miss(config, bucket, holdings)


def _sealed(config: CUDAGraphConfig, bucket: Bucket, holdings: Holdings) -> Decision:
    larger = holdings.find_larger() if config.cudagraph_copy_inputs else None
    if larger is not None:
        return Decision(CUDAGraphMode.REPLAY, Reason.LARGER, larger.bucket, larger)
    error = None
    if config.on_miss == "error":
        error = SealedError(
            f"bucket {bucket} is not captured and the manager is sealed: "
            "warm it up before seal(), or set mode to CUDAGraphMode.CAPTURE"
        )
    return Decision(CUDAGraphMode.NONE, Reason.SEALED, bucket, error=error)


def _miss(config: CUDAGraphConfig, bucket: Bucket, holdings: Holdings) -> Decision:
    failed = holdings.failed(bucket)
    if failed is not None:
        return _failed(config, bucket, holdings, failed)
    if config.on_miss == "capture":
        return _capture(Reason.MISS, bucket, holdings)
    if config.on_miss == "background":
        return _background(config, bucket, holdings)
    error = None
    if config.on_miss == "error":
        error = SealedError(
            f'bucket {bucket} is not captured and on_miss="error" forbids to capture it in a '
            'request: warm it up first, or set on_miss="capture"'
        )
    return Decision(CUDAGraphMode.NONE, Reason.MISS, bucket, error=error)


def _background(config: CUDAGraphConfig, bucket: Bucket, holdings: Holdings) -> Decision:
    larger = holdings.find_larger() if config.cudagraph_copy_inputs else None
    queues = holdings.queues(bucket)
    if larger is None:
        reason = Reason.QUEUED if queues else Reason.REFUSED
        return Decision(CUDAGraphMode.NONE, reason, bucket, in_background=queues)
    return Decision(
        CUDAGraphMode.REPLAY,
        Reason.LARGER,
        larger.bucket,
        larger,
        in_background=queues,
        is_passing=True,
    )


def _failed(
    config: CUDAGraphConfig, bucket: Bucket, holdings: Holdings, failed: CaptureError
) -> Decision:
    none = CUDAGraphMode.NONE
    if isinstance(failed, PaddingLeakError):
        return Decision(none, Reason.LEAK, bucket, error=copy.copy(failed))
    if config.on_miss == "error":
        error = SealedError(
            f'bucket {bucket} could not be captured ({failed}), and on_miss="error" forbids to '
            "run eagerly: mend that, then reset()"
        )
        return Decision(none, Reason.FAILED, bucket, error=error)
    if config.on_miss == "background" and config.cudagraph_copy_inputs:
        larger = holdings.find_larger()
        if larger is not None:
            return Decision(
                CUDAGraphMode.REPLAY, Reason.LARGER, larger.bucket, larger, is_passing=True
            )
    return Decision(none, Reason.FAILED, bucket)


def _overflow(
    config: CUDAGraphConfig,
    mode: CUDAGraphMode,
    sizes: Bucket,
    carried: Collection[str],
    holdings: Holdings,
) -> Decision:
    none = CUDAGraphMode.NONE
    if config.on_overflow == "eager":
        return Decision(none, Reason.OVERFLOW)
    piece = _largest_piece(config, sizes, carried)
    if config.on_overflow == "split" and piece:
        return Decision(none, Reason.SPLIT, piece_rows=piece)
    if config.on_overflow != "exact":
        error = _too_large(config, sizes, carried, policy="split" if piece else "exact")
        return Decision(none, Reason.OVERFLOW, error=error)
    if mode is CUDAGraphMode.REPLAY:
        sealed = SealedError(
            f'{sizes} is not captured, and a sealed manager refuses on_overflow="exact": '
            "add a bucket, or set mode to CUDAGraphMode.CAPTURE"
        )
        return Decision(none, Reason.SEALED, sizes, error=sealed)
    failed = holdings.failed(sizes)
    if failed is not None:
        return _failed(config, sizes, holdings, failed)
    return _capture(Reason.OVERFLOW, sizes, holdings)


def _capture(reason: Reason, bucket: Bucket, holdings: Holdings) -> Decision:
    if holdings.is_capturing_here(bucket):
        return Decision(CUDAGraphMode.NONE, Reason.QUEUED, bucket)  # it cannot wait for itself
    return Decision(CUDAGraphMode.CAPTURE, reason, bucket)


def _largest_piece(config: CUDAGraphConfig, sizes: Bucket, carried: Collection[str]) -> int:
    """The most rows that are inside the limits beside the other sizes; 0: not even the fewest."""
    pieces = (sizes.with_sizes({"batch": rows}) for rows in reversed(config.capture_sizes))
    return next((piece.batch_size for piece in pieces if config.admits(piece, carried)), 0)


def too_large_axes(config: CUDAGraphConfig, sizes: Bucket) -> list[str]:
    """The axes whose size alone is outside the limits; none: the elements of its bucket are."""
    return [axis for axis, size in sizes.sizes.items() if size > config.largest(axis)]


def has_every_length(config: CUDAGraphConfig, call: Call) -> bool:
    """Whether each length of the call's sequences is a bucket of its own."""
    return config.capture_seq_lens is None and "seq" in call.carried


def limits(config: CUDAGraphConfig, sizes: Bucket, carried: Collection[str]) -> str:
    """The limits that a call is outside of, in words."""
    if beyond := too_large_axes(config, sizes):
        # The sizes that a caller of `execute_or_capture` states are not all carried by arrays.
        axes = [axis for axis in sizes.sizes if axis in {*carried, *beyond}]
        most = [f"{axis_name(axis)} {config.largest(axis)}" for axis in axes]
        return " and ".join([", ".join(most[:-1]), most[-1]] if most[1:] else most)
    bucket = config.padded(sizes, carried)
    return (
        f"max_bucket_elements={config.max_bucket_elements}, of which its bucket, {bucket}, takes "
        f"{bucket.elements}"
    )


def larger_limits(
    config: CUDAGraphConfig,
    sizes: Bucket,
    carried: Collection[str],
    *,
    add: str = "add larger buckets",
) -> str:
    """What to change for a call that is outside the limits."""
    remedies = [add] if too_large_axes(config, sizes) else []
    # A bucket that is added may be of the call's very size.
    if not config.allows(sizes if remedies else config.padded(sizes, carried)):
        remedies.append("raise max_bucket_elements")
    return " and ".join(remedies)


def _too_large(
    config: CUDAGraphConfig, sizes: Bucket, carried: Collection[str], *, policy: str
) -> CUDAGraphError:
    of_call = str(sizes)
    if config.on_overflow == "split" and "batch" in carried:
        # Its rows are cut: what is wrong is wrong with the fewest.
        piece = sizes.with_sizes({"batch": min(sizes.batch_size, config.capture_sizes[0])})
        of_call = of_call if piece == sizes else f"{piece}, the smallest piece of {sizes}"
        sizes = piece
    problems = [
        f"{axis_name(axis)}={sizes.size(axis)} is larger than the largest "
        f"bucket, {config.largest(axis)}"
        for axis in too_large_axes(config, sizes)
    ]
    bucket = config.padded(sizes, carried)
    if not config.allows(bucket):
        problems.append(
            f"the bucket of {of_call}, {bucket}, has {bucket.elements} elements, more than "
            f"max_bucket_elements={config.max_bucket_elements}"
        )
    remedy = larger_limits(config, sizes, carried, add="add a bucket")
    return BucketOverflowError(f'{" and ".join(problems)}: {remedy} or set on_overflow="{policy}"')


def bucket_to_pad(
    config: CUDAGraphConfig, decision: Decision, sizes: Bucket, carried: Collection[str]
) -> Bucket:
    """The bucket that serves a call, or would if the mode allowed it.

    Raises:
        BucketOverflowError: The call is outside the limits.
    """
    if decision.entry is not None:
        return decision.entry.bucket
    bucket = config.padded(sizes, carried) if decision.bucket is None else decision.bucket
    is_inside = config.allows(bucket) and not too_large_axes(config, sizes)
    if decision.bucket is not None or is_inside:
        return bucket
    raise BucketOverflowError(
        f"{sizes} is outside the limits, {limits(config, sizes, carried)}, and has no bucket to be "
        f"padded to: {larger_limits(config, sizes, carried)}"
    )


def _unpadded(sizes: Bucket, bucket: Bucket) -> CUDAGraphError:
    return InputShapeError(
        f"the inputs have {sizes.described}, not a bucket's shape, and "
        f"cudagraph_copy_inputs=False forbids to copy them: pad them to {bucket.short}, "
        "as the function's own pad does, or leave cudagraph_copy_inputs on"
    )
