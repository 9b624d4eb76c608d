"""What waits for a batcher: items, which of them run next, and what became of them."""

from __future__ import annotations

import itertools
import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from enum import Enum
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

from cudagraph_jax._base.changes import counted
from cudagraph_jax._base.log import log_in_worker
from cudagraph_jax.batching.composition import compose, rectangle
from cudagraph_jax.batching.lane import Grid, Lane
from cudagraph_jax.errors import (
    BucketOverflowError,
    CUDAGraphError,
    DeadlineError,
    InputShapeError,
    QueueFullError,
)
from cudagraph_jax.graphs.observers import tell
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array
from cudagraph_jax.shapes.pytrees import PyTree

_MAX_CALLS = 16
"""Of more that wait than so many of the largest calls hold, the oldest are composed.

More company saves hardly any padding, and to compose 512 rows takes 0.2 ms.
"""

_PATIENT_CALLS = 2
"""So many calls may go by before the oldest is passed no more: what ran as it came, and one."""

_UNKNOWN_S = 1.0
"""When to try again where nobody measured anything."""

_TYPICAL = 8
"""So many of those that wait say what one takes where no call has ended: 25 us for a refusal."""

_GONE = object()


class Outcome(Enum):
    """What became of an item; each is counted once, but for those that wait or run."""

    ANSWERED = "answered"
    FAILED = "failed"
    EXPIRED = "expired"
    """Its deadline came before its answer, whether it ran or not."""
    CANCELLED = "cancelled"
    REFUSED = "refused"
    """It fits no captured bucket, or not the function, or came when the batcher was closed."""
    FULL = "full"
    """As many waited as may; items of `map` wait for room instead."""


class Item(Future[PyTree]):
    """One row that waits for its answer.

    Args:
        queue: Where it waits.
        lane: What it may share calls with.
        arrays: The row.
        sizes: Of the row, as a batch of one.
        now: When it came.
        expires_at: When its answer is of no use any more.
    """

    def __init__(
        self,
        queue: ItemQueue,
        lane: Lane,
        arrays: tuple[Array, ...],
        sizes: Bucket,
        *,
        now: float,
        expires_at: float = math.inf,
    ) -> None:
        super().__init__()
        self._queue = queue
        self.lane = lane
        self.arrays = arrays
        self.sizes = sizes
        self.came_at = now
        self.expires_at = expires_at
        self.settled: tuple[PyTree, BaseException | None] | None = None

    def after_fork(self, error: BaseException) -> None:
        """Settles it in a child, as it was settled in the parent or else with `error`.

        A lock of the future may have been taken by a thread that is not here, so that it begins
        anew. Its callbacks are the parent's, where they are called; they may write to a client.
        """
        answer, failure = self.settled or (None, error)
        super().__init__()
        if failure is None:
            self.set_result(answer)
        else:
            self.set_exception(failure)

    def cancel(self) -> bool:
        """Has it not run, and wait no more; False once its call has started."""
        try:
            return super().cancel()
        finally:  # whatever its callbacks raise
            if self.cancelled() and self._queue.drop(self):
                self._queue.figures.count(Outcome.CANCELLED)
                self.set_running_or_notify_cancel()


def too_late(item: Item, now: float) -> DeadlineError:
    """The error of an item whose answer does not come in time."""
    took, within = (now - item.came_at) * 1e3, (item.expires_at - item.came_at) * 1e3
    return DeadlineError(
        f"after {took:,.0f} ms there is no answer that comes within {within:,.0f} ms: allow more "
        "time, or let fewer items wait (max_waiting)"
    )


class Selection(NamedTuple):
    """Items that share a call.

    Attributes:
        items: Those of one size class as they came.
        lane: Whose.
        bucket: Where they run.
        cost_s: What that takes; 0 where it was never measured.
        waiting: How many items there were to choose from.
        grid: What it was chosen from; the lane may have another one by now.
    """

    items: list[Item]
    lane: Lane
    bucket: Bucket
    cost_s: float
    waiting: int
    grid: Grid


