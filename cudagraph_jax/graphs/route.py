"""The way of one request shape through a captured bucket: pad, call, trim; and remembered ways."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, get_abstract_mesh

from cudagraph_jax._base.fork import put_right_in_child
from cudagraph_jax.graphs.observers import Observers, annotation
from cudagraph_jax.graphs.pads import Homes, direct_call, masks_for, pads_for, put_masks
from cudagraph_jax.graphs.replay_counts import Journal, Request
from cudagraph_jax.program.arguments import device_array_type
from cudagraph_jax.program.donation import refuses_transfer, use_up
from cudagraph_jax.program.eager import is_plain
from cudagraph_jax.program.outputs import OutputLeaf, Outputs, RealOutputs
from cudagraph_jax.program.padded import Refill, Refills, is_padded, padded_maker
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array, Index, own_part, real_index
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.profile import REPLAY
from cudagraph_jax.xla.settings import current_mesh
from cudagraph_jax.xla.shardings import dividing, parts

NO_KWARGS: Mapping[str, PyTree] = {}


class Route:
    """How requests of one exact shape are served by one executable.

    Everything that depends on shapes alone is worked out here, once; `run` is the hot path.

    Args:
        program: What the executable was compiled from.
        call: The compiled function.
        bucket: Its sizes.
        leaves: Those of the request, or of one like it.
        request: What is served: its sizes and how they fit.
        outputs: The program's outputs.
        real: The caller's part of them; None where the axes say it.
        homes: Where it takes what it is given.
        refills: What re-fills those that are handed out as a `Padded`.
        journal: Where replays are recorded.
        wait: Whether to wait for the device on each run.

    Attributes:
        bucket: As given.
        request: As given.
        direct: What gives the executable's outputs for a call's positional arguments as they are,
            if no more is to be done than to copy some into zeros; else None.
        lead_type: The class of the arrays whose shape alone finds it; None: `takes` looks closer.
        pads_nothing: Whether the arguments go to the compiled function as they are, which checks
            them all.
        checks: What the arguments must be, beside what the compiled function checks.
        others: Position of each argument that is an array but for the one that leads, its shape,
            and which dtypes it may have in NumPy.
        sizes_in_arrays: Whether arguments that are arrays themselves carry all the sizes, not such
            as are pytrees, or a `Padded`.
        kinds: The types of arguments that need no second look.
        device_array: The class of JAX's arrays.
        device, precision, x64, mesh: JAX's settings in the threads that it serves, the mesh without
            its devices.
        devices: That mesh with them; None without one.
        lead_decides: Whether no other array than the one that leads is cut over several devices.
        finish: What turns its outputs into the caller's; None where they are handed out as is.
        tally: Counts the replays.
    """

    __slots__ = (
        "_call",
        "_cut",
        "_direct",
        "_mask_homes",
        "_masks",
        "_pads",
        "_unpad",
        "_wait",
        "bucket",
        "checks",
        "device",
        "device_array",
        "devices",
        "direct",
        "finish",
        "kinds",
        "lead_decides",
        "lead_type",
        "mesh",
        "others",
        "pads_nothing",
        "precision",
        "request",
        "sizes_in_arrays",
        "tally",
        "x64",
    )

    def __init__(
        self,
        program: Program,
        call: Callable[..., PyTree],
        *,
        bucket: Bucket,
        leaves: Sequence[object],
        request: Request,
        outputs: Outputs,
        real: RealOutputs | None,
        homes: Homes,
        refills: Refills,
        journal: Journal,
        wait: bool,
    ) -> None:
        # All outputs are there as soon as one of them is on the host.
        waits = wait or any(leaf.unpad == "host" for leaf in outputs.leaves)
        self.tally = journal.open(request, waits=waits)  # first: `__del__` asks for it
        self.bucket, self.request, sizes = bucket, request, request.sizes
        self._call, self._wait = call, wait
        self._pads = pads_for(program, leaves, homes, sizes=sizes, bucket=bucket)
        self.pads_nothing = not (self._pads.arrays or self._pads.trees)
        self._masks = masks_for(program, homes, sizes, bucket)
        self._mask_homes = homes.masks
        self.finish = finisher(outputs, refills, sizes=sizes, bucket=bucket, real=real)
        self._unpad = program.target.unpad
        self.checks, arguments = program.checks, program.argument_leaves
        # What a pytree holds is looked at by nobody but the compiled function.
        self.sizes_in_arrays = not any(map(is_padded, leaves)) and all(
            argument.is_array or all(program.axes[i].passes_through for i in argument.indices)
            for argument in arguments
        )
        self.others = tuple(
            (place, getattr(leaves[arguments[place].indices[0]], "shape", ()), dtypes)
            for place, dtypes in self.checks.others
        )
        self.kinds = self.checks.kinds
        self.device_array = device_array_type()
        self._cut = homes.cut(program)
        self.lead_type = None if self._cut else self.device_array
        self.lead_decides = not any(place in self._cut for place, _, _ in self.others)
        self.device, self.precision, self.x64, self.mesh = program.settings.always_read
        self.devices = program.settings.values[-1]
        self._direct = direct_call(call, self._pads, self._masks)
        self.direct = None if wait or any(self.checks.numbers) else self._direct

    def __del__(self) -> None:
        # Whoever runs a route holds it, so that nothing is counted after this.
        self.tally.is_open = False

    def serves_thread(self) -> bool:
        """Whether this thread has the mesh of those that it serves, and takes padding."""
        if self.mesh is not get_abstract_mesh():  # which names no devices
            return False
        if is_plain(self._unpad):
            return False
        return self.devices is None or self.devices == current_mesh()

    def takes(self, lead: PyTree, args: Sequence[PyTree]) -> bool:
        """Whether arrays of which several devices have parts are where it takes them.

        What was put elsewhere on purpose the compiled function refuses. Of what was not, it has JAX
        compile how that is cut; what a pytree holds is not looked at here.
        """
        kind: Any = self.device_array
        if not self.sizes_in_arrays or type(lead) is not kind:
            return False
        for position, home in self._cut.items():
            if type(value := args[position]) is kind:
                own = value.sharding
                if not (own == home or own.is_equivalent_to(home, value.ndim)):
                    return False
        return True

    def run(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree] = NO_KWARGS) -> PyTree:
        """The outputs for `args`, trimmed; recorded as a replay."""
        start = perf_counter()
        result = self.call_padded(args, kwargs)
        if self.finish is not None:
            result = self.finish(result)
        tally = self.tally
        tally.used_at = end = perf_counter()
        tally.seconds += end - start
        next(tally.count)
        return result

    def execute(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree] = NO_KWARGS) -> PyTree:
        """The outputs for `args`, trimmed; recorded nowhere."""
        result = self.call_padded(args, kwargs)
        return result if self.finish is None else self.finish(result)

    def call_padded(
        self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree] = NO_KWARGS
    ) -> PyTree:
        """The outputs for `args` as the executable gives them, of the bucket's size."""
        given = args
        try:
            if self._direct is not None and not kwargs:
                result = self._direct(*given)
            else:
                if not self.pads_nothing:
                    args = self._pads.apply(given)
                result = self._call(*args, **kwargs, **self._made_masks())
            is_refused = False
        except jax.errors.JaxRuntimeError as error:
            if not refuses_transfer(error):
                raise
            is_refused = True
        if is_refused:
            args = self._pads.apply_explicitly(given)
            result = self._call(*args, **kwargs, **put_masks(self._made_masks(), self._mask_homes))
        if self._wait:
            jax.block_until_ready(result)
        if self._pads.donated:
            use_up(given, args, self._pads.donated)
        return result

    def _made_masks(self) -> Mapping[str, PyTree]:
        return NO_KWARGS if self._masks is None else self._masks()


