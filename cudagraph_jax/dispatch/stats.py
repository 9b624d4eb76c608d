"""Counts: of the calls that are no replays by reason, and all statistics of a manager."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cudagraph_jax._base.changes import counted
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.graphs.replay_counts import SizeHistogram
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.shapes.ladder import Bucket


class Outcomes:
    """Each call that is no replay, counted once under one outcome and reason.

    Args:
        sizes: Where the sizes of the calls are counted.

    Attributes:
        restarts: How often `clear` set the counts to zero.
    """

    def __init__(self, sizes: SizeHistogram | None = None) -> None:
        self.sizes = SizeHistogram() if sizes is None else sizes
        self._counts: dict[tuple[str, Reason], itertools.count[int]] = {}
        self.restarts = 0

    def add(self, outcome: str, reason: Reason, sizes: Bucket | None = None) -> None:
        """Counts one call.

        Args:
            outcome: `"capture"`, `"split"`, `"eager"` or `"error"`.
            reason: Why.
            sizes: Its sizes, where known.
        """
        if sizes is not None:
            self.sizes.add(sizes)
        next(self._counts.setdefault((outcome, reason), itertools.count()))

    @contextmanager
    def counting_input_errors(self) -> Iterator[None]:
        """Counts a call whose arguments are refused."""
        try:
            yield
        except BaseException:
            self.add("error", Reason.INPUT)
            raise

    def clear(self) -> None:
        """Starts from zero."""
        self._counts = {}
        self.restarts += 1

    def by_reason(self, outcome: str) -> dict[str, int]:
        """The counts of one outcome by reason, sorted."""
        counts = list(self._counts.items())
        found = {reason.value: counted(n) for (kind, reason), n in counts if kind == outcome}
        return dict(sorted(found.items()))


_MISSED = ("miss", "queued", "refused", "sealed", "failed")


def manager_stats(outcomes: Outcomes, capturer: Capturer) -> dict[str, Any]:
    """Counts and times; `CUDAGraphManager.stats` says what they mean."""
    registry, mode = capturer.registry, capturer.gate.mode
    totals = registry.totals
    eager, errors = outcomes.by_reason("eager"), outcomes.by_reason("error")
    captures = sum(outcomes.by_reason("capture").values())
    splits = outcomes.by_reason("split")
    return {
        "enabled": mode is not CUDAGraphMode.DISABLED,
        "mode": mode.value,
        "registry": registry.stats(),
        "calls": totals.calls
        + captures
        + sum((*splits.values(), *eager.values(), *errors.values())),
        "hits": totals.calls,
        "misses": captures
        + splits.get("miss", 0)
        + sum(eager.get(reason, 0) for reason in _MISSED),
        "replays": {"exact": totals.exact, "padded": totals.padded, "larger": totals.larger},
        "captures": captures,
        "splits": sum(splits.values()),
        "splits_by_reason": splits,
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
