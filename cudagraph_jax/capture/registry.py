"""All captured buckets: captured once, found, evicted."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.lru import CacheItem, Errors, SingleFlightLRU
from cudagraph_jax.capture.ahead import Begin
from cudagraph_jax.capture.build import Builder, shelf_of
from cudagraph_jax.capture.peers import PEERS
from cudagraph_jax.config import CUDAGraphConfig, checked_config
from cudagraph_jax.errors import CaptureError, ConfigError, CUDAGraphError, CUDAGraphWarning
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.observers import Observers
from cudagraph_jax.graphs.replay_counts import MAX_SIZES, Ledger, ReplayTotals, SizeHistogram
from cudagraph_jax.graphs.route import Watcher, Watchers
from cudagraph_jax.program.call import Call, Variant
from cudagraph_jax.program.function_ref import FunctionRef
from cudagraph_jax.program.program import Compiler, Program
from cudagraph_jax.program.single_input import capture_sizes, single_program
from cudagraph_jax.report.words import things
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.memory import pool_bytes
from cudagraph_jax.xla.shardings import check_grid, divided_grid

if TYPE_CHECKING:
    from cudagraph_jax.store import GraphStore


Key = tuple[Bucket, Variant]
_ONE = "give a store or a compiler"

# A compile takes some hundred times as long as a run. A bucket that was twice evicted sooner, and
# is captured once more, is one that comes and goes.
_WORTH_A_COMPILE = 10
_THRASHING = 2
_MUCH_CLOSED_OVER = 2**20


def _too_heavy(name: str, memory_bytes: int, budget_bytes: int) -> CaptureError:
    return CaptureError(
        f"{name} needs {memory_bytes:,} bytes, more than the whole budget of {budget_bytes:,}: "
        "raise memory_pool_size_mb or leave the bucket out",
        stage="budget",
    )


class _MemoryWarnings:
    """What the users of one registry are warned of, once each."""

    def __init__(self) -> None:
        self._evictions: Counter[tuple[int, int]] = Counter()
        self._told: set[str] = set()

    def evicted(self, entries: Iterable[CUDAGraphEntry]) -> None:
        """Remembers those that left before they were worth their compile."""
        early = [entry for entry in entries if entry.replay_count < _WORTH_A_COMPILE]
        if len(self._evictions) > MAX_SIZES:
            self._evictions.clear()
        self._evictions.update(_key(entry) for entry in early)

    def forget(self, function: FunctionRef) -> None:
        """Forgets a function that is gone, whose number another one may get."""
        for key in [key for key in list(self._evictions) if key[0] == function.identity]:
            self._evictions.pop(key, None)

    def captured(self, entry: CUDAGraphEntry, config: CUDAGraphConfig, *, held: int) -> None:
        """Warns where `entry`, one of so many, comes and goes, or closes over much."""
        if self._evictions[_key(entry)] >= _THRASHING and self._is_new("thrashing"):
            full = config.max_graphs is not None and held >= config.max_graphs
            limit = "max_graphs" if full else "memory_pool_size_mb"
            message = (
                f"thrashing: {entry.variant.name} at {entry.bucket} is compiled again and again, "
                f"because it is evicted before it serves {_WORTH_A_COMPILE} replays: raise "
                f"{limit}={getattr(config, limit)}, or give fewer capture_sizes and "
                "capture_seq_lens"
            )
            # Who sets max_graphs, which is None by default, has chosen that buckets leave.
            tell = logger.warning if full else _warn
            tell(message)
        each = entry.closed_over_bytes
        if not each:
            return
        buckets = len(config.grid(entry.program.carried, entry.bucket))
        if each * buckets >= _MUCH_CLOSED_OVER and self._is_new(entry.variant.name):
            how = "an argument with None in in_axes"
            if entry.single_input:
                how = "a part of the inputs"
            _warn(
                f"{entry.variant.name} closes over arrays of {each:,} bytes, and every bucket "
                f"keeps a copy of them: {each * buckets:,} bytes for the "
                f"{things(buckets, 'bucket')} of the grid. Pass them as {how}, which all buckets "
                "share"
            )

    def _is_new(self, what: str) -> bool:
        is_new = what not in self._told
        self._told.add(what)
        return is_new


def _key(entry: CUDAGraphEntry) -> tuple[int, int]:
    # Many functions may have one name. Numbers, since a variant keeps what it is of.
    return entry.variant.function.identity, hash((entry.variant, entry.bucket))


def _warn(message: str) -> None:
    warnings.warn(message, CUDAGraphWarning, stacklevel=3)


ERRORS = Errors(shared=CUDAGraphError, not_made=CaptureError, too_heavy=_too_heavy)
"""What is raised to those who wait for a capture that fails, and for a bucket without room."""


@belongs_to_process
class CUDAGraphRegistry:
    """Captured buckets by size and variant.

    Each is captured once however many threads ask for it; the least recently used go first when
    `max_graphs` or the memory budget is reached. All methods are safe to call from many threads.

    Args:
        config: Limits, compiler options and the grid.
        clock: Seconds, for capture times.
        store: Where executables are kept; None: in the directory of the config, if it has one.
        compiler: What compiles in the place of XLA, as in a test; None: XLA.

    Attributes:
        config: Limits, compiler options and the grid; re-planning sets another grid.
        shelf: The executables in the store; None without one.
        sizes: How often each size was asked for, up to the last time that totals were.
        observers: Who watches captures and replays.
        restarts: How often `reset` set the counts to zero.

    Example:
        >>> registry = CUDAGraphRegistry()
        >>> entry = registry.capture(4, 8, lambda inputs: inputs["x"] * 2, {"x": (4, 8)})
        >>> registry.get(3, 8) is entry
        True
    """

    def __init__(
        self,
        config: CUDAGraphConfig | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        store: GraphStore | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.config = checked_config(config)
        self.shelf = shelf_of(self.config.store if store is None else store, clock=clock)
        if self.shelf is not None and compiler is not None:
            raise ConfigError(
                f"a store keeps what XLA compiles, not what {compiler!r} makes: {_ONE}"
            )
        self.sizes = SizeHistogram()
        self._given, self._is_given = self.config, True
        # With what tells that the function is gone. Without a lock: each is there or not.
        self._required: dict[_Required, object] = {}
        self._ledger = Ledger(self.sizes)
        self._watchers = Watchers()
        self.observers: Observers = Observers(self._watchers.forget)
        self._builder = Builder(
            clock=clock, observers=self.observers, shelf=self.shelf, compiler=compiler
        )
        self.restarts = 0
        self._warnings = _MemoryWarnings()
        self._entries: SingleFlightLRU[Key, CUDAGraphEntry] = SingleFlightLRU(
            last_used=lambda entry: entry.journal.last_used(),
            weight=lambda entry: entry.memory.kept_bytes if entry.memory else 0,
            borrows=lambda entry: entry.memory.temporary_bytes if entry.memory else 0,
            max_items=self.config.max_graphs,
            max_weight=self.config.memory_budget_bytes,
            on_drop=lambda entries: self.changed() if entries else None,
            on_evict=self._tell_evicted,
            describe=lambda key: f"{key[1].name} at {key[0]}",
            errors=ERRORS,
        )

    def __repr__(self) -> str:
        return f"CUDAGraphRegistry({self.num_graphs} graphs, {self.capture_count} captures)"

    def _repr_html_(self) -> str:
        # Here, because most processes that serve show nothing.
        from cudagraph_jax.report.summary import stats_html

        return stats_html("CUDAGraphRegistry", self.stats())

    @property
    def num_graphs(self) -> int:
        """How many buckets are held."""
        return len(self._entries)

    @property
    def capture_count(self) -> int:
        """How many buckets were compiled."""
        return self._builder.captures

    @property
    def load_count(self) -> int:
        """How many buckets were loaded instead."""
        return self._builder.loads

    @property
    def capture_ms(self) -> float:
        """Milliseconds of all captures."""
        return self._builder.capture_ms

    @property
    def evictions(self) -> int:
        """How many buckets had to leave because of a limit."""
        return self._entries.evictions

    @property
    def totals(self) -> ReplayTotals:
        """What all replays add up to, those of dropped buckets included."""
        return self._ledger.totals()

    @property
    def multiples(self) -> dict[str, int]:
        """What the sizes of the grid are multiples of, by axis, so that meshes divide them."""
        found: dict[str, int] = {}
        for _, axis, multiple in list(self._required):
            found[axis] = math.lcm(found.get(axis, 1), multiple)
        return found

    def require(self, function: FunctionRef, multiples: Mapping[str, int]) -> None:
        """Has the sizes of the grid be multiples of these, after re-planning, too.

        Default sizes are rounded up to them, as long as nothing is captured or planned.

        Args:
            function: For how long: until it is gone.
            multiples: By axis.

        Raises:
            ConfigError: A size is not, or a limit is below what the default ones are rounded to.
        """
        every = [(function, axis, multiple) for axis, multiple in multiples.items()]
        new = [required for required in every if required not in self._required]
        for required in new:
            forget = partial(_forget, self._required, required)
            self._required[required] = function.when_gone(forget)
        try:
            # First told, then looked at: of two that come at once the last one sees both.
            while (config := self._rounded()) != self.config:
                check_grid(config, multiples)
                self.config = config
            check_grid(config, multiples)
        except ConfigError:
            for required in new:
                _forget(self._required, required)
            raise

    def _rounded(self) -> CUDAGraphConfig:
        """The configuration; default sizes are such as all meshes divide, while they may change."""
        is_open = self._is_given and not self.num_graphs
        return divided_grid(self._given, self.multiples) if is_open else self.config

    def change_grid(self, config: CUDAGraphConfig) -> None:
        """Serves by another grid from now on.

        Raises:
            ConfigError: A mesh does not divide it, of a function that came meanwhile, say.
        """
        before, self._is_given = (self.config, self._is_given), False
        self.config = config
        try:
            check_grid(config, self.multiples)
        except ConfigError:
            self.config, self._is_given = before
            raise

    def asked_sizes(self) -> dict[Bucket, int]:
        """How often each size was asked for; see `CUDAGraphManager.sizes`."""
        self._ledger.totals()  # which counts the replays since the last time
        return self.sizes.counts()

    def capture(
        self,
        batch_size: int,
        seq_len: int,
        capture_fn: Callable[[PyTree], PyTree],
        input_shapes: PyTree,
        output_shapes: PyTree = None,
    ) -> CUDAGraphEntry:
        """The entry of this very size; compiled and run `warmup_iterations` times where absent.

        Args:
            batch_size: Rows of the bucket.
            seq_len: Sequence length of the bucket.
            capture_fn: A JAX function of one pytree.
            input_shapes: That pytree at the bucket's size: `jax.ShapeDtypeStruct` leaves, or
                tuples of sizes (float32). Axis 0 is the batch where its size is `batch_size`, axis
                1 the sequence where its size is `seq_len`.
            output_shapes: What the function is expected to give; checked if not None.

        Raises:
            InputShapeError: `input_shapes` are no shapes, or `output_shapes` not what comes.
            CaptureError: The function could not be traced, lowered, compiled or run.
        """
        use_jax()
        sizes = capture_sizes(batch_size, seq_len)
        program, call = single_program(capture_fn, input_shapes, output_shapes, sizes)
        runs = self.config.warmup_iterations
        return self.capture_program(program, sizes, call, iterations=runs).value

    def capture_program(
        self,
        program: Program,
        bucket: Bucket,
        call: Call,
        *,
        iterations: int = 0,
    ) -> CacheItem[CUDAGraphEntry]:
        """The entry of `program` at `bucket`, compiled where absent and published whole.

        Args:
            program: What to compile.
            bucket: For which sizes.
            call: A call of the program: in `debug_mode` a new entry is checked against it, and
                what it passes through is used in the runs.
            iterations: Runs of a new entry before anybody can see it.

        Raises:
            CaptureError: Compiling, checking or running failed, here or in the thread that was
                waited for; such an entry is not kept.
            InputShapeError: An output that must be trimmed cannot be.
            DistributedError: It spans processes that do not agree on it, or evicts another.
        """
        build = self._building(program, bucket, call, iterations)
        made = self._entries.get_or_make((bucket, program.variant), build)
        if made.is_new:
            self._tell(made.value)
            for other in self._same_calls(made.value):
                if other.variant.function.is_gone:
                    self.discard(other.bucket, other.variant)
        return made

    def _tell(self, entry: CUDAGraphEntry) -> None:
        """Tells of a new entry, which anybody can find by now."""
        self.observers.captured(entry)
        self._warnings.captured(entry, self.config, held=self.num_graphs)

    def _tell_evicted(self, entries: list[CUDAGraphEntry]) -> None:
        self.observers.evicted(entries)
        self._warnings.evicted(entries)

    def build(
        self,
        program: Program,
        bucket: Bucket,
        call: Call,
        *,
        iterations: int = 0,
    ) -> CUDAGraphEntry:
        """A new entry that is not held yet; as for `capture_program`."""
        return self._building(program, bucket, call, iterations)()

    def _building(
        self, program: Program, bucket: Bucket, call: Call, iterations: int
    ) -> Callable[[], CUDAGraphEntry]:
        return partial(
            self._builder.build,
            program,
            bucket,
            call,
            config=self.config,
            ledger=self._ledger,
            held=self.entries,
            iterations=iterations,
        )

    @property
    def generation(self) -> int:
        """How often it was cleared."""
        return self._entries.generation

    def adopt(self, entries: Mapping[Key, CUDAGraphEntry], *, generation: int) -> bool:
        """Holds what was built, unless it was cleared since `generation`; evicts nothing."""
        adopted = self._entries.put_all(entries, generation=generation)
        for entry in entries.values() if adopted else ():
            self._tell(entry)
        return adopted

    def find(self, bucket: Bucket, variant: Variant) -> CUDAGraphEntry | None:
        """The entry of exactly this bucket and variant."""
        return self._entries.values.get((bucket, variant))

    def remove(self, batch_size: int, seq_len: int, *, variant: Variant | None = None) -> bool:
        """Drops the entries of exactly this size; whether there were any.

        A request that is under way keeps its executable until it is done.

        Raises:
            DistributedError: Several processes share captured buckets, and process 0 leads.
        """
        PEERS.refuse_dropping(self.entries())
        for entry in (entries := self.at(Bucket(batch_size, seq_len), variant=variant)):
            self.discard(entry.bucket, entry.variant)
        return bool(entries)

    def is_capturing_here(self, bucket: Bucket, variant: Variant) -> bool:
        """Whether this very thread captures the bucket, and a signal handler came in between."""
        return self._entries.is_making_here((bucket, variant))

    @property
    def captures_here(self) -> bool:
        """Whether this very thread captures anything, so that the background may wait for it."""
        return self._entries.makes_here

    def discard(self, bucket: Bucket, variant: Variant) -> None:
        """Drops the entry of exactly this bucket and variant, if there is one."""
        self._entries.pop((bucket, variant))

    def release(self, function: FunctionRef) -> None:
        """Drops what was captured for a function that is gone, as it can serve nobody.

        The graph of a function of one pytree still serves `replay_graph` and `get`, which name no
        function, until another one is captured for the same bucket and inputs.
        """
        for entry in self.entries():
            if entry.variant.function == function and not (
                entry.single_input and self._is_newest(entry)
            ):
                self.discard(entry.bucket, entry.variant)
        self._warnings.forget(function)

    def _is_newest(self, entry: CUDAGraphEntry) -> bool:
        return all(other.graph_id < entry.graph_id for other in self._same_calls(entry))

    def _same_calls(self, entry: CUDAGraphEntry) -> list[CUDAGraphEntry]:
        """The entries of other functions of one pytree for the same bucket and inputs."""
        own = entry.variant
        return [
            other
            for other in self.at(entry.bucket)
            if entry.single_input
            and other.single_input
            and other.variant.function != own.function
            and (other.variant.structure, other.variant.leaves) == (own.structure, own.leaves)
        ]

    def discard_broken(self, entry: CUDAGraphEntry, error: CaptureError) -> None:
        """Drops an entry that does not run; one that was loaded is compiled the next time.

        It may have been dropped meanwhile: what has its place by then stays.
        """
        key = (entry.bucket, entry.variant)
        if self._entries.values.get(key) is entry:
            self._builder.reject(entry, error)  # before somebody else misses it
            self._entries.pop_only(key, entry)

    def compiling_ahead(self, workers: int) -> AbstractContextManager[Begin]:
        """A function that has executables compiled in threads; see `CompilesAhead.running`."""
        entries = self._entries
        return self._builder.ahead.running(
            workers, is_captured=lambda *key: key in entries or entries.is_making(key)
        )

    def clear(self) -> None:
        """Drops all entries, and does not keep those that are being captured.

        Raises:
            DistributedError: Several processes share captured buckets, and process 0 leads.
        """
        PEERS.refuse_dropping(self.entries())
        self._entries.clear()
        self.changed()

    def reset(self) -> None:
        """Drops all entries and starts all counts from zero.

        Raises:
            DistributedError: Several processes share captured buckets, and process 0 leads.
        """
        PEERS.refuse_dropping(self.entries())
        # First, so that what is captured from now on counts in the new ledger.
        self._ledger.sizes = SizeHistogram()  # whose journals may be read on
        self._ledger = Ledger(self.sizes)
        self.sizes.clear()
        self.clear()
        self._warnings = _MemoryWarnings()
        self._entries.forget_evictions()
        self._builder.forget()
        self.restarts += 1  # the last: who adds up differences reads it before the counts

    def entries(self) -> list[CUDAGraphEntry]:
        """A snapshot of all entries, in the order of their capture."""
        return [entry for _, entry in self._entries.items()]

    def watch(self, routes: Watcher) -> None:
        """Forgets `routes` whenever an entry was dropped; held weakly."""
        self._watchers.add(routes)

    def changed(self) -> None:
        """Tells all watchers to look entries up anew."""
        self._watchers.forget()

    def stats(self) -> dict[str, Any]:
        """Counts and times, in values that JSON can hold; `graphs` by `"8x128"`."""
        return inventory(
            self.entries(), builder=self._builder, totals=self.totals, evictions=self.evictions
        )

    def find_larger(self, sizes: Bucket, variant: Variant) -> CUDAGraphEntry | None:
        """The entry with the fewest elements that holds `sizes`, of the same variant.

        Without `capture_seq_lens` the sequence is not padded, so only its own length holds it.
        """
        pads_seq = self.config.capture_seq_lens is not None
        entries = [entry for entry in self.entries() if entry.variant == variant]
        holding = [entry for entry in entries if entry.bucket.holds(sizes, pads_seq=pads_seq)]
        return min(holding, key=lambda entry: entry.bucket.elements, default=None)

    def get(
        self, batch_size: int, seq_len: int, *, variant: Variant | None = None
    ) -> CUDAGraphEntry | None:
        """The entry of this size, else of the bucket it is padded to, else None.

        Args:
            batch_size: Rows of the request.
            seq_len: Sequence length of the request.
            variant: Which one of several; None: the one captured last.
        """
        for bucket in (Bucket(batch_size, seq_len), self.config.bucket_for(batch_size, seq_len)):
            if entries := self.at(bucket, variant=variant):
                return entries[-1]
        return None

    def at(self, bucket: Bucket, *, variant: Variant | None = None) -> list[CUDAGraphEntry]:
        """All entries of exactly this bucket, the one captured last at the end."""
        held = (entry for entry in self.entries() if entry.bucket == bucket)
        return [entry for entry in held if variant in (None, entry.variant)]

    def has(self, batch_size: int, seq_len: int, *, variant: Variant | None = None) -> bool:
        """Whether `get` would find an entry."""
        return self.get(batch_size, seq_len, variant=variant) is not None


_Required = tuple[FunctionRef, str, int]
"""A function, an axis, and what the sizes of that are to be multiples of."""


def _forget(all_required: dict[_Required, object], required: _Required) -> None:
    all_required.pop(required, None)


def inventory(
    entries: Iterable[CUDAGraphEntry], *, builder: Builder, totals: ReplayTotals, evictions: int
) -> dict[str, Any]:
    """The figures of a registry; `graphs` by `"8x128"`.

    Further variants of the same bucket have `"#"` and their graph_id behind it.
    """
    held = list(entries)
    graphs: dict[str, object] = {}
    for entry in held:
        key = str(entry.bucket)
        graphs[f"{key}#{entry.graph_id}" if key in graphs else key] = entry.stats()
    return {
        "num_graphs": len(held),
        "capture_count": builder.captures,
        "total_replays": totals.replays,
        "total_replay_time_ms": totals.seconds * 1e3,
        "avg_replay_time_ms": totals.mean_ms,
        "capture_time_ms": builder.capture_ms,
        "load_count": builder.loads,
        "load_time_ms": builder.load_ms,
        "memory_bytes": pool_bytes(entry.memory for entry in held),
        "closed_over_bytes": sum(entry.closed_over_bytes for entry in held),
        "evictions": evictions,
        "graphs": graphs,
    }