class WatchedRoute(Route):
    """A route whose replays are annotated or told of, as its `Observers` say when it is made.

    Unwatched routes are not of this class, so that watching costs them nothing.

    Args:
        program: As for `Route`, and so are the others.
        observers: Who watches.
        graph_id: The number of the entry, which a profile tells.
    """

    __slots__ = ("_observers", "_shown")

    def __init__(
        self,
        program: Program,
        call: Callable[..., PyTree],
        *,
        bucket: Bucket,
        leaves: Sequence[object],
        request: Request,
        outputs: Outputs,
        real: RealOutputs | None,
        homes: Homes,
        refills: Refills,
        journal: Journal,
        wait: bool,
        observers: Observers,
        graph_id: int,
    ) -> None:
        super().__init__(
            program,
            call,
            bucket=bucket,
            leaves=leaves,
            request=request,
            outputs=outputs,
            real=real,
            homes=homes,
            refills=refills,
            journal=journal,
            wait=wait,
        )
        self.direct = None  # so that calls come through `run`
        self._observers = observers
        self._shown: Callable[[], AbstractContextManager[object]] = nullcontext
        if observers.annotate_replays:
            self._shown = partial(
                annotation,
                REPLAY,
                program.target.name,
                bucket,
                watcher=observers.number,
                graph_id=graph_id,
            )

    def run(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree] = NO_KWARGS) -> PyTree:
        """The outputs for `args`, trimmed; recorded as a replay, in a profile too if asked."""
        # `Route.run` once more: it tells nobody its seconds, so that watching costs it nothing.
        with self._shown():
            start = perf_counter()
            result = self.execute(args, kwargs)
            tally = self.tally
            tally.used_at = end = perf_counter()
            tally.seconds += end - start
            next(tally.count)
        self._observers.replayed(self.bucket, end - start)
        return result


