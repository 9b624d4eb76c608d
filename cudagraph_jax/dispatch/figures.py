"""The statistics of a manager, in values that JSON can hold."""

from __future__ import annotations

from typing import Any

from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.modes import CUDAGraphMode

_MISSED = ("miss", "queued", "refused", "sealed", "failed")


def manager_stats(dispatcher: Dispatcher) -> dict[str, Any]:
    """Counts and times; `CUDAGraphManager.stats` says what they mean."""
    outcomes, registry, capturer = dispatcher.outcomes, dispatcher.registry, dispatcher.capturer
    totals = registry.totals
    eager, errors = outcomes.by_reason("eager"), outcomes.by_reason("error")
    captures = sum(outcomes.by_reason("capture").values())
    splits = sum(outcomes.by_reason("split").values())
    return {
        "enabled": dispatcher.mode is not CUDAGraphMode.DISABLED,
        "mode": dispatcher.mode.value,
        "registry": registry.stats(),
        "calls": totals.calls + captures + splits + sum(eager.values()) + sum(errors.values()),
        "hits": totals.calls,
        "misses": captures + sum(eager.get(reason, 0) for reason in _MISSED),
        "replays": {"exact": totals.exact, "padded": totals.padded, "larger": totals.larger},
        "captures": captures,
        "splits": splits,
        "pieces": totals.pieces,
        "queued": len(capturer.background),
        "recorded_again": capturer.recorded_again,
        "eager_calls": sum(eager.values()),
        "eager_by_reason": eager,
        "errors_by_reason": errors,
        "failed_buckets": len(capturer.failures),
        "evictions": registry.evictions,
        "real_elements": totals.real_elements,
        "padded_elements": totals.computed_elements - totals.real_elements,
        "waste": totals.waste,
        "compile_seconds": registry.capture_ms / 1e3,
        "store": None if registry.shelf is None else registry.shelf.store.stats(),
    }
