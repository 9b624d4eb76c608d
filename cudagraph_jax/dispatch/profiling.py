"""Profiles the replays of a registry: what XLA's command buffers do, and which arguments move."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from cudagraph_jax._base.fork import use_jax
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.errors import CUDAGraphError
from cudagraph_jax.graphs.addresses import AddressBook
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.observers import Observers
from cudagraph_jax.report.replay_profile import BucketReplays, ReplayProfile
from cudagraph_jax.xla.profile import Shown, attribute, read_events
from cudagraph_jax.xla.stages import compiled_so_far


def profile_replays(registry: CUDAGraphRegistry, run: Callable[[], object]) -> ReplayProfile:
    """What a profile shows of the replays of `registry` while `run` runs.

    Args:
        registry: Whose replays.
        run: Is called once.

    Raises:
        CUDAGraphError: Another profile is running.
    """
    use_jax()
    observers, compiled = registry.observers, compiled_so_far()
    with tempfile.TemporaryDirectory(prefix="cudagraph_jax-") as directory:
        with _profile(directory), _watched(observers) as addresses:
            run()
        shown, strays = attribute(read_events(Path(directory)), watcher=observers.number)
    # What was dropped meanwhile is known no more.
    held = [entry for entry in registry.entries() if entry.graph_id in shown]
    buckets = [_replays(entry, shown[entry.graph_id], addresses) for entry in held]
    buckets.sort(key=lambda bucket: -bucket.replays)
    if compiled_so_far() == compiled:
        replaying = frozenset(bucket.graph_id for bucket in buckets if bucket.is_replaying)
        observers.saw_replaying(replaying)
    return ReplayProfile(jax.default_backend(), tuple(buckets), strays)


def _replays(entry: CUDAGraphEntry, shown: Shown, addresses: AddressBook) -> BucketReplays:
    return BucketReplays(
        name=entry.variant.name,
        bucket=entry.bucket,
        graph_id=entry.graph_id,
        replays=shown.replays,
        executed=shown.counts["executed"],
        updated=shown.counts["updated"],
        recorded=shown.counts["recorded"],
        arguments=addresses.moves(entry.graph_id),
    )


@contextmanager
def _profile(directory: str) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    try:
        jax.profiler.start_trace(directory, profiler_options=options)
    except RuntimeError as error:
        raise CUDAGraphError(f"cannot profile: {error} Stop the one that is running.") from error
    try:
        yield
    finally:
        jax.profiler.stop_trace()


@contextmanager
def _watched(observers: Observers) -> Iterator[AddressBook]:
    """Every replay annotated, and the addresses of its arguments written down."""
    annotated = observers.annotate_replays
    observers.addresses = addresses = AddressBook()
    observers.annotate_replays = True
    try:
        yield addresses
    finally:
        observers.annotate_replays = annotated
        observers.addresses = None
