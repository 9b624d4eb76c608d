"""Executables that outlive their process: looked up in a store, else compiled and put there."""

from __future__ import annotations

import logging
import os
import secrets
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import jax

from cudagraph_jax.errors import CUDAGraphWarning, StoreError
from cudagraph_jax.fork import forkable_lock
from cudagraph_jax.graphs import serial
from cudagraph_jax.graphs.cache_hits import cache_hits
from cudagraph_jax.graphs.executable import Executable, Lowering, described
from cudagraph_jax.graphs.identity import (
    WHAT_IT_COMPUTES,
    Fields,
    common_fields,
    execution_devices,
    fingerprint_fields,
    is_portable,
    lowered_fields,
)
from cudagraph_jax.graphs.outputs import Outputs, outputs_from_json, outputs_to_json
from cudagraph_jax.graphs.variant import Variant
from cudagraph_jax.graphs.wanted import Complete, Wanted, compiled
from cudagraph_jax.log import logger
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.store import GraphStore, Miss, Reason, Stored


class Found(NamedTuple):
    """What was loaded, and the bytes that it was loaded from."""

    complete: Complete
    payload: bytes


class Shelf:
    """The executables of one registry in a store.

    Whatever goes wrong with the store, the executable is compiled: a store can be slow or useless,
    but not stop a request. Each cause is warned of once.

    Args:
        store: Where they are.
        clock: Seconds, for the time that loading takes.
    """

    def __init__(self, store: GraphStore, *, clock: Callable[[], float]) -> None:
        self.store = store
        self._clock = clock
        self._patience_s = store.patience_s
        self._lock = forkable_lock()
        self._warned: set[str] = set()
        self._distrusted: set[tuple[Bucket, Variant]] = set()
        self._homes: weakref.WeakKeyDictionary[Executable, Fields] = weakref.WeakKeyDictionary()

    def distrust(self, bucket: Bucket, variant: Variant) -> None:
        """From now on compiles this bucket, and replaces what the store has of it."""
        with self._lock:
            self._distrusted.add((bucket, variant))

    def take(self, wanted: Wanted) -> Complete:
        """The executable that is wanted, loaded or compiled, and its outputs.

        Raises:
            CaptureError: Tracing, lowering or compiling failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        program, bucket = wanted.program, wanted.bucket
        try:
            common = common_fields(program, bucket, options=wanted.options)
        except StoreError as error:
            return self._unstored(wanted, error)
        named = fingerprint_fields(common, program, pads_seq=wanted.pads_seq)
        if named is not None and (found := self._load(wanted, named)) is not None:
            return found.complete
        outputs = program.outputs(bucket, others=wanted.others)
        lowering = program.lower(bucket, clock=self._clock)
        try:
            exact = lowered_fields(common, program, lowering, bucket, clock=self._clock)
        except StoreError as error:
            self._warn(wanted, error)
            options = wanted.options
            return outputs, lowering.compile(compiler_options=options, clock=self._clock)
        if named is None or not is_portable(lowering):
            return self._load_or_compile(wanted, outputs, lowering, exact=exact, home=exact)
        return self._load_or_compile(wanted, outputs, lowering, exact=exact, home=named)

    def hot(self, name: str) -> dict[str, int]:
        """How often each bucket of the function `name` was replayed before."""
        try:
            return self.store.hot().get(name, {})
        except StoreError as error:
            logger.warning("the order of the warm-up is not known: %s", error)
            return {}

    def touch(self, executable: Executable) -> None:
        """Marks the file of an executable as in use."""
        if (fields := self._homes.get(executable)) is not None:
            self.store.touch(fields)

    def explain(self, wanted: Wanted) -> str:
        """What the store has of an executable, as far as that is known without tracing."""
        try:
            fields = common_fields(wanted.program, wanted.bucket, options=wanted.options)
            named = fingerprint_fields(fields, wanted.program, pads_seq=wanted.pads_seq)
            if named is not None and named in self.store:
                return "the store has it"
            near = self.store.nearest(fields, besides=WHAT_IT_COMPUTES)
        except StoreError as error:
            return f"the store is of no use: {error}"
        if near is None:
            return "the store has nothing like it"
        if near.differences:
            return f"of the store, {near}"
        return "the store has it, unless the function has changed"

    def _unstored(self, wanted: Wanted, error: StoreError) -> Complete:
        self._warn(wanted, error)
        return compiled(wanted, clock=self._clock)

    def _load_or_compile(
        self, wanted: Wanted, outputs: Outputs, lowering: Lowering, *, exact: Fields, home: Fields
    ) -> Complete:
        """The executable that is there as `exact`, else compiled by one process; kept as `home`."""
        if (found := self._load(wanted, exact, lowering=lowering)) is not None:
            if home is not exact:
                self._put(wanted, home, outputs, found.payload)
            return found.complete
        with self.store.lock(home, self._patience_s) as is_alone:
            if not is_alone:
                self._patience_s = 0.0
            # Whoever had the lock may have put it meanwhile.
            found = self._load(wanted, home, lowering=lowering) if self._has(home) else None
            if found is not None:
                return found.complete
            executable = self._compiled(wanted, lowering)
            self._put(wanted, home, outputs, executable)
        return outputs, executable

    def _compiled(self, wanted: Wanted, lowering: Lowering) -> Executable:
        options = wanted.options
        if self.store.mode == "ro":
            return lowering.compile(compiler_options=options, clock=self._clock)
        with cache_hits() as hits:
            executable = lowering.compile(compiler_options=options, clock=self._clock)
        if not hits:
            return executable
        # What comes out of JAX's own cache cannot be written again: it runs, but what is read back
        # lacks its code. Under a name that is not in there it is compiled.
        again = wanted.program.lower(
            wanted.bucket, clock=self._clock, name=f"{lowering.name}_{secrets.token_hex(4)}"
        )
        return again.compile(compiler_options=options, clock=self._clock)

    def _has(self, fields: Fields) -> bool:
        try:
            return fields in self.store
        except StoreError:
            return False  # said already when it was asked for

    def _load(
        self, wanted: Wanted, fields: Fields, *, lowering: Lowering | None = None
    ) -> Found | None:
        """The executable of `fields`; None where it is not there, or cannot be loaded."""
        if (wanted.bucket, wanted.program.variant) in self._distrusted:
            return None
        start = self._clock()
        try:
            answer = self.store.get(fields)
            if isinstance(answer, Miss):
                self._note(wanted, fields, answer)
                return None
            found = self._restored(wanted, answer, lowering, start)
        except StoreError as error:
            self._warn(wanted, error)
            return None
        self._homes[found[1]] = fields
        return Found(found, answer.payload)

    def _restored(
        self, wanted: Wanted, stored: Stored, lowering: Lowering | None, start: float
    ) -> Complete:
        program = wanted.program
        written = None if lowering is not None else outputs_from_json(stored.extra.get("outputs"))
        if written is None:
            outputs = program.outputs(wanted.bucket, others=wanted.others)
        else:
            outputs = program.restore_outputs(written)
        loaded = serial.load(
            stored.payload,
            inputs=jax.tree.structure(program.arguments(wanted.bucket)),
            outputs=outputs.structure,
            devices=execution_devices(program),
        )
        took_ms = (self._clock() - start) * 1e3
        before_ms = 0.0 if lowering is None else lowering.took_ms
        return outputs, described(loaded, before_ms + took_ms, is_loaded=True)

    def _put(
        self, wanted: Wanted, fields: Fields, outputs: Outputs, made: Executable | bytes
    ) -> None:
        if self.store.mode == "ro":
            return
        try:
            payload = made if isinstance(made, bytes) else serial.dump(made.call)
            if lost := [name for name in wanted.options if name.encode() not in payload]:
                raise StoreError(f"JAX does not write its compiler options {', '.join(lost)}")
            self.store.put(fields, payload, extra={"outputs": outputs_to_json(outputs)})
            if isinstance(made, Executable):
                self._homes[made] = fields
        except StoreError as error:
            self._warn(wanted, error)

    def _note(self, wanted: Wanted, fields: Fields, miss: Miss) -> None:
        if miss.reason is not Reason.ABSENT:
            logger.warning("%s is compiled again: %s", wanted, miss)
        elif logger.isEnabledFor(logging.INFO):
            near = self.store.nearest(fields, same=("name", "bucket", "known_by"))
            logger.info("%s is not in the store: %s", wanted, near or "nothing like it is")

    def _warn(self, wanted: Wanted, error: StoreError) -> None:
        """Says once what the store cannot do."""
        # An error of the system has the name of a file in its text, which is another each time.
        system = error.__cause__
        cause = str(system.errno) if isinstance(system, OSError) else str(error)
        with self._lock:
            known = cause in self._warned
            self._warned.add(cause)
        if not known:
            warnings.warn(
                f"{wanted} is served without the store {self.store.path}: {error}",
                CUDAGraphWarning,
                stacklevel=2,
            )


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
    return Shelf(store if isinstance(store, GraphStore) else GraphStore(store), clock=clock)
