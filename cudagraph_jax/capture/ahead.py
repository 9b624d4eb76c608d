"""Compiles the next buckets of a warm-up in threads, while the first of them is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import NamedTuple

from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.worker import daemons
from cudagraph_jax.errors import CUDAGraphError
from cudagraph_jax.program.call import Variant
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.program import CompileRequest
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.settings import ThreadSettings
from cudagraph_jax.xla.stages import Executable

Begin = Callable[[CompileRequest], None]


class Preparation(NamedTuple):
    """What is traced already.

    Attributes:
        outputs: Of the executable.
        finish: Loads or compiles it, in whatever thread.
    """

    outputs: Outputs
    finish: Callable[[], Executable]


Prepare = Callable[[CompileRequest], Preparation]


class _CompileAhead(NamedTuple):
    request: CompileRequest
    outputs: Outputs
    made: Future[Executable]


class CompilesAhead:
    """Executables that are being compiled, until whoever captures their buckets takes them.

    A function is traced and lowered by whoever asks, since what the caller set up for tracing (a
    context of his model's library) is not known to other threads, beyond JAX's settings and its
    mesh, and Python would trace in one thread at a time. XLA takes most of the time, and threads
    for it; a store is looked into and written to by these threads, too.

    Args:
        prepare: Traces what is asked for, and gives what finishes it.

    Attributes:
        begun: What may be taken, by bucket and variant; not to be changed.
    """

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self.begun: dict[tuple[Bucket, Variant], _CompileAhead] = {}

    @contextmanager
    def running(
        self, workers: int, *, is_captured: Callable[[Bucket, Variant], bool]
    ) -> Iterator[Begin]:
        """A function that begins with an executable, if nobody has; it does not wait for it.

        What cannot be lowered is left to whoever captures it, and so is what nobody took.

        Args:
            workers: How many are compiled at a time.
            is_captured: Whether a bucket is captured, or is being captured by now.

        Raises:
            CUDAGraphError: This process was forked from one that had used JAX.
        """
        use_jax()
        all_begun: list[_CompileAhead] = []
        settings = ThreadSettings()
        try:
            with daemons(workers, name="cudagraph-jax-compile") as run:

                def begin(request: CompileRequest) -> None:
                    key = _key(request)
                    if key in self.begun or is_captured(*key):
                        return
                    try:
                        outputs, finish = self._prepare(request)
                    except CUDAGraphError:
                        return
                    begun = _CompileAhead(request, outputs, Future())
                    all_begun.append(begun)
                    if self.begun.setdefault(key, begun) is not begun:
                        return
                    # Whoever captures it from now on takes it; who began before compiles it.
                    if not (is_captured(*key) and self._remove(begun)):
                        try:
                            run(lambda: _finish(begun, finish, settings))
                        except RuntimeError:  # no thread is to be had, or the interpreter ends
                            self._remove(begun)

                yield begin
        finally:
            for begun in all_begun:
                begun.made.cancel()
                self._remove(begun)

    def take(self, request: CompileRequest) -> Preparation | None:
        """What was begun for just this, by whomever, and is compiled; None where nothing was.

        Raises:
            CaptureError: It could not be compiled.
        """
        begun = self.begun.get(_key(request))
        if begun is None or begun.request.options != request.options or not self._remove(begun):
            return None
        try:
            executable = begun.made.result()
        except CancelledError:
            return None  # the warm-up that began it has ended
        # Begun by another program of the variant, the code is the same; the axes are its own.
        is_own = begun.request.program is request.program
        return Preparation(begun.outputs if is_own else request.outputs(), lambda: executable)

    def _remove(self, begun: _CompileAhead) -> bool:
        """Whether it was there still, to be taken by one alone."""
        key = _key(begun.request)
        return self.begun.get(key) is begun and self.begun.pop(key, None) is begun


def _finish(
    begun: _CompileAhead, finish: Callable[[], Executable], settings: ThreadSettings
) -> None:
    if not begun.made.set_running_or_notify_cancel():
        return
    try:
        with (
            settings.applied()
        ):  # what comes out of JAX's own cache is traced once more for a store
            begun.made.set_result(finish())
    except BaseException as error:
        begun.made.set_exception(error)


def _key(request: CompileRequest) -> tuple[Bucket, Variant]:
    return (request.bucket, request.program.variant)
