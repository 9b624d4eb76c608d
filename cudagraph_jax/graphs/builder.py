"""Makes entries: compiles a bucket, checks it, runs it; held by nobody yet."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.fork import forkable_lock, use_jax
from cudagraph_jax.graphs.call import Call
from cudagraph_jax.graphs.check import check_entry
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.idle import run_idle
from cudagraph_jax.graphs.journal import Journal, Ledger
from cudagraph_jax.graphs.observers import Observers, annotation
from cudagraph_jax.graphs.program import Program
from cudagraph_jax.shapes.ladder import Bucket


class Builder:
    """Makes the entries of one registry, and counts them.

    Args:
        clock: Seconds, for capture times.
        observers: Who watches the entries.

    Attributes:
        captures: How many there have been.
        capture_ms: Milliseconds of all of them.
    """

    def __init__(self, *, clock: Callable[[], float], observers: Observers[CUDAGraphEntry]) -> None:
        self._clock = clock
        self._observers = observers
        self._ids = itertools.count(1)
        self._lock = forkable_lock()
        self.captures = 0
        self.capture_ms = 0.0

    def build(
        self,
        program: Program,
        bucket: Bucket,
        call: Call,
        *,
        config: CUDAGraphConfig,
        ledger: Ledger,
        single_input: bool = False,
        iterations: int = 0,
    ) -> CUDAGraphEntry:
        """A new entry of `program` at `bucket`, complete.

        Args:
            program: What to compile.
            bucket: For which sizes.
            call: A call of the program, which `debug_mode` checks against.
            config: Compiler options and checks.
            ledger: Where its replays are added up.
            single_input: Whether its `replay` takes the function's only argument.
            iterations: Runs of it.

        Raises:
            CaptureError: Compiling, checking or running failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        use_jax()
        with annotation("capture", program.target.name, bucket):
            outputs = program.outputs(bucket, others=config.buckets(seq_len=bucket.seq_len))
            executable = program.compile(
                bucket, compiler_options=config.xla_options(), clock=self._clock
            )
        with self._lock:
            self.captures += 1
            self.capture_ms += executable.compile_ms
        entry = CUDAGraphEntry(
            bucket=bucket,
            program=program,
            executable=executable,
            outputs=outputs,
            graph_id=next(self._ids),
            single_input=single_input,
            copies_inputs=config.cudagraph_copy_inputs,
            waits=config.debug_mode,
            journal=Journal(bucket, ledger, executable),
            observers=self._observers,
        )
        if config.debug_mode:
            check_entry(entry, call, pads_seq=config.capture_seq_lens is not None)
        run_idle(entry, iterations, leaves=call.leaves)
        return entry

    def forget(self) -> None:
        """Counts from zero again."""
        with self._lock:
            self.captures = 0
            self.capture_ms = 0.0
