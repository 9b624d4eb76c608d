"""The other processes of a job: what all of them run is compared first, nothing is decided alone.

JAX leaves that unchecked. Of a program that spans processes, one gets NaN where they call with
different sizes in one bucket, and wrong numbers with different data; with different buckets all of
them end by a signal, and where one does not call the others wait for ever.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import DistributedError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import Call, is_key, spans_processes
from cudagraph_jax.program.fingerprint import Source
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.padded import Padded
from cudagraph_jax.program.program import CompileRequest
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.coordinator import Coordinator
from cudagraph_jax.xla.environment import jaxlib_version
from cudagraph_jax.xla.memory import pool_bytes
from cudagraph_jax.xla.shardings import is_foreign
from cudagraph_jax.xla.stages import Executable

Facts = Mapping[str, str]

CAPTURES_TAKE = 10
"""How many times longer processes wait for each other at a capture than at a call."""

_LEAD = "have process 0 decide for all: cudagraph_jax.distributed.lead there, follow on the others"
_LONGEST = 100


class Peers:
    """The processes of this job, and what they agree on.

    It is asked by what has to be decided anew: a hit of a function of this process alone never
    comes here. What spans processes is what has an argument, or an output, on the devices of
    several; nothing else is compared or refused.

    Attributes:
        led: The function that process 0 decides for; None: none.
    """

    def __init__(self) -> None:
        self._coordinator = Coordinator()
        self._callers: dict[str, threading.Thread] = {}
        self.led: str | None = None

    def compare(self, what: str, facts: Facts, *, timeout_s: float, said: str = "") -> list[str]:
        """What each process says, where all of them are to do the same thing.

        Args:
            what: What this one is to do.
            facts: What must be equal on all of them, by name.
            timeout_s: How long it waits for the others.
            said: What it tells the others besides.

        Raises:
            DistributedError: One is to do another thing, or came too late.
        """
        own = json.dumps([what, dict(facts), said])
        told = [json.loads(text) for text in self._coordinator.exchange(own, timeout_s=timeout_s)]
        for index, (other, others, _) in enumerate(told):
            if [other, others] != told[0][:2]:
                raise DistributedError(_difference(told[0], told[index], index))
        return [text for _, _, text in told]

    def agree_on_call(
        self,
        call: Call,
        held: Callable[[], list[CUDAGraphEntry]],
        *,
        decision: str,
        is_alone: bool,
        config: CUDAGraphConfig,
    ) -> bool:
        """Has all processes agree to one call, if it spans them; whether it does.

        Args:
            call: The call.
            held: All that is captured, which may show that its program spans them.
            decision: What this process is about to do.
            is_alone: Whether that is what another one may do otherwise, such as to run eagerly.
            config: How long to wait.

        Raises:
            DistributedError: They do not, or this process may not.
        """
        if jax.process_count() == 1:
            return False
        if not spans_processes(call.variant.leaves) and not any(
            entry.is_shared and entry.variant == call.variant for entry in held()
        ):
            return False
        name = call.target.name
        self._refuse_led(name)
        if is_alone:
            raise DistributedError(
                f"{name} at {call.sizes} spans several processes and would be served so: "
                f"{decision}. What one of them runs eagerly or captures in the background another "
                'may not: warm the bucket up, with on_miss="capture", and for what is outside the '
                'limits add larger buckets or set on_overflow="split" or "exact"'
            )
        self._take_turn(name)
        facts = {"sizes": str(call.sizes), "decision": decision, "data": digest_of(call.leaves)}
        self.compare(f"a call of {name}", facts, timeout_s=config.process_timeout_s)
        return True

    def agree_on_warmup(
        self, call: Call, config: CUDAGraphConfig, buckets: Collection[Bucket]
    ) -> bool:
        """Has all processes agree to a warm-up, if its program spans them; whether it does.

        Raises:
            DistributedError: They do not, or the function is led.
        """
        if not spans_processes(call.variant.leaves):
            return False
        self._refuse_led(call.target.name)
        self.compare(
            f"the warm-up of {call.target.name}",
            {**facts_of(call, config), "grid": " ".join(map(str, buckets))},
            timeout_s=CAPTURES_TAKE * config.process_timeout_s,
        )
        return True

    def agree_on_capture(
        self,
        request: CompileRequest,
        outputs: Outputs,
        executable: Executable,
        config: CUDAGraphConfig,
    ) -> bool:
        """Has all processes agree to what was compiled, if it spans them; whether it does.

        So nobody runs it before all of them have it.

        Raises:
            DistributedError: They do not, or a process cannot read an output that it hands out.
        """
        if jax.process_count() == 1:
            return False
        given = jax.tree.leaves(executable.call.output_shardings)
        if not any(map(is_foreign, [*jax.tree.leaves(executable.call.input_shardings), *given])):
            return False
        for leaf, sharding in zip(outputs.leaves, given, strict=True):
            if leaf.unpad == "host" and is_foreign(sharding) and not sharding.is_fully_replicated:
                raise DistributedError(
                    f"{leaf.name} of {request} is spread over the devices of several processes "
                    f"({sharding.spec}), so that none of them can read it: leave it there with "
                    'unpad="none" or "padded", or replicate it, as jax.lax.with_sharding_constraint'
                    " with PartitionSpec() does"
                )
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in _leaves(executable.output_info)]
        facts = {
            "outputs": _short(" ".join(shapes)),
            "unpad": str(request.program.target.unpad),
            "options": str(dict(request.options)),
            "warmup_iterations": str(config.warmup_iterations),
        }
        wait_s = CAPTURES_TAKE * config.process_timeout_s
        self.compare(f"the capture of {request}", facts, timeout_s=wait_s)
        return True

    def _refuse_led(self, name: str) -> None:
        if self.led is not None:
            raise DistributedError(
                f"{name} spans several processes, and process 0 decides for all of them while "
                f"{self.led} is led: call what lead gave, there alone, or close it first"
            )

    def _take_turn(self, name: str) -> None:
        """Keeps calls to one thread, as long as that lives: of several nobody knows the order."""
        own = threading.current_thread()
        first = self._callers.setdefault("thread", own)
        if first is own:
            return
        if first.is_alive():
            raise DistributedError(
                f"{name} spans several processes and is called by the threads {first.name} and "
                f"{own.name}, in an order that may be another one elsewhere: call from one thread, "
                f"or {_LEAD}, whose calls any thread may make"
            )
        self._callers["thread"] = own


# Of the process, as the job is: functions of any number of managers share its devices.
PEERS = Peers()


def facts_of(call: Call, config: CUDAGraphConfig) -> dict[str, str]:
    """What a program is on every process that runs it: function, arguments, configuration."""
    variant, target = call.variant, call.target
    function = variant.function.function
    source = None if function is None else Source(function)
    leaves = [leaf.placed for leaf in variant.leaves]
    return {
        "function": "" if source is None else source.where,
        "code": "" if source is None else source.read[0],
        "jax": f"{jax.__version__}, jaxlib {jaxlib_version()}",
        **{name: str(value) for name, value in config.to_dict().items() if name != "store"},
        "arguments": ", ".join(leaves) if len(leaves) < 8 else f"{len(leaves)}, {_hash(leaves)}",
        "structure": _short(str(variant.structure)),
        "statics": str(variant.statics),
        "axes": _short(" ".join(str(axes) for axes in call.axes)),
        "padding": _short(str(call.declared.pad_values)),
        "masks": str([(mask.name, mask.axes) for mask in target.masks]),
        "donated": str(target.donate_argnums),
    }


def refuse_eviction(
    entry: CUDAGraphEntry, held: Sequence[CUDAGraphEntry], config: CUDAGraphConfig
) -> None:
    """Raises where a new entry would have one leave, and processes share any of them.

    Which one was used last each process knows for itself.

    Raises:
        DistributedError: It would.
    """
    together = [*held, entry]
    if not any(other.is_shared for other in together):
        return
    budget = config.memory_budget_bytes
    over = [f"max_graphs={config.max_graphs}"] * (len(together) > (config.max_graphs or 1 << 62))
    if budget is not None and pool_bytes(other.memory for other in together) > budget:
        over.append(f"memory_pool_size_mb={config.memory_pool_size_mb}")
    if over and held:
        raise DistributedError(
            f"{entry.variant.name} at {entry.bucket} would have a captured bucket leave "
            f"({over[0]}), which may be another one on another process: raise that, or give fewer "
            "capture_sizes and capture_seq_lens"
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


def _difference(first: Sequence[Any], other: Sequence[Any], index: int) -> str:
    if first[0] != other[0]:
        return (
            f"process 0 is at {first[0]}, but process {index} at {other[0]}: have all processes "
            f"do the same in one order, or {_LEAD}"
        )
    facts, others = first[1], other[1]
    names = [name for name in {**facts, **others} if facts.get(name) != others.get(name)]
    parts = [
        f"{name} is {facts.get(name)!s:.{_LONGEST}} on process 0 and "
        f"{others.get(name)!s:.{_LONGEST}} on process {index}"
        for name in names[:3]
    ]
    return (
        f"{first[0]} is not the same everywhere: {'; '.join(parts)}. Give all the same, or {_LEAD}"
    )


def digest_of(leaves: Sequence[Any]) -> str:
    """A hash of what must be equal on all processes; of arrays that lie on several, what they are.

    It reads 1 GB/s, and waits for arrays that are being computed.
    """
    found = hashlib.blake2b(digest_size=12)
    for leaf in leaves:
        value = leaf.array if isinstance(leaf, Padded) else leaf
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            found.update(f"{value.dtype}{value.shape}{value.sharding}".encode())
            continue
        array = np.asarray(jax.random.key_data(value) if is_key(value) else value)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _leaves(tree: Any) -> list[Any]:
    leaves: list[Any] = jax.tree.leaves(tree)
    return leaves


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{len(text)} characters, {_hash([text])}"


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
