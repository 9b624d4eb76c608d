"""Compiles the next buckets of a warm-up in threads, while the first of them is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from cudagraph_jax.errors import CUDAGraphError
from cudagraph_jax.graphs.executable import Lowering, stage_errors
from cudagraph_jax.graphs.outputs import Outputs
from cudagraph_jax.graphs.variant import Variant
from cudagraph_jax.graphs.wanted import Compiler, Complete, Wanted, lowered
from cudagraph_jax.shapes.ladder import Bucket

Begin = Callable[[Wanted], None]


class _Begun(NamedTuple):
    wanted: Wanted
    complete: Future[Complete]


class CompilesAhead:
    """Executables that are being compiled, until whoever captures their buckets takes them.

    A function is traced and lowered by whoever asks, since what the caller set up for tracing
    (`jax.default_matmul_precision` and such) is not known to other threads. XLA takes most of the
    time, and threads for it.

    Args:
        compiler: What compiles.
        clock: Seconds, for capture times.
    """

    def __init__(self, *, compiler: Compiler, clock: Callable[[], float]) -> None:
        self._compiler = compiler
        self._clock = clock
        self._begun: dict[tuple[Bucket, Variant], _Begun] = {}

    @contextmanager
    def running(
        self, workers: int, *, is_captured: Callable[[Bucket, Variant], bool]
    ) -> Iterator[Begin]:
        """A function that begins with an executable, if nobody has; it does not wait for it.

        What cannot be lowered is left to whoever captures it, and so is what nobody took.

        Args:
            workers: How many are compiled at a time.
            is_captured: Whether a bucket is captured, or is being captured by now.
        """
        all_begun: list[_Begun] = []
        pool = ThreadPoolExecutor(workers, thread_name_prefix="cudagraph-jax-compile")

        def begin(wanted: Wanted) -> None:
            key = (wanted.bucket, wanted.program.variant)
            begun = _Begun(wanted, Future())
            # First: whoever captures it from now on takes it, and who began before is known.
            if self._begun.setdefault(key, begun) is not begun:
                return
            all_begun.append(begun)
            if is_captured(*key) and self._begun.pop(key, None) is begun:
                return
            try:
                outputs, lowering = lowered(wanted, clock=self._clock)
            except CUDAGraphError as error:
                self._begun.pop(key, None)
                begun.complete.set_exception(error)
                return
            pool.submit(self._compile, begun, outputs, lowering)

        try:
            yield begin
        finally:
            pool.shutdown(cancel_futures=True)
            for begun in all_begun:
                begun.complete.cancel()
                key = (begun.wanted.bucket, begun.wanted.program.variant)
                if self._begun.get(key) is begun:
                    del self._begun[key]

    def take(self, wanted: Wanted) -> Complete | None:
        """What was begun for just this, by whomever, once it is compiled; None where nothing was.

        Raises:
            CaptureError: It could not be compiled.
        """
        key = (wanted.bucket, wanted.program.variant)
        begun = self._begun.get(key)
        if begun is None or begun.wanted.options != wanted.options:
            return None
        if self._begun.pop(key, None) is not begun:
            return None
        try:
            outputs, executable = begun.complete.result()
        except CancelledError:
            return None  # the warm-up that began it has ended
        if begun.wanted.grid != wanted.grid:
            # Of another program: the code is the same, the axes may have been found otherwise.
            outputs = wanted.program.outputs(wanted.bucket, others=wanted.others)
        return outputs, executable

    def _compile(self, begun: _Begun, outputs: Outputs, lowering: Lowering) -> None:
        try:
            with stage_errors("compile", str(begun.wanted)):
                executable = self._compiler(begun.wanted, lowering, clock=self._clock)
        except BaseException as error:
            begun.complete.set_exception(error)
        else:
            begun.complete.set_result((outputs, executable))
