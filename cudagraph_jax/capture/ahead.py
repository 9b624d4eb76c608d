"""Compiles the next buckets of a warm-up in threads, while the first of them is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from cudagraph_jax.errors import CUDAGraphError
from cudagraph_jax.program.call import Variant
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.program import Compiler, CompileRequest
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.stages import Executable, Lowering, stage_errors

Begin = Callable[[CompileRequest], None]


class _Begun(NamedTuple):
    request: CompileRequest
    outputs: Outputs
    executable: Future[Executable]


class CompilesAhead:
    """Executables that are being compiled, until whoever captures their buckets takes them.

    A function is traced and lowered by whoever asks, since what the caller set up for tracing
    (`jax.default_matmul_precision` and such) is not known to other threads. XLA takes most of the
    time, and threads for it.

    Args:
        compiler: What compiles in the place of XLA; None: XLA.
        clock: Seconds, for capture times.

    Attributes:
        begun: What may be taken, by bucket and variant; not to be changed.
    """

    def __init__(self, *, compiler: Compiler | None, clock: Callable[[], float]) -> None:
        self._compiler = compiler
        self._clock = clock
        self.begun: dict[tuple[Bucket, Variant], _Begun] = {}

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

        def begin(request: CompileRequest) -> None:
            key = _key(request)
            if key in self.begun or is_captured(*key):
                return
            try:
                outputs, lowering = request.lower(clock=self._clock)
            except CUDAGraphError:
                return
            begun = _Begun(request, outputs, Future())
            all_begun.append(begun)
            if self.begun.setdefault(key, begun) is not begun:
                return
            # Whoever captures it from now on takes it; who began before compiles it already.
            if not (is_captured(*key) and self._remove(begun)):
                pool.submit(self._compile, begun, lowering)

        try:
            yield begin
        finally:
            try:
                pool.shutdown(cancel_futures=True)
            finally:
                for begun in all_begun:
                    begun.executable.cancel()
                    self._remove(begun)

    def take(self, request: CompileRequest) -> tuple[Outputs, Executable] | None:
        """What was begun for just this, by whomever, once it is compiled; None where nothing was.

        Raises:
            CaptureError: It could not be compiled.
        """
        begun = self.begun.get(_key(request))
        if begun is None or begun.request.options != request.options or not self._remove(begun):
            return None
        try:
            executable = begun.executable.result()
        except CancelledError:
            return None  # the warm-up that began it has ended
        # Begun by another program of the variant, the code is the same; the axes are its own.
        is_own = begun.request.program is request.program
        return begun.outputs if is_own else request.outputs(), executable

    def _remove(self, begun: _Begun) -> bool:
        """Whether it was there still, to be taken by one alone."""
        key = _key(begun.request)
        return self.begun.get(key) is begun and self.begun.pop(key, None) is begun

    def _compile(self, begun: _Begun, lowering: Lowering) -> None:
        if not begun.executable.set_running_or_notify_cancel():
            return
        try:
            with stage_errors("compile", str(begun.request)):
                if self._compiler is None:
                    executable = lowering.compile(
                        compiler_options=begun.request.options, clock=self._clock
                    )
                else:
                    executable = self._compiler(begun.request, lowering, clock=self._clock)
        except BaseException as error:
            begun.executable.set_exception(error)
        else:
            begun.executable.set_result(executable)


def _key(request: CompileRequest) -> tuple[Bucket, Variant]:
    return (request.bucket, request.program.variant)
