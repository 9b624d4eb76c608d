"""What is behind the manager: one call decided, served and counted."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import CaptureError, InputShapeError, PaddingLeakError
from cudagraph_jax.fork import use_jax
from cudagraph_jax.graphs.call import Call
from cudagraph_jax.graphs.capturer import Capturer, Task
from cudagraph_jax.graphs.decision import Decision, Holdings, Reason, decide
from cudagraph_jax.graphs.eager import run_eagerly
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.journal import Fit
from cudagraph_jax.graphs.outcomes import Outcomes
from cudagraph_jax.graphs.registry import CUDAGraphRegistry
from cudagraph_jax.graphs.route import Route
from cudagraph_jax.graphs.split import (
    delete_donated,
    joined,
    piece_rows,
    pieces,
    unjoinable,
    was_donated,
)
from cudagraph_jax.log import logger
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from cudagraph_jax.shapes.prefix import PyTree


class Served(NamedTuple):
    """The answer to a call.

    Attributes:
        outputs: What the caller gets.
        route: How a call of the same shapes is served without deciding again; None where each is
            decided anew.
    """

    outputs: PyTree
    route: Route | None = None


class Dispatcher:
    """Serves calls: the state and the steps that `CUDAGraphManager` and `bucket_jit` share.

    Args:
        registry: Where captured buckets are; its configuration holds limits and policies.
        capturer: What captures.

    Attributes:
        outcomes: Counts of the calls that were no replays.
    """

    def __init__(self, registry: CUDAGraphRegistry, *, capturer: Capturer) -> None:
        self.registry = registry
        self.capturer = capturer
        self.outcomes = Outcomes(registry.sizes)

    @property
    def mode(self) -> CUDAGraphMode:
        """The most that is done with a call."""
        return self.capturer.gate.mode

    @property
    def config(self) -> CUDAGraphConfig:
        """Limits and policies; re-planning changes the grid."""
        return self.registry.config

    def bucket_for(self, call: Call) -> Bucket:
        """The bucket that `call` is padded to; a size that no array carries stays as it is."""
        return _padded(self.config, call, call.sizes)

    def decide(self, call: Call) -> Decision:
        """What is done with `call`; nothing is run."""
        decision = self._decide(call, call.sizes)
        if decision.reason is not Reason.SPLIT:
            return decision
        parts = [
            self._decide(call, call.sizes._replace(batch_size=rows))
            for rows in dict.fromkeys(piece_rows(call.sizes.batch_size, self._largest_piece))
        ]
        refused = next((part for part in parts if part.error is not None), None)
        if refused is not None:
            return refused
        first = parts[0]
        if first.entry is not None and (error := unjoinable(first.entry.outputs)) is not None:
            return replace(decision, reason=Reason.INPUT, error=error)
        if not first.has_bucket:
            return replace(decision, reason=Reason.OVERFLOW, in_pieces=True)
        return replace(decision, mode=first.mode, in_pieces=True)

    @property
    def _largest_piece(self) -> int:
        return Ladder(self.config.capture_sizes).max

    def _decide(self, call: Call, sizes: Bucket) -> Decision:
        holdings = Holdings(
            find=lambda bucket: self.registry.find(bucket, call.variant),
            find_larger=lambda: self.registry.find_larger(sizes, call.variant),
            failed=lambda bucket: self.capturer.failures.get(bucket, call.variant),
            queues=lambda bucket: self.capturer.background.accepts((bucket, call.variant)),
        )
        while True:
            config = self.config
            bucket = _padded(config, call, sizes)
            decision = decide(config, self.mode, sizes, bucket, holdings)
            # A new grid comes before the old one goes: what was not found may be there by now.
            if config is self.config:
                return decision

    def serve(self, task: Task) -> Served:
        """The outputs of a call, by whichever way was decided; counted once.

        Raises:
            CUDAGraphError: What the policies turn into an error, and leaks in `debug_mode`.
        """
        use_jax()
        decision = self.decide(task.call)
        logger.debug("%s at %s: %s", task.call.variant.name, task.call.sizes, decision)
        try:
            return self._act(decision, task)
        except BaseException as error:
            self.outcomes.add("error", _error_reason(error, decision), task.call.sizes)
            raise

    def _act(self, decision: Decision, task: Task) -> Served:
        call = task.call
        if decision.error is not None:
            raise decision.error
        if decision.in_pieces:
            return self._split(task)
        self._queue(decision, task)
        if decision.entry is not None:
            route = decision.entry.route_for(call, fit=decision.fit)
            outputs = route.run(call.args, call.kwargs)
            # The bucket that is being captured takes over as soon as it is there.
            return Served(outputs, None if decision.is_passing else route)
        if decision.mode is not CUDAGraphMode.CAPTURE or decision.bucket is None:
            return self._eager(task, decision.reason)
        with self.capturer.gate.admission() as admitted:
            if admitted:
                return self._capture_and_run(task, decision.bucket, decision.reason)
        # The mode has changed meanwhile.
        return self._act(self.decide(call), task)

    def _queue(self, decision: Decision, task: Task) -> None:
        if decision.in_background:
            with self.capturer.gate.admission() as admitted:
                if admitted:
                    self.capturer.capture_later(self.bucket_for(task.call), task)

    def _capture_and_run(self, task: Task, bucket: Bucket, reason: Reason) -> Served:
        call = task.call
        try:
            made = self.capturer.capture_now(task, bucket)
        except CaptureError as error:
            return self._failed(task, bucket, error)
        route = made.value.route_for(call)
        if not made.is_new:
            return Served(route.run(call.args, call.kwargs), route)
        try:
            outputs = route.execute(call.args, call.kwargs)
        except Exception as error:
            if was_donated(call, task.target.donate_argnums):
                raise  # its inputs are gone, so that nothing can run with them again
            failure = CaptureError(f"{bucket} was compiled, but does not run: {error}", stage="run")
            failure.__cause__ = error
            served = self._failed(task, bucket, failure)
            self.registry.discard(bucket, call.variant)
            return served
        self.outcomes.add("capture", reason, call.sizes)
        return Served(outputs, route)

    def _failed(self, task: Task, bucket: Bucket, error: CaptureError) -> Served:
        """The eager answer to a call whose bucket could not be captured; raises leaks."""
        failures, variant = self.capturer.failures, task.call.variant
        if isinstance(error, PaddingLeakError):
            failures.remember(bucket, variant, error)
            raise error
        # A mistake in the function itself surfaces here, as it would without this package.
        outputs = self._run_eagerly(task)
        failures.remember(bucket, variant, error)
        self.outcomes.add("eager", Reason.FAILED, task.call.sizes)
        return Served(outputs)

    def rescue(self, task: Task, bucket: Bucket, error: BaseException) -> PyTree:
        """The eager answer to a call for whose replay there was no memory; else raises `error`.

        Args:
            task: The call.
            bucket: What it was replayed in.
            error: What the replay raised.
        """
        gone = was_donated(task.call, task.target.donate_argnums)
        if gone or not isinstance(error, Exception) or "RESOURCE_EXHAUSTED" not in str(error):
            self.outcomes.add("error", Reason.RUN, task.call.sizes)
            raise error
        logger.warning("%s runs eagerly at %s: %s", task.target.name, bucket, error)
        return self._eager(task, Reason.MEMORY).outputs

    def _split(self, task: Task) -> Served:
        """The call in pieces, each in its bucket; a piece without one runs eagerly."""
        donated = task.target.donate_argnums
        parts = list(pieces(task.call, largest=self._largest_piece, donate_argnums=donated))
        # All pieces but the last are of one size.
        entries = {
            part.sizes: self._entry_for(replace(task, call=part)) for part in (parts[0], parts[-1])
        }
        first = entries[parts[0].sizes]
        if first is None:
            return self._eager(task, Reason.OVERFLOW)
        error = unjoinable(first.outputs)
        if error is not None:
            raise error
        results: list[PyTree] = []
        for part in parts:
            entry = entries[part.sizes]
            if entry is None:
                results.append(self._run_eagerly(replace(task, call=part)))
            else:
                route = entry.route_for(part, fit=Fit.PIECE)
                results.append(route.run(part.args, part.kwargs))
        delete_donated(task.call, donated)
        self.outcomes.add("split", Reason.OVERFLOW, task.call.sizes)
        return Served(joined(results, first.outputs, [part.sizes.batch_size for part in parts]))

    def _entry_for(self, task: Task) -> CUDAGraphEntry | None:
        """The entry that serves a piece, captured where that is allowed."""
        decision = self.decide(task.call)
        if decision.error is not None:
            raise decision.error
        self._queue(decision, task)
        if decision.mode is not CUDAGraphMode.CAPTURE or decision.bucket is None:
            return decision.entry
        with self.capturer.gate.admission() as admitted:
            if not admitted:
                return None
            try:
                return self.capturer.capture_now(task, decision.bucket).value
            except CaptureError as error:
                self.capturer.failures.remember(decision.bucket, task.call.variant, error)
                if isinstance(error, PaddingLeakError):
                    raise
                return None

    def _eager(self, task: Task, reason: Reason) -> Served:
        outputs = self._run_eagerly(task)
        self.outcomes.add("eager", reason, task.call.sizes)
        return Served(outputs)

    @staticmethod
    def _run_eagerly(task: Task) -> PyTree:
        call = task.call
        return run_eagerly(task.target, call.args, call.kwargs, call.sizes)


def _error_reason(error: BaseException, decision: Decision) -> Reason:
    if isinstance(error, PaddingLeakError):
        return Reason.LEAK
    if decision.error is not None:
        return decision.reason
    return Reason.INPUT if isinstance(error, InputShapeError) else Reason.RUN


def _padded(config: CUDAGraphConfig, call: Call, sizes: Bucket) -> Bucket:
    padded = config.bucket_for(*sizes)
    return Bucket(
        padded.batch_size if call.carries_batch else sizes.batch_size,
        padded.seq_len if call.carries_seq else sizes.seq_len,
    )
