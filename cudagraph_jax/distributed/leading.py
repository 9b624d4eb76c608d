"""`lead` and `follow`: process 0 decides for all processes of a job what they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import jax
import numpy as np
from jax.tree_util import keystr

from cudagraph_jax._base.checks import waiting_time
from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.text import error_line, one_line
from cudagraph_jax.capture.peers import (
    CAPTURES_TAKE,
    PEERS,
    function_facts,
    hash_of,
    proof_refusal,
    variant_facts,
)
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.distributed.calls import Calls, Function, Plan, on_host, told
from cudagraph_jax.distributed.link import Door, Link, Message, encoded, knock
from cudagraph_jax.distributed.turns import Turns
from cudagraph_jax.errors import ConfigError, DistributedError, InputShapeError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.arguments import ArgumentPlaces
from cudagraph_jax.program.call import Args, has_tracers, placement
from cudagraph_jax.program.fingerprint import comparable_structure, digest_of
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.coordinator import RESTART
from cudagraph_jax.xla.shardings import is_foreign

_UNKNOWN_S = 60.0
"""How long to wait for the others where the arguments do not say."""


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
        self._calls = Calls(function, passed)
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
        plan = Plan(entry.bucket, partial(entry.begin_rows, args, kwargs))
        return self._turns.do(lambda: self._run(told((own, dict(kwargs))), plan, rows=True))

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
        own = jax.tree.map(on_host, arrays)
        return self._run(told(own), self._calls.plan(own))

    def _run(self, own: Message, plan: Plan, *, rows: bool = False) -> PyTree:
        """Has all processes run the same; once it is told, each has to."""
        head = {**own.head, "bucket": plan.bucket.sizes, "rows": rows, "captures": plan.captures}
        limit_s = self._timeout_s
        if plan.captures:
            limit_s *= CAPTURES_TAKE
            self._turns.allow(limit_s)
        self._turns.tell(head, own.arrays, limit_s=limit_s)
        try:
            outputs = plan.run()
            jax.block_until_ready(outputs)
            return outputs
        except BaseException as error:
            if not self._links:
                raise  # which nobody else has begun
            why = f"a call of {self.function.called} failed on process 0"
            raise self._turns.fail_with(why, cause=error) from error

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
            with ExitStack() as entrance:
                doors: list[Door] = []

                def opened() -> str:  # while they meet, who learn where it is, or why there is none
                    doors.append(entrance.enter_context(closing(Door())))
                    return doors[0].address

                wait_s, _ = _meet(function, passed, timeout_s, leads=True, said=opened)
                with _together():
                    links = doors[0].let_in(others, timeout_s=wait_s)
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
        self._calls = Calls(function, passed)
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
        try:
            if message.head.get("end"):
                self._turns.finish()
                return
            if message.head["captures"]:
                self._turns.allow(CAPTURES_TAKE * self._timeout_s)
            jax.block_until_ready(self._calls.obey(message))
            self._link.send(_DONE)
        except BaseException as error:
            self._turns.fail_with(f"a call of {self._name} failed there", cause=error)


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
    function: Function,
    passed: Args,
    timeout_s: float | None,
    *,
    leads: bool,
    said: Callable[[], str] = str,
) -> tuple[float, list[str]]:
    """How long to wait, and what each process says, if all are to lead or follow the same.

    Raises:
        DistributedError: They are not.
        CUDAGraphError: What all of them refuse it with.
    """
    wait_s, facts, own, refused = _UNKNOWN_S, dict[str, str](), "", None
    try:
        wait_s = _checked(function, passed, timeout_s, leads=leads)
        facts, own = _facts(function, passed, wait_s), said()
    except Exception as error:
        refused = error  # which the others learn, too
    if refused is not None and jax.process_count() == 1:
        raise refused
    what = f"lead of {_name(function)}"
    compare = PEERS.coordinator.compare
    return wait_s, compare(what, facts, timeout_s=wait_s, said=own, refused=refused)


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
