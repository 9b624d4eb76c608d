"""Calls of a led function: decided on process 0, done by the others; and how they are told."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from cudagraph_jax._base.text import error_line
from cudagraph_jax.capture.cache_key import structure_to_json, tree_from_json
from cudagraph_jax.capture.peers import PEERS
from cudagraph_jax.dispatch.decision import Decision
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.distributed.link import Message
from cudagraph_jax.errors import CUDAGraphError, DistributedError, InputShapeError
from cudagraph_jax.graphs.entry import CUDAGraphEntry, real_outputs
from cudagraph_jax.graphs.pads import refuse_parameters_elsewhere
from cudagraph_jax.graphs.route import Route, Routes
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.arguments import ArgumentPlaces
from cudagraph_jax.program.call import Args, Call, is_key, is_weak
from cudagraph_jax.program.program import request_for
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.shardings import is_readable

Function = BucketedFunction[..., PyTree]


class Plan(NamedTuple):
    """How a call is served on this process, and so on all of them."""

    bucket: Bucket
    run: Callable[[], PyTree]
    captures: bool = False


class Calls:
    """Calls of a led function on one process: what is decided on process 0 is done by the others.

    Attributes:
        places: Which of its arguments are passed through.
    """

    def __init__(self, function: Function, passed: Args) -> None:
        self._function, self._passed = function, passed
        self.places = ArgumentPlaces(function.in_axes)
        self._routes = Routes()
        function.registry.watch(self._routes)

    def plan(self, own: Args) -> Plan:
        """How process 0 serves a call; nothing is run.

        Raises:
            CUDAGraphError: The arguments do not fit, or it is not served by a bucket.
        """
        dispatcher = self._function.manager.dispatcher
        args, key, draft = self._arguments(own), _key(own), self._routes.draft()
        route = None if key is None else draft.table.get(key)
        if route is None:
            with dispatcher.outcomes.counting_input_errors():
                call = self._function.describe(*args)
            decision = dispatcher.decide(call)
            if decision.mode is CUDAGraphMode.CAPTURE and not decision.piece_rows:
                return self._capture(call, decision)
            route = self._decided(call, decision)
            if key is not None and not decision.is_passing and _is_written_out(call, args):
                draft.add(route, key=key)
            return Plan(route.bucket, partial(route.run, call.args, call.kwargs))
        return Plan(route.bucket, partial(route.run, args))

    def obey(self, message: Message) -> PyTree:
        """What another process runs, as it is told."""
        bucket, own = Bucket.of(message.head["bucket"]), _untold(message)
        if message.head["rows"]:
            arrays, kwargs = own
            args = self._arguments(arrays)
            return self._entry(self._function.describe(*args), bucket).begin_rows(args, kwargs)
        args, key, draft = self._arguments(own), _key(own), self._routes.draft()
        route = None if key is None else draft.table.get(key)
        if route is None or route.bucket != bucket:
            call = self._function.describe(*args)
            route = self._entry(call, bucket).route_for(call)
            if key is not None and _is_written_out(call, args):
                draft.add(route, key=key)
            return route.run(call.args, call.kwargs)
        return route.run(args)

    def _arguments(self, own: Args) -> Args:
        return self.places.joined(self._passed, own)

    def _decided(self, call: Call, decision: Decision) -> Route:
        """The route of a call that a captured bucket serves.

        Raises:
            CUDAGraphError: None does.
        """
        name = call.target.name
        error: CUDAGraphError | None = decision.error
        if error is None and decision.piece_rows:
            error = DistributedError(
                f"{name} at {call.sizes} would be cut in pieces, which a led function is not: give "
                f"calls of at most {decision.piece_rows} rows"
            )
        if error is None and decision.entry is None:
            error = DistributedError(
                f"{name} at {call.sizes} has no bucket and would run eagerly ({decision}), which "
                "a led function does not: warm it up, or add larger buckets"
            )
        if error is not None or decision.entry is None:
            self._function.manager.dispatcher.outcomes.add("error", decision.reason, call.sizes)
            raise error or AssertionError
        return decision.entry.route_for(call, fit=decision.fit)

    def _capture(self, call: Call, decision: Decision) -> Plan:
        """How a call is served whose bucket all processes capture first."""
        bucket, outcomes = decision.bucket, self._function.manager.dispatcher.outcomes
        assert bucket is not None  # or this is not what was decided
        try:
            self._refuse_capture(call, bucket)
        except CUDAGraphError:
            outcomes.add("error", decision.reason, call.sizes)
            raise

        def run() -> PyTree:
            entry = self._entry(call, bucket)
            outcomes.add("capture", decision.reason, call.sizes)
            return entry.route_for(call).execute(call.args, call.kwargs)

        return Plan(bucket, run, captures=True)

    def _refuse_capture(self, call: Call, bucket: Bucket) -> None:
        """Raises what can be known of a capture before it is compiled, for the caller alone.

        Raises:
            CUDAGraphError: The function takes no such bucket or call, an output cannot be trimmed,
                what is passed through lies elsewhere, or there is no place.
        """
        registry = self._function.registry
        program = self._function.manager.dispatcher.capturer.program_of(call)
        refuse_parameters_elsewhere(call)
        PEERS.refuse_eviction(call, bucket, registry.entries(), registry.config)
        is_stored = registry.shelf is not None
        request = request_for(program, bucket, config=registry.config, is_stored=is_stored)
        infos = program.evaluate(bucket)
        outputs = program.outputs(
            bucket, tree=infos, others=request.others, searches=request.searches
        )
        real_outputs(program, outputs, call.sizes, bucket=bucket, infos=infos)

    def _entry(self, call: Call, bucket: Bucket) -> CUDAGraphEntry:
        """The entry of a bucket that all processes have, or capture now."""
        dispatcher = self._function.manager.dispatcher
        entry = dispatcher.registry.find(bucket, call.variant)
        if entry is not None:
            return entry
        capture = dispatcher.capturer.capture
        return dispatcher.capturer.gate.within(lambda _: capture(call, bucket)).value


def told(tree: PyTree) -> Message:
    """A pytree of arrays and numbers, in a form that can be told.

    Raises:
        InputShapeError: It holds something else, or a container that is not built in.
    """
    leaves, structure = jax.tree.flatten(tree)
    try:
        text = structure_to_json(structure, itertools.count())
    except TypeError as error:
        raise InputShapeError(
            f"the arguments of a led function are told to other processes, but {error_line(error)}:"
            " give arrays, or lists, tuples and dictionaries of them"
        ) from None
    for leaf in leaves:
        if not isinstance(leaf, np.ndarray | bool | int | float):
            raise InputShapeError(
                f"the arguments of a led function are told to other processes, but one is a "
                f"{type(leaf).__name__}: give NumPy arrays or numbers"
            )
    numbers = [None if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
    arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
    return Message({"tree": text, "numbers": numbers}, arrays)


def _untold(message: Message) -> PyTree:
    """What `told` was given."""
    rest = iter(message.arrays)
    leaves = [next(rest) if number is None else number for number in message.head["numbers"]]
    structure = jax.tree.structure(tree_from_json(message.head["tree"]))
    return jax.tree.unflatten(structure, leaves)


def on_host(leaf: PyTree) -> PyTree:
    """What can be told of an array, with the dtype that the function computes with."""
    if isinstance(leaf, np.generic):
        return np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    if not isinstance(leaf, jax.Array) or is_key(leaf):
        return leaf
    if not is_readable(leaf):
        raise InputShapeError(
            f"{leaf.aval} lies on the devices of several processes, but what is led is told by "
            "process 0 alone: give what it can read, or pass it through (None in in_axes)"
        )
    # A number whose dtype gives way to that of others is one of Python's, on all processes.
    return leaf.item() if is_weak(leaf) and not leaf.ndim else np.asarray(leaf)


def _is_written_out(call: Call, args: Args) -> bool:
    """Whether a call takes just these: no default is filled in, and none of them is static."""
    return len(call.args) == len(args) and not call.kwargs


def _key(own: PyTree) -> object:
    """What the route of a call depends on; None where it also depends on numbers."""
    leaves, structure = jax.tree.flatten(own)
    if not all(type(leaf) is np.ndarray for leaf in leaves):
        return None
    return structure, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
