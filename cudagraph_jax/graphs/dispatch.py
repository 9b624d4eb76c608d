"""What is behind the manager: one call decided, served and counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import CaptureError, PaddingLeakError
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
    check_joinable,
    delete_donated,
    joined,
    piece_rows,
    pieces,
)
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
        config: Limits and policies.
        registry: Where captured buckets are.
        capturer: What captures.

    Attributes:
        mode: The most that is done with a call.
        outcomes: Counts of the calls that were no replays.
    """

    def __init__(
        self, config: CUDAGraphConfig, registry: CUDAGraphRegistry, *, capturer: Capturer
    ) -> None:
        self.config = config
        self.registry = registry
        self.capturer = capturer
        self.mode = CUDAGraphMode.CAPTURE if config.enabled else CUDAGraphMode.DISABLED
        self.outcomes = Outcomes()

    def bucket_for(self, call: Call) -> Bucket:
        """The bucket that `call` is padded to; a size that no array carries stays as it is."""
        padded = self.config.bucket_for(*call.sizes)
        return Bucket(
            padded.batch_size if call.carries_batch else call.sizes.batch_size,
            padded.seq_len if call.carries_seq else call.sizes.seq_len,
        )

    def decide(self, call: Call) -> Decision:
        """What is done with `call`; nothing is run."""
        decision = self._decide(call, call.sizes)
        if decision.reason is not Reason.SPLIT:
            return decision
        for rows in piece_rows(call.sizes.batch_size, self._largest_piece):
            part = self._decide(call, call.sizes._replace(batch_size=rows))
            if part.error is not None:
                return part
        return decision

    @property
    def _largest_piece(self) -> int:
        return Ladder(self.config.capture_sizes).max

    def _decide(self, call: Call, sizes: Bucket) -> Decision:
        holdings = Holdings(
            find=lambda bucket: self.registry.find(bucket, call.variant),
            find_larger=lambda: self.registry.find_larger(sizes, call.variant),
            failed=lambda bucket: self.capturer.failures.get(bucket, call.variant),
        )
        bucket = self.bucket_for(replace(call, sizes=sizes))
        return decide(self.config, self.mode, sizes, bucket, holdings)

    def serve(self, task: Task) -> Served:
        """The outputs of a call, by whichever way was decided; counted once.

        Raises:
            CUDAGraphError: What the policies turn into an error, and leaks in `debug_mode`.
        """
        decision = self.decide(task.call)
        try:
            return self._act(decision, task)
        except PaddingLeakError:
            self.outcomes.add("error", Reason.LEAK)
            raise
        except BaseException:
            reason = Reason.RUN if decision.error is None else decision.reason
            self.outcomes.add("error", reason)
            raise

    def _act(self, decision: Decision, task: Task) -> Served:
        self.registry.fork_guard.check()
        call = task.call
        if decision.error is not None:
            raise decision.error
        if decision.in_background and decision.bucket is not None:
            self.capturer.capture_later(self.bucket_for(call), task)
        if decision.entry is not None:
            route = decision.entry.route_for(call, fit=decision.fit)
            outputs = route.run(call.args, call.kwargs)
            # The bucket that is being captured takes over as soon as it is there.
            return Served(outputs, None if decision.in_background else route)
        if decision.reason is Reason.SPLIT:
            return self._split(task)
        if decision.mode is not CUDAGraphMode.CAPTURE or decision.bucket is None:
            return self._eager(task, decision.reason)
        return self._capture_and_run(task, decision.bucket, decision.reason)

    def _capture_and_run(self, task: Task, bucket: Bucket, reason: Reason) -> Served:
        call = task.call
        try:
            made = self.capturer.capture_for(task, bucket)
        except PaddingLeakError:
            raise
        except CaptureError as error:
            # A mistake in the function itself surfaces here, as it would without this package.
            outputs = self._run_eagerly(task)
            self.capturer.failures.remember(bucket, call.variant, error)
            self.outcomes.add("eager", Reason.FAILED)
            return Served(outputs)
        route = made.value.route_for(call)
        if not made.is_new:
            return Served(route.run(call.args, call.kwargs), route)
        outputs = route.execute(call.args, call.kwargs)
        self.outcomes.add("capture", reason)
        return Served(outputs, route)

    def _split(self, task: Task) -> Served:
        """The call in pieces; eagerly as a whole where its first piece has no bucket."""
        results: list[PyTree] = []
        entry: CUDAGraphEntry | None = None
        donated = task.target.donate_argnums
        parts = list(pieces(task.call, largest=self._largest_piece, donate_argnums=donated))
        for piece in parts:
            part = replace(task, call=piece)
            found = self._entry_for(part)
            if found is None and entry is None:
                return self._eager(task, Reason.OVERFLOW)
            if found is None:
                results.append(self._run_eagerly(part))
                continue
            if entry is None:
                entry = found
                check_joinable(entry.outputs)
            route = found.route_for(piece, fit=Fit.PIECE)
            results.append(route.run(piece.args, piece.kwargs))
        delete_donated(task.call, donated)
        self.outcomes.add("split", Reason.OVERFLOW)
        assert entry is not None  # a call that is split has a piece
        return Served(joined(results, entry.outputs, [part.sizes.batch_size for part in parts]))

    def _entry_for(self, task: Task) -> CUDAGraphEntry | None:
        """The entry that serves a piece, captured where that is allowed."""
        decision = self.decide(task.call)
        if decision.error is not None:
            raise decision.error
        if decision.in_background and decision.bucket is not None:
            self.capturer.capture_later(self.bucket_for(task.call), task)
        if decision.mode is not CUDAGraphMode.CAPTURE or decision.bucket is None:
            return decision.entry
        try:
            return self.capturer.capture_for(task, decision.bucket).value
        except PaddingLeakError:
            raise
        except CaptureError as error:
            self.capturer.failures.remember(decision.bucket, task.call.variant, error)
            return None

    def _eager(self, task: Task, reason: Reason) -> Served:
        outputs = self._run_eagerly(task)
        self.outcomes.add("eager", reason)
        return Served(outputs)

    @staticmethod
    def _run_eagerly(task: Task) -> PyTree:
        call = task.call
        return run_eagerly(task.target, call.args, call.kwargs, call.sizes)

    def stats(self) -> dict[str, Any]:
        """Counts and times, in values that JSON can hold."""
        totals = self.registry.totals
        eager, errors = self.outcomes.by_reason("eager"), self.outcomes.by_reason("error")
        captures = sum(self.outcomes.by_reason("capture").values())
        splits = sum(self.outcomes.by_reason("split").values())
        missed = sum(eager.get(reason, 0) for reason in ("miss", "queued", "sealed", "failed"))
        return {
            "enabled": self.mode is not CUDAGraphMode.DISABLED,
            "mode": self.mode.value,
            "registry": self.registry.stats(),
            "calls": totals.calls + captures + splits + sum(eager.values()) + sum(errors.values()),
            "hits": totals.calls,
            "misses": captures + missed,
            "replays": {
                "exact": totals.exact,
                "padded": totals.padded,
                "larger": totals.larger,
            },
            "captures": captures,
            "splits": splits,
            "pieces": totals.pieces,
            "queued": len(self.capturer.background),
            "recorded_again": self.capturer.recorded_again,
            "eager_calls": sum(eager.values()),
            "eager_by_reason": eager,
            "errors_by_reason": errors,
            "failed_buckets": len(self.capturer.failures),
            "evictions": self.registry.evictions,
            "real_elements": totals.real_elements,
            "padded_elements": totals.computed_elements - totals.real_elements,
            "waste": totals.waste,
            "compile_seconds": self.registry.capture_ms / 1e3,
        }
