"""Items that may share calls: of one program, with the buckets that are captured for it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property, partial
from statistics import median
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from cudagraph_jax._base.log import log_in_worker
from cudagraph_jax.batching.company import check_company
from cudagraph_jax.batching.composition import Priced, Prices
from cudagraph_jax.batching.rows import ItemArguments, RowLayout, RowOutputs
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.dispatch.nearest import nearest_entry, variant_differences
from cudagraph_jax.errors import BucketOverflowError, DistributedError, InputShapeError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import Args, Call, abstract_call
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket, axis_name
from cudagraph_jax.shapes.padding import Array
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.settings import ThreadSettings, refuse_not_finite
from cudagraph_jax.xla.shardings import is_foreign, is_spread

_COSTS_LAST_S = 0.25
"""How long costs are taken for true: to ask all buckets takes 0.1 ms."""

_REMEMBERED_ITEMS = 1 << 14
"""Enough to plan a grid from, and so recent that the plan is one for today."""


Begin = Callable[[CUDAGraphEntry, Sequence[PyTree], Mapping[str, PyTree]], PyTree]
"""As `CUDAGraphEntry.begin_rows`."""


class Grid(NamedTuple):
    """The captured buckets of a lane.

    Attributes:
        entries: By their bucket.
        prices: What they cost, in milliseconds, or in elements where none was ever waited for.
        is_measured: Whether it is milliseconds.
        made_at: When the costs were asked for.
    """

    entries: Mapping[Bucket, CUDAGraphEntry]
    prices: Prices
    is_measured: bool
    made_at: float


def grid_of(entries: Sequence[CUDAGraphEntry], *, made_at: float) -> Grid:
    """The buckets with their costs; one that nobody measured costs as its elements elsewhere."""
    costs = {entry.bucket: entry.cost_ms for entry in entries}
    rates = [cost / bucket.elements for bucket, cost in costs.items() if cost is not None]
    rate = median(rates) if rates else 1.0
    known = {
        bucket: bucket.elements * rate if cost is None else cost for bucket, cost in costs.items()
    }
    prices = Prices(Priced(*item) for item in zip(known, plausible(known), strict=True))
    return Grid({entry.bucket: entry for entry in entries}, prices, bool(rates), made_at)


def put_ahead(inputs: PyTree, *, platform: Callable[[], str] = jax.default_backend) -> PyTree:
    """`inputs` on their way to the device; on the CPU as they are, where that would be a copy."""
    return inputs if platform() == "cpu" else jax.device_put(inputs)


def plausible(costs: Mapping[Bucket, float]) -> list[float]:
    """The costs, but of none more than of a bucket that holds more.

    What is measured so was slow for another reason, such as a pause of the process, and the bucket
    would not run again to show it: it counts as half-way between those around it.
    """
    if not costs:
        return []
    sizes = np.array([list(bucket.sizes.values()) for bucket in costs])
    measured = np.array(list(costs.values()))
    holds = (sizes[:, None] >= sizes[None]).all(-1) & ~np.eye(len(sizes), dtype=bool)
    above = np.where(holds, measured[:, None], np.inf).min(0)
    below = np.where(holds.T, measured[:, None], 0.0).max(0)
    middle = (np.minimum(below, above) + above) / 2
    bounded: list[float] = np.where(measured > above, middle, measured).tolist()
    return bounded


class _Now(NamedTuple):
    """What all items share for the time being.

    Attributes:
        values: As the batcher is given them.
        bound: The arguments of a call with them, by lane; those of the row are of any row.
    """

    values: Args
    bound: dict[Lane, Args]


class SharedArguments:
    """What all items of a batcher share, such as parameters; the only place that holds it.

    Args:
        values: In the order of the function's arguments.

    Attributes:
        now: What that is for the time being; a change is that of this one attribute.
    """

    def __init__(self, values: Args) -> None:
        self.change(values)

    def change(self, values: Args) -> None:
        """Has calls use these from the next one on; NumPy arrays are put on the device, once."""
        self.now = _Now(jax.tree.map(_on_device, values), {})


def _on_device(leaf: PyTree) -> PyTree:
    """A copy of a NumPy array, which each call would copy otherwise, as large as it is."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    is_numeric = leaf.dtype == np.bool_ or jnp.issubdtype(leaf.dtype, jnp.number)
    return jax.device_put(np.array(leaf)) if is_numeric else leaf


def _at_home(call: Call) -> Args:
    """The arguments of a call, what is passed through where it is declared to be: put there once.

    From one device to several JAX would copy it in each call, and compile how it is cut.
    """

    def placed(leaf: PyTree, home: Sharding | None) -> PyTree:
        is_by_chance = isinstance(leaf, jax.Array) and not leaf.committed
        if not (is_by_chance and is_spread(home)) or is_foreign(home):
            return leaf  # what several processes share, none of them puts there alone
        return jax.device_put(np.asarray(leaf), home)

    homes = [
        leaf.sharding if axes.passes_through else None
        for leaf, axes in zip(call.variant.leaves, call.axes, strict=True)
    ]
    leaves = map(placed, call.leaves, homes)
    args, _ = jax.tree.unflatten(call.variant.structure, list(leaves))
    found: Args = args
    return found


