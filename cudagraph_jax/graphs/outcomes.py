"""Counts of the calls that are no replays: captures, eager runs and errors by reason."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cudagraph_jax.errors import CUDAGraphError
from cudagraph_jax.graphs.decision import Reason


class Outcomes:
    """Each call that is no replay, counted once under one outcome and reason."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, Reason]] = Counter()

    def add(self, outcome: str, reason: Reason) -> None:
        """Counts one call.

        Args:
            outcome: `"capture"`, `"eager"` or `"error"`.
            reason: Why.
        """
        with self._lock:
            self._counts[outcome, reason] += 1

    @contextmanager
    def counting_input_errors(self) -> Iterator[None]:
        """Counts a call whose arguments are refused."""
        try:
            yield
        except CUDAGraphError:
            self.add("error", Reason.INPUT)
            raise

    def clear(self) -> None:
        """Starts from zero."""
        with self._lock:
            self._counts.clear()

    def by_reason(self, outcome: str) -> dict[str, int]:
        """The counts of one outcome by reason, sorted."""
        with self._lock:
            found = {
                reason.value: n for (kind, reason), n in self._counts.items() if kind == outcome
            }
        return dict(sorted(found.items()))
