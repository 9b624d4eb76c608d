"""Captures: in a request, in a warm-up, in the background; what fails is remembered."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

import jax

from cudagraph_jax._base.changes import Changes
from cudagraph_jax._base.fork import put_right_in_child
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.lru import CacheItem
from cudagraph_jax._base.text import error_text
from cudagraph_jax._base.worker import Background, is_wanted
from cudagraph_jax.capture.failures import Failures
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import CaptureError, CUDAGraphError, InputShapeError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.warm_runs import run_idle
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.advice import trace_advice
from cudagraph_jax.program.call import Call, Variant, argument_leaf_names
from cudagraph_jax.program.function_ref import FunctionRef
from cudagraph_jax.program.program import Program
from cudagraph_jax.program.single_input import check_outputs
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.memory import free_bytes
from cudagraph_jax.xla.settings import ThreadSettings

if TYPE_CHECKING:
    from cudagraph_jax.capture.usage import Upkeep


T = TypeVar("T")


class Capturer:
    """Captures buckets for one manager.

    Args:
        registry: Where captured buckets are held, and the configuration.
        clock: Seconds, for the pauses after failed captures.
        captures_evict: Whether a new capture throws recorded graphs away; asked of the backend if
            None (docs/xla.md, "Command buffers").

    Attributes:
        gate: The mode, and who captures.
        failures: Captures that failed.
        background: Captures that wait.
        is_warm: Whether a warm-up has ended: from then on a capture disturbs traffic.
        free_bytes: Asked what is free of a device's memory, before a warm-up.
        recorded_again: How many buckets were run because a capture had thrown their graphs away.
        upkeep: Who writes down what is hot; None without a store.
    """

    def __init__(
        self,
        registry: CUDAGraphRegistry,
        *,
        clock: Callable[[], float] = time.monotonic,
        captures_evict: Callable[[], bool] | None = None,
    ) -> None:
        self.registry = registry
        enabled = registry.config.enabled
        self.gate = CaptureGate(CUDAGraphMode.CAPTURE if enabled else CUDAGraphMode.DISABLED)
        self.failures = Failures(clock=clock)
        self.background = Background("cudagraph-jax-capture")
        self.is_warm = False
        self.free_bytes: Callable[[jax.Device], int | None] = free_bytes
        self.recorded_again = 0
        self.upkeep: Upkeep | None = None
        if registry.shelf is not None:
            # Here, because most processes keep nothing.
            from cudagraph_jax.capture.usage import Upkeep

            self.upkeep = Upkeep(registry.shelf, registry)
        self._programs: WeakValueDictionary[Variant, Program] = WeakValueDictionary()
        self._first_calls: dict[Variant, Program] = {}
        self._watched: dict[FunctionRef, object] = {}
        self._newest_plan: object = None
        self._captures_evict = _backend_evicts if captures_evict is None else captures_evict

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A function that goes with its manager leaves what it knows of hot buckets. The default is
        # there when the interpreter, at its end, has emptied this module before who holds it.
        if (upkeep := getattr(self, "upkeep", None)) is not None and not is_finalizing():
            upkeep.end()

    def plan_later(self, job: Callable[[], None], *, dropped: Callable[[], None]) -> bool:
        """Has a new grid captured in the background, instead of one that still waits.

        Args:
            job: Captures it.
            dropped: Called instead where the manager is closed or reset before that.

        Returns:
            Whether it will be.
        """
        turn = object()

        def capture() -> None:
            if self._newest_plan is turn:
                job()

        before, self._newest_plan = self._newest_plan, turn
        if self.background.submit(turn, capture, dropped=dropped):
            return True
        self._newest_plan = before
        return False

    def program_of(self, call: Call) -> Program:
        """The one program of the call's variant, for as long as anybody holds it.

        Raises:
            ConfigError: A mesh that is declared for its arrays does not divide the grid.
        """
        program = self._programs.get(call.variant)
        if program is None:
            self._watch(call.variant.function)
            # Of several first calls one makes it: this step nobody cuts in two, unlike the next.
            program = self._first_calls.setdefault(call.variant, Program(call))
            try:
                if program.shardings:
                    self.registry.require(call.variant.function, program.multiples)
                return self._programs.setdefault(call.variant, program)
            finally:
                if self._first_calls.get(call.variant) is program:
                    self._first_calls.pop(call.variant, None)
        program.renew(call)
        return program

    def _watch(self, function: FunctionRef) -> None:
        """Has everything of `function` dropped once it is gone."""
        if function in self._watched:
            return
        own = weakref.ref(self)

        def tell() -> None:
            if (capturer := own()) is not None:
                capturer.release(function)

        if (watch := function.when_gone(tell)) is not None:
            self._watched[function] = watch

    def release(self, function: FunctionRef) -> None:
        """Drops what was captured for a function that is gone, and what failed."""
        self._watched.pop(function, None)
        if self.upkeep is not None:
            self.upkeep.write()  # what was replayed, before it is dropped
        self.failures.forget_function(function)
        self.registry.release(function)

    def capture(
        self,
        call: Call,
        bucket: Bucket,
        *,
        program: Program | None = None,
        iterations: int = 0,
        in_warmup: bool = False,
    ) -> CacheItem[CUDAGraphEntry]:
        """The entry of a call's program at `bucket`, published whole.

        After a warm-up the other buckets are run again where this one threw their recorded graphs
        away.

        Args:
            call: A call of the program; in `debug_mode` the entry is checked against it.
            bucket: For which sizes.
            program: That program, where the caller has it.
            iterations: Runs of a new entry before anybody can see it.
            in_warmup: Whether more captures follow, so that others are not run yet.

        Raises:
            CaptureError: It could not be captured, checked or run.
        """
        program = self.program_of(call) if program is None else program
        if call.target.output_shapes is not None:
            check_outputs(program, call.sizes, call.target.output_shapes)
        try:
            made = self.registry.capture_program(program, bucket, call, iterations=iterations)
        except CaptureError as error:
            advice = _advice(call, bucket, error)
            if advice is None:
                raise
            told = CaptureError(f"{str(error).rstrip('. ')}. {advice}", stage=error.stage)
            raise told from error.__cause__
        except InputShapeError as error:
            if not call.target.single_input:
                raise
            # Axes were guessed by size, and guessed wrong: nothing that the caller declared.
            raise CaptureError(
                f"{error_text(error)} (bucket_jit names axes explicitly)", stage="trace"
            ) from error
        if made.is_new:
            self._settle(made.value, in_warmup=in_warmup)
        return made

    def _settle(self, entry: CUDAGraphEntry, *, in_warmup: bool) -> None:
        """What follows from a new entry."""
        if self.failures.remembered:
            self.failures.forget(entry.bucket, entry.variant)
        if self.upkeep is not None and not self.upkeep.is_begun:
            self.upkeep.begin()
        if not _has_place(entry.program, entry.bucket, self.registry.config):
            # It was decided before the grid changed: whoever asked for it has it all the same.
            self.registry.discard(entry.bucket, entry.variant)
        if entry.variant.function.is_gone:
            self.release(entry.variant.function)  # it went meanwhile
        if self.is_warm and not in_warmup:
            self.record_again(other_than={entry})

    def capture_later(self, bucket: Bucket, call: Call) -> None:
        """Captures and warms up `bucket` off the request path, queued once."""
        variant, config = call.variant, self.registry.config
        generation = self.registry.generation
        # The job must hold no array of the request: it may wait for long.
        program = self.program_of(call)
        abstract, settings = program.example, ThreadSettings()
        if call.target.output_shapes is not None:
            try:
                check_outputs(program, call.sizes, call.target.output_shapes)
            except CaptureError as error:
                self.failures.remember(bucket, variant, error)
                return

        def job() -> None:
            if self.registry.config is not config or self.registry.generation != generation:
                return  # another grid, or dropped since: the next call asks for its own bucket
            if variant.function.is_gone:
                return
            iterations = config.warmup_iterations
            try:
                with settings.applied():
                    self.capture(abstract, bucket, program=program, iterations=iterations)
            except CaptureError as error:
                if is_wanted():
                    self.failures.remember(bucket, variant, error)
                else:
                    logger.warning("%s is not captured: %s", variant.name, error)
            except CUDAGraphError as error:
                final = CaptureError(str(error), stage="trace")
                self.failures.remember(bucket, variant, final)
            except BaseException as error:
                # A function that exits, say: it is not to be tried with each call.
                other = CaptureError(
                    f"cannot capture {bucket}: {type(error).__name__}: {error_text(error)}",
                    stage="compile",
                )
                self.failures.remember(bucket, variant, other)
                raise

        self.background.submit((bucket, variant), job)

    def close(self) -> None:
        """Ends the background worker: what waits is dropped, what runs is finished."""
        if self.registry.shelf is not None:
            self.registry.shelf.store.stop_waiting()
        try:
            # The worker may wait for a bucket that this very thread captures, as when a signal
            # handler closes.
            self.background.close(wait=not self.gate.is_inside)
        finally:
            if self.upkeep is not None:
                self.upkeep.end()

    def reset(self) -> None:
        """Forgets failures, counts, and what waits to be captured."""
        self.background.clear()
        self.failures.clear()
        self.is_warm = False
        self.recorded_again = 0

    def end_warmup(self, captured: Collection[CUDAGraphEntry] | None) -> None:
        """From now on a capture disturbs traffic; runs what this warm-up has thrown away.

        Args:
            captured: What it ran; None: nothing was captured.
        """
        if self.is_warm and captured is not None:
            # Those of other functions lost what they had recorded.
            self.record_again(other_than=captured)
        self.is_warm = True

    def record_again(self, *, other_than: Collection[CUDAGraphEntry] = ()) -> None:
        """Runs every bucket once, on backends where a new capture throws recorded graphs away.

        One that does not run any more is dropped, and remembered as one that failed.
        """
        if not self._captures_evict():
            return
        for entry in self.registry.entries():
            if entry in other_than or entry.is_shared:  # other processes do not run it now
                continue
            try:
                run_idle(entry, 1)
            except InputShapeError as error:
                logger.debug("%s is not run again: %s", entry, error)
                continue
            except CaptureError as error:
                self.registry.discard_broken(entry, error)
                self.failures.remember(entry.bucket, entry.variant, error)
            self.recorded_again += 1  # or it was tried, at least


def _advice(call: Call, bucket: Bucket, error: CaptureError) -> str | None:
    """What the caller may do about a function that cannot be traced."""
    if error.stage != "trace" or call.target.single_input:
        return None
    names = argument_leaf_names(call.declared.argument_names, call.args, call.kwargs)
    leaves = zip(names, call.leaves, call.axes, strict=True)
    return trace_advice(error.__cause__, leaves, sizes=call.sizes, bucket=bucket)


def is_stale(program: Program, bucket: Bucket, old: CUDAGraphConfig, new: CUDAGraphConfig) -> bool:
    """Whether `bucket` was of the grid of `old` and has no place in that of `new`.

    What lies outside the limits of both was captured for `on_overflow="exact"`, and serves on.
    """
    if old is new:
        return False
    if not new.admits(bucket, program.carried):
        return old.admits(bucket, program.carried)
    return not _has_place(program, bucket, new)


def _has_place(program: Program, bucket: Bucket, config: CUDAGraphConfig) -> bool:
    """Whether calls under `config` are padded to `bucket`."""
    if not config.admits(bucket, program.carried):
        return config.on_overflow == "exact"
    return config.padded(bucket, program.carried) == bucket


def _backend_evicts() -> bool:
    return jax.default_backend() == "gpu"


class CaptureGate:
    """Admits captures while the mode is CAPTURE, and can wait for those it has admitted.

    Args:
        mode: The mode to begin with.

    Attributes:
        mode: The most that may be done; `change` sets it.
    """

    def __init__(self, mode: CUDAGraphMode) -> None:
        self.mode = mode
        self.after_fork()
        put_right_in_child(self)

    def after_fork(self) -> None:
        """Begins with nobody inside; in a child, that is where they are."""
        self._changes = Changes()
        self._inside: dict[object, int] = {}
        self._settling: set[int] = set()

    def change(self, mode: CUDAGraphMode) -> None:
        """Sets the mode; effective for the next admission."""
        self.mode = mode

    def within(self, act: Callable[[bool], T]) -> T:
        """What `act` gives, which is told whether it may capture; `settle` waits for its end if so.

        It is no context manager: an interrupt on the way into the exit of one skips that.
        """
        ticket, thread = object(), threading.get_ident()
        try:
            # First, so that whoever changes the mode and settles sees this, or this the new mode.
            self._inside[ticket] = thread
            is_admitted = self.mode is CUDAGraphMode.CAPTURE
            if not is_admitted:
                self._leave(ticket, thread)
            return act(is_admitted)
        finally:
            try:
                self._leave(ticket, thread)
            except BaseException:  # one of two interrupts
                self._leave(ticket, thread)
                raise

    @property
    def is_inside(self) -> bool:
        """Whether this thread is inside."""
        return threading.get_ident() in self._inside.values()

    def _leave(self, ticket: object, thread: int) -> None:
        self._inside.pop(ticket, None)
        if thread not in self._inside.values():
            self._settling.discard(thread)
        self._changes.tell()

    def settle(self, *, is_waited_for: bool = False) -> None:
        """Waits until no other thread is inside.

        From inside it does not wait for those that have called this from inside themselves, which
        would be for ever.

        Args:
            is_waited_for: Whether such threads may wait for the caller, as for a worker.
        """
        if self.is_inside:
            self._settling.add(threading.get_ident())
            self._changes.tell()
        elif not is_waited_for:
            self._changes.wait_for(lambda: not self._inside)
            return
        self._changes.wait_for(lambda: self._settling.issuperset(list(self._inside.values())))
