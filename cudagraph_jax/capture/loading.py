"""Executables read back from a store, several at once where that is asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

import jax

from cudagraph_jax._base.log import logger
from cudagraph_jax.capture.cache_key import (
    Fields,
    check_outputs,
    execution_devices,
    number_of,
    outputs_in,
)
from cudagraph_jax.errors import CUDAGraphWarning, StoreError
from cudagraph_jax.program.call import Variant
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.program import CompileRequest
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import unflatten_shapes
from cudagraph_jax.store import GraphStore, Miss, MissReason, Stored
from cudagraph_jax.store.outcomes import fence
from cudagraph_jax.xla import serialize as serial
from cudagraph_jax.xla.environment import cores
from cudagraph_jax.xla.memory import memory_of
from cudagraph_jax.xla.stages import Executable, Lowering, count_executable

MOST_THREADS = 8


class LoadedEntry(NamedTuple):
    """What was loaded, and what it was loaded from."""

    outputs: Outputs
    executable: Executable
    stored: Stored


Ahead = LoadedEntry | Miss | Stored | None


class Loader:
    """Loads executables from a store; what cannot be loaded is said, and not there.

    Args:
        store: Where they are.
        clock: Seconds, for the time that loading takes.
    """

    def __init__(self, store: GraphStore, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._told: dict[str, object] = {}
        self._distrusted: set[tuple[Bucket, Variant]] = set()
        self._ahead: dict[tuple[Bucket, Variant], tuple[Fields, Future[Ahead]]] = {}

    def distrust(self, bucket: Bucket, variant: Variant) -> None:
        """From now on loads nothing for this bucket."""
        self._distrusted.add((bucket, variant))

    def trust(self, request: CompileRequest) -> None:
        """Loads this bucket again, since it was stored anew."""
        self._distrusted.discard((request.bucket, request.program.variant))

    def load(
        self,
        request: CompileRequest,
        fields: Fields,
        *,
        lowering: Lowering | None = None,
        is_again: bool = False,
    ) -> LoadedEntry | Miss | None:
        """The executable of `fields`, or why it is not there; None where it cannot be loaded.

        Args:
            request: What it is for.
            fields: What identifies it.
            lowering: Its function, if that had to be lowered to know this.
            is_again: Whether it was just missed by other fields.
        """
        key = (request.bucket, request.program.variant)
        if key in self._distrusted:
            return None
        known, ahead = self._ahead.pop(key, (fields, None))
        found = None
        with suppress(CancelledError):  # the warm-up that asked for it has ended
            found = ahead.result() if ahead is not None and known == fields else None
        if isinstance(found, LoadedEntry | Miss):
            return found
        return self._loaded(request, fields, lowering, stored=found, is_again=is_again)

    @contextmanager
    def loading_ahead(self, requests: Sequence[tuple[CompileRequest, Fields]]) -> Iterator[None]:
        """Loads all of them in threads while the block runs, which asks for them in that order."""
        threads = min(MOST_THREADS, cores(), len(requests))
        if threads < 2:
            yield
            return
        pool = ThreadPoolExecutor(threads, thread_name_prefix="cudagraph-jax-load")
        keys = [(request.bucket, request.program.variant) for request, _ in requests]
        try:
            for key, (request, fields) in zip(keys, requests, strict=True):
                self._ahead[key] = (fields, pool.submit(self._untraced, request, fields))
            yield
        finally:
            pool.shutdown(cancel_futures=True)
            for key in keys:
                self._ahead.pop(key, None)

    def tell(self, request: CompileRequest, error: StoreError) -> None:
        """Warns once of what the store cannot do."""
        # Where a file is meant, its name in the text is another one each time.
        system, reason = error.__cause__, getattr(error, "reason", None)
        cause = str(error) if reason is None else str(reason)
        cause = str(system.errno) if isinstance(system, OSError) and system.errno else cause
        if self._is_news(cause):
            warnings.warn(
                f"{request} is served without the store {self._store.path}: {error}",
                CUDAGraphWarning,
                stacklevel=2,
            )

    def tell_closed_over(self, request: CompileRequest, lowering: Lowering) -> None:
        """Warns once of a function's arrays that are stored with it and not seen by its name."""
        fingerprint, size = request.program.target.fingerprint, lowering.closed_over_bytes
        if fingerprint is None or fingerprint.unsure is None or not size:
            return
        about = f"closed over {fingerprint.given} {fingerprint.function} {fingerprint.code}"
        if self._is_news(about):
            warnings.warn(
                f"{request.program.target.name} closes over {size:,} bytes of arrays, which are "
                f"stored with it: while fingerprint={fingerprint.given!r} stays the same, a server "
                "that starts with other arrays loads these. Have the fingerprint change with them, "
                'or pass them as an argument that is not padded: in_axes=(None, "batch seq")',
                CUDAGraphWarning,
                stacklevel=2,
            )

    def _is_news(self, cause: str) -> bool:
        """Whether this is asked for the first time."""
        own = object()
        return self._told.setdefault(cause, own) is own

    def _untraced(self, request: CompileRequest, fields: Fields) -> Ahead:
        """As `load`, in a thread to which what the caller set up for tracing does not apply.

        What is stored alone where the function must be traced; None where something is to be told.
        """
        try:
            # The program's default device is not this thread's.
            with fence("it cannot be loaded"), request.program.settings.applied():
                answer = self._store.get(fields)
                if isinstance(answer, Miss):
                    return answer
                outputs = outputs_in(answer)
                if outputs is None:
                    return answer
                return self._restored(request, answer, outputs)
        except StoreError:
            return None

    def _loaded(
        self,
        request: CompileRequest,
        fields: Fields,
        lowering: Lowering | None,
        *,
        stored: Stored | None,
        is_again: bool,
    ) -> LoadedEntry | Miss | None:
        try:
            with fence("it cannot be loaded"):
                answer = self._store.get(fields, is_again=is_again) if stored is None else stored
                if isinstance(answer, Miss):
                    return answer
                own = outputs_in(answer) if lowering is None else None
                outputs = own or request.outputs(lowering)
                return self._restored(request, answer, outputs, lowering=lowering)
        except StoreError as error:
            self.tell(request, error)
            return None

    def _restored(
        self,
        request: CompileRequest,
        stored: Stored,
        outputs: Outputs,
        *,
        lowering: Lowering | None = None,
    ) -> LoadedEntry:
        start = self._clock()
        program = request.program
        loaded = serial.load(
            stored.payload,
            inputs=jax.tree.structure(program.arguments(request.bucket)),
            outputs=outputs.structure,
            devices=execution_devices(program),
        )
        count_executable()
        took_ms = (self._clock() - start) * 1e3
        if lowering is None:
            closed_over = number_of(stored, "closed_over_bytes", int) or 0
            output_info = unflatten_shapes(outputs.structure, serial.output_leaves(loaded))
        else:
            closed_over, output_info = lowering.closed_over_bytes, lowering.output_info
        executable = Executable(
            call=loaded,
            output_info=output_info,
            compile_ms=took_ms if lowering is None else took_ms + lowering.took_ms,
            memory=memory_of(loaded, closed_over_bytes=closed_over),
            flops=number_of(stored, "flops", float),
            is_loaded=True,
        )
        if lowering is None:
            check_outputs(outputs, executable, request.bucket)
        known = program.restore_outputs(outputs, executable.output_info)
        # A function may give another pytree at each bucket: then each keeps its own.
        return LoadedEntry(known if known == outputs else outputs, executable, stored)

    def note(self, request: CompileRequest, fields: Fields, miss: Miss) -> None:
        """Logs why an executable is compiled: at INFO where it is only absent."""
        if miss.reason is not MissReason.ABSENT:
            logger.warning("%s is compiled again: %s", request, miss)
        elif logger.isEnabledFor(logging.INFO):
            name = request.program.target.name
            if not self._is_news(
                f"absent {name}"
            ):  # the others differ likewise, and looking reads all headers
                logger.info("%s is not in the store", request)
                return
            try:
                with fence("it cannot be searched"):
                    near = self._store.nearest(fields, same=("name", "bucket", "known_by"))
            except StoreError as error:
                logger.info("%s is not in the store: %s", request, error)
            else:
                logger.info("%s is not in the store: %s", request, near or "nothing like it is")
