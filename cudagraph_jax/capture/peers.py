"""The other processes of a job: what all of them run is compared first, nothing is decided alone.

JAX leaves that unchecked. Of a program that spans processes, one gets NaN where they call with
different sizes in one bucket, and wrong numbers with different data; with different buckets all of
them end by a signal, and where one does not call the others wait for ever.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

import jax

from cudagraph_jax._base.text import error_line
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import DistributedError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import Call, Target, Variant, placement, spans_processes
from cudagraph_jax.program.fingerprint import (
    Source,
    comparable,
    comparable_structure,
    digest_of,
)
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.padded import Padded
from cudagraph_jax.program.program import CompileRequest
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.version import __version__
from cudagraph_jax.xla.coordinator import RESTART, Coordinator, Facts, crowd_error
from cudagraph_jax.xla.environment import jaxlib_version
from cudagraph_jax.xla.memory import pool_bytes
from cudagraph_jax.xla.serialize import input_shardings, output_leaves
from cudagraph_jax.xla.settings import current_settings
from cudagraph_jax.xla.shardings import is_foreign
from cudagraph_jax.xla.stages import Executable


class Run(Protocol):
    """Runs something, and calls `looks_on` with the seconds that it has taken so far."""

    def __call__(self, *, looks_on: Callable[[float], None]) -> None:
        """Does so."""


CAPTURES_TAKE = 10
"""How many times longer processes wait for each other at a capture than at a call."""

_LONGEST = 100


class Peers:
    """What the processes of this job agree on.

    It is asked by what has to be decided anew: a hit of a function of this process alone never
    comes here. What spans processes is what has an argument, or an output, on the devices of
    several; nothing else is compared or refused.

    Args:
        coordinator: By which they tell each other.

    Attributes:
        coordinator: As given.
        led: The function that process 0 decides for; None: none.
        leads: The thread that does what process 0 decides.
    """

    def __init__(self, coordinator: Coordinator | None = None) -> None:
        self.coordinator = Coordinator() if coordinator is None else coordinator
        self._claim = threading.Lock()
        self._caller: threading.Thread | None = None
        # By their numbers, which all processes count alike, they know what they have captured.
        self._agreed: WeakKeyDictionary[Executable, int] = WeakKeyDictionary()
        self._numbers = itertools.count(1)
        self.led: str | None = None
        self.leads: threading.Thread | None = None

    @contextmanager
    def leading(self, name: str) -> Iterator[None]:
        """Has nothing of several processes run in the block but what process 0 decides.

        Raises:
            DistributedError: Something is led already.
        """
        with self._claim:
            led, self.led = self.led, self.led or name
        if led is not None:
            raise DistributedError(
                f"{led} is led already, and what is led besides would come in another order on "
                "each process: lead one function at a time"
            )
        try:
            yield
        finally:
            self.led = self.leads = None

    def failed(self, where: str, error: BaseException) -> DistributedError:
        """What is raised where a run fails here that all have begun; nothing is compared again."""
        why = (
            f"{where} spans several processes and failed on this one ({error_line(error)}), while "
            f"others may wait for it: {RESTART}"
        )
        self.coordinator.break_off(why)
        return DistributedError(why)

    def spans(self, call: Call, held: Callable[[], Sequence[CUDAGraphEntry]]) -> bool:
        """Whether several processes run a call together.

        Args:
            call: The call.
            held: All that is captured, which may show that its program spans them.
        """
        return jax.process_count() > 1 and (
            spans_processes(call.variant.leaves)
            or any(entry.is_shared and entry.variant == call.variant for entry in held())
        )

    def agree_on_call(
        self,
        call: Call,
        *,
        decision: str,
        entries: Sequence[CUDAGraphEntry] = (),
        refused: Exception | None,
        config: CUDAGraphConfig,
        what: str = "a call",
    ) -> None:
        """Has all processes agree to one call, which spans them.

        Args:
            call: The call.
            decision: What this process is about to do.
            entries: What it is about to run of what is captured.
            refused: Why it does not do so.
            config: How long to wait.
            what: What is done with it.

        Raises:
            DistributedError: They do not agree, or process 0 decides.
            Exception: What all of them refuse it with.
        """
        self._refuse_led(call.target.name)
        refused = self._other_thread(call.target.name) or refused
        facts = {"sizes": str(call.sizes), "decision": decision}
        if entries:
            numbers = [self._agreed.get(entry.executable) for entry in entries]
            facts["program"] = f"number {', '.join(map(str, numbers))}"
        if refused is None:
            try:
                facts["data"] = _data_of(call)
            except Exception as error:  # of an array that is deleted
                refused = error
        wait_s = config.process_timeout_s
        self.coordinator.compare(
            f"{what} of {call.target.name}", facts, timeout_s=wait_s, refused=refused
        )

    def tell_of_input(
        self,
        what: str,
        arguments: PyTree,
        error: BaseException,
        *,
        timeout_s: float,
        is_shared: bool = False,
    ) -> None:
        """Tells the others of what is refused before it can be described, if it spans them.

        Args:
            what: What it was to be.
            arguments: What it was given, which shows that; or `is_shared` says so.
            error: What it is refused with.
            timeout_s: How long it waits for the others.
            is_shared: Whether it spans them, whatever the arguments are.

        Raises:
            DistributedError: They do not refuse it alike.
            Exception: `error`, where they do.
        """
        if jax.process_count() == 1 or self.led is not None or not isinstance(error, Exception):
            return
        if is_shared or any(is_foreign(placement(leaf)) for leaf in jax.tree.leaves(arguments)):
            self.coordinator.compare(what, {}, timeout_s=timeout_s, refused=error)

    @contextmanager
    def refusing_input(self, what: str, arguments: PyTree, *, timeout_s: float) -> Iterator[None]:
        """Has `tell_of_input` told of what is raised in the block.

        Raises:
            DistributedError: The others do not refuse theirs, too.
        """
        try:
            yield
        except BaseException as error:
            self.tell_of_input(what, arguments, error, timeout_s=timeout_s)
            raise

    @contextmanager
    def agreeing_on_warmup(
        self, call: Call, config: CUDAGraphConfig, facts: Facts
    ) -> Iterator[None]:
        """Has all processes agree to a warm-up, if its program spans them; none is left in it.

        Args:
            call: Its example.
            config: The configuration.
            facts: What must be equal besides that.

        Raises:
            DistributedError: They do not agree, the function is led, or one of them alone fails.
        """
        if not spans_processes(call.variant.leaves):
            yield
            return
        name, wait_s = call.target.name, CAPTURES_TAKE * config.process_timeout_s
        self._refuse_led(name)
        own, refused = dict[str, str](), None
        try:
            own = {**facts_of(call, config), "sizes": str(call.sizes), "data": _data_of(call)}
        except Exception as error:  # of an array that is deleted
            refused = error
        what = f"the warm-up of {name}"
        self.coordinator.compare(what, {**own, **facts}, timeout_s=wait_s, refused=refused)
        with self.telling(what, timeout_s=wait_s):
            yield

    @contextmanager
    def telling(self, what: str, *, timeout_s: float, is_shared: bool = True) -> Iterator[None]:
        """Tells the others of what fails in the block on this process, where it is shared.

        They learn that at the next comparison.

        Raises:
            DistributedError: It fails on one process alone.
        """
        try:
            yield
        except DistributedError:  # which the others have, too
            raise
        except Exception as error:
            if is_shared:
                self.coordinator.compare(what, {}, timeout_s=timeout_s, refused=error)
            raise
        except BaseException as error:  # an interrupt: nothing is waited for
            if is_shared:
                self.failed(what, error)
            raise

    def telling_of_capture(
        self, request: CompileRequest, call: Call, config: CUDAGraphConfig
    ) -> AbstractContextManager[None]:
        """Tells the others of what cannot be compiled here, as far as the arguments show them."""
        return self.telling(
            f"the capture of {request}",
            timeout_s=CAPTURES_TAKE * config.process_timeout_s,
            is_shared=spans_processes(call.variant.leaves),
        )

    def agree_on_capture(
        self,
        request: CompileRequest,
        call: Call,
        outputs: Outputs,
        executable: Executable,
        *,
        held: Sequence[CUDAGraphEntry],
        config: CUDAGraphConfig,
    ) -> bool:
        """Has all processes agree to what was compiled, if it spans them; whether it does.

        So nobody runs it before all of them have it.

        Args:
            request: What was asked for.
            call: The call that asks for it.
            outputs: What is known of its outputs.
            executable: What was compiled.
            held: What is captured already.
            config: The configuration.

        Raises:
            DistributedError: They do not, or a process cannot read an output that it hands out, or
                a captured bucket would have to leave that several share, or leave for one.
        """
        if jax.process_count() == 1:
            return False
        given = output_leaves(executable.call)
        places = [*input_shardings(executable.call), *(leaf.sharding for leaf in given)]
        is_shared = any(map(is_foreign, places))
        refused = _eviction(request, executable, held, is_shared=is_shared, config=config)
        if is_shared:
            self._refuse_led(call.target.name)
            shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in given]
            facts = {
                **facts_of(call, config),
                "outputs": _short(" ".join(shapes)),
                "options": str(dict(request.options)),
            }
            self.coordinator.compare(
                f"the capture of {request}",
                facts,
                timeout_s=CAPTURES_TAKE * config.process_timeout_s,
                refused=_unreadable(request, outputs, given) or proof_refusal(config) or refused,
            )
            self._agreed[executable] = next(self._numbers)
        elif refused is not None:
            raise refused
        return is_shared

    def refuse_eviction(
        self, call: Call, bucket: Bucket, held: Sequence[CUDAGraphEntry], config: CUDAGraphConfig
    ) -> None:
        """Raises where there is no place for the bucket of a call, as far as it is known before.

        Raises:
            DistributedError: Another one would have to leave, and processes share any of them.
        """
        is_shared = spans_processes(call.variant.leaves)
        what = f"{call.target.name} {bucket}"
        refused = _eviction(what, None, held, is_shared=is_shared, config=config)
        if refused is not None:
            raise refused

    def refuse_dropping(self, held: Sequence[CUDAGraphEntry]) -> None:
        """Raises where one process would drop what process 0 decides by, or runs elsewhere.

        Raises:
            DistributedError: Processes share a captured bucket, and a function is led.
        """
        if self.led is not None and any(entry.is_shared for entry in held):
            raise DistributedError(
                f"process 0 leads {self.led}, and goes by what all processes have captured: leave "
                "the block of lead, so that follow returns, before captured buckets are dropped"
            )

    def run_together(self, entry: CUDAGraphEntry, run: Run, *, timeout_s: float) -> None:
        """Runs an entry on all processes that share it; where it fails on one, it does on all.

        Args:
            entry: What is run.
            run: Runs it; `looks_on` is to be called while that takes.
            timeout_s: How long it may take, here and there.

        Raises:
            DistributedError: It has failed on some of them, which are not at one from here on.
            Exception: What all of them have failed with.
        """
        if not entry.is_shared:
            run(looks_on=lambda seconds: None)
            return
        what, failure = f"a run of {entry.variant.name} {entry.bucket}", None

        def look_on(seconds: float) -> None:
            # Who waits within a collective for one that does not come would do so for ever.
            if failed := self.coordinator.failure_elsewhere():
                raise DistributedError(f"{what} does not end here: {failed} elsewhere")
            if seconds > timeout_s:
                raise DistributedError(f"{what} does not end here: not within {timeout_s:g} s")

        try:
            run(looks_on=look_on)
        except Exception as error:
            failure = error
        except BaseException as error:  # an interrupt: nothing is waited for
            self.failed(what, error)
            raise
        try:
            self.coordinator.compare(what, {}, timeout_s=timeout_s, refused=failure)
        except DistributedError as error:
            self.coordinator.break_off(f"{str(error).rstrip('. ')}: {RESTART}")
            raise
        finally:
            del failure  # whose traceback leads back to this frame

    def _refuse_led(self, name: str) -> None:
        if self.led is not None and self.leads is not threading.current_thread():
            raise DistributedError(
                f"{name} spans several processes, and process 0 decides for all of them while "
                f"{self.led} is led: call what lead gave, there alone, or close it first"
            )

    def _other_thread(self, name: str) -> DistributedError | None:
        """Keeps calls to one thread, as long as that lives: of several nobody knows the order."""
        own = threading.current_thread()
        first = self._caller
        if first is None or not first.is_alive():
            first = self._caller = own
        if first is own:
            return None
        return crowd_error(
            f"{name} spans several processes and is called by the threads {first.name} and "
            f"{own.name}"
        )


# Of the process, as the job is: functions of any number of managers share its devices.
PEERS = Peers()


def _data_of(call: Call) -> str:
    """A hash of what a call gives, as far as this process can read it; of shapes there is none."""
    return digest_of([leaf.array if isinstance(leaf, Padded) else leaf for leaf in call.leaves])


def facts_of(call: Call, config: CUDAGraphConfig) -> dict[str, str]:
    """What a program is on every process that runs it: function, arguments, configuration."""
    return {
        **function_facts(call.variant.function.function, call.target, config),
        "donated": str(call.target.donate_argnums),
        **variant_facts(call.variant),
        "axes": _short(" ".join(str(axes) for axes in call.axes)),
        "padding": _short(str(list(map(repr, call.declared.pad_values)))),
    }


def variant_facts(variant: Variant) -> dict[str, str]:
    """What the arguments of a program are on every process."""
    leaves = [leaf.placed for leaf in variant.leaves]
    return {
        "arguments": ", ".join(leaves) if len(leaves) < 8 else f"{len(leaves)}, {hash_of(leaves)}",
        "structure": _short(comparable_structure(variant.structure)),
        "statics": ", ".join(f"{name}={comparable(value)}" for name, _, value in variant.statics),
    }


def function_facts(
    function: Callable[..., PyTree] | None, target: Target, config: CUDAGraphConfig
) -> dict[str, str]:
    """What a function is on every process, whatever its arguments are."""
    source = None if function is None else Source(function)
    return {
        "function": "" if source is None else source.where,
        "code": "" if source is None else source.read[0],
        "versions": f"{__version__}, jax {jax.__version__}, jaxlib {jaxlib_version()}",
        **{name: str(value) for name, value in config.to_dict().items() if name != "store"},
        "masks": str([(mask.name, mask.axes) for mask in target.masks]),
        "unpad": str(target.unpad),
        "out_axes": str(target.out_axes),
        "settings": str(current_settings()[1:]),  # behind the device, which is each process's own
    }


def _eviction(
    what: object,
    executable: Executable | None,
    held: Sequence[CUDAGraphEntry],
    *,
    is_shared: bool,
    config: CUDAGraphConfig,
) -> DistributedError | None:
    """What is raised where a new entry would have one leave, and processes share any of them.

    Which one was used last each process knows for itself. What the new one needs is not known where
    it is not compiled yet (`executable` is None).
    """
    if not held or not (is_shared or any(other.is_shared for other in held)):
        return None
    budget = config.memory_budget_bytes
    over = [f"max_graphs={config.max_graphs}"] * (len(held) >= (config.max_graphs or 1 << 62))
    memories = [made.memory for made in (*held, executable) if made is not None]
    if budget is not None and pool_bytes(memories) > budget:
        over.append(f"memory_pool_size_mb={config.memory_pool_size_mb}")
    if not over:
        return None
    return DistributedError(
        f"{what} would have a captured bucket leave ({over[0]}), which may be another one on "
        "another process: raise that, or give fewer capture_sizes and capture_seq_lens"
    )


def _unreadable(
    request: CompileRequest, outputs: Outputs, given: Sequence[jax.ShapeDtypeStruct]
) -> DistributedError | None:
    """What is raised where an output is to be handed out that no process has as a whole."""
    for leaf, info in zip(outputs.leaves, given, strict=True):
        sharding = info.sharding
        if leaf.unpad == "host" and is_foreign(sharding) and not sharding.is_fully_replicated:
            return DistributedError(
                f"{leaf.name} of {request} is spread over the devices of several processes "
                f"({sharding.spec}), so that none of them can read it: leave it there with "
                'unpad="none" or "padded", or replicate it, as jax.lax.with_sharding_constraint'
                " with PartitionSpec() does"
            )
    return None


def proof_refusal(config: CUDAGraphConfig) -> DistributedError | None:
    """What is raised where a bucket would be compared with the plain function's answer."""
    if not config.debug_mode:
        return None
    return DistributedError(
        "debug_mode compares with eager answers, which several processes do not give together: "
        "prove the padding in one process, and leave it off here"
    )


def refuse_replan(held: Sequence[CUDAGraphEntry]) -> None:
    """Raises where processes share a captured bucket, since each has its own time to change grids.

    Raises:
        DistributedError: They do.
    """
    if any(entry.is_shared for entry in held):
        raise DistributedError(
            "a new grid is captured in the background, and would take its place at another moment "
            "on each process: plan it from sizes() of one of them with plan_buckets, and start all "
            "with CUDAGraphConfig.from_plan"
        )


def _short(text: str) -> str:
    """The text, or how long it is and its hash."""
    return text if len(text) <= _LONGEST else f"{len(text)} characters, {hash_of([text])}"


def hash_of(texts: Sequence[str]) -> str:
    """A hash of texts, by which people tell them apart."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
