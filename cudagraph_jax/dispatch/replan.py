"""A new grid in the place of the old one, while requests go on."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TypedDict

from cudagraph_jax._base.checks import positive_size
from cudagraph_jax._base.log import logger
from cudagraph_jax.capture.capturer import is_stale
from cudagraph_jax.capture.peers import refuse_replan
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.capture.warmup import sealed_error
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.dispatch.split import piece_rows
from cudagraph_jax.errors import ConfigError, CUDAGraphError, CUDAGraphWarning
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.warm_runs import run_idle
from cudagraph_jax.planning.costs import Cost
from cudagraph_jax.planning.plan import BucketPlan
from cudagraph_jax.planning.planner import Headroom, plan_buckets
from cudagraph_jax.program.call import Variant
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.memory import pool_bytes
from cudagraph_jax.xla.shardings import check_grid

Entries = dict[tuple[Bucket, Variant], CUDAGraphEntry]


def plan_from(
    sizes: Mapping[Bucket, int],
    config: CUDAGraphConfig,
    *,
    max_graphs: int | None = None,
    cost: Cost | None = None,
    batch_multiple: int = 1,
    seq_multiple: int = 1,
    multiples: Mapping[str, int] | None = None,
    headroom: Headroom | None = None,
    max_padding: float | None = None,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    divided: Mapping[str, int] = MappingProxyType({}),
) -> BucketPlan:
    """The plan for sizes that a manager of `config` was asked for; see `CUDAGraphManager.replan`.

    `divided` is what sizes are multiples of besides, by axis, so that meshes divide them.

    Raises:
        ConfigError: There are no sizes, an option is not valid, `config` pads no sequence, or no
            grid of so many buckets was found that holds all sizes within `max_bucket_elements`.
    """
    most = [
        math.inf if size is None else positive_size(size, name=name)
        for name, size in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len))
    ]
    kept = _planned_sizes(sizes, config, most)
    axes = ("batch", "seq", *config.capture_axes)
    ladders = [config.ladder(axis) or (1,) for axis in axes]
    if headroom is None:
        # What fits today fits tomorrow.
        largest = [ladder[-1] for ladder in ladders]
        asked = (*most, *[math.inf] * (len(axes) - 2))
        headroom = tuple(int(min(pair)) for pair in zip(largest, asked, strict=True))
    # The lengths of an axis without a ladder are nobody's to choose.
    planned = {axis: parts for axis, parts in divided.items() if config.ladder(axis)}
    if max_graphs is None:
        # Not those that the budget leaves: it leaves some of the new ones out, too.
        max_graphs = math.prod(map(len, ladders))
    plan = partial(
        plan_buckets,
        axes=axes,
        max_graphs=max_graphs,
        cost=cost,
        **_multiples(batch_multiple, seq_multiple, multiples, planned),
        headroom=headroom,
        max_padding=max_padding,
        max_bucket_elements=config.max_bucket_elements,
    )
    try:
        return plan(kept)
    except ConfigError:
        whole = _with_buckets(kept, config)
        if len(whole) in (0, len(kept)):
            raise
        _tell_left_out(sum(kept.values()) - sum(whole.values()), kept, config)
        return plan(whole)


def _planned_sizes(
    sizes: Mapping[Bucket, int], config: CUDAGraphConfig, most: Sequence[float]
) -> dict[Bucket, int]:
    """Those up to `most`, and what a split makes of the others."""
    kept = _in_pieces(_up_to(most, sizes), config)
    if config.capture_seq_lens is None and any(size.seq_len != 1 for size in kept):
        raise ConfigError(
            "capture_seq_lens=None makes each seq_len a bucket of its own, so that there is no "
            "grid to plan: give capture_seq_lens to have the sequence padded"
        )
    return kept


def _with_buckets(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> dict[Bucket, int]:
    """The sizes that have a bucket of all axes, of which those that are not carried are 1.

    A plan has all axes, and may have too few buckets for one of its own where one is not carried.
    """
    unnamed = dict.fromkeys(config.capture_axes, 1)
    return {
        size: count
        for size, count in sizes.items()
        if config.allows(config.padded(Bucket.of({**unnamed, **size.sizes})))
    }


class _Multiples(TypedDict):
    """Those of `plan_buckets`."""

    batch_multiple: int
    seq_multiple: int
    multiples: Mapping[str, int] | None


def _multiples(
    batch: int, seq: int, further: Mapping[str, int] | None, divided: Mapping[str, int]
) -> _Multiples:
    """What was asked for, and divided by the meshes besides."""
    usual = {"batch": batch, "seq": seq}
    named = dict(further) if isinstance(further, Mapping) else {}
    for axis, parts in divided.items():
        given = usual if axis in usual and axis not in named else named
        given[axis] = math.lcm(positive_size(given.get(axis, 1), name=f"multiple of {axis}"), parts)
    return {
        "batch_multiple": usual["batch"],
        "seq_multiple": usual["seq"],
        "multiples": named or further,
    }


def _in_pieces(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> dict[Bucket, int]:
    """Those of `sizes` within `max_bucket_elements`, and the pieces that others are served in.

    A size is judged by what its arrays carried, as it was when it was served. A batch or a sequence
    of 1 may be one that none did, which is not padded.
    """
    found: Counter[Bucket] = Counter()
    left_out = 0

    def is_allowed(size: Bucket) -> bool:
        carried = [axis for axis, n in size.sizes.items() if n > 1 or axis in config.capture_axes]
        return config.allows(config.padded(size, carried))

    for size, count in sizes.items():
        if is_allowed(size):
            found[size] += count
        elif config.on_overflow == "split":
            cut = [size.with_sizes({"batch": rows}) for rows in config.capture_sizes]
            fitting = [piece.batch_size for piece in cut if is_allowed(piece)]
            for rows in piece_rows(size.batch_size, max(fitting)) if fitting else ():
                found[size.with_sizes({"batch": rows})] += count
            left_out += 0 if fitting else count
        else:
            left_out += count
    if not found:
        raise ConfigError(
            f"all {len(sizes)} sizes are above max_bucket_elements={config.max_bucket_elements}: "
            'raise that, or set on_overflow="split"'
        )
    if left_out:
        _tell_left_out(left_out, sizes, config)
    return found


def _tell_left_out(count: int, sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> None:
    logger.warning(
        "planned without %d requests of %d, which no bucket within max_bucket_elements=%d holds",
        *(count, sum(sizes.values()), config.max_bucket_elements),
    )


def _up_to(most: Sequence[float], sizes: Mapping[Bucket, int]) -> dict[Bucket, int]:
    """Those of `sizes` with no more than `most` rows and positions."""
    if not sizes:
        raise ConfigError("no sizes were asked for yet: plan after there were requests")
    kept = {
        size: count
        for size, count in sizes.items()
        if size.batch_size <= most[0] and size.seq_len <= most[1]
    }
    if not kept:
        options = zip(("max_batch_size", "max_seq_len"), most, strict=True)
        given = " or ".join(f"{name}={size}" for name, size in options if size != math.inf)
        raise ConfigError(f"all {len(sizes)} sizes are above {given}: raise that")
    return kept


def replan_later(dispatcher: Dispatcher, plan: BucketPlan, *, keeps_limits: bool = False) -> None:
    """Captures the grid of `plan` off the request path, and then changes to it as a whole.

    Every program that has a captured bucket gets the new grid. If anything fails, the old grid
    stays, and a `CUDAGraphWarning` says why. A newer plan takes the place of one that waits.

    Args:
        dispatcher: What changes.
        plan: To what.
        keeps_limits: Whether limits above the ladders stay.

    Raises:
        ConfigError: The grid does not fit the configuration.
        SealedError: The mode does not allow captures.
        DistributedError: Several processes share a captured bucket.
        CUDAGraphError: The manager is closed, or its queue is full.
    """
    refuse_replan(dispatcher.registry.entries())
    config = planned_config(dispatcher.config, plan, keeps_limits=keeps_limits)
    check_grid(config, dispatcher.registry.multiples)
    programs = _programs(dispatcher.registry)
    grids = [len(config.grid(entry.program.carried, entry.bucket)) for entry in programs]
    _check_count(config, sum(grids) or plan.num_graphs)
    capturer = dispatcher.capturer

    def job() -> None:
        try:
            _capture_and_switch(dispatcher, config)
        except BaseException as error:
            _warn(plan, error)
            if not isinstance(error, CUDAGraphError):
                raise

    def dropped() -> None:
        _warn(plan, "the manager was closed or reset before it was captured")

    def submit(is_admitted: bool) -> None:
        if not is_admitted:
            raise sealed_error(dispatcher.mode)
        if not capturer.plan_later(job, dropped=dropped):
            raise CUDAGraphError(
                f"{plan!r} cannot be captured: the manager is closed, or its queue is full"
            )

    capturer.gate.within(submit)


def planned_config(
    config: CUDAGraphConfig, plan: BucketPlan, *, keeps_limits: bool = False
) -> CUDAGraphConfig:
    """`config` with the grid of `plan`.

    Args:
        config: The configuration now.
        plan: The new grid.
        keeps_limits: Whether limits above the ladders stay; else the new ladders are the limits.
    """
    lengths = config.capture_seq_lens
    planned = replace(
        config,
        capture_sizes=plan.batch_sizes,
        capture_seq_lens=None if lengths is None else plan.seq_lens,
        capture_axes={axis: plan.sizes[axis] for axis in config.capture_axes},
        max_capture_batch_size=None,
        max_capture_seq_len=config.max_capture_seq_len if lengths is None else None,
    )
    if not keeps_limits:
        return planned
    return replace(
        planned,
        max_capture_batch_size=max(config.max_batch_size, planned.max_batch_size),
        max_capture_seq_len=max(config.max_seq_len, planned.max_seq_len),
    )


def _warn(plan: BucketPlan, why: object) -> None:
    # Python shows a warning once, and a server may plan every hour.
    logger.warning("%r was not put in place, and the old grid stays: %s", plan, why)
    warnings.warn(
        f"{plan!r} was not put in place, and the old grid stays: {why}",
        CUDAGraphWarning,
        stacklevel=2,
    )


def _capture_and_switch(dispatcher: Dispatcher, config: CUDAGraphConfig) -> None:
    """Captures what the new grid lacks, runs it, and changes over."""
    registry, generation = dispatcher.registry, dispatcher.registry.generation
    new: Entries = {}
    # Once more for programs that came meanwhile, and for buckets that left.
    while missing := _missing(registry, config, new):
        try:
            built = [_built(registry, entry, bucket) for entry, bucket in missing]
            # Only now: every capture throws away what is recorded (docs/xla.md, "Command buffers").
            for entry in built:
                run_idle(entry, config.warmup_iterations)
        finally:
            dispatcher.capturer.record_again()
        new.update({(entry.bucket, entry.variant): entry for entry in built})
    _switch(registry, config, new, generation)
    logger.info("changed to a grid of %d buckets", len(config.buckets()))


def _built(registry: CUDAGraphRegistry, entry: CUDAGraphEntry, bucket: Bucket) -> CUDAGraphEntry:
    program = entry.program
    with program.settings.applied():
        return registry.build(program, bucket, program.example)


def _missing(
    registry: CUDAGraphRegistry, config: CUDAGraphConfig, new: Entries
) -> list[tuple[CUDAGraphEntry, Bucket]]:
    """An entry of each program with the buckets that it lacks, the largest first."""
    missing = [
        (entry, bucket)
        for entry in _programs(registry)
        for bucket in config.grid(entry.program.carried, entry.bucket)
        if (bucket, entry.variant) not in new and registry.find(bucket, entry.variant) is None
    ]
    return sorted(missing, key=lambda found: found[1].elements, reverse=True)


def _switch(
    registry: CUDAGraphRegistry, config: CUDAGraphConfig, new: Entries, generation: int
) -> None:
    old = registry.config
    check_grid(config, registry.multiples)  # as a function may ask that came meanwhile
    leaving = _leaving(registry, config, new)
    # In this order, whoever looks meanwhile finds the bucket of one grid or of the other.
    if not registry.adopt(new, generation=generation):
        raise CUDAGraphError(
            "the buckets were dropped meanwhile, by clear() or reset(): plan again"
        )
    registry.change_grid(config)
    registry.changed()
    for entry in registry.entries():
        if entry in leaving or is_stale(entry.program, entry.bucket, old, config):
            registry.discard(entry.bucket, entry.variant)
    registry.asked_sizes()  # which counts what was asked for until now
    registry.sizes.fade()


def _leaving(
    registry: CUDAGraphRegistry, config: CUDAGraphConfig, new: Entries
) -> set[CUDAGraphEntry]:
    """Buckets outside the grid that have to go, the least recently used, so that the new one fits.

    Raises:
        ConfigError: The new grid alone is over a limit.
    """
    staying = [
        entry
        for entry in registry.entries()
        if not is_stale(entry.program, entry.bucket, registry.config, config)
        and (entry.bucket, entry.variant) not in new
    ]
    exact = [entry for entry in staying if not config.admits(entry.bucket, entry.program.carried)]
    exact.sort(key=lambda entry: entry.journal.last_used(), reverse=True)
    leaving: set[CUDAGraphEntry] = set()
    while True:
        held = [*new.values(), *(entry for entry in staying if entry not in leaving)]
        try:
            _check_count(config, len(held))
            _check_bytes(config, held)
        except ConfigError:
            if not exact:
                raise
            leaving.add(exact.pop())
        else:
            return leaving


def _programs(registry: CUDAGraphRegistry) -> list[CUDAGraphEntry]:
    """An entry of each program that has a grid of its own, the one captured last.

    A size that no array carries, or that is not padded, distinguishes programs of one variant.
    """
    pads_seq = registry.config.capture_seq_lens is not None
    found = {}
    for entry in registry.entries():
        program = entry.program
        if entry.variant.function.is_gone:
            continue  # it cannot be compiled for other buckets
        own = {
            axis: size
            for axis, size in entry.bucket.sizes.items()
            if axis not in program.carried or (axis == "seq" and not pads_seq)
        }
        found[entry.variant, tuple(own.items())] = entry
    return list(found.values())


def _check_count(config: CUDAGraphConfig, buckets: int) -> None:
    if config.max_graphs is not None and buckets > config.max_graphs:
        raise ConfigError(
            f"the grid takes {buckets} buckets for all programs, but "
            f"max_graphs={config.max_graphs}: plan with fewer, or raise max_graphs"
        )


def _check_bytes(config: CUDAGraphConfig, entries: list[CUDAGraphEntry]) -> None:
    needed = pool_bytes(entry.memory for entry in entries)
    budget = config.memory_budget_bytes
    if budget is not None and needed > budget:
        raise ConfigError(
            f"its {len(entries)} buckets take {needed:,} bytes, but the budget is {budget:,}: "
            "plan with fewer, or raise memory_pool_size_mb"
        )
