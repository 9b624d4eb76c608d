"""Exact counts of replays, without a lock on the way in."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from cudagraph_jax.shapes.ladder import Bucket


class Fit(Enum):
    """How a request fits the bucket that serves it."""

    EXACT = "exact"
    PADDED = "padded"
    LARGER = "larger"
    """A larger bucket than its own, which is not captured."""
    PIECE = "piece"
    """A piece of a batch that was split: a replay of the bucket, but no call of its own."""


class Request(NamedTuple):
    """What a replay served.

    Attributes:
        sizes: The request's (batch, seq_len).
        fit: How that fits the bucket.
    """

    sizes: Bucket
    fit: Fit


@dataclass(frozen=True, slots=True)
class ReplayTotals:
    """What replays add up to.

    Attributes:
        exact: Replays of the bucket's own sizes.
        padded: Replays of smaller sizes.
        larger: Replays in a larger bucket than the request's own.
        pieces: Replays of a piece of a split batch.
        seconds: Time of all, from the inputs to the trimmed outputs.
        real_elements: batch * seq_len of the requests, summed.
        computed_elements: batch * seq_len of the buckets that served them, summed.
    """

    exact: int = 0
    padded: int = 0
    larger: int = 0
    pieces: int = 0
    seconds: float = 0.0
    real_elements: int = 0
    computed_elements: int = 0

    @property
    def replays(self) -> int:
        """Replays in all."""
        return self.calls + self.pieces

    @property
    def calls(self) -> int:
        """Replays that served a whole call."""
        return self.exact + self.padded + self.larger

    @property
    def waste(self) -> float:
        """The part of all computed elements that was padding, from 0 to 1."""
        if not self.computed_elements:
            return 0.0
        return 1 - self.real_elements / self.computed_elements

    def __add__(self, other: ReplayTotals) -> ReplayTotals:
        return ReplayTotals(
            exact=self.exact + other.exact,
            padded=self.padded + other.padded,
            larger=self.larger + other.larger,
            pieces=self.pieces + other.pieces,
            seconds=self.seconds + other.seconds,
            real_elements=self.real_elements + other.real_elements,
            computed_elements=self.computed_elements + other.computed_elements,
        )


class Tally:
    """Counts the replays of one request shape through one entry.

    The hot path writes here without a lock: `next(tally.count)` and the two sums below.
    `itertools.count` is atomic, so that no replay is lost or counted twice whatever the number of
    threads; a race may lose the time of one, never its count.

    Args:
        request: What is served.
        journal: Where the sum goes when the last holder of the tally is gone: a request that is
            still under way when its route is dropped is counted all the same.

    Attributes:
        count: `next` counts one replay.
        seconds: Their time, from the inputs to the trimmed outputs.
        used_at: `time.perf_counter` at the end of the last one.
    """

    __slots__ = ("__weakref__", "_journal", "_reads", "count", "request", "seconds", "used_at")

    def __init__(self, request: Request, journal: Journal) -> None:
        self.request = request
        self.count = itertools.count()
        self.seconds = 0.0
        self.used_at = 0.0
        self._reads = 0
        self._journal = journal

    def __del__(self) -> None:
        self._journal.close(self.totals(), self.used_at)

    def totals(self) -> ReplayTotals:
        """The sum so far; only one thread at a time may ask."""
        # A counter tells its value only by counting on: what was read is taken off again.
        replays = next(self.count) - self._reads
        self._reads += 1
        sizes, fit = self.request
        return ReplayTotals(
            **{_FIELD[fit]: replays},
            seconds=self.seconds,
            real_elements=replays * sizes.elements,
            computed_elements=replays * self._journal.elements,
        )


_FIELD = {Fit.EXACT: "exact", Fit.PADDED: "padded", Fit.LARGER: "larger", Fit.PIECE: "pieces"}


class Journal:
    """The replays of one entry, whatever their routes.

    Args:
        bucket: The sizes of the entry.
        ledger: Where the sum goes when the journal is gone.

    Attributes:
        elements: batch * seq_len of the bucket.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_ledger",
        "_lock",
        "_sum",
        "_tallies",
        "_used_at",
        "elements",
    )

    def __init__(self, bucket: Bucket, ledger: Ledger) -> None:
        self.elements = bucket.elements
        self._lock = threading.Lock()
        self._tallies: weakref.WeakSet[Tally] = weakref.WeakSet()
        self._closed: deque[tuple[ReplayTotals, float]] = deque()
        self._sum = ReplayTotals()
        self._used_at = time.perf_counter()
        self._ledger = ledger
        ledger.open(self)

    def __del__(self) -> None:
        self._ledger.close(self.totals())

    def open(self, request: Request) -> Tally:
        """A tally for requests of one shape."""
        tally = Tally(request, self)
        with self._lock:
            self._tallies.add(tally)
        return tally

    def close(self, totals: ReplayTotals, used_at: float) -> None:
        """Keeps the sum of a tally that is going away.

        It is called by a finaliser, which may run anywhere, so it takes no lock.
        """
        self._closed.append((totals, used_at))

    def last_used(self) -> float:
        """`time.perf_counter` at the end of the last replay, or when the journal began."""
        with self._lock:
            self._add_closed()
            return max([self._used_at, *[tally.used_at for tally in self._tallies]])

    def totals(self) -> ReplayTotals:
        """The sum of all replays so far."""
        with self._lock:
            # In this order: a tally that goes away meanwhile is not counted on both sides.
            self._add_closed()
            return sum((tally.totals() for tally in self._tallies), self._sum)

    def _add_closed(self) -> None:
        while self._closed:
            totals, used_at = self._closed.popleft()
            self._sum = self._sum + totals
            self._used_at = max(self._used_at, used_at)


class Ledger:
    """The sum of many journals, also of those that are gone."""

    def __init__(self) -> None:
        self._journals: weakref.WeakSet[Journal] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed: deque[ReplayTotals] = deque()
        self._sum = ReplayTotals()

    def open(self, journal: Journal) -> None:
        """Counts `journal` from now on."""
        with self._lock:
            self._journals.add(journal)

    def close(self, totals: ReplayTotals) -> None:
        """Keeps the sum of a journal that is going away.

        It is called by a finaliser, which may run anywhere, so it takes no lock.
        """
        self._closed.append(totals)

    def totals(self) -> ReplayTotals:
        """The sum of all journals, open and closed."""
        with self._lock:
            while self._closed:
                self._sum = self._sum + self._closed.popleft()
            return sum((journal.totals() for journal in self._journals), self._sum)