class ItemQueue:
    """The items that wait, the oldest first.

    It has no lock: items come and go by single steps of a dictionary, and whoever takes one out
    settles it (`_base/changes.py` says why).

    Args:
        max_waiting: More are refused.
        max_wait_s: How long an item may wait for others while nothing runs.
        name: What logs and errors call the batcher.
        clock: Seconds.

    Attributes:
        waiting: The items.
        figures: What became of the others.
        is_closed: Whether no more come.
    """

    def __init__(
        self, *, max_waiting: int, max_wait_s: float, name: str, clock: Callable[[], float]
    ) -> None:
        self.waiting: dict[Item, None] = {}
        self.figures = Figures()
        self.is_closed = False
        self._max_waiting, self._max_wait_s = max_waiting, max_wait_s
        self._name, self._clock = name, clock
        self._has_deadlines = False  # as of most batchers: to look through all items takes 0.1 ms

    @property
    def has_room(self) -> bool:
        """Whether one more may wait."""
        return len(self.waiting) < self._max_waiting

    def check_open(self) -> None:
        """Raises where no more come.

        Raises:
            CUDAGraphError: It is closed.
        """
        if self.is_closed:
            raise CUDAGraphError(f"the batcher {self._name} is closed: make a new one")

    def add(self, item: Item) -> None:
        """Has it wait.

        Raises:
            QueueFullError: As many wait as may.
            CUDAGraphError: It is closed.
        """
        if item.expires_at < math.inf:
            self._has_deadlines = True
        self.waiting[item] = None
        if self.is_closed and self.drop(item):  # maybe by another thread, just now
            self.check_open()
        if len(self.waiting) > self._max_waiting and self.drop(item):
            waiting, each = len(self.waiting), self.seconds_each()
            retry_after_s = _UNKNOWN_S if each is None else waiting * each
            raise QueueFullError(
                f"{waiting} items wait already, as many as max_waiting={self._max_waiting} allows: "
                f"try again in {retry_after_s:.2g} s, or let fewer come",
                retry_after_s=retry_after_s,
            )

    def seconds_each(self) -> float | None:
        """What an item takes: as in the last calls, or before any as in full ones of what waits.

        Those cost what was measured in the warm-up; None where nothing was, or nothing waits.
        """
        if self.figures.seconds_each is not None or not self.waiting:
            return self.figures.seconds_each
        some = list(self.waiting)[:_TYPICAL]
        grids = {lane: lane.grid() for lane in {item.lane for item in some}}
        if not all(grid.is_measured for grid in grids.values()):
            return None
        return fmean(grids[item.lane].prices.share(item.sizes) for item in some) * 1e-3

    def drop(self, item: Item) -> bool:
        """Takes it out; whether it was there."""
        return self.waiting.pop(item, _GONE) is not _GONE

    def claim(self, item: Item) -> bool:
        """Takes it out to be settled; False where it is cancelled."""
        if not self.drop(item):
            return False
        if item.set_running_or_notify_cancel():
            return True
        self.figures.count(Outcome.CANCELLED)
        return False

    def fail(self, item: Item, error: BaseException, outcome: Outcome = Outcome.FAILED) -> None:
        """Has one that waits fail, unless it is cancelled."""
        if self.claim(item):
            self.settle(item, outcome, error=error)

    def settle(
        self,
        item: Item,
        outcome: Outcome,
        answer: PyTree = None,
        *,
        error: BaseException | None = None,
    ) -> None:
        """Gives one that was claimed its answer or its error."""
        item.settled = answer, error  # before, so that a child that is forked meanwhile has it
        self.figures.count(outcome)
        try:
            if error is None:
                item.set_result(answer)
            else:
                item.set_exception(error)
        except BaseException:
            # What a callback of the caller's raises is not the next item's fault.
            log_in_worker(
                *(logging.ERROR, "a callback of an item of the batcher %s failed", self._name),
                is_error=True,
            )

    def clear(self) -> None:
        """Cancels all that wait."""
        with ExitStack() as stack:  # all of them, whatever their callbacks raise
            for item in reversed(list(self.waiting)):
                stack.callback(item.cancel)

    def expire(self, item: Item, now: float) -> None:
        """Fails one for its deadline."""
        self.fail(item, too_late(item, now), Outcome.EXPIRED)

    def choose(self, free_at: float | None = None) -> Selection | None:
        """What to run next; items whose deadline comes before their answer fail.

        Args:
            free_at: When the device is free; None: now.

        Returns:
            A call that holds the oldest item, or one of items in a hurry that pass it; None where
            nothing waits, or may wait for others.
        """
        now = self._clock()
        free_at = now if free_at is None else max(now, free_at)  # a call may take longer than ever
        while window := self._window():
            oldest, lane = window[0], window[0].lane
            grid = lane.grid()
            class_of = grid.prices.class_of
            classes = [found for item in window if (found := class_of(item.sizes))]
            if len(classes) < len(window):
                self._fail_unheld(window)
                continue
            if free_at < self._waits_until():
                return None
            parts = compose(classes, grid.prices)
            part = next(part for part in parts if 0 in part.rows)
            chosen = [window[place] for place in part.rows]
            scale = 1e-3 if grid.is_measured else 0.0
            done_at = free_at + part.cost * scale
            late = [item for item in chosen if item.expires_at < done_at]
            waiting = len(self.waiting)
            if not late:
                return Selection(chosen, lane, part.bucket, part.cost * scale, waiting, grid)
            # Alone they may be in time. Where more than a call waits that is no way to catch up,
            # and if ever more come in a hurry, the oldest is not to be passed by all of them.
            alone = grid.prices.holding(rectangle([item.sizes for item in late]))
            patient_until = oldest.came_at + self._max_wait_s + _PATIENT_CALLS * part.cost * scale
            may_pass = oldest in late or free_at <= patient_until
            if len(parts) == 1 and len(late) < len(chosen) and may_pass and alone is not None:
                done_at = free_at + alone.cost * scale
                if all(item.expires_at >= done_at for item in late):
                    return Selection(late, lane, alone.bucket, alone.cost * scale, waiting, grid)
            for item in late:
                self.expire(item, now)
        return None

    def oldest(self) -> Item | None:
        """The oldest item; those whose deadline has passed fail."""
        return next(iter(self._in_time()), None)

    def _in_time(self) -> list[Item]:
        """All that wait, the oldest first; those whose deadline has passed fail."""
        waiting = list(self.waiting)
        if self._has_deadlines:
            now = self._clock()
            for item in [item for item in waiting if item.expires_at <= now]:
                self.expire(item, now)
            waiting = [item for item in waiting if item.expires_at > now]
        return waiting

    def _window(self) -> list[Item]:
        """The oldest item and others of its lane; those whose deadline has passed fail."""
        waiting = self._in_time()
        if not waiting:
            return []
        lane = waiting[0].lane
        mates = (item for item in waiting if item.lane is lane)
        return list(islice(mates, max(1, _MAX_CALLS * lane.grid().prices.most_rows)))

    def _fail_unheld(self, window: Sequence[Item]) -> None:
        """Fails those that no captured bucket holds any more."""
        for item in window:
            try:
                item.lane.entry_for(item.sizes)
            except (BucketOverflowError, InputShapeError) as error:
                self.fail(item, error)

    def _waits_until(self) -> float:
        """Until when all may wait for others: no more if none can come, or a call is full."""
        waiting = list(self.waiting)
        if not self._max_wait_s or self.is_closed or len(waiting) >= self._max_waiting:
            return -math.inf
        lanes = Counter(item.lane for item in waiting)
        if any(count >= lane.grid().prices.most_rows for lane, count in lanes.items()):
            return -math.inf
        return min(map(self._patience, waiting), default=-math.inf)

    def _patience(self, item: Item) -> float:
        """Until when an item waits for others.

        Of the time that it can spare it waits for half at the most: timers are late, and a call of
        several rows takes longer than one of its own.
        """
        spare_s = item.expires_at - item.came_at
        if spare_s < math.inf:
            grid = item.lane.grid()
            alone = grid.prices.holding(item.sizes)
            spare_s -= alone.cost * 1e-3 if alone is not None and grid.is_measured else 0.0
        return item.came_at + min(self._max_wait_s, spare_s / 2)

    def wait_s(self) -> float | None:
        """How long what waits may wait for others; None where nothing does."""
        return max(0.0, self._waits_until() - self._clock()) if self.waiting else None


