"""What is known of a call by its sizes alone, no function named."""

from __future__ import annotations

from cudagraph_jax.dispatch.decision import Holdings, decide
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.shapes.ladder import Bucket


def mode_for(dispatcher: Dispatcher, sizes: Bucket) -> CUDAGraphMode:
    """What would be done with a call of this size, any captured function taken for its own."""
    registry, config = dispatcher.registry, dispatcher.config

    def find(bucket: Bucket) -> CUDAGraphEntry | None:
        return next(iter(registry.at(bucket)), None)

    def find_larger() -> CUDAGraphEntry | None:
        found = (registry.find_larger(sizes, entry.variant) for entry in registry.entries())
        return next((entry for entry in found if entry is not None), None)

    holdings = Holdings(find, find_larger, lambda bucket: None)
    return decide(config, dispatcher.mode, sizes, config.bucket_for(*sizes), holdings).mode


def replayable(dispatcher: Dispatcher, sizes: Bucket) -> list[CUDAGraphEntry]:
    """The entries of the first bucket that may serve `sizes`, the one captured last in front.

    Only those of functions of one pytree: the specification's calls.
    """
    registry, config = dispatcher.registry, dispatcher.config
    buckets = [sizes]
    if config.cudagraph_copy_inputs:
        buckets.append(config.bucket_for(*sizes))
        if dispatcher.mode is CUDAGraphMode.REPLAY:
            larger = (registry.find_larger(sizes, entry.variant) for entry in registry.entries())
            found = {entry.bucket for entry in larger if entry is not None}
            buckets += sorted(found, key=lambda bucket: bucket.elements)
    for bucket in dict.fromkeys(buckets):
        entries = [entry for entry in registry.at(bucket) if entry.single_input]
        if entries:
            return entries[::-1]
    return []
