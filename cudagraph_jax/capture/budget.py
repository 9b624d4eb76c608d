"""Whether a grid fits into the limits: said before one of its buckets drives another one out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax

from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.errors import CaptureError, ConfigError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import Variant
from cudagraph_jax.program.program import Program
from cudagraph_jax.report.words import things
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.memory import Memory, array_bytes, pool_bytes
from cudagraph_jax.xla.settings import default_device

FreeBytes = Callable[[jax.Device], int | None]

_REMEDY = "raise it, or give fewer capture_sizes and capture_seq_lens"
_REMEDY_OTHERS = (
    "raise it, give fewer capture_sizes and capture_seq_lens, or first drop buckets that are not "
    "needed any more, with registry.remove or reset()"
)


class Budget:
    """The limits of a registry, while a grid is captured, in whatever order.

    What other functions hold is to stay, and what the same function holds for other arguments.
    What this one holds outside the grid may go.

    Args:
        registry: Where the buckets go.
        variant: What the buckets are captured for.
        buckets: The grid.

    Raises:
        ConfigError: The grid has more buckets than `max_graphs` leaves for it.
    """

    def __init__(
        self, registry: CUDAGraphRegistry, variant: Variant, buckets: Sequence[Bucket]
    ) -> None:
        self._registry = registry
        self._variant = variant
        self._buckets = frozenset(buckets)
        self._evictions = registry.evictions
        self._measured: dict[int, Memory] = {}
        self._to_stay = dict.fromkeys(self._held())
        limit, others = registry.config.max_graphs, self._others
        if limit is not None and len(buckets) + others > limit:
            beside = f" beside the {others} of other functions or arguments" if others else ""
            raise ConfigError(
                f"the grid has {things(len(buckets), 'bucket')}{beside}, more than "
                f"max_graphs={limit}: {self._remedy}"
            )

    def check(self, bucket: Bucket) -> None:
        """Raises unless `bucket` probably fits beside those that are to stay.

        Raises:
            ConfigError: It does not; the message has the sizes.
        """
        if self._registry.find(bucket, self._variant) is None and not self.has_room([bucket]):
            held = _memories(self._held())
            now, then = pool_bytes(held), pool_bytes([*held, self._share(bucket)])
            raise ConfigError(
                f"the grid does not fit into {self._pool}: {things(len(held), 'bucket')} with "
                f"{now:,} bytes are held, and the next one, {bucket}, needs about {then - now:,} "
                f"more, but the budget is {self._registry.config.memory_budget_bytes:,}: "
                f"{self._remedy}"
            )

    def has_room(self, buckets: Sequence[Bucket]) -> bool:
        """Whether all of `buckets` probably fit; before one is measured, one alone is tried."""
        limit = self._registry.config.memory_budget_bytes
        if limit is None or not self._measured:
            return limit is None or len(buckets) == 1
        return pool_bytes([*_memories(self._held()), *map(self._share, buckets)]) <= limit

    def refuse(self, error: CaptureError) -> None:
        """Raises if a bucket could not be captured because it needs more than the whole budget.

        Raises:
            ConfigError: So it is.
        """
        if error.stage == "budget":
            raise ConfigError(f"the grid does not fit into {self._pool}: {error}") from error

    def add(self, entry: CUDAGraphEntry) -> None:
        """Counts a bucket that is captured now.

        Raises:
            ConfigError: It has driven out another one: more was needed than was estimated.
        """
        self._measured[entry.bucket.elements] = entry.memory or Memory(0)
        self._to_stay[entry] = None
        if self._registry.evictions <= self._evictions:
            return
        if lost := self._to_stay.keys() - self._registry.entries():
            names = sorted(f"{known.variant.name} at {known.bucket}" for known in lost)
            raise ConfigError(
                f"the grid does not fit into {self._exceeded()}, so that {', '.join(names)} had to "
                f"leave when {entry.bucket} was captured: {self._remedy}"
            )

    def _share(self, bucket: Bucket) -> Memory:
        """About what `bucket` needs: its share of what the nearest one does."""
        elements = bucket.elements
        nearest = min(self._measured, key=lambda size: abs(size - elements))
        known, part = self._measured[nearest], min(1.0, elements / nearest)
        return Memory(int(known.kept_bytes * part), int(known.temporary_bytes * part))

    def _held(self) -> list[CUDAGraphEntry]:
        """What is to stay of the entries that are held now."""
        return [
            entry
            for entry in self._registry.entries()
            if entry.variant != self._variant or entry.bucket in self._buckets
        ]

    def _exceeded(self) -> str:
        needed, config = pool_bytes(_memories(self._to_stay)), self._registry.config
        budget = config.memory_budget_bytes
        if config.max_graphs is not None and (budget is None or needed <= budget):
            return f"max_graphs={config.max_graphs}"
        count = things(len(self._to_stay), "bucket")
        return f"{self._pool}: {count} need {needed:,} bytes, and the budget is {budget:,}"

    @property
    def _others(self) -> int:
        return sum(entry.variant != self._variant for entry in self._to_stay)

    @property
    def _remedy(self) -> str:
        return _REMEDY_OTHERS if self._others else _REMEDY

    @property
    def _pool(self) -> str:
        return f"memory_pool_size_mb={self._registry.config.memory_pool_size_mb}"


def check_device(
    program: Program, bucket: Bucket, free_bytes: FreeBytes, *, memory: Memory | None = None
) -> None:
    """Refuses a bucket that needs more to run than is free of its device, where that is known.

    That are its own inputs and outputs, and the temporary memory. What is passed through lies on
    the device already.

    Args:
        program: What runs.
        bucket: At which size.
        free_bytes: Asked for what is free of a device.
        memory: What the compiler says of it; None before it is compiled.

    Raises:
        ConfigError: It needs more.
        CaptureError: The function cannot be traced at `bucket`.
    """
    placed = [leaf.sharding.device_set for leaf in program.variant.leaves if leaf.sharding]
    devices = set[jax.Device]().union(*placed) or {default_device()}
    if len(devices) > 1:
        return  # each has a part of it
    (device,) = devices
    free = free_bytes(device)
    if free is None:
        return
    own = [
        jax.ShapeDtypeStruct(
            axes.resize(tuple(size or 0 for size in leaf.shape), bucket), leaf.dtype
        )
        for leaf, axes in zip(program.variant.leaves, program.axes, strict=True)
        if not axes.passes_through
    ]
    needed = array_bytes((own, program.evaluate(bucket)))
    needed += memory.temporary_bytes if memory else 0
    if needed > free:
        raise ConfigError(
            f"{program.target.name} at {bucket} needs {needed:,} bytes of {device} for a run"
            f"{'' if memory else ', without its temporary memory'}, but {free:,} are free: free "
            "arrays that are not needed any more, or give smaller capture_sizes and "
            "capture_seq_lens"
        )


def _memories(entries: Iterable[CUDAGraphEntry]) -> list[Memory | None]:
    return [entry.memory for entry in entries]