# From 10 us to 100 s, each a fifth longer than the one before.
_BOUNDS = [1e-5 * 2 ** (step / 4) for step in range(94)]


class Times:
    """How long something took, how often: a histogram with one writer.

    Attributes:
        observers: Told of each, in seconds.
        count: How often.
        total_s: The sum.
        max_s: The longest.
    """

    def __init__(self) -> None:
        self.observers: list[Callable[[float], None]] = []
        self._counts = [0] * (len(_BOUNDS) + 1)
        self.count = 0
        self.total_s = 0.0
        self.max_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self.count += 1
        self.total_s += seconds
        if seconds > self.max_s:
            self.max_s = seconds
        if self.observers:
            tell(self.observers, seconds)

    def percentile_ms(self, percent: float) -> float:
        """What so many percent did not exceed; 0 without any.

        It is a fifth too long at the most; below 10 µs it is that, or the longest of all.
        """
        counts = list(self._counts)
        rank, seen = percent / 100 * sum(counts), 0
        for bound, count in zip([*_BOUNDS, math.inf], counts, strict=True):
            seen += count
            if count and seen >= rank:
                return min(bound, self.max_s) * 1e3
        return 0.0

    def stats(self) -> dict[str, float]:
        """The figures, in values that JSON can hold."""
        mean = self.total_s / self.count if self.count else 0.0
        percentiles = {f"p{percent}": self.percentile_ms(percent) for percent in (50, 90, 99)}
        return {"mean": mean * 1e3, **percentiles, "max": self.max_s * 1e3}


