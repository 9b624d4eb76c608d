"""Makes entries: compiles a bucket, checks it, runs it; held by nobody yet."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax

from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.log import logger
from cudagraph_jax.capture.ahead import CompilesAhead, Preparation
from cudagraph_jax.capture.peers import CAPTURES_TAKE, PEERS
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import CaptureError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.observers import Observers, annotation
from cudagraph_jax.graphs.replay_counts import Journal, Ledger
from cudagraph_jax.graphs.warm_runs import run_idle
from cudagraph_jax.program.call import Call
from cudagraph_jax.program.padded import refills_of
from cudagraph_jax.program.program import Compiler, CompileRequest, Program, request_for
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.stages import Executable, Lowering, stage_errors

if TYPE_CHECKING:
    from cudagraph_jax.capture.persistent import Shelf
    from cudagraph_jax.store import GraphStore


class Builder:
    """Makes the entries of one registry, and counts them.

    Args:
        clock: Seconds, for capture times.
        observers: Who watches the entries.
        shelf: Where executables are looked up before they are compiled; None: nowhere.
        compiler: What compiles in the place of XLA, without a shelf; None: XLA.

    Attributes:
        captures: How many were compiled.
        capture_ms: Milliseconds of all of them.
        loads: How many were loaded instead.
        load_ms: Milliseconds of all of those.
        ahead: What is loaded or compiled before its bucket is captured.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        observers: Observers,
        shelf: Shelf | None,
        compiler: Compiler | None,
    ) -> None:
        self._clock = clock
        self._observers = observers
        self._shelf = shelf
        self._compiler = compiler
        self.ahead = CompilesAhead(self._prepare)
        self._ids = itertools.count(1)
        self.captures = self.loads = 0
        self.capture_ms = self.load_ms = 0.0

    def build(
        self,
        program: Program,
        bucket: Bucket,
        call: Call,
        *,
        config: CUDAGraphConfig,
        ledger: Ledger,
        held: Callable[[], Sequence[CUDAGraphEntry]],
        iterations: int = 0,
    ) -> CUDAGraphEntry:
        """A new entry of `program` at `bucket`, complete.

        Args:
            program: What to compile.
            bucket: For which sizes.
            call: A call of the program, which `debug_mode` checks against.
            config: Compiler options and checks.
            ledger: Where its replays are added up.
            held: What is captured already.
            iterations: Runs of it.

        Raises:
            CaptureError: Compiling, checking or running failed.
            InputShapeError: An output that must be trimmed cannot be.
            DistributedError: It spans processes that do not agree on it, or evicts what they share.
        """
        use_jax()
        request = request_for(program, bucket, config=config, is_stored=self._shelf is not None)
        while True:
            with (
                PEERS.telling_of_capture(request, call, config),
                annotation("capture", program.target.name, bucket),
            ):
                outputs, finish = self._begun_or_prepared(request)
                executable = finish()
                if _is_too_large(executable, config) and (frugal := _for_memory(request)):
                    request, executable = frugal, self._recompiled(frugal, executable)
            self._count(executable)
            entry = CUDAGraphEntry(
                bucket=bucket,
                program=program,
                executable=executable,
                outputs=outputs,
                refills=refills_of(outputs, executable, left=program.on_left),
                graph_id=next(self._ids),
                options=request.options,
                copies_inputs=config.cudagraph_copy_inputs,
                waits=config.debug_mode,
                journal=Journal(bucket, ledger, executable),
                observers=self._observers,
                is_shared=PEERS.agree_on_capture(
                    request, call, outputs, executable, held=held(), config=config
                ),
            )
            try:
                _prove(entry, call, config=config, iterations=iterations)
            except CaptureError as error:
                if not entry.is_loaded:
                    raise
                self.reject(entry, error)  # and once more, compiled
            else:
                return entry

    def _begun_or_prepared(self, request: CompileRequest) -> Preparation:
        """What is asked for, from where it is there first."""
        begun = self.ahead.take(request) if self.ahead.begun else None
        return begun or self._prepare(request)

    def _prepare(self, request: CompileRequest) -> Preparation:
        """What is asked for, traced, and what has it loaded or compiled."""
        if self._shelf is not None:
            return self._shelf.prepare(request)
        outputs, lowering = request.lower(clock=self._clock)
        if self._compiler is not None:
            return Preparation(outputs, partial(self._compile, self._compiler, request, lowering))
        return Preparation(outputs, request.compiling(lowering, clock=self._clock))

    def _compile(
        self, compiler: Compiler, request: CompileRequest, lowering: Lowering
    ) -> Executable:
        with stage_errors("compile", str(request)):
            return compiler(request, lowering, clock=self._clock)

    def _recompiled(self, frugal: CompileRequest, wide: Executable) -> Executable:
        """The one that takes less memory, and its time beside that of the other."""
        executable = self._begun_or_prepared(frugal).finish()
        return replace(executable, compile_ms=wide.compile_ms + executable.compile_ms)

    def reject(self, entry: CUDAGraphEntry, error: CaptureError) -> None:
        """Has what was loaded for `entry`, and does not do, compiled the next time instead."""
        if self._shelf is None or not entry.is_loaded:
            return
        logger.warning("%s of the store is compiled again: %s", entry.bucket, error)
        self._shelf.distrust(entry.bucket, entry.variant)
        took_ms = entry.capture_time_ms
        self.loads -= 1
        self.load_ms -= took_ms

    def forget(self) -> None:
        """Counts from zero again."""
        self.captures = self.loads = 0
        self.capture_ms = self.load_ms = 0.0

    def _count(self, executable: Executable) -> None:
        took_ms = executable.compile_ms
        if executable.is_loaded:
            self.loads += 1
            self.load_ms += took_ms
        else:
            self.captures += 1
            self.capture_ms += took_ms


