"""Memory of an executable: what it keeps while it is held, and what a run borrows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.stages import Compiled

from cudagraph_jax.shapes.pytrees import PyTree

if TYPE_CHECKING:  # it takes 20 ms, since it imports Pallas
    from jax.extend import core

# What a process grows by for each program that it holds on a CPU, where XLA reports no code at
# all: 0.2 to 0.3 MB, and 2 to 2.5 kB for each line of its HLO (docs/xla.md, "Memory").
_PROGRAM_BYTES = 256 * 1024
_LINE_BYTES = 2304


@dataclass(frozen=True, slots=True)
class Memory:
    """What one executable takes.

    Attributes:
        kept_bytes: What it keeps while it is held: code, and the arrays that its function closes
            over, of which every executable has a copy.
        temporary_bytes: What a run takes from the allocator, and gives back.
        closed_over_bytes: The closed-over arrays alone.
    """

    kept_bytes: int
    temporary_bytes: int = 0
    closed_over_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """What it needs alone."""
        return self.kept_bytes + self.temporary_bytes


def memory_of(compiled: Compiled, *, closed_over_bytes: int = 0) -> Memory | None:
    """What the compiler says that `compiled` takes; None if it does not say.

    The reported peak is not used: on a CPU it leaves all temporary memory out, and on a GPU it adds
    nothing to it (docs/xla.md, "Memory").

    Args:
        compiled: A program.
        closed_over_bytes: Of the arrays that its function closes over.
    """
    report = compiled.memory_analysis()
    if report is None:
        return None
    kept = int(report.generated_code_size_in_bytes)
    if kept <= 0:  # not known; otherwise it includes the constants
        lines = (compiled.as_text() or "").count("\n")
        kept = _PROGRAM_BYTES + _LINE_BYTES * lines + closed_over_bytes
    return Memory(kept, int(report.temp_size_in_bytes), closed_over_bytes)


def pool_bytes(memories: Iterable[Memory | None]) -> int:
    """What executables take together: all that they keep, and the largest temporary memory.

    A run gives its temporary memory back, so that of several the next run takes the same.
    """
    known = [memory for memory in memories if memory is not None]
    largest = max((memory.temporary_bytes for memory in known), default=0)
    return sum(memory.kept_bytes for memory in known) + largest


def closed_over_bytes(jaxpr: core.ClosedJaxpr) -> int:
    """Bytes of the arrays in a traced function that are none of its arguments."""
    arrays = {id(array): array.nbytes for array in _constants(jaxpr, set())}
    return sum(arrays.values())


def _constants(value: object, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _constants(item, seen)
    elif hasattr(value, "eqns") and id(value) not in seen:  # a jaxpr
        seen.add(id(value))
        # Only a closed one has constants; in newer versions of JAX all are.
        consts = getattr(value, "consts", ())
        yield from (found for found in consts if isinstance(found, jax.Array) or _is_array(found))
        for equation in value.eqns:
            literals = [atom.val for atom in equation.invars if hasattr(atom, "val")]
            yield from filter(_is_array, literals)
            yield from _constants(list(equation.params.values()), seen)


def _is_array(constant: Any) -> bool:
    return getattr(constant, "ndim", 0) > 0 and hasattr(constant, "nbytes")


def array_bytes(tree: PyTree) -> int:
    """Bytes of the arrays or shapes in a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def free_bytes(device: jax.Device) -> int | None:
    """What is free of a device's memory; None where the backend does not tell, as on a CPU."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return int(stats["bytes_limit"] - stats["bytes_in_use"])