_REMEMBERED_ROWS = 256


class Figures:
    """What became of the items of one batcher; times and calls have one writer, its worker.

    Attributes:
        queued: From the arrival to the start of the call.
        served: From there to the answer.
        real_elements: Of all rows that ran, at their own sizes.
        computed_elements: Those of the buckets where they ran.
        calls: By bucket.
        seconds_each: What one took of late, as a part of its call; None where none ran.
    """

    def __init__(self) -> None:
        self._outcomes = {outcome: itertools.count() for outcome in Outcome}
        self.queued, self.served = Times(), Times()
        self.real_elements = 0
        self.computed_elements = 0
        self.calls: Counter[Bucket] = Counter()
        self.seconds_each: float | None = None

    def count(self, outcome: Outcome) -> None:
        """Counts one item."""
        next(self._outcomes[outcome])

    def items(self) -> dict[str, int]:
        """How many there are of each outcome."""
        return {outcome.value: counted(n) for outcome, n in self._outcomes.items()}

    def add_call(self, bucket: Bucket, *, rows: int, real_elements: int, seconds: float) -> None:
        """Counts a call that the device was at for so long."""
        self.calls[bucket] += 1
        self.real_elements += real_elements
        self.computed_elements += bucket.elements
        each = seconds / rows
        before = each if self.seconds_each is None else self.seconds_each
        # Each row weighs the same: one alone takes longer than one of many.
        self.seconds_each = before + (each - before) * rows / (rows + _REMEMBERED_ROWS)

    def stats(self) -> dict[str, Any]:
        """The figures, in values that JSON can hold."""
        computed = self.computed_elements
        return {
            "items": self.items(),
            "queue_ms": self.queued.stats(),
            "service_ms": self.served.stats(),
            "real_elements": self.real_elements,
            "computed_elements": computed,
            "waste": 1 - self.real_elements / computed if computed else 0.0,
            "calls": {str(bucket): count for bucket, count in sorted(self.calls.copy().items())},
        }