# XLA's CPU compiler orders operations so that many may run at once, with temporary memory for each:
# 512 MiB for 64 of 8 MiB, where one after the other takes 16 (docs/xla.md, "Memory").
_ONE_BY_ONE = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def _is_too_large(executable: Executable, config: CUDAGraphConfig) -> bool:
    budget, memory = config.memory_budget_bytes, executable.memory
    if budget is None or memory is None or memory.kept_bytes > budget:
        return False  # or less temporary memory would not do either
    return memory.total_bytes > budget


def _for_memory(request: CompileRequest) -> CompileRequest | None:
    """The same with less temporary memory; None where XLA cannot be asked for it."""
    if jax.default_backend() != "cpu" or not _ONE_BY_ONE.keys().isdisjoint(request.options):
        return None
    return request._replace(options={**request.options, **_ONE_BY_ONE})


def _prove(entry: CUDAGraphEntry, call: Call, *, config: CUDAGraphConfig, iterations: int) -> None:
    if config.debug_mode:
        from cudagraph_jax.graphs.check import check_entry

        # Nobody but the check sees its examples; `disable_jit` as in `run_idle`.
        with jax.transfer_guard("allow"), jax.disable_jit(False):
            check_entry(
                entry,
                call,
                pads_seq=config.capture_seq_lens is not None,
                compare_where=config.compare_where,
            )
    if iterations:
        run = partial(run_idle, entry, iterations, call=call)
        PEERS.run_together(entry, run, timeout_s=CAPTURES_TAKE * config.process_timeout_s)


def shelf_of(
    store: GraphStore | str | os.PathLike[str] | None, *, clock: Callable[[], float]
) -> Shelf | None:
    """The shelf in a store or a directory.

    Raises:
        ConfigError: It is neither.
        StoreError: The directory cannot be used.
    """
    if store is None:
        return None
    # Here, because most processes keep nothing.
    from cudagraph_jax.capture.persistent import Shelf
    from cudagraph_jax.store import GraphStore

    return Shelf(store if isinstance(store, GraphStore) else GraphStore(store), clock=clock)
