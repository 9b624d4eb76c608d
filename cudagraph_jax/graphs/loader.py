"""Executables read back from a store, several at once where that is asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import jax

from cudagraph_jax.errors import CUDAGraphWarning, InputShapeError, StoreError
from cudagraph_jax.fork import forkable_lock
from cudagraph_jax.graphs import serial
from cudagraph_jax.graphs.executable import Executable, Lowering
from cudagraph_jax.graphs.host import cores
from cudagraph_jax.graphs.identity import Fields, execution_devices
from cudagraph_jax.graphs.outputs import Outputs, outputs_from_json, outputs_to_json
from cudagraph_jax.graphs.variant import Variant
from cudagraph_jax.graphs.wanted import Complete, Wanted
from cudagraph_jax.log import logger
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.store import GraphStore, Json, Miss, Reason, Stored

MOST_THREADS = 8
MOST_GRIDS = 8
"""How many grids' outputs a file describes; those described first go first."""
N = TypeVar("N", int, float)


class Found(NamedTuple):
    """What was loaded, and what it was loaded from."""

    complete: Complete
    stored: Stored


Ahead = Found | Miss | Stored | None


class Loader:
    """Loads executables from a store; what cannot be loaded is said, and not there.

    Args:
        store: Where they are.
        clock: Seconds, for the time that loading takes.
    """

    def __init__(self, store: GraphStore, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._lock = forkable_lock()
        self._told: set[str] = set()
        self._distrusted: set[tuple[Bucket, Variant]] = set()
        self._ahead: dict[tuple[Bucket, Variant], tuple[Fields, Future[Ahead]]] = {}

    def distrust(self, bucket: Bucket, variant: Variant) -> None:
        """From now on loads nothing for this bucket."""
        with self._lock:
            self._distrusted.add((bucket, variant))

    def trust(self, wanted: Wanted) -> None:
        """Loads this bucket again, since it was stored anew."""
        with self._lock:
            self._distrusted.discard((wanted.bucket, wanted.program.variant))

    def load(
        self,
        wanted: Wanted,
        fields: Fields,
        *,
        lowering: Lowering | None = None,
        is_again: bool = False,
    ) -> Found | Miss | None:
        """The executable of `fields`, or why it is not there; None where it cannot be loaded.

        Args:
            wanted: What it is for.
            fields: What identifies it.
            lowering: Its function, if that had to be lowered to know this.
            is_again: Whether it was just missed by other fields.
        """
        key = (wanted.bucket, wanted.program.variant)
        if key in self._distrusted:
            return None
        known, ahead = self._ahead.pop(key, (fields, None))
        found = None
        with suppress(CancelledError):  # the warm-up that asked for it has ended
            found = ahead.result() if ahead is not None and known == fields else None
        if isinstance(found, Found | Miss):
            return found
        return self._loaded(wanted, fields, lowering, stored=found, is_again=is_again)

    @contextmanager
    def loading_ahead(self, all_wanted: Sequence[tuple[Wanted, Fields]]) -> Iterator[None]:
        """Loads all of them in threads while the block runs, which asks for them in that order."""
        threads = min(MOST_THREADS, cores(), len(all_wanted))
        if threads < 2:
            yield
            return
        pool = ThreadPoolExecutor(threads, thread_name_prefix="cudagraph-jax-load")
        keys = [(wanted.bucket, wanted.program.variant) for wanted, _ in all_wanted]
        try:
            for key, (wanted, fields) in zip(keys, all_wanted, strict=True):
                self._ahead[key] = (fields, pool.submit(self._untraced, wanted, fields))
            yield
        finally:
            pool.shutdown(cancel_futures=True)
            for key in keys:
                self._ahead.pop(key, None)

    def tell(self, wanted: Wanted, error: StoreError) -> None:
        """Warns once of what the store cannot do."""
        # Where a file is meant, its name in the text is another one each time.
        system, reason = error.__cause__, getattr(error, "reason", None)
        cause = str(error) if reason is None else str(reason)
        cause = str(system.errno) if isinstance(system, OSError) and system.errno else cause
        with self._lock:
            known = cause in self._told
            self._told.add(cause)
        if not known:
            warnings.warn(
                f"{wanted} is served without the store {self._store.path}: {error}",
                CUDAGraphWarning,
                stacklevel=2,
            )

    def _untraced(self, wanted: Wanted, fields: Fields) -> Ahead:
        """As `load`, in a thread to which what the caller set up for tracing does not apply.

        What is stored alone where the function must be traced; None where something is to be told.
        """
        try:
            answer = self._store.get(fields)
            if isinstance(answer, Miss):
                return answer
            outputs = _outputs(answer, wanted.grid)
            if outputs is None:
                return answer
            return self._restored(wanted, answer, outputs)
        except StoreError:
            return None

    def _loaded(
        self,
        wanted: Wanted,
        fields: Fields,
        lowering: Lowering | None,
        *,
        stored: Stored | None,
        is_again: bool,
    ) -> Found | Miss | None:
        try:
            answer = self._store.get(fields, is_again=is_again) if stored is None else stored
            if isinstance(answer, Miss):
                return answer
            own = _outputs(answer, wanted.grid) if lowering is None else None
            if own is not None:
                return self._restored(wanted, answer, own)
            outputs = wanted.program.outputs(wanted.bucket, others=wanted.others)
            if lowering is not None:
                structure = jax.tree.structure(lowering.output_info)
                outputs = outputs._replace(structure=structure)
            elif (other := _outputs(answer)) is not None:
                outputs = outputs._replace(structure=other.structure)
            return self._restored(wanted, answer, outputs, lowering=lowering)
        except StoreError as error:
            self.tell(wanted, error)
            return None

    def _restored(
        self,
        wanted: Wanted,
        stored: Stored,
        outputs: Outputs,
        *,
        lowering: Lowering | None = None,
    ) -> Found:
        start = self._clock()
        program = wanted.program
        loaded = serial.load(
            stored.payload,
            inputs=jax.tree.structure(program.arguments(wanted.bucket)),
            outputs=outputs.structure,
            devices=execution_devices(program),
        )
        took_ms = (self._clock() - start) * 1e3
        executable = Executable(
            call=loaded,
            compile_ms=took_ms if lowering is None else took_ms + lowering.took_ms,
            memory_bytes=_number(stored, "memory_bytes", int),
            flops=_number(stored, "flops", float),
            is_loaded=True,
        )
        if lowering is None:
            _check_outputs(outputs, executable, wanted.bucket)
        known = program.restore_outputs(outputs)
        if known.leaves != outputs.leaves:
            raise StoreError("its outputs are trimmed otherwise than those of other buckets")
        return Found((known, executable), stored)

    def note(self, wanted: Wanted, fields: Fields, miss: Miss) -> None:
        """Logs why an executable is compiled: at INFO where it is only absent."""
        if miss.reason is not Reason.ABSENT:
            logger.warning("%s is compiled again: %s", wanted, miss)
        elif logger.isEnabledFor(logging.INFO):
            name = wanted.program.target.name
            with self._lock:
                is_first = f"absent {name}" not in self._told
                self._told.add(f"absent {name}")
            if not is_first:  # the others differ likewise, and looking reads all headers
                logger.info("%s is not in the store", wanted)
                return
            near = self._store.nearest(fields, same=("name", "bucket", "known_by"))
            logger.info("%s is not in the store: %s", wanted, near or "nothing like it is")


def beside(
    wanted: Wanted, outputs: Outputs, executable: Executable, *, stored: Stored | None = None
) -> dict[str, Json]:
    """What is stored beside an executable, so that loading need not find it out again.

    Args:
        wanted: What it is for.
        outputs: Its outputs, whose axes were found by the grid of `wanted`.
        executable: The executable.
        stored: Where it was loaded from; what stands there of other grids stays.
    """
    own = outputs._replace(structure=jax.tree.structure(executable.output_info))
    others = {} if stored is None else dict(_by_grid(stored))
    others.pop(wanted.grid, None)
    by_grid = [*others.items(), (wanted.grid, outputs_to_json(own))]
    return {
        "outputs": [list(pair) for pair in by_grid[-MOST_GRIDS:]],
        "memory_bytes": executable.memory_bytes,
        "flops": executable.flops,
        "compile_ms": round(executable.compile_ms, 3),
    }


def knows_grid(wanted: Wanted, stored: Stored) -> bool:
    """Whether it says what the outputs are for this grid, if that can be written at all."""
    return wanted.grid in dict(_by_grid(stored))


def _check_outputs(outputs: Outputs, executable: Executable, bucket: Bucket) -> None:
    """Refuses axes that the executable's outputs do not have."""
    try:
        shapes = [tuple(info.shape) for info in jax.tree.leaves(executable.output_info)]
        fits = all(
            leaf.ndim == len(shape) and leaf.axes.resize(shape, bucket) == shape
            for leaf, shape in zip(outputs.leaves, shapes, strict=True)
        )
    except (ValueError, LookupError):
        fits = False
    if not fits:
        raise StoreError("its outputs are not what its header says")


def _number(stored: Stored, name: str, kind: type[N]) -> N | None:
    value = stored.extra.get(name)
    return kind(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _by_grid(stored: Stored) -> list[tuple[str, Any]]:
    """What a file says of the outputs for each grid, the newest last."""
    written: Any = stored.extra.get("outputs")
    pairs = written if isinstance(written, list) else []
    return [
        (pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
    ]


def _outputs(stored: Stored, grid: str | None = None) -> Outputs | None:
    """The outputs for a grid, or for any; None where the file does not say."""
    by_grid = _by_grid(stored)
    written = dict(by_grid).get(grid) if grid is not None else next(iter(by_grid), ("", None))[1]
    try:
        return outputs_from_json(written)
    except (LookupError, TypeError, ValueError, InputShapeError) as error:
        raise StoreError(f"its outputs are not described: {error}") from error