def finisher(
    outputs: Outputs,
    refills: Refills = (),
    *,
    sizes: Bucket,
    bucket: Bucket,
    real: RealOutputs | None = None,
) -> Callable[[PyTree], PyTree] | None:
    """What turns the executable's outputs into the caller's.

    Args:
        outputs: The program's outputs.
        refills: What re-fills those that are handed out as a `Padded`.
        sizes: The sizes of the call.
        bucket: Those of the outputs.
        real: The caller's part of them, where the axes alone do not say it.

    Returns:
        A function of the outputs; None where they can be handed out as they are.
    """
    steps = [
        _leaf_finisher(
            leaf,
            real_index(leaf.axes, leaf.ndim, sizes) if real is None else real.indices[index],
            refills[index] if refills else None,
            sizes=sizes,
            bucket=bucket,
        )
        for index, leaf in enumerate(outputs.leaves)
    ]
    structure = outputs.structure if real is None else real.structure
    if all(step is None for step in steps) and structure == outputs.structure:
        return None
    if len(steps) == 1 and jax.tree_util.treedef_is_leaf(structure):
        return steps[0]

    def finish(result: PyTree) -> PyTree:
        leaves, own = jax.tree.flatten(result)
        return jax.tree.unflatten(
            own if real is None else structure,
            [
                leaf if step is None else step(leaf)
                for step, leaf in zip(steps, leaves, strict=True)
            ],
        )

    return finish


def on_host(array: PyTree) -> Array:
    """`array` in NumPy, also where `jax.transfer_guard` wants that said."""
    try:
        return np.asarray(array)
    except jax.errors.JaxRuntimeError as error:
        if not refuses_transfer(error):
            raise
    fetched: Array = jax.device_get(array)
    return fetched


def host_slicer(index: Index) -> Callable[[PyTree], Array]:
    """What gives that part of an array in NumPy."""
    asarray = np.asarray

    def slice_on_host(array: PyTree) -> Array:
        try:
            return asarray(array)[index]
        except jax.errors.JaxRuntimeError:
            return on_host(array)[index]

    return slice_on_host


def slice_on_device(array: PyTree, index: Index) -> PyTree:
    """`array[index]`, also under `jax.transfer_guard`: JAX takes the index from the host."""
    try:
        return array[index]
    except jax.errors.JaxRuntimeError as error:
        if not refuses_transfer(error):
            raise
    with jax.transfer_guard("allow"):
        return array[index]


def device_slicer(index: Index) -> Callable[[PyTree], PyTree]:
    """What gives that part of an array on the device.

    Of one that lies on several it stays there, cut along the dimensions that still divide.
    """
    slice_parts: Callable[[PyTree], PyTree] | None = None

    def slice_whole(array: PyTree) -> PyTree:
        nonlocal slice_parts
        if not isinstance(array, jax.Array) or not parts(array.sharding):  # float0 is NumPy's
            return slice_on_device(array, index)
        if slice_parts is None:  # for each shape and sharding there is one slicer
            pairs = zip(index, array.shape, strict=True)
            bounds = tuple(real.indices(size)[:2] for real, size in pairs)
            shape = [stop - start for start, stop in bounds]
            slice_parts = compiled_slicer(bounds, dividing(array.sharding, shape))
        return slice_parts(array)

    return slice_whole


