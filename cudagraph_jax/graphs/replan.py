"""A new grid in the place of the old one, while requests go on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

from cudagraph_jax.checks import positive_size
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import ConfigError, CUDAGraphError, CUDAGraphWarning
from cudagraph_jax.graphs.dispatch import Dispatcher
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.grid import grid, sealed_error
from cudagraph_jax.graphs.idle import run_idle
from cudagraph_jax.graphs.registry import CUDAGraphRegistry
from cudagraph_jax.graphs.variant import Variant
from cudagraph_jax.log import logger
from cudagraph_jax.shapes.costs import Cost
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.plan import BucketPlan
from cudagraph_jax.shapes.planner import Headroom, plan_buckets


def plan_from(
    sizes: Mapping[Bucket, int],
    config: CUDAGraphConfig,
    *,
    max_graphs: int | None = None,
    cost: Cost | None = None,
    batch_multiple: int = 1,
    seq_multiple: int = 1,
    headroom: Headroom | None = None,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
) -> BucketPlan:
    """The plan for sizes that a manager of `config` was asked for; see `Planned.replan`.

    Raises:
        ConfigError: There are no sizes, an option is not valid, or `config` pads no sequence.
    """
    most = [
        math.inf if size is None else positive_size(size, name=name)
        for name, size in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len))
    ]
    kept = {
        size: count
        for size, count in sizes.items()
        if size.batch_size <= most[0] and size.seq_len <= most[1]
    }
    if not kept:
        raise ConfigError(
            f"{len(sizes)} sizes were asked for, none of them within max_batch_size="
            f"{max_batch_size} and max_seq_len={max_seq_len}: plan after there were requests"
        )
    if config.capture_seq_lens is None and any(size.seq_len != 1 for size in kept):
        raise ConfigError(
            "capture_seq_lens=None makes each seq_len a bucket of its own, so that there is no "
            "grid to plan: give capture_seq_lens to have the sequence padded"
        )
    return plan_buckets(
        kept,
        max_graphs=len(config.buckets()) if max_graphs is None else max_graphs,
        cost=cost,
        batch_multiple=batch_multiple,
        seq_multiple=seq_multiple,
        headroom=headroom,
    )


def replan_later(dispatcher: Dispatcher, plan: BucketPlan) -> None:
    """Captures the grid of `plan` off the request path, and then changes to it as a whole.

    Every program that has a captured bucket gets the new grid. If anything fails, the old grid
    stays, and a `CUDAGraphWarning` says why.

    Raises:
        ConfigError: The grid does not fit the configuration.
        SealedError: The mode does not allow captures.
        CUDAGraphError: The manager is closed, or its queue is full.
    """
    config = planned_config(dispatcher.config, plan)
    programs = _programs(dispatcher.registry)
    limit, wanted = config.max_graphs, plan.num_graphs * max(1, len(programs))
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"{plan.num_graphs} buckets for each of {len(programs)} programs are {wanted}, but "
            f"max_graphs={limit}: plan with fewer, or raise max_graphs"
        )
    capturer = dispatcher.capturer
    with capturer.gate.admission() as admitted:
        if not admitted:
            raise sealed_error(dispatcher.mode)
        if not capturer.background.submit(plan, lambda: _job(dispatcher, config, plan)):
            raise CUDAGraphError(
                f"{plan!r} cannot be captured: the manager is closed, or its queue is full"
            )


def planned_config(config: CUDAGraphConfig, plan: BucketPlan) -> CUDAGraphConfig:
    """`config` with the grid of `plan`, and with its limits."""
    lengths = config.capture_seq_lens
    return replace(
        config,
        capture_sizes=plan.batch_sizes,
        capture_seq_lens=None if lengths is None else plan.seq_lens,
        max_capture_batch_size=None,
        max_capture_seq_len=config.max_capture_seq_len if lengths is None else None,
    )


def _job(dispatcher: Dispatcher, config: CUDAGraphConfig, plan: BucketPlan) -> None:
    try:
        _capture_and_switch(dispatcher, config)
    except CUDAGraphError as error:
        warnings.warn(
            f"{plan!r} was not put in place, and the old grid stays: {error}",
            CUDAGraphWarning,
            stacklevel=1,
        )


def _capture_and_switch(dispatcher: Dispatcher, config: CUDAGraphConfig) -> None:
    """Captures what the new grid lacks, runs it, and changes over."""
    registry, restarts = dispatcher.registry, dispatcher.registry.restarts
    new: list[CUDAGraphEntry] = []
    kept: set[tuple[Bucket, Variant]] = set()
    for entry in _programs(registry).values():
        program = entry.program
        for bucket in sorted(grid(config, program.example), key=_elements, reverse=True):
            kept.add((bucket, program.variant))
            if registry.find(bucket, program.variant) is None:
                new.append(
                    registry.build(
                        program, bucket, program.example, single_input=entry.single_input
                    )
                )
    held = [entry for entry in registry.entries() if (entry.bucket, entry.variant) in kept]
    _check_budget(config, [*new, *held])
    # Only now, since every capture throws away what is recorded (FACTS.md, "Command buffers").
    for entry in new:
        run_idle(entry, config.warmup_iterations)
    dispatcher.capturer.record_again()
    if registry.restarts != restarts:
        raise CUDAGraphError("the manager was reset meanwhile: plan again")
    _switch(registry, config, new, kept)
    logger.info("changed to a grid of %d buckets", len(config.buckets()))


def _switch(
    registry: CUDAGraphRegistry,
    config: CUDAGraphConfig,
    new: list[CUDAGraphEntry],
    kept: set[tuple[Bucket, Variant]],
) -> None:
    # In this order, whoever looks meanwhile finds the bucket of one grid or of the other.
    for entry in new:
        registry.adopt(entry)
    old, registry.config = registry.config, config
    registry.changed()
    for entry in registry.entries():
        # What is larger than either grid was captured for on_overflow="exact", and serves that.
        inside = any(limits.should_use_cudagraph(*entry.bucket) for limits in (old, config))
        if inside and (entry.bucket, entry.variant) not in kept:
            registry.discard(entry.bucket, entry.variant)
    registry.sizes.fade()


def _programs(registry: CUDAGraphRegistry) -> dict[Variant, CUDAGraphEntry]:
    """An entry of each program, the one captured last."""
    return {entry.variant: entry for entry in registry.entries()}


def _check_budget(config: CUDAGraphConfig, entries: list[CUDAGraphEntry]) -> None:
    needed, budget = sum(entry.memory_bytes or 0 for entry in entries), config.memory_budget_bytes
    if budget is not None and needed > budget:
        raise ConfigError(
            f"its {len(entries)} buckets take {needed:,} bytes, but the budget is {budget:,}: "
            "plan with fewer, or raise memory_pool_size_mb"
        )


def _elements(bucket: Bucket) -> int:
    return bucket.elements
