"""Executables that outlive their process: looked up in a store, else compiled and put there."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import jax

from cudagraph_jax._base.log import logger
from cudagraph_jax.capture.ahead import Preparation
from cudagraph_jax.capture.cache_key import (
    WHAT_IT_COMPUTES,
    Fields,
    beside,
    common_fields,
    execution_devices,
    fingerprint_fields,
    is_portable,
    lowered_fields,
)
from cudagraph_jax.capture.loading import LoadedEntry, Loader
from cudagraph_jax.errors import StoreError
from cudagraph_jax.program.call import Variant
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.program import CompileRequest, Program
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.store import GraphStore, Miss, MissReason
from cudagraph_jax.store.identity import plain
from cudagraph_jax.store.outcomes import fence
from cudagraph_jax.xla import serialize as serial
from cudagraph_jax.xla.compiles import cache_hits
from cudagraph_jax.xla.environment import plugin_versions
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
        self._named: weakref.WeakKeyDictionary[Program, Fields | None] = weakref.WeakKeyDictionary()
        with suppress(StoreError), fence(_NOT_NAMED):  # told when something is captured
            plugin_versions()  # before somebody upgrades them under this process
        self._homes: weakref.WeakKeyDictionary[Executable, Fields] = weakref.WeakKeyDictionary()

    def distrust(self, bucket: Bucket, variant: Variant) -> None:
        """From now on compiles this bucket, and replaces what the store has of it."""
        self._loader.distrust(bucket, variant)

    def prepare(self, request: CompileRequest) -> Preparation:
        """The outputs, and what loads or compiles the executable that is asked for.

        Nothing is left to trace by then, so that any thread may do that.

        Raises:
            CaptureError: Tracing, lowering or compiling failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        program, bucket = request.program, request.bucket
        try:
            with fence(_NOT_NAMED):
                common, named = self._fields(request)
        except StoreError as error:
            self._loader.tell(request, error)
            outputs, lowering = request.lower(clock=self._clock)
            return Preparation(outputs, request.compiling(lowering, clock=self._clock))
        missed = None if named is None else self._load(request, named)
        if isinstance(missed, LoadedEntry):
            executable = missed.executable
            return Preparation(missed.outputs, lambda: executable)
        outputs, lowering = request.lower(clock=self._clock)
        try:
            with fence(_NOT_NAMED):
                exact = _settled(
                    lowered_fields(common, program, lowering, bucket, clock=self._clock)
                )
        except StoreError as error:
            self._loader.tell(request, error)
            return Preparation(outputs, request.compiling(lowering, clock=self._clock))
        home = exact if named is None or not is_portable(lowering) else named
        if home is named:
            self._loader.tell_closed_over(request, lowering)

        def finish() -> Executable:
            found = self._load(request, exact, lowering=lowering, is_again=missed is not None)
            if isinstance(found, LoadedEntry):
                return self._moved(request, found, missed, home=None if home is exact else home)
            self._note(request, [(named or exact, missed), (exact, found)])
            is_exact = home is exact
            return self._compile_alone(request, outputs, lowering, home=home, is_exact=is_exact)

        return Preparation(outputs, finish)

    @contextmanager
    def loading_ahead(self, requests: Iterable[CompileRequest]) -> Iterator[None]:
        """Loads what has a fingerprint in threads, while the block takes it in that order."""
        named = []
        for request in requests:
            with suppress(StoreError), fence(_NOT_NAMED):  # told to who takes it
                fields = self._fields(request)[1]
                if fields is not None:
                    named.append((request, fields))
        with self._loader.loading_ahead(named):
            yield

    def hot(self, name: str) -> dict[str, int]:
        """How often each bucket of the function `name` was replayed before."""
        try:
            with fence("it cannot be read"):
                return self.store.hot().get(name, {})
        except StoreError as error:
            logger.warning("the order of the warm-up is not known: %s", error)
            return {}

    def touch(self, executable: Executable) -> None:
        """Marks the file of an executable as in use, if that is possible."""
        if (fields := self._homes.get(executable)) is not None:
            with suppress(StoreError), fence("it cannot be marked"):
                self.store.touch(fields)

    def explain(self, request: CompileRequest) -> str:
        """What the store has of an executable, as far as that is known without tracing."""
        try:
            with fence(_NOT_NAMED):
                fields, named = self._fields(request)
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

    def _fields(self, request: CompileRequest) -> tuple[Fields, Fields | None]:
        """What identifies an executable beside its code, and with its fingerprint if it has one."""
        program = request.program
        common = common_fields(program, request.bucket, options=request.options)
        try:
            # A function that once was the only one of its fingerprint stays so while it is here.
            if program not in self._named:
                self._named[program] = fingerprint_fields(program)
        except StoreError as error:
            self._loader.tell(request, error)
            return common, None
        named = self._named[program]
        if named is None:
            return common, None
        mesh = str(jax.sharding.get_abstract_mesh())
        return common, _settled({**common, **named, "mesh": mesh})

    def _moved(
        self,
        request: CompileRequest,
        found: LoadedEntry,
        missed: Miss | None,
        *,
        home: Fields | None,
    ) -> Executable:
        """What was found by what it lowers to, from now on to be found as `home`, too."""
        if missed is not None and missed.reason is not MissReason.ABSENT:
            logger.warning("%s is loaded without its fingerprint: %s", request, missed)
        if home is not None:
            payload = found.stored.payload
            self._put(request, home, found.outputs, found.executable, payload=payload)
        return found.executable

    def _note(self, request: CompileRequest, looks: Iterable[tuple[Fields, Miss | None]]) -> None:
        """Logs once why an executable is compiled that was looked for in several ways."""
        misses = [(fields, miss) for fields, miss in looks if miss is not None]
        if misses:
            said = next((it for it in misses if it[1].reason is not MissReason.ABSENT), misses[0])
            self._loader.note(request, *said)

    def _compile_alone(
        self,
        request: CompileRequest,
        outputs: Outputs,
        lowering: Lowering,
        *,
        home: Fields,
        is_exact: bool,
    ) -> Executable:
        """The executable, compiled by one process, and put where the others look for it.

        Args:
            request: What is asked for.
            outputs: Its outputs.
            lowering: Its function, lowered.
            home: What identifies it.
            is_exact: Whether that is what it lowers to.
        """
        patience_s = self._patience_s

        def say() -> None:
            logger.info(
                "waiting for another process that compiles %s, at most %g s", request, patience_s
            )

        with self.store.lock(home, patience_s, on_wait=say) as is_alone:
            if not is_alone:
                self._patience_s = 0.0
            # Whoever had the lock may have put it meanwhile; as a start without lowering sees it.
            known = lowering if is_exact else None
            found = (
                self._load(request, home, lowering=known, is_again=True)
                if self._has(home)
                else None
            )
            if isinstance(found, LoadedEntry):
                return found.executable
            executable, is_storable = self._compiled(request, lowering)
            if is_storable:
                self._put(request, home, outputs, executable)
        return executable

    def _compiled(self, request: CompileRequest, lowering: Lowering) -> tuple[Executable, bool]:
        """The compiled executable, and whether it can be stored."""
        options = request.options
        with cache_hits() as hits:
            executable = lowering.compile(compiler_options=options, clock=self._clock)
        if not hits or not self._is_writable:
            return executable, not hits
        # What comes out of JAX's own cache cannot be written again: it runs, but what is read back
        # lacks its code. Under a name that is not in there it is compiled.
        again = request.program.lower(
            request.bucket, clock=self._clock, name=f"{lowering.name}_{secrets.token_hex(4)}"
        )
        if again.text.replace(again.name, lowering.name) != lowering.text:
            return executable, False  # this thread lacks what the caller had set up for tracing
        return again.compile(compiler_options=options, clock=self._clock), True

    def _has(self, fields: Fields) -> bool:
        with suppress(StoreError), fence("it cannot be read"):
            return fields in self.store
        return False  # why was said already when it was asked for

    def _load(
        self,
        request: CompileRequest,
        fields: Fields,
        *,
        lowering: Lowering | None = None,
        is_again: bool = False,
    ) -> LoadedEntry | Miss | None:
        found = self._loader.load(request, fields, lowering=lowering, is_again=is_again)
        if not isinstance(found, LoadedEntry):
            return found
        self._homes[found.executable] = fields
        return found

    def _put(
        self,
        request: CompileRequest,
        fields: Fields,
        outputs: Outputs,
        executable: Executable,
        *,
        payload: bytes | None = None,
    ) -> None:
        """Stores an executable, from the bytes that it was loaded from if it was."""
        if self.store.mode == "ro":
            return
        try:
            with fence("it cannot be stored"):
                self._write(request, fields, outputs, executable, payload)
        except StoreError as error:
            if getattr(error, "reason", None) is MissReason.OUTDATED:
                # Of a server that is upgraded already; why this one compiles was said.
                logger.info("%s is not stored: %s", request, error)
                return
            self._is_writable = False
            self._loader.tell(request, error)
        else:
            self._is_writable = True
            self._loader.trust(request)
            self._homes[executable] = fields

    def _write(
        self,
        request: CompileRequest,
        fields: Fields,
        outputs: Outputs,
        executable: Executable,
        payload: bytes | None,
    ) -> None:
        if payload is None:
            _check_devices(request, executable)
        data = serial.dump(executable.call) if payload is None else payload
        if lost := [name for name in request.options if name.encode() not in data]:
            raise StoreError(f"JAX does not write its compiler options {', '.join(lost)}")
        self.store.put(fields, data, extra=beside(outputs, executable))


_NOT_NAMED = "what identifies it cannot be found out"


def _settled(fields: Fields) -> Fields:
    """The fields in the form that the store compares, so that it need not make it each time."""
    return plain(fields, name="identity", nested=False)


def _check_devices(request: CompileRequest, executable: Executable) -> None:
    """Refuses what runs elsewhere than its arguments say: it would not be loaded there."""
    leaves = serial.output_leaves(executable.call)
    devices = set().union(*(leaf.sharding.device_set for leaf in leaves))
    if not devices <= set(execution_devices(request.program)):
        raise StoreError("its function puts it on other devices than its arguments are on")