@lru_cache(maxsize=256)  # the caches of many layers are alike
def compiled_slicer(
    bounds: tuple[tuple[int, int], ...], placed: NamedSharding
) -> Callable[[PyTree], PyTree]:
    """What gives the part within `bounds` of an array over a mesh, cut as `placed` is."""
    index = tuple(slice(*each) for each in bounds)

    def slice_parts(whole: PyTree) -> PyTree:
        # Where its type says how it is cut, JAX slices no dimension into uneven parts.
        is_typed = AxisType.Explicit in placed.mesh.axis_types
        return (jax.sharding.reshard(whole, placed) if is_typed else whole)[index]

    sliced: Callable[[PyTree], PyTree] = jax.jit(slice_parts, out_shardings=placed)
    return sliced


def _leaf_finisher(
    leaf: OutputLeaf, index: Index, refill: Refill | None, *, sizes: Bucket, bucket: Bucket
) -> Callable[[PyTree], PyTree] | None:
    if leaf.unpad == "padded":
        return padded_maker(index, refill)
    trims = sizes != bucket and not (leaf.axes.passes_through and not leaf.follows)
    if leaf.unpad == "host":
        if not trims:
            return on_host
        real, whole = (
            math.prod(length.of(size) for _, length in leaf.axes.dims) for size in (sizes, bucket)
        )
        if real < whole / 2:
            return lambda array: own_part(on_host(array), index)
        return host_slicer(index)
    if leaf.unpad == "device" and trims:
        return device_slicer(index)
    return None


MAX_ROUTES = 1 << 14
"""Shapes remembered by one function; beyond that it starts anew (some 10 MB)."""

RouteTable = dict[Hashable, Route]


class Routes:
    """The routes of one caller; valid until an entry is dropped or the mode changes.

    Both tables are read without a lock. Forgetting swaps the dictionaries, so that a thread that
    decided before cannot add its route to those in use: take a `draft` first, decide, then `add`.

    Attributes:
        table: Routes by the shapes and dtypes of all bucketed arrays.
        exact: Routes that pad nothing, by the shape of the array that carries the sizes: the
            compiled function refuses other arrays that do not fit it.
        numpy: Routes by the shape and dtype of that array, where it is NumPy's; the caller compares
            the others, which costs half of what a key of all of them does.
    """

    __slots__ = ("__weakref__", "exact", "numpy", "table")

    def __init__(self) -> None:
        self.forget_routes()

    def forget_routes(self) -> None:
        """Decides every call anew from now on."""
        self.table: RouteTable = {}
        self.exact: RouteTable = {}
        self.numpy: RouteTable = {}

    def draft(self) -> Draft:
        """Where the route of a decision that is yet to be taken may be added."""
        return Draft(self.table, self.exact, self.numpy)


class Draft(NamedTuple):
    """The tables that were in use before a decision."""

    table: RouteTable
    exact: RouteTable
    numpy: RouteTable

    def add(self, route: Route, *, key: Hashable, lead: PyTree = None) -> None:
        """Remembers `route`.

        Args:
            route: The route of a call.
            key: The call's key in `table`.
            lead: The array that carries its sizes; None where none of them decides alone.
        """
        for table in self:
            if len(table) >= MAX_ROUTES:
                table.clear()
        self.table[key] = route
        if lead is None:
            return
        if route.pads_nothing:
            self.exact[lead.shape] = route
        if type(lead) is np.ndarray and route.sizes_in_arrays and route.lead_decides:
            self.numpy[lead.shape, lead.dtype] = route


class Watcher(Protocol):
    """Who remembers what was decided."""

    def forget_routes(self) -> None:
        """Decides anew from now on."""


class Watchers:
    """All the routes that have to be forgotten when an entry is dropped; held weakly."""

    def __init__(self) -> None:
        # Unlike the walk through a WeakSet, its copy stands while others add.
        self._routes: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()
        put_right_in_child(self)

    def add(self, routes: Watcher) -> None:
        """Forgets `routes` too, from now on."""
        self._routes[id(routes)] = routes

    def forget(self) -> None:
        """Decides every call anew from now on."""
        for reference in self._routes.valuerefs():
            if (routes := reference()) is not None:
                routes.forget_routes()

    def after_fork(self) -> None:
        """Has a forked child decide every call anew, so that it is told that it is one."""
        self.forget()