class _Holding(NamedTuple):
    """What a lane knows of the registry.

    Attributes:
        held: All that it held.
        own: The lane's of them.
        outputs: The answers within those, by `graph_id`.
        grid: The same, priced.
    """

    held: tuple[CUDAGraphEntry, ...]
    own: Sequence[CUDAGraphEntry]
    outputs: Mapping[int, RowOutputs]
    grid: Grid


class Lane:
    """One program of a function, as items come to it.

    Args:
        function: What is called.
        row: The arrays of an item as a batch of one, as shapes.
        item: Those arrays.
        arguments: Where they stand among the function's.
        shared: What all items share.
        clock: Seconds.
        begin: Begins a call of a bucket.

    Attributes:
        variant: What identifies the program.
        sizes: Those of the row.
        layout: How rows stand in its calls.
        recent: The sizes of the items that came last.

    Raises:
        InputShapeError: The row does not fit the function.
        PaddingLeakError: In `debug_mode`: a row gets another answer in company than alone.
    """

    def __init__(
        self,
        function: BucketedFunction[..., PyTree],
        row: Args,
        item: Sequence[PyTree],
        *,
        arguments: ItemArguments,
        shared: SharedArguments,
        clock: Callable[[], float],
        begin: Begin = CUDAGraphEntry.begin_rows,
    ) -> None:
        self._begin = begin
        self._function, self._row, self._arguments = function, row, arguments
        self._shared, self._clock, self._settings = shared, clock, ThreadSettings()
        call = self._describe(shared.now.values)
        self._call = abstract_call(call)
        self.variant = call.variant
        self.sizes = call.sizes
        self.layout = RowLayout(call)
        self.recent: deque[Bucket] = deque(maxlen=_REMEMBERED_ITEMS)
        self._holding = _Holding((), [], {}, grid_of([], made_at=clock()))
        self._item = item if function.manager.config.debug_mode else None

    def __repr__(self) -> str:
        return f"Lane({self.variant})"

    def _describe(self, passed: Args) -> Call:
        with self._settings.applied():  # whoever changes what is shared, or runs it, has others
            return self._function.describe(*self._arguments.places.joined(passed, self._row))

    @property
    def key(self) -> Hashable:
        """What items share that may share calls: where lengths are not padded, theirs too."""
        is_padded = self._function.manager.config.capture_seq_lens is not None
        return self.variant if is_padded else (self.variant, self.sizes.seq_len)

    @property
    def name(self) -> str:
        """The function's."""
        return self.variant.name

    def grid(self) -> Grid:
        """The buckets that are captured by now, at what they cost."""
        known, held = self._holding, tuple(self._function.registry.entries())
        own, outputs = known.own, known.outputs
        if held != known.held:
            own = [entry for entry in held if entry.variant == self.variant]
            if self.key != self.variant:
                own = [entry for entry in own if entry.seq_len == self.sizes.seq_len]
            outputs = {entry.graph_id: self._outputs_of(entry) for entry in own}
            for entry in own:
                if self._item is not None and entry.graph_id not in known.outputs:
                    self._check(entry, self._item)
        elif self._clock() < known.grid.made_at + _COSTS_LAST_S:
            return known.grid
        grid = grid_of(own, made_at=self._clock())
        self._holding = _Holding(held, own, outputs, grid)
        return grid

    def _outputs_of(self, entry: CUDAGraphEntry) -> RowOutputs:
        known = self._holding.outputs.get(entry.graph_id)
        if known is not None:
            return known
        return RowOutputs(entry.outputs, partial(entry.real_outputs, entry.outputs))

    def call_of(self, item: Sequence[PyTree], sizes: Bucket) -> Call:
        """A call of one row by itself: the arrays of an item of these sizes."""
        arrays = self.layout.pad([self.converted(item)], [sizes], sizes)
        return self._function.describe(*self.arguments(arrays))

    def _check(self, entry: CUDAGraphEntry, item: Sequence[PyTree]) -> None:
        """In debug_mode: raises unless rows of several sizes may share calls of a bucket."""
        config = self._function.manager.config
        check_company(
            self,
            entry,
            self.call_of(item, self.sizes),
            pads_seq=config.capture_seq_lens is not None,
            compare_where=config.compare_where,
        )

    def check(self, sizes: Bucket) -> None:
        """Raises where no captured bucket answers a row of these sizes.

        Raises:
            BucketOverflowError: It is larger than all that are captured.
            InputShapeError: None is captured for items like these, or the function takes no such.
        """
        self._outputs_of(self.entry_for(sizes)).check(sizes)

    def entry_for(self, sizes: Bucket) -> CUDAGraphEntry:
        """The cheapest captured bucket of one row of these sizes.

        Raises:
            BucketOverflowError: It is larger than all that are captured.
            InputShapeError: None is captured for items like these.
            DistributedError: It spans several processes and is not led.
        """
        grid = self.grid()
        priced = grid.prices.holding(sizes)
        if priced is not None:
            entry = grid.entries[priced.bucket]
            if entry.is_shared and self._begin is CUDAGraphEntry.begin_rows:
                raise DistributedError(
                    f"{self.name} spans several processes, and a batcher would compose other calls "
                    "on each: give it what cudagraph_jax.distributed.lead yields on process 0, and "
                    "call follow on the others"
                )
            return entry
        if grid.entries:
            raise BucketOverflowError(self._too_large(sizes, grid.prices))
        manager = self._function.manager
        bucket = manager.config.padded(sizes, self._call.carried)
        near = nearest_entry(manager.registry.entries(), self._call, bucket)
        raise InputShapeError(
            f"no bucket is captured for items like {self.variant}, and a batcher captures none "
            f"({near or 'none of the function is'}): call warmup of the function with arguments "
            "like these first"
        )

    def _too_large(self, sizes: Bucket, prices: Prices) -> str:
        came = ", ".join(
            f"{axis_name(axis)}={sizes.size(axis)}"
            for axis in self._call.carried
            if axis != "batch"
        )
        most, is_one_enough = prices.fitting(sizes)
        limits = [f"{axis_name(axis)} fits up to {size}" for axis, size in most.items()]
        return (
            f"an item of {self.name} has {came}, which no captured bucket holds: "
            f"{(' or ' if is_one_enough else ' and ').join(limits)}: cut it, or capture larger ones"
        )

    def check_shared(self, passed: Args) -> None:
        """Raises unless calls with these in the place of what is shared are of the same program.

        Raises:
            InputShapeError: They are not.
        """
        call = self._describe(passed)
        if call.variant != self.variant:
            differences = " and ".join(variant_differences(self.variant, call))
            raise InputShapeError(
                f"what {self.name} passes through has other shapes or dtypes than before, for "
                f"which nothing is captured ({differences}): give the same as before, or make a "
                "new Batcher after a warmup with these"
            )

    def converted(self, leaves: Sequence[PyTree]) -> tuple[Array, ...]:
        """Copies of an item's arrays, which the caller may then change."""
        return tuple(
            [np.array(leaf, dtype) for leaf, dtype in zip(leaves, self.layout.dtypes, strict=True)]
        )

    def arguments(self, arrays: Sequence[PyTree]) -> list[PyTree]:
        """The arguments of a call with these arrays, and what all items share now."""
        now = self._shared.now
        args = now.bound.get(self)
        if args is None:
            args = now.bound[self] = _at_home(self._describe(now.values))
        return self.layout.arguments(args, arrays)

    def put(
        self, entry: CUDAGraphEntry, inputs: PyTree, *, put: Callable[[PyTree], PyTree]
    ) -> PyTree:
        """The padded inputs of a call that is to follow the one that computes."""
        if entry.homes.are_several:
            return inputs  # they are cut on the host; from one device to several, JAX compiles that
        try:
            with entry.program.settings.applied(), jax.transfer_guard("allow"):
                return put(inputs)
        except Exception as error:  # there is no room beside the other call: its own may find some
            log_in_worker(logging.DEBUG, "inputs of %s were not put ahead: %s", self.name, error)
            return inputs

    def begin(
        self, entry: CUDAGraphEntry, args: Sequence[PyTree], masks: Mapping[str, PyTree]
    ) -> PyTree:
        """The outputs of a call of one of the buckets, not waited for."""
        with entry.program.settings.applied(), jax.transfer_guard("allow"):
            try:
                return self._begin(entry, args, {**self._call.kwargs, **masks})
            except Exception as error:
                refuse_not_finite(error, f"{self.name} in the bucket {entry.bucket}")
                raise

    def answers(
        self, entry: CUDAGraphEntry, result: PyTree, rows: Sequence[Bucket]
    ) -> list[PyTree]:
        """The answer to each row of such a call."""
        outputs = self._outputs_of(entry)
        with jax.transfer_guard("allow"):
            return outputs.answers(result, rows)

    def run_eagerly(self, arrays: Sequence[Array], sizes: Bucket) -> PyTree:
        """The answer to one row by the function itself, as in a mode that runs no bucket."""
        row = self.layout.own(self.layout.pad([arrays], [sizes], sizes))
        with self._settings.applied():
            result = self._function(*self._arguments.places.joined(self._shared.now.values, row))
        with jax.transfer_guard("allow"):
            return self._plain_outputs.answers(result, [sizes])[0]

    @cached_property
    def _plain_outputs(self) -> RowOutputs:
        """The answers within outputs of the function itself: it is traced, and nothing compiled."""
        dispatcher = self._function.manager.dispatcher
        with self._settings.applied():
            program = Program(self._call)
        bucket = dispatcher.bucket_for(self._call)
        outputs = program.outputs(bucket, others=dispatcher.config.along_axes(bucket))
        return RowOutputs(outputs, partial(program.real_outputs, outputs))
