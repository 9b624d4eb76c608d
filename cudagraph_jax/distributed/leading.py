"""`lead` and `follow`: process 0 decides for all processes of a job what they run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr

from cudagraph_jax._base.checks import waiting_time
from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.text import error_line, one_line
from cudagraph_jax.capture.cache_key import structure_to_json, tree_from_json
from cudagraph_jax.capture.peers import (
    CAPTURES_TAKE,
    PEERS,
    function_facts,
    hash_of,
    proof_refusal,
    variant_facts,
)
from cudagraph_jax.dispatch.decision import Decision
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.distributed.link import Link, Message, encoded, knock, open_door
from cudagraph_jax.distributed.turns import Turns
from cudagraph_jax.errors import ConfigError, CUDAGraphError, DistributedError, InputShapeError
from cudagraph_jax.graphs.entry import CUDAGraphEntry, real_outputs
from cudagraph_jax.graphs.pads import refuse_parameters_elsewhere
from cudagraph_jax.graphs.route import Route, Routes
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.arguments import ArgumentPlaces
from cudagraph_jax.program.call import Args, Call, has_tracers, is_key, is_weak, placement
from cudagraph_jax.program.fingerprint import comparable_structure, digest_of
from cudagraph_jax.program.program import request_for
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.coordinator import RESTART
from cudagraph_jax.xla.shardings import is_foreign, is_readable

_UNKNOWN_S = 60.0
"""How long to wait for the others where the arguments do not say."""

Function = BucketedFunction[..., PyTree]
Tree = tuple[Any, list[Any], list[Array]]
"""A pytree to be told: its structure, each leaf that is a number (None: an array), the arrays."""


@belongs_to_process
class Led:
    """A function that process 0 leads, to be called there by any thread; made by `lead`.

    Each call is told to the other processes with its bucket and its arrays, and its outputs are
    there when it returns. What is wrong with the arguments is said to the caller alone, and nobody
    else is told. A process that fails, ends, falls silent or is late ends all of it.

    Attributes:
        function: What is called.
        passed: What `in_axes` passes through.
    """

    def __init__(
        self, function: Function, passed: Args, links: Sequence[Link], *, timeout_s: float
    ) -> None:
        self.function, self.passed = function, passed
        self._calls = _Calls(function, passed)
        self._links, self._timeout_s = links, timeout_s
        self._is_closed = False
        self._turns = Turns(links, timeout_s=timeout_s, received=self._receive)
        self._turns.start()

    def __repr__(self) -> str:
        return one_line(f"Led({self.function.called}, {1 + len(self._links)} processes)")

    def __call__(self, *arrays: PyTree, **keywords: PyTree) -> PyTree:
        """The function's outputs, as the function hands them out.

        Args:
            *arrays: Its positional arguments but for those that are passed through: NumPy arrays,
                numbers, arrays of JAX that this process can read, or built-in containers of them.
                Those that have a default may be left out at the end.
            **keywords: None: nothing is told by keyword.

        Raises:
            InputShapeError: They do not fit, one is given by keyword, or a transformation of JAX is
                under way.
            DistributedError: A process failed, is gone, silent or late, now or before; or the call
                would not be served by a bucket, captured or to be captured.
            CUDAGraphError: What the policies turn into an error.
        """
        use_jax()
        if keywords:
            raise InputShapeError(
                f"{self.function.called} is led, and got {', '.join(keywords)} by keyword: give "
                "its arguments by position, without those that are passed through"
            )
        if has_tracers(arrays):
            raise InputShapeError(
                f"{self.function.called} is led, so it cannot be traced by jax.jit, jax.vmap or "
                "jax.grad: call it with arrays, or transform the plain function"
            )
        return self._turns.do(partial(self._call, arrays))

    def begin_rows(
        self, entry: CUDAGraphEntry, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]
    ) -> PyTree:
        """As `CUDAGraphEntry.begin_rows`, on all processes; the outputs are there."""
        own = self._calls.places.parted(tuple(args))[1]

        def run() -> PyTree:
            told = _told((own, dict(kwargs)))
            return self._run(
                {"bucket": entry.bucket.sizes, "rows": True},
                told,
                lambda: entry.begin_rows(args, kwargs),
            )

        return self._turns.do(run)

    def close(self) -> None:
        """Ends what is led, when what was asked before has ended; the others return then.

        Raises:
            DistributedError: A process has failed, now or before, or does not end in time.
        """
        if self._is_closed:
            return
        self._is_closed = True
        with self._turns.ending():
            self._turns.do(self._tell_end)
            self._turns.wait_for_ends()

    def _call(self, arrays: Args) -> PyTree:
        own = jax.tree.map(_on_host, arrays)
        told = _told(own)
        plan = self._calls.plan(own)
        if plan.captures:
            self._turns.allow(CAPTURES_TAKE * self._timeout_s)
        return self._run({"bucket": plan.bucket.sizes}, told, plan.run, captures=plan.captures)

    def _run(
        self,
        head: Mapping[str, Any],
        told: Tree,
        run: Callable[[], PyTree],
        *,
        captures: bool = False,
    ) -> PyTree:
        """Has all processes run the same; from here on each has to."""
        self._tell(head, told, captures=captures)
        try:
            outputs = run()
            jax.block_until_ready(outputs)
            return outputs
        except BaseException as error:
            if not self._links:
                raise  # which nobody else has begun
            why = f"a call of {self.function.called} failed on process 0"
            raise self._turns.fail_with(why, cause=error) from error

    def _tell(self, head: Mapping[str, Any], told: Tree, *, captures: bool = False) -> None:
        tree, leaves, arrays = told
        head = {**head, "captures": captures, "tree": tree, "leaves": leaves}
        limit_s = self._timeout_s * (CAPTURES_TAKE if captures else 1)
        self._turns.tell(head, arrays, limit_s=limit_s)

    def _tell_end(self) -> None:
        self._turns.is_closing = True
        self._turns.tell({"end": True}, [], limit_s=self._timeout_s)

    def _receive(self, link: Link, message: Message) -> None:
        self._turns.has_done(link)


@contextmanager
def lead(function: Function, *passed: PyTree, timeout_s: float | None = None) -> Iterator[Led]:
    """Has process 0 decide for all processes what they run of `function`; the others `follow`.

    Process 0 tells each call with its bucket and its data, in one order, whatever thread it comes
    from. Without other processes it is the function, called by one thread at a time.

    Args:
        function: What `bucket_jit` made, warmed up by all processes alike; buckets that are not
            captured are, on all of them, when they are asked for.
        *passed: What `in_axes` passes through, such as parameters, in its order: on all processes
            the same.
        timeout_s: The seconds after which another process that does not come, is silent or late is
            given up, and within which a call has to end on all of them; ten times that where it
            captures. `process_timeout_s` of the configuration if None.

    Yields:
        What to call.

    Raises:
        DistributedError: This is not process 0, the others do not come in time, or have another
            function, configuration, grid or parameters; or one has failed, when the block ends.
        ConfigError: `function` is not what `bucket_jit` makes, or passes other arguments through.

    Example:
        >>> import numpy as np, cudagraph_jax
        >>> from cudagraph_jax.distributed import lead
        >>> config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,))
        >>> double = cudagraph_jax.bucket_jit(lambda x: x * 2, in_axes="batch seq", config=config)
        >>> with lead(double) as led:
        ...     led(np.ones((3, 5), np.float32)).shape
        (3, 5)
    """
    others = jax.process_count() - 1
    with PEERS.leading(_name(function)):
        if others:
            with open_door() as door:
                wait_s, _ = _meet(function, passed, timeout_s, leads=True, said=door.address)
                with _together():
                    links = door.let_in(others, timeout_s=wait_s)
                    led = Led(function, passed, links, timeout_s=wait_s)
        else:
            wait_s = _checked(function, passed, timeout_s, leads=True)
            led = Led(function, passed, [], timeout_s=wait_s)
        try:
            yield led
        except BaseException:
            try:
                led.close()
            except DistributedError as error:
                logger.error("%r: %s", led, error)
            raise
        led.close()


def follow(function: Function, *passed: PyTree, timeout_s: float | None = None) -> None:
    """Runs what process 0 tells, until it closes what it leads.

    Args:
        function: As for `lead`, and so are the others.
        *passed: What `in_axes` passes through: the same as there.
        timeout_s: As for `lead`.

    Raises:
        DistributedError: Process 0 is gone, silent or late, or fails, another process does, or they
            have another function, configuration, grid or parameters.
        ConfigError: `function` is not what `bucket_jit` makes, or passes other arguments through.
    """
    with PEERS.leading(_name(function)):
        wait_s, said = _meet(function, passed, timeout_s, leads=False)
        with _together():
            link = knock(said[0], jax.process_index(), timeout_s=wait_s)
        _Follower(function, passed, link, timeout_s=wait_s).run()


_DONE = encoded({"done": True})


class _Follower:
    """What another process than 0 does until it is told that this is the end."""

    def __init__(self, function: Function, passed: Args, link: Link, *, timeout_s: float) -> None:
        self._name, self._link, self._timeout_s = function.called, link, timeout_s
        self._calls = _Calls(function, passed)
        self._turns = Turns([link], timeout_s=timeout_s, received=self._receive)

    def run(self) -> None:
        """Returns at the end.

        Raises:
            DistributedError: It has failed.
        """
        self._turns.start()
        with self._turns.ending():
            self._turns.wait()

    def _receive(self, link: Link, message: Message) -> None:
        self._turns.add(partial(self._obey, message))

    def _obey(self, message: Message) -> None:
        head = message.head
        try:
            if head.get("end"):
                self._turns.finish()
                return
            if head["captures"]:
                self._turns.allow(CAPTURES_TAKE * self._timeout_s)
            jax.block_until_ready(self._calls.obey(head, _untold(head, message.arrays)))
            self._link.send(_DONE)
        except BaseException as error:
            self._turns.fail_with(f"a call of {self._name} failed there", cause=error)


class _Plan(NamedTuple):
    """How a call is served on this process, and so on all of them."""

    bucket: Bucket
    run: Callable[[], PyTree]
    captures: bool = False


class _Calls:
    """Calls of a led function on one process: what is decided on process 0 is done by the others.

    Attributes:
        places: Which of its arguments are passed through.
    """

    def __init__(self, function: Function, passed: Args) -> None:
        self._function, self._passed = function, passed
        self.places = ArgumentPlaces(function.in_axes)
        self._routes = Routes()
        function.registry.watch(self._routes)

    def plan(self, own: Args) -> _Plan:
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
            return _Plan(route.bucket, partial(route.run, call.args, call.kwargs))
        return _Plan(route.bucket, partial(route.run, args))

    def obey(self, head: Mapping[str, Any], own: PyTree) -> PyTree:
        """What another process runs."""
        bucket = Bucket.of(head["bucket"])
        if head.get("rows"):
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

    def _capture(self, call: Call, decision: Decision) -> _Plan:
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

        return _Plan(bucket, run, captures=True)

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


def _name(function: Function) -> str:
    return function.called if isinstance(function, BucketedFunction) else f"{function!r:.80}"


def _checked(function: Function, passed: Args, timeout_s: float | None, *, leads: bool) -> float:
    """How long to wait, if the arguments are valid.

    Raises:
        ConfigError: One is not.
        DistributedError: It is another process that does this, or `debug_mode` is on.
    """
    if not isinstance(function, BucketedFunction):
        raise ConfigError(f"function={function!r:.80} is not what bucket_jit makes: decorate it")
    number = ArgumentPlaces(function.in_axes).passed
    if len(passed) != number:
        raise ConfigError(
            f"{function.called} passes {number} argument(s) through, as "
            f"in_axes={function.in_axes!r} says, but {len(passed)} were given: give those beside "
            "the function"
        )
    if jax.process_count() > 1 and (refused := proof_refusal(function.manager.config)):
        raise refused
    if timeout_s is None:
        timeout_s = function.manager.config.process_timeout_s
    wait_s = waiting_time("timeout_s", timeout_s)
    if not wait_s:
        raise ConfigError("timeout_s=0 waits for nobody: give the seconds that a call may take")
    index = jax.process_index()
    if leads and index != 0:
        raise DistributedError(
            f"process {index} cannot lead, as process 0 does: call "
            "cudagraph_jax.distributed.follow here"
        )
    if not leads and index == 0:
        raise DistributedError("process 0 leads: call cudagraph_jax.distributed.lead here")
    return wait_s


@contextmanager
def _together() -> Iterator[None]:
    """What fails in the block ends it for all: they have agreed to lead and to follow."""
    try:
        yield
    except BaseException as error:
        PEERS.coordinator.break_off(f"leading has failed ({error_line(error)}): {RESTART}")
        raise


def _meet(
    function: Function, passed: Args, timeout_s: float | None, *, leads: bool, said: str = ""
) -> tuple[float, list[str]]:
    """How long to wait, and what each process says, if all are to lead or follow the same.

    Raises:
        DistributedError: They are not.
        CUDAGraphError: What all of them refuse it with.
    """
    wait_s, facts, refused = _UNKNOWN_S, dict[str, str](), None
    try:
        wait_s = _checked(function, passed, timeout_s, leads=leads)
        facts = _facts(function, passed, wait_s)
    except Exception as error:
        refused = error  # which the others learn, too
    if refused is not None and jax.process_count() == 1:
        raise refused
    what = f"lead of {_name(function)}"
    compare = PEERS.coordinator.compare
    return wait_s, compare(what, facts, timeout_s=wait_s, said=said, refused=refused)


def _facts(function: Function, passed: Args, timeout_s: float) -> dict[str, str]:
    captured = [
        f"{entry.bucket} {variant_facts(entry.variant)}"
        for entry in function.registry.entries()
        if entry.variant.name == function.called
    ]
    binder = function.binder
    return {
        **function_facts(function.__wrapped__, function.target, function.manager.config),
        "in_axes": str(function.in_axes),
        "pad_side": str(function.pad_side),
        "pad_values": str(jax.tree.map(repr, binder.pad_values)),
        "in_shardings": str(binder.in_shardings),
        "static_argnames": str(sorted(binder.static_argnames)),
        "donate_argnums": str(binder.donate_argnums),
        "mode": function.manager.mode.name,
        "captured": f"{len(captured)} buckets, {hash_of(sorted(captured))}",
        **_parameters(passed),
        "structure": hash_of([comparable_structure(jax.tree.structure(passed))]),
        "timeout_s": str(timeout_s),  # the pulse of one goes by its own
    }


def _parameters(passed: Args) -> dict[str, str]:
    """What each leaf of what is passed through is, by the way to it; and a hash of all of them.

    An array that lies on this process's own devices is on others elsewhere.
    """
    facts: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(passed)[0]:
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        sharding = placement(leaf)
        place = f", {getattr(sharding, 'spec', sharding)}" if is_foreign(sharding) else ""
        name = f"parameter {keystr(path)}"
        facts[name] = f"{kind}{list(np.shape(leaf))}{place}, {digest_of([leaf])}"
    return facts | {"parameters": hash_of([f"{name} {fact}" for name, fact in facts.items()])}


def _told(tree: PyTree) -> Tree:
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
    arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
    return text, [None if isinstance(leaf, np.ndarray) else leaf for leaf in leaves], arrays


def _untold(head: Mapping[str, Any], arrays: Sequence[Array]) -> PyTree:
    """What `_told` was given."""
    rest = iter(arrays)
    leaves = [next(rest) if leaf is None else leaf for leaf in head["leaves"]]
    structure = jax.tree.structure(tree_from_json(head["tree"]))
    return jax.tree.unflatten(structure, leaves)


def _on_host(leaf: PyTree) -> PyTree:
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
