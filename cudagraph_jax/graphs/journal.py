"""Exact counts of replays, without a lock on the way in."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from cudagraph_jax.shapes.ladder import Bucket

FOLD_EVERY = 512
"""Records kept before the thread that writes the next one adds them up (some 100 µs)."""


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
        time_ns: Nanoseconds of all, from the inputs to the trimmed outputs.
        real_elements: batch * seq_len of the requests, summed.
        computed_elements: batch * seq_len of the buckets that served them, summed.
    """

    exact: int = 0
    padded: int = 0
    larger: int = 0
    pieces: int = 0
    time_ns: int = 0
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
            time_ns=self.time_ns + other.time_ns,
            real_elements=self.real_elements + other.real_elements,
            computed_elements=self.computed_elements + other.computed_elements,
        )


class Journal:
    """Records of replays: appended without a lock, added up now and then under one.

    `deque.append` and `deque.popleft` are atomic, so no record is lost or counted twice, whatever
    the number of threads.

    Args:
        bucket: The sizes of the entry.
        ledger: Where the sum goes when the last holder of the journal is gone: a request that is
            still under way when its entry is dropped is counted all the same.

    Attributes:
        append: Takes (nanoseconds, request).
        pending: What was appended and is not added up yet.
        last_used_ns: `time.perf_counter_ns` of the last replay.
    """

    __slots__ = (
        "__weakref__",
        "_elements",
        "_ledger",
        "_lock",
        "_totals",
        "append",
        "last_used_ns",
        "pending",
    )

    def __init__(self, bucket: Bucket, ledger: Ledger) -> None:
        self._elements = bucket.elements
        self._ledger = ledger
        self._lock = threading.Lock()
        self._totals = ReplayTotals()
        self.pending: deque[tuple[int, Request]] = deque()
        self.append = self.pending.append
        self.last_used_ns = time.perf_counter_ns()
        ledger.open(self)

    def __del__(self) -> None:
        self._ledger.close(self._take())

    def totals(self) -> ReplayTotals:
        """The sum of all records so far."""
        with self._lock:
            self._totals = self._totals + self._drain()
            return self._totals

    def _take(self) -> ReplayTotals:
        with self._lock:
            totals, self._totals = self._totals + self._drain(), ReplayTotals()
            return totals

    def _drain(self) -> ReplayTotals:
        counts = dict.fromkeys(Fit, 0)
        time_ns = real = 0
        while self.pending:
            elapsed, (sizes, fit) = self.pending.popleft()
            counts[fit] += 1
            time_ns += elapsed
            real += sizes[0] * sizes[1]
        computed = sum(counts.values()) * self._elements
        return ReplayTotals(
            exact=counts[Fit.EXACT],
            padded=counts[Fit.PADDED],
            larger=counts[Fit.LARGER],
            pieces=counts[Fit.PIECE],
            time_ns=time_ns,
            real_elements=real,
            computed_elements=computed,
        )


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
            open_now = sum((journal.totals() for journal in self._journals), ReplayTotals())
            while self._closed:
                self._sum = self._sum + self._closed.popleft()
            return self._sum + open_now
