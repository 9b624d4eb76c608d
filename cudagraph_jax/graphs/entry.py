"""One captured bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.text import one_line
from cudagraph_jax.errors import DistributedError, InputShapeError
from cudagraph_jax.graphs.observers import Observers, annotation
from cudagraph_jax.graphs.pads import (
    Homes,
    fits_untouched,
    homes_of,
    refuse_elsewhere,
    refuse_misplaced,
)
from cudagraph_jax.graphs.replay_counts import Fit, Journal, ReplayTotals, Request
from cudagraph_jax.graphs.route import Route, WatchedRoute
from cudagraph_jax.modes import CommandBufferScope, GraphState
from cudagraph_jax.program.call import Call, Variant, describe_call
from cudagraph_jax.program.outputs import Outputs, RealOutputs
from cudagraph_jax.program.padded import Refills, flatten_arguments
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.memory import Memory
from cudagraph_jax.xla.profile import REPLAY
from cudagraph_jax.xla.settings import refuse_not_finite
from cudagraph_jax.xla.stages import Executable

if TYPE_CHECKING:
    from cudagraph_jax.report.command_buffers import Inspection

# Of the first XLA may run the thunks one by one, with the second it records, with the third it
# replays (docs/xla.md, "Command buffers").
_RUNS_UNTIL_WARM = 3


@belongs_to_process
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CUDAGraphEntry:
    """One captured bucket, born complete; only its counters change.

    Attributes:
        bucket: Its sizes.
        program: The function and inputs that it was compiled from.
        executable: The compiled program.
        outputs: Where its outputs carry the sizes.
        refills: What re-fills those that are handed out as a `Padded`.
        graph_id: A number that no other entry of the registry has had.
        options: The compiler options that it was compiled with.
        copies_inputs: Whether `replay` pads; otherwise inputs must have the bucket's shape.
        waits: Whether each replay waits for the device (`debug_mode`).
        journal: The records of its replays.
        observers: Who watches it.
        is_shared: Whether it runs on the devices of several processes, all of which run it.
        homes: Where its executable takes what it is given.
    """

    bucket: Bucket
    program: Program = field(repr=False)
    executable: Executable = field(repr=False)
    outputs: Outputs = field(repr=False)
    refills: Refills = field(default=(), repr=False)
    graph_id: int
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    copies_inputs: bool = True
    waits: bool = False
    journal: Journal = field(repr=False)
    observers: Observers = field(repr=False)
    is_shared: bool = False
    homes: Homes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        homes = homes_of(self.program, self.executable.call, self.bucket)
        object.__setattr__(self, "homes", homes)

    def __repr__(self) -> str:
        return one_line(f"CUDAGraphEntry({self.bucket}, {self.variant}, graph_id={self.graph_id})")

    @property
    def batch_size(self) -> int:
        """Rows of the bucket."""
        return self.bucket.batch_size

    @property
    def seq_len(self) -> int:
        """Sequence length of the bucket; 1 for functions without a sequence axis."""
        return self.bucket.seq_len

    @property
    def key(self) -> tuple[int, int]:
        """`(batch_size, seq_len)`."""
        return (self.batch_size, self.seq_len)

    @property
    def variant(self) -> Variant:
        """What else distinguishes it: function, dtypes, other dimensions, static arguments."""
        return self.program.variant

    @property
    def single_input(self) -> bool:
        """Whether `replay` takes one pytree, as the specification has it, or a tuple."""
        return self.program.target.single_input

    @property
    def is_loaded(self) -> bool:
        """Whether it was loaded from a store instead of compiled."""
        return self.executable.is_loaded

    @property
    def capture_time_ms(self) -> float:
        """Milliseconds to trace, lower and compile it, or to load it."""
        return self.executable.compile_ms

    @property
    def memory_bytes(self) -> int | None:
        """What it needs alone, kept and borrowed; None if the compiler does not say."""
        return self.executable.memory_bytes

    @property
    def memory(self) -> Memory | None:
        """What it keeps while it is held, and what a run borrows, apart."""
        return self.executable.memory

    @property
    def closed_over_bytes(self) -> int:
        """Of the arrays that its function closes over, of which it keeps a copy."""
        return self.executable.closed_over_bytes

    @property
    def flops(self) -> float | None:
        """Floating-point operations of one replay; None if the compiler does not say."""
        return self.executable.flops

    @property
    def input_shapes(self) -> PyTree:
        """The inputs as a pytree of `jax.ShapeDtypeStruct`."""
        args, _ = self.program.arguments(self.bucket)
        return args[0] if self.single_input else args

    @property
    def output_shapes(self) -> PyTree:
        """The outputs as a pytree of `jax.ShapeDtypeStruct`, at the bucket's size."""
        return jax.tree.map(
            lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), self.executable.output_info
        )

    @property
    def totals(self) -> ReplayTotals:
        """What its replays add up to."""
        return self.journal.totals()

    @property
    def replay_count(self) -> int:
        """How often it was replayed."""
        return self.totals.replays

    @property
    def state(self) -> GraphState:
        """How far it has come; `REPLAYING` only if `CUDAGraphManager.profile_replays` saw it."""
        return self._state(self.replay_count)

    @property
    def total_replay_time_ms(self) -> float:
        """Milliseconds of all replays, from the inputs to the trimmed outputs.

        With outputs on the device this is the time to dispatch, unless in `debug_mode`.
        """
        return self.totals.seconds * 1e3

    @property
    def avg_replay_time_ms(self) -> float:
        """Mean milliseconds of a replay; 0 before the first."""
        return self.totals.mean_ms

    @property
    def cost_ms(self) -> float | None:
        """Milliseconds that a run takes until its outputs are there; None where nobody waited.

        It is measured in the warm-up, and refreshed by calls that wait for their outputs, as they
        do with `unpad="host"` or in `debug_mode`: never a time to dispatch.
        """
        return self.journal.cost_ms

    def stats(self) -> dict[str, Any]:
        """Its figures, in values that JSON can hold."""
        totals = self.totals
        return {
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "axes": self.bucket.named,
            "variant": str(self.variant),
            "graph_id": self.graph_id,
            "state": self._state(totals.replays).value,
            "capture_time_ms": self.capture_time_ms,
            "memory_bytes": self.memory_bytes,
            "temporary_bytes": self.memory and self.memory.temporary_bytes,
            "closed_over_bytes": self.closed_over_bytes,
            "flops": self.flops,
            "replay_count": totals.replays,
            "total_replay_time_ms": totals.seconds * 1e3,
            "avg_replay_time_ms": totals.mean_ms,
            "cost_ms": self.cost_ms,
            "waste": totals.waste,
        }

    def _state(self, replays: int) -> GraphState:
        if self.observers.is_replaying(self.graph_id):
            return GraphState.REPLAYING
        runs = self.journal.idle_runs + replays
        return GraphState.WARMED if runs >= _RUNS_UNTIL_WARM else GraphState.COMPILED

    def inspect(
        self, *, scopes: Iterable[CommandBufferScope] = (), gpu: str | None = None
    ) -> Inspection:
        """What XLA records of it into command buffers; nothing but a statement on a CPU.

        It is compiled once more, for its own options and for each of `scopes`. On a GPU that has
        the recorded graphs of the process recorded again at their next run.

        Args:
            scopes: Further scopes to compare it with, its other options being as they are.
            gpu: The GPU to compile for, which need not be here: `"a100"`, `"h100"`, `"h200"`,
                `"b200"`, or the path of a `gpu_target_config.pbtxt` that XLA dumped on one. It
                takes JAX's CUDA plugin. None: for the default backend.

        Raises:
            CaptureError: It cannot be compiled, or XLA dumped nothing.
            ConfigError: `gpu` is not known, or cannot be compiled for.
        """
        # Here, because most processes that serve inspect nothing.
        from cudagraph_jax.graphs.inspection import inspect

        options = {"own options": self.options}
        options |= {scope.name: scope.in_place_of(self.options) for scope in scopes}
        return inspect(self.program, self.bucket, options, gpu=gpu)

    def replay(self, inputs: PyTree) -> PyTree:
        """The outputs for `inputs`, trimmed to their real sizes.

        Args:
            inputs: The pytree that the captured function takes, of the bucket's size or smaller;
                for an entry of a `bucket_jit` function the tuple of its positional arguments.

        Raises:
            InputShapeError: `inputs` are not what was captured, or larger than the bucket.
            DistributedError: The bucket spans several processes.
        """
        return self.serve(inputs)

    def serve(self, inputs: PyTree, *, fit: Fit | None = None) -> PyTree:
        """As `replay`, recorded with `fit`; exact or padded, as the sizes say, if None."""
        use_jax()
        if self.is_shared:
            raise DistributedError(
                f"{self.variant.name} at {self.bucket} spans several processes, and a replay of "
                "its entry is not compared among them: call the function itself"
            )
        args = (inputs,) if self.single_input else tuple(inputs)
        route = self.route_for(self._describe(args), fit=fit)
        try:
            return route.run(args)
        except Exception as error:
            refuse_not_finite(error, f"{self.variant.name} in the bucket {self.bucket}")
            raise

    def route_for(
        self, call: Call, *, fit: Fit | None = None, outputs: Outputs | None = None
    ) -> Route:
        """The route of a call of this entry's variant and not larger than its bucket.

        Args:
            call: The call.
            fit: How it fits; exact or padded, as its sizes say, if None.
            outputs: The entry's outputs, to be handed out in another way.

        Raises:
            InputShapeError: Only the function can say what its outputs are at the call's sizes, and
                it does not take those; or an array would have to be copied to other devices, and
                nothing is to be copied, or no process can read it; or what is passed through was
                put elsewhere.
        """
        if not self.copies_inputs:
            refuse_elsewhere(self.program, call.leaves, self.homes)
        refuse_misplaced(self.program, call.leaves, self.homes, self.bucket)
        if fit is None:
            fit = Fit.EXACT if call.sizes == self.bucket else Fit.PADDED
        make: Callable[..., Route] = Route
        run: Callable[..., PyTree] = self.executable.call
        if self.observers.watches_replays:
            make = partial(WatchedRoute, observers=self.observers, graph_id=self.graph_id)
            if (addresses := self.observers.addresses) is not None:
                names = self.program.argument_names
                run = addresses.noting(self.graph_id, names, run)
        outputs = self.outputs if outputs is None else outputs
        is_known = call.sizes == self.bucket or not (outputs.follows or outputs.may_spread)
        return make(
            self.program,
            run,
            bucket=self.bucket,
            leaves=call.leaves,
            request=Request(call.sizes, fit),
            outputs=outputs,
            real=None if is_known else self.real_outputs(outputs, call.sizes),
            homes=self.homes,
            refills=self.refills,
            journal=self.journal,
            wait=self.waits,
        )

    def begin_rows(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> PyTree:
        """The outputs of a batch whose rows have their own lengths, not waited for.

        `count_rows` records it, when they are there.

        Args:
            args: The arguments, at the bucket's size.
            kwargs: The keyword arguments, masks among them, likewise.
        """
        run: Callable[..., PyTree] = self.executable.call
        observers = self.observers
        if (addresses := observers.addresses) is not None:
            run = addresses.noting(self.graph_id, self.program.argument_names, run)
        if not observers.annotate_replays:
            return run(*args, **kwargs)
        about = {"watcher": observers.number, "graph_id": self.graph_id}
        with annotation(REPLAY, self.program.target.name, self.bucket, **about):
            return run(*args, **kwargs)

    def count_rows(self, sizes: Bucket, *, real_elements: int, seconds: float) -> None:
        """Records a replay of rows that have their own lengths.

        Args:
            sizes: The rows, and the largest size on each axis.
            real_elements: Those of all rows at their own sizes.
            seconds: How long the device was at it.
        """
        fit = Fit.EXACT if real_elements == self.bucket.elements else Fit.PADDED
        self.journal.add(Request(sizes, fit), seconds=seconds, real_elements=real_elements)
        if self.observers.watches_replays:
            self.observers.replayed(self.bucket, seconds)

    def real_outputs(self, outputs: Outputs, sizes: Bucket) -> RealOutputs:
        """As the function of that name, of this entry."""
        infos = self.executable.output_info
        return real_outputs(self.program, outputs, sizes, bucket=self.bucket, infos=infos)

    def padded_outputs(self, call: Call) -> list[PyTree]:
        """The output arrays for `call` as the executable gives them; recorded as no replay."""
        route = self.route_for(call)
        return jax.tree.leaves(route.call_padded(call.args, call.kwargs))

    def _describe(self, args: tuple[PyTree, ...]) -> Call:
        leaves, structure = flatten_arguments((args, {}))
        if structure != self.variant.structure:
            raise InputShapeError(
                f"the inputs have the structure {structure}, but {self.bucket} was captured for "
                f"{self.variant.structure}: give the same pytree of arrays"
            )
        call = describe_call(
            self.variant.function,
            args,
            {},
            declared=self.program.declared,
            target=self.program.target,
            places=self.variant.places,
            flat=(leaves, structure),
        )
        if call.variant.leaves != self.variant.leaves:
            raise InputShapeError(
                f"the inputs are {call.variant}, but {self.bucket} was captured for "
                f"{self.variant}: give the same dtypes and other dimensions"
            )
        # A size that no array carries is the bucket's own.
        sizes = self.bucket.map(
            lambda own, given: given, call.sizes.only(call.carried, others=self.bucket)
        )
        if not self.bucket.holds(sizes):
            raise InputShapeError(
                f"the inputs have {sizes.described}, more than the bucket {self.bucket}: use a "
                "larger bucket"
            )
        may_copy = self.copies_inputs
        if not (may_copy or sizes == self.bucket or fits_untouched(call, self.bucket, self.homes)):
            raise InputShapeError(
                f"the inputs have {sizes.described}, not the bucket's {self.bucket}, and "
                "cudagraph_copy_inputs=False forbids to copy them: pad them, or leave "
                "cudagraph_copy_inputs on"
            )
        return replace(call, sizes=sizes)


def real_outputs(
    program: Program, outputs: Outputs, sizes: Bucket, *, bucket: Bucket, infos: PyTree
) -> RealOutputs:
    """What of a bucket's outputs is the plain function's answer to a call of `sizes`.

    Args:
        program: What the bucket is of.
        outputs: Its outputs.
        sizes: Those of the call.
        bucket: Those of the bucket.
        infos: Its outputs there, with their `shape`.

    Raises:
        InputShapeError: The function takes no such call, or its answer is larger.
    """
    real = program.real_outputs(outputs, sizes)
    if outputs.may_spread:
        program.refuse_spread(sizes, bucket=bucket)
    if not outputs.follows:
        return real
    wholes = [info.shape for info in jax.tree.leaves(infos)]
    for leaf, shape, whole in zip(outputs.leaves, real.shapes, wholes, strict=True):
        is_cut = leaf.unpad != "none"
        if is_cut and any(size > room for size, room in zip(shape, whole, strict=True)):
            raise InputShapeError(
                f"{leaf.name} has the shape {shape} at {sizes.described}, more than in the bucket "
                f"{bucket}, {whole}, so that it cannot be cut out of that: let its length grow "
                'with the size, or ask for unpad="none"'
            )
    return real


def homes_in(entry: CUDAGraphEntry | None) -> Homes | None:
    """Where a captured bucket takes what it is given; None where none is captured."""
    return None if entry is None else entry.homes
