"""Executables that outlive their process: looked up in a store, else compiled and put there."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import jax

from cudagraph_jax._base.log import logger
from cudagraph_jax.capture.cache_key import (
    WHAT_IT_COMPUTES,
    Fields,
    beside,
    common_fields,
    execution_devices,
    fingerprint_fields,
    is_portable,
    knows_grid,
    lowered_fields,
)
from cudagraph_jax.capture.compile_request import Complete, Wanted, compiled
from cudagraph_jax.capture.loading import Found, Loader
from cudagraph_jax.errors import StoreError
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.variant import Variant
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.store import GraphStore, Miss, Reason
from cudagraph_jax.xla import serialize as serial
from cudagraph_jax.xla.compiles import cache_hits
from cudagraph_jax.xla.stages import Executable, Lowering


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
        self._loader = Loader(store, clock=clock)
        self._is_writable = store.mode != "ro"
        self._homes: weakref.WeakKeyDictionary[Executable, Fields] = weakref.WeakKeyDictionary()

    def distrust(self, bucket: Bucket, variant: Variant) -> None:
        """From now on compiles this bucket, and replaces what the store has of it."""
        self._loader.distrust(bucket, variant)

    def take(self, wanted: Wanted) -> Complete:
        """The executable that is wanted, loaded or compiled, and its outputs.

        Raises:
            CaptureError: Tracing, lowering or compiling failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        program, bucket = wanted.program, wanted.bucket
        try:
            common, named = self._fields(wanted)
        except StoreError as error:
            self._loader.tell(wanted, error)
            return compiled(wanted, clock=self._clock)
        missed = None if named is None else self._load(wanted, named)
        if isinstance(missed, Found):
            return missed.complete
        outputs = program.outputs(bucket, others=wanted.others)
        lowering = program.lower(bucket, clock=self._clock)
        try:
            exact = lowered_fields(common, program, lowering, bucket, clock=self._clock)
        except StoreError as error:
            self._loader.tell(wanted, error)
            options = wanted.options
            return outputs, lowering.compile(compiler_options=options, clock=self._clock)
        found = self._load(wanted, exact, lowering=lowering, is_again=missed is not None)
        home = exact if named is None or not is_portable(lowering) else named
        if isinstance(found, Found):
            return self._moved(wanted, found, missed, home=None if home is exact else home)
        self._note(wanted, [(named or exact, missed), (exact, found)])
        return self._compile_alone(wanted, outputs, lowering, home=home, is_exact=home is exact)

    @contextmanager
    def loading_ahead(self, all_wanted: Iterable[Wanted]) -> Iterator[None]:
        """Loads what has a fingerprint in threads, while the block takes it in that order."""
        named = []
        for wanted in all_wanted:
            with suppress(StoreError):  # told to who takes it
                fields = self._fields(wanted)[1]
                if fields is not None:
                    named.append((wanted, fields))
        with self._loader.loading_ahead(named):
            yield

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
            fields, named = self._fields(wanted)
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

    def _fields(self, wanted: Wanted) -> tuple[Fields, Fields | None]:
        """What identifies an executable beside its code, and with its fingerprint if it has one."""
        program = wanted.program
        common = common_fields(program, wanted.bucket, options=wanted.options)
        try:
            named = fingerprint_fields(common, program)
        except StoreError as error:
            self._loader.tell(wanted, error)
            named = None
        return common, named

    def _moved(
        self, wanted: Wanted, found: Found, missed: Miss | None, *, home: Fields | None
    ) -> Complete:
        """What was found by what it lowers to, from now on to be found as `home`, too."""
        if missed is not None and missed.reason is not Reason.ABSENT:
            logger.warning("%s is loaded without its fingerprint: %s", wanted, missed)
        if home is not None:
            self._put(wanted, home, found.complete, payload=found.stored.payload)
        return found.complete

    def _note(self, wanted: Wanted, looks: Iterable[tuple[Fields, Miss | None]]) -> None:
        """Logs once why an executable is compiled that was looked for in several ways."""
        misses = [(fields, miss) for fields, miss in looks if miss is not None]
        if misses:
            said = next((it for it in misses if it[1].reason is not Reason.ABSENT), misses[0])
            self._loader.note(wanted, *said)

    def _compile_alone(
        self,
        wanted: Wanted,
        outputs: Outputs,
        lowering: Lowering,
        *,
        home: Fields,
        is_exact: bool,
    ) -> Complete:
        """The executable, compiled by one process, and put where the others look for it.

        Args:
            wanted: What is wanted.
            outputs: Its outputs.
            lowering: Its function, lowered.
            home: What identifies it.
            is_exact: Whether that is what it lowers to.
        """
        patience_s = self._patience_s

        def say() -> None:
            logger.info(
                "waiting for another process that compiles %s, at most %g s", wanted, patience_s
            )

        with self.store.lock(home, patience_s, on_wait=say) as is_alone:
            if not is_alone:
                self._patience_s = 0.0
            # Whoever had the lock may have put it meanwhile; as a start without lowering sees it.
            known = lowering if is_exact else None
            found = (
                self._load(wanted, home, lowering=known, is_again=True) if self._has(home) else None
            )
            if isinstance(found, Found):
                return found.complete
            complete, is_storable = self._compiled(wanted, lowering, outputs)
            if is_storable:
                self._put(wanted, home, complete)
        return complete

    def _compiled(
        self, wanted: Wanted, lowering: Lowering, outputs: Outputs
    ) -> tuple[Complete, bool]:
        """The compiled executable, and whether it can be stored."""
        options = wanted.options
        with cache_hits() as hits:
            executable = lowering.compile(compiler_options=options, clock=self._clock)
        if not hits or not self._is_writable:
            return (outputs, executable), not hits
        # What comes out of JAX's own cache cannot be written again: it runs, but what is read back
        # lacks its code. Under a name that is not in there it is compiled.
        again = wanted.program.lower(
            wanted.bucket, clock=self._clock, name=f"{lowering.name}_{secrets.token_hex(4)}"
        )
        return (outputs, again.compile(compiler_options=options, clock=self._clock)), True

    def _has(self, fields: Fields) -> bool:
        try:
            return fields in self.store
        except (StoreError, OSError):
            return False  # said already when it was asked for

    def _load(
        self,
        wanted: Wanted,
        fields: Fields,
        *,
        lowering: Lowering | None = None,
        is_again: bool = False,
    ) -> Found | Miss | None:
        found = self._loader.load(wanted, fields, lowering=lowering, is_again=is_again)
        if not isinstance(found, Found):
            return found
        self._homes[found.complete[1]] = fields
        if lowering is None and not knows_grid(wanted, found.stored):
            self._describe(wanted, fields, found)
        return found

    def _describe(self, wanted: Wanted, fields: Fields, found: Found) -> None:
        """Writes down the outputs, so that the next start with this grid need not trace for it."""
        if self.store.mode == "ro":
            return
        extra = beside(wanted, *found.complete, stored=found.stored)
        try:
            self.store.put(fields, found.stored.payload, extra=extra)
        except StoreError as error:
            logger.info(
                "%s is loaded, but its outputs are found again at each start: %s", wanted, error
            )

    def _put(
        self, wanted: Wanted, fields: Fields, complete: Complete, *, payload: bytes | None = None
    ) -> None:
        """Stores an executable, from the bytes that it was loaded from if it was."""
        if self.store.mode == "ro":
            return
        outputs, executable = complete
        try:
            if payload is None:
                _check_devices(wanted, executable)
            data = serial.dump(executable.call) if payload is None else payload
            if lost := [name for name in wanted.options if name.encode() not in data]:
                raise StoreError(f"JAX does not write its compiler options {', '.join(lost)}")
            self.store.put(fields, data, extra=beside(wanted, outputs, executable))
        except StoreError as error:
            self._is_writable = False
            self._loader.tell(wanted, error)
        else:
            self._is_writable = True
            self._loader.trust(wanted)
            self._homes[executable] = fields


def _check_devices(wanted: Wanted, executable: Executable) -> None:
    """Refuses what runs elsewhere than its arguments say: it would not be loaded there."""
    placed = jax.tree.leaves(executable.call.output_shardings)
    devices = set().union(*(sharding.device_set for sharding in placed))
    if not devices <= set(execution_devices(wanted.program)):
        raise StoreError("its function puts it on other devices than its arguments are on")
