"""Captures: in a request, in a warm-up, in the background; what fails is remembered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import CaptureError, CUDAGraphError, InputShapeError
from cudagraph_jax.graphs.background import Background
from cudagraph_jax.graphs.call import Call, abstract_call
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.failures import Failures
from cudagraph_jax.graphs.idle import run_idle
from cudagraph_jax.graphs.lru import Made
from cudagraph_jax.graphs.program import Program, Target
from cudagraph_jax.graphs.registry import CUDAGraphRegistry
from cudagraph_jax.shapes.ladder import Bucket

logger = logging.getLogger("cudagraph_jax")


@dataclass(frozen=True, slots=True)
class Task:
    """A call with the function that it is for.

    Attributes:
        call: The call.
        target: Its function.
        single_input: Whether the function takes one pytree (the specification's calls).
        before_capture: Called before a new bucket is compiled; what it raises goes through.
    """

    call: Call
    target: Target
    single_input: bool = False
    before_capture: Callable[[Program], None] | None = None


class Capturer:
    """Captures buckets for one manager.

    Args:
        config: Compiler options, checks and warm-up runs.
        registry: Where captured buckets are held.
        clock: Seconds, for the pauses after failed captures.
        captures_evict: Whether a new capture throws recorded graphs away; asked of the backend if
            None (FACTS.md, "Command buffers").

    Attributes:
        failures: Captures that failed.
        background: Captures that wait.
        is_warm: Whether a warm-up has ended: from then on a capture disturbs traffic.
        recorded_again: How many buckets were run because a capture had thrown their graphs away.
    """

    def __init__(
        self,
        config: CUDAGraphConfig,
        registry: CUDAGraphRegistry,
        *,
        clock: Callable[[], float] = time.monotonic,
        captures_evict: Callable[[], bool] | None = None,
    ) -> None:
        self.config = config
        self.registry = registry
        self.failures = Failures(clock=clock)
        self.background = Background("cudagraph-jax-capture")
        self.is_warm = False
        self.recorded_again = 0
        self._captures_evict = _backend_evicts if captures_evict is None else captures_evict

    def capture(
        self, program: Program, bucket: Bucket, task: Task, *, iterations: int = 0
    ) -> Made[CUDAGraphEntry]:
        """The entry of `program` at `bucket`, published whole.

        Args:
            program: What to compile.
            bucket: For which sizes.
            task: A call of the program; in `debug_mode` the entry is checked against it.
            iterations: Runs of a new entry before anybody can see it.

        Raises:
            CaptureError: It could not be captured, checked or run.
        """
        made = self.registry.capture_program(
            program,
            bucket,
            task.call,
            single_input=task.single_input,
            iterations=iterations,
        )
        if made.is_new:
            self.failures.forget(bucket, program.variant)
            logger.info(
                "captured %s of %s in %.0f ms", bucket, program.variant, made.value.capture_time_ms
            )
            if self.is_warm:
                self.record_again(other_than=made.value)
        return made

    def capture_for(
        self, task: Task, bucket: Bucket, *, iterations: int = 0
    ) -> Made[CUDAGraphEntry]:
        """The entry of a task's own program at `bucket`; see `capture`."""
        program = Program(task.target, task.call)
        if task.before_capture is not None:
            task.before_capture(program)
        try:
            return self.capture(program, bucket, task, iterations=iterations)
        except InputShapeError as error:
            if not task.single_input:
                raise
            # Axes were guessed by size, and guessed wrong: nothing that the caller declared.
            raise CaptureError(
                f"{error} (bucket_jit names axes explicitly)", stage="trace"
            ) from error

    def capture_later(self, bucket: Bucket, task: Task) -> None:
        """Captures and warms up `bucket` off the request path, queued once."""
        abstract = replace(task, call=abstract_call(task.call))

        def job() -> None:
            try:
                self.capture_for(abstract, bucket, iterations=self.config.warmup_iterations)
            except CaptureError as error:
                self.failures.remember(bucket, task.call.variant, error)
            except CUDAGraphError as error:
                final = CaptureError(str(error), stage="trace")
                self.failures.remember(bucket, task.call.variant, final)

        self.background.submit((bucket, task.call.variant), job)

    def reset(self) -> None:
        """Forgets failures and counts."""
        self.failures.clear()
        self.is_warm = False
        self.recorded_again = 0

    def record_again(self, *, other_than: CUDAGraphEntry | None = None) -> None:
        """Runs every bucket once, on backends where a new capture throws recorded graphs away."""
        if not self._captures_evict():
            return
        for entry in self.registry.entries():
            if entry is not other_than:
                run_idle(entry, 1)
                self.recorded_again += 1


def _backend_evicts() -> bool:
    return jax.default_backend() == "gpu"
