"""Whether a grid fits into the limits: said before a bucket is evicted by the next one."""

from __future__ import annotations

from collections.abc import Sequence

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.registry import CUDAGraphRegistry
from cudagraph_jax.graphs.variant import Variant
from cudagraph_jax.shapes.ladder import Bucket


class Budget:
    """The limits of a registry, while a grid is captured from the largest bucket down.

    What the next bucket needs is estimated from the one before, in proportion to their elements:
    temporary memory grows with those, so that the estimate is rarely too low.

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
        limit = registry.config.max_graphs
        others = sum(entry.variant.function != variant.function for entry in registry.entries())
        if limit is not None and len(buckets) + others > limit:
            beside = f" beside the {others} of other functions" if others else ""
            raise ConfigError(
                f"the grid has {len(buckets)} buckets{beside}, more than max_graphs={limit}: "
                "raise it, or give fewer capture_sizes and capture_seq_lens"
            )
        self._registry = registry
        self._variant = variant
        self._added = 0
        self._last: CUDAGraphEntry | None = None

    def check(self, bucket: Bucket) -> None:
        """Raises unless `bucket` probably fits beside those that are held.

        Raises:
            ConfigError: It does not; the message has the sizes.
        """
        limit = self._registry.config.memory_budget_bytes
        if limit is None or self._last is None or not self._last.memory_bytes:
            return
        if self._registry.find(bucket, self._variant) is not None:
            return
        entries = self._registry.entries()
        # Other variants of the same function, such as for parameters that are gone, may go.
        held = sum(
            entry.memory_bytes or 0
            for entry in entries
            if entry.variant == self._variant or entry.variant.function != self._variant.function
        )
        lost = sum(entry.variant == self._variant for entry in entries) < self._added
        needed = self._last.memory_bytes * bucket.elements // self._last.bucket.elements
        if held + needed > limit or lost:
            raise ConfigError(
                f"the grid does not fit into memory_pool_size_mb="
                f"{self._registry.config.memory_pool_size_mb}: {self._registry.num_graphs} buckets "
                f"take {held:,} bytes, and the next one, {bucket}, needs about {needed:,}, but the "
                f"budget is {limit:,}: raise it, or give fewer capture_sizes and capture_seq_lens"
            )

    def add(self, entry: CUDAGraphEntry) -> None:
        """Counts a bucket that is held now."""
        self._last = entry
        self._added += 1
