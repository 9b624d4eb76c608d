"""Exact counts: of replays, without a lock on the way in, and of the sizes asked for."""

from __future__ import annotations

import itertools
import time
import weakref
from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from cudagraph_jax._base.changes import counted
from cudagraph_jax._base.fork import put_right_in_child
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
        sizes: The request's.
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
        real_elements: The product of all sizes of each request, summed.
        computed_elements: That of the buckets that served them, summed.
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
    def mean_ms(self) -> float:
        """Mean milliseconds of a replay; 0 before the first."""
        return self.seconds * 1e3 / self.replays if self.replays else 0.0

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

    Attributes:
        request: What is served.
        count: `next` counts one replay.
        real_elements: Those of one replay; not of its sizes where each row has its own length.
        seconds: Their time, from the inputs to the trimmed outputs.
        used_at: `time.perf_counter` at the end of the last one.
        waits: Whether that is the time until the outputs are there, not only to dispatch.
        is_open: Whether there may be more; its route sets it to False when it goes away.
        settled_seconds: The time of those that were read.
    """

    __slots__ = (
        "_settled",
        "count",
        "is_open",
        "real_elements",
        "request",
        "seconds",
        "settled_seconds",
        "used_at",
        "waits",
    )

    def __init__(self, request: Request, *, waits: bool = False) -> None:
        self.request = request
        self.waits = waits
        self.real_elements = request.sizes.elements
        self.settled_seconds = 0.0
        self.count = itertools.count()
        self.seconds = 0.0
        self.used_at = 0.0
        self.is_open = True
        self._settled = 0

    def read(self) -> tuple[int, int]:
        """The replays so far, and how many of them nobody was told before."""
        replays = counted(self.count)
        new, self._settled = replays - self._settled, replays
        return replays, new


class _Sum:
    """Adds tallies of one bucket up: there may be thousands, and a scrape reads them all."""

    __slots__ = ("_replays", "real_elements", "seconds")

    def __init__(self) -> None:
        self._replays = dict.fromkeys(Fit, 0)
        self.seconds = 0.0
        self.real_elements = 0

    def add(self, tally: Tally, replays: int) -> None:
        """Adds so many replays of a tally, and its time."""
        self._replays[tally.request.fit] += replays
        self.seconds += tally.seconds
        self.real_elements += replays * tally.real_elements

    def totals(self, elements: int) -> ReplayTotals:
        """The sum, in a bucket of so many elements."""
        return ReplayTotals(
            exact=self._replays[Fit.EXACT],
            padded=self._replays[Fit.PADDED],
            larger=self._replays[Fit.LARGER],
            pieces=self._replays[Fit.PIECE],
            seconds=self.seconds,
            real_elements=self.real_elements,
            computed_elements=elements * sum(self._replays.values()),
        )


P = TypeVar("P")


class _Parts(Generic[P]):
    """What is added up: parts that go on, and the sum of those that are over.

    Several threads may add up at a time, and a signal handler in the middle of another one: each
    looks at one state, and of those that found the same parts to be over, one takes them out.

    Attributes:
        over: The sum of those that are over, another object whenever it changes.
        open: Those that go on.
    """

    __slots__ = ("_fold_at", "open", "over")

    _FEW = 256

    def __init__(self) -> None:
        self.over = ReplayTotals()
        self.open: list[P] = []
        self._fold_at = self._FEW

    def add(self, part: P) -> bool:
        """Adds a part; whether there are so many by now that those that are over should go."""
        self.open.append(part)
        if len(self.open) < self._fold_at:
            return False
        self._fold_at = 2 * len(self.open) + self._FEW
        return True

    def now(self) -> tuple[ReplayTotals, list[P]]:
        """The sum of those that are over, and the others."""
        return self.over, list(self.open)

    def close(
        self, before: ReplayTotals, seen: int, going_on: list[P], ended: ReplayTotals
    ) -> None:
        """Takes parts out that are over, unless somebody has since `before`.

        Args:
            before: The sum without them.
            seen: How many parts there were.
            going_on: Those of them that go on.
            ended: What the others add up to.
        """
        over = before + ended
        # One line without a call, which nobody cuts in two; parts that came since are at the end.
        self.open[:seen], self.over = (
            (going_on, over) if self.over is before else (self.open[:seen], self.over)
        )


_REMEMBERED_RUNS = 32


class _Cost(NamedTuple):
    """What a run costs, and how many calls that waited have said so."""

    seconds: float | None = None
    calls: int = 0


class Journal:
    """The replays of one entry, whatever their routes.

    It holds its tallies, also those of routes that are gone, until it adds them up: a request that
    is still under way when its route is dropped is counted all the same.

    Args:
        bucket: The sizes of the entry.
        ledger: What adds all journals up.
        owner: What lives as long as the entry.

    Attributes:
        idle_runs: Runs without a request, as in the warm-up.
    """

    # What a run costs: the least of those without a request, since the first ones load code and
    # record graphs; from then on the mean of the calls that wait, the last 32 counting most.

    def __init__(self, bucket: Bucket, ledger: Ledger, owner: object) -> None:
        self._elements = bucket.elements
        self._ledger = ledger
        self._owner = weakref.ref(owner)
        self._tallies: _Parts[Tally] = _Parts()
        self._used_at = time.perf_counter()
        self.idle_runs = 0
        self._cost = _Cost()
        ledger.open(self)

    def add_idle_run(self, seconds: float) -> None:
        """Counts a run without a request, which took so long until its outputs were there."""
        self.idle_runs += 1
        cost = self._cost
        if not cost.calls:
            least = seconds if cost.seconds is None else min(cost.seconds, seconds)
            self._cost = _Cost(least)

    @property
    def cost_ms(self) -> float | None:
        """Milliseconds of a run until its outputs are there; None where nobody waited for one."""
        self.totals()
        seconds = self._cost.seconds
        return None if seconds is None else seconds * 1e3

    def open(self, request: Request, *, waits: bool = False) -> Tally:
        """A tally for requests of one shape.

        Args:
            request: What is served.
            waits: Whether its times are those until the outputs are there.
        """
        tally = Tally(request, waits=waits)
        if self._tallies.add(tally):
            self.totals()
        return tally

    def add(self, request: Request, *, seconds: float, real_elements: int) -> None:
        """Counts one replay that waited for its outputs, of rows that have their own lengths."""
        tally = self.open(request, waits=True)
        tally.real_elements = real_elements
        tally.seconds, tally.used_at = seconds, time.perf_counter()
        next(tally.count)
        tally.is_open = False

    @property
    def is_over(self) -> bool:
        """Whether nothing can be added any more; after `totals`."""
        return self._owner() is None and not self._tallies.open

    def last_used(self) -> float:
        """`time.perf_counter` at the end of the last replay, or when the journal began."""
        return max([self._used_at, *[tally.used_at for tally in list(self._tallies.open)]])

    def totals(self) -> ReplayTotals:
        """The sum of all replays so far; lets go of the tallies that are closed."""
        over, tallies = self._tallies.now()
        going_on: list[Tally] = []
        running, ended = _Sum(), _Sum()
        sizes = self._ledger.sizes
        for tally in tallies:
            # Asked before it is read, so that nothing is added between the two.
            is_open = tally.is_open
            replays, new = tally.read()
            if new > 0 and tally.waits:  # another reader may have told of them meanwhile
                self._refresh_cost(tally, new)
            if new and tally.request.fit is not Fit.PIECE:
                sizes.add(tally.request.sizes, new)
            (running if is_open else ended).add(tally, replays)
            if is_open:
                going_on.append(tally)
            else:
                self._used_at = max(self._used_at, tally.used_at)
        closed = ended.totals(self._elements)
        if len(going_on) < len(tallies):
            self._tallies.close(over, len(tallies), going_on, closed)
        return over + closed + running.totals(self._elements)

    def _refresh_cost(self, tally: Tally, new: int) -> None:
        """Takes the mean of so many new calls into the cost, each with the weight of one run."""
        seconds = tally.seconds
        mean = (seconds - tally.settled_seconds) / new
        tally.settled_seconds = seconds
        cost = self._cost
        before = mean if cost.seconds is None else cost.seconds
        weight = new / (new + min(max(cost.calls, 1), _REMEMBERED_RUNS))
        self._cost = _Cost(before + (mean - before) * weight, cost.calls + new)


class Ledger:
    """The sum of many journals, also of those that are over.

    Args:
        sizes: Where the sizes of all calls are counted, whenever journals are added up.

    Attributes:
        sizes: The same; another one when its journals should count no more there.
    """

    def __init__(self, sizes: SizeHistogram | None = None) -> None:
        self.sizes = SizeHistogram() if sizes is None else sizes
        self._journals: _Parts[Journal] = _Parts()

    def open(self, journal: Journal) -> None:
        """Counts `journal` from now on."""
        if self._journals.add(journal):
            self.totals()

    def totals(self) -> ReplayTotals:
        """The sum of all journals; lets go of those that are over."""
        over, journals = self._journals.now()
        going_on: list[Journal] = []
        running, ended = ReplayTotals(), ReplayTotals()
        for journal in journals:
            # Asked in this order, so that nothing is added between the two.
            found = journal.totals()
            if journal.is_over:
                ended = ended + found
            else:
                running = running + found
                going_on.append(journal)
        if len(going_on) < len(journals):
            self._journals.close(over, len(journals), going_on, ended)
        return over + ended + running


MAX_SIZES = 4096
"""Different sizes that are told apart: about a megabyte."""


class SizeHistogram:
    """Counts of the sizes of calls; safe to use from many threads.

    Where there are more different sizes than the limit, they are counted as the next multiple of a
    step that doubles, on the axis that has most of them, but never as more than the largest.

    Args:
        max_sizes: How many are told apart.
    """

    def __init__(self, *, max_sizes: int = MAX_SIZES) -> None:
        self._max_sizes = max_sizes
        self._added: deque[tuple[Bucket, int]] = deque()
        self._is_adding = False
        self._counts: dict[Bucket, int] = {}
        self._is_fresh = False
        self._largest: dict[str, int] = {}
        self._steps: Counter[str] = Counter()
        put_right_in_child(self)

    def after_fork(self) -> None:
        """In a child, where nobody else is adding."""
        self._is_adding = False

    def add(self, sizes: Bucket, count: int = 1) -> None:
        """Counts requests of one size; an empty one is none that a bucket serves."""
        if sizes.is_empty or not count:
            return
        self._added.append((sizes, count))
        self._settle()

    def counts(self) -> dict[Bucket, int]:
        """A snapshot, ascending."""
        self._settle()
        return dict(sorted(self._counts.items()))

    def fade(self) -> None:
        """Halves the counts if any is new, so that newer requests count for more; none is lost."""
        self._settle()
        if self._is_fresh:
            self._counts = {sizes: max(1, n // 2) for sizes, n in list(self._counts.items())}
        self._is_fresh = False

    def clear(self) -> None:
        """Forgets everything."""
        self._settle()
        self._counts = {}
        self._is_fresh = False
        self._largest, self._steps = {}, Counter()

    def _settle(self) -> None:
        """Counts what was added, unless somebody does already, who then goes on with it."""
        if self._is_adding:
            return
        self._is_adding = True
        try:
            while self._added:
                self._count(*self._added.popleft())
        finally:
            self._is_adding = False

    def _count(self, sizes: Bucket, count: int) -> None:
        for axis, size in sizes.sizes.items():
            self._largest[axis] = max(size, self._largest.get(axis, 0))
        rounded = self._rounded(sizes)
        self._counts[rounded] = self._counts.get(rounded, 0) + count
        self._is_fresh = True
        while len(self._counts) > self._max_sizes:
            self._coarsen()

    def _rounded(self, sizes: Bucket) -> Bucket:
        if not self._steps:
            return sizes
        return Bucket.of(
            {
                axis: min(-(-size >> self._steps[axis]) << self._steps[axis], self._largest[axis])
                for axis, size in sizes.sizes.items()
            }
        )

    def _coarsen(self) -> None:
        different: dict[str, set[int]] = {}
        for sizes in self._counts:
            for axis, size in sizes.sizes.items():
                different.setdefault(axis, set()).add(size)
        # The sequence where there are as many batches: it has more to give away.
        self._steps[max(reversed(different), key=lambda axis: len(different[axis]))] += 1
        coarse: dict[Bucket, int] = {}
        for sizes, count in self._counts.items():
            rounded = self._rounded(sizes)
            coarse[rounded] = coarse.get(rounded, 0) + count
        self._counts = coarse  # as a whole: who reads it meanwhile sees all of it
