"""What is behind the manager: one call decided, served and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import CaptureError, PaddingLeakError
from cudagraph_jax.graphs.call import Call
from cudagraph_jax.graphs.check import check_entry
from cudagraph_jax.graphs.decision import Decision, Holdings, Reason, decide
from cudagraph_jax.graphs.eager import run_eagerly
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.failures import Failures
from cudagraph_jax.graphs.lru import Made
from cudagraph_jax.graphs.outcomes import Outcomes
from cudagraph_jax.graphs.program import Program, Target
from cudagraph_jax.graphs.registry import CUDAGraphRegistry
from cudagraph_jax.graphs.route import Route
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.prefix import PyTree

logger = logging.getLogger("cudagraph_jax")


class Served(NamedTuple):
    """The answer to a call.

    Attributes:
        outputs: What the caller gets.
        route: How a call of the same shapes is served without deciding again; None where each is
            decided anew.
    """

    outputs: PyTree
    route: Route | None


class Dispatcher:
    """Serves calls: the state and the steps that `CUDAGraphManager` and `bucket_jit` share.

    Args:
        config: Limits and policies.
        registry: Where captured buckets are.

    Attributes:
        mode: The most that is done with a call.
        failures: Captures that failed.
        outcomes: Counts of the calls that were no replays.
    """

    def __init__(self, config: CUDAGraphConfig, registry: CUDAGraphRegistry) -> None:
        self.config = config
        self.registry = registry
        self.mode = CUDAGraphMode.CAPTURE if config.enabled else CUDAGraphMode.DISABLED
        self.failures = Failures()
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
        holdings = Holdings(
            find=lambda bucket: self.registry.find(bucket, call.variant),
            find_larger=lambda: self.registry.find_larger(call.sizes, call.variant),
            failed=lambda bucket: self.failures.get(bucket, call.variant),
        )
        return decide(self.config, self.mode, call.sizes, self.bucket_for(call), holdings)

    def serve(
        self,
        call: Call,
        target: Target,
        *,
        single_input: bool = False,
        before_capture: Callable[[Program], None] | None = None,
    ) -> Served:
        """The outputs of `call`, by whichever way was decided.

        Args:
            call: The call.
            target: Its function.
            single_input: Whether the function takes one pytree (the specification's calls).
            before_capture: Called before a new bucket is compiled; what it raises goes through.

        Raises:
            CUDAGraphError: What the policies turn into an error, and leaks in `debug_mode`.
        """
        decision = self.decide(call)
        if decision.error is not None:
            self.outcomes.add("error", decision.reason)
            raise decision.error
        if decision.entry is not None:
            route = decision.entry.route_for(call, fit=decision.fit)
            return Served(route.run(call.args, call.kwargs), route)
        if decision.mode is not CUDAGraphMode.CAPTURE or decision.bucket is None:
            return self._eager(call, target, decision.reason)
        program = Program(target, call)
        if before_capture is not None:
            before_capture(program)
        return self._capture_and_run(call, program, decision.bucket, single_input)

    def capture(
        self, program: Program, bucket: Bucket, call: Call, *, single_input: bool = False
    ) -> Made[CUDAGraphEntry]:
        """The entry of `program` at `bucket`; checked against `call` in `debug_mode`.

        Raises:
            CaptureError: It could not be captured.
        """

        def prove(entry: CUDAGraphEntry) -> None:
            check_entry(entry, call)

        made = self.registry.capture_program(
            program,
            bucket,
            single_input=single_input,
            prove=prove if self.config.debug_mode else None,
        )
        if made.is_new:
            logger.info(
                "captured %s of %s in %.0f ms", bucket, program.variant, made.value.capture_time_ms
            )
        return made

    def _capture_and_run(
        self, call: Call, program: Program, bucket: Bucket, single_input: bool
    ) -> Served:
        try:
            made = self.capture(program, bucket, call, single_input=single_input)
        except PaddingLeakError:
            self.outcomes.add("error", Reason.MISS)
            raise
        except CaptureError as error:
            # A mistake in the function itself surfaces here, as it would without this package.
            served = self._eager(call, program.target, Reason.FAILED)
            self.failures.remember(bucket, call.variant, error)
            return served
        route = made.value.route_for(call)
        if not made.is_new:
            return Served(route.run(call.args, call.kwargs), route)
        outputs = route.execute(call.args, call.kwargs)
        self.outcomes.add("capture", Reason.MISS)
        return Served(outputs, route)

    def _eager(self, call: Call, target: Target, reason: Reason) -> Served:
        outputs = run_eagerly(target, call.args, call.kwargs, call.sizes)
        self.outcomes.add("eager", reason)
        return Served(outputs, None)

    def stats(self) -> dict[str, object]:
        """Counts and times, in values that JSON can hold."""
        totals = self.registry.totals
        eager, errors = self.outcomes.by_reason("eager"), self.outcomes.by_reason("error")
        captures = sum(self.outcomes.by_reason("capture").values())
        missed = sum(eager.get(reason, 0) for reason in ("miss", "sealed", "failed"))
        return {
            "enabled": self.mode is not CUDAGraphMode.DISABLED,
            "mode": self.mode.value,
            "registry": self.registry.stats(),
            "calls": totals.replays + captures + sum(eager.values()) + sum(errors.values()),
            "hits": totals.replays,
            "misses": captures + missed,
            "replays": {
                "exact": totals.exact,
                "padded": totals.padded,
                "larger": totals.larger,
            },
            "captures": captures,
            "eager_calls": sum(eager.values()),
            "eager_by_reason": eager,
            "errors_by_reason": errors,
            "failed_buckets": len(self.failures),
            "evictions": self.registry.evictions,
            "real_elements": totals.real_elements,
            "padded_elements": totals.computed_elements - totals.real_elements,
            "waste": totals.waste,
            "compile_seconds": self.registry.capture_ms / 1e3,
        }
