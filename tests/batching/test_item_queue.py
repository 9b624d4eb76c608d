"""What waits: which items run next, and that each is settled once, whatever comes in between."""

import math
from collections import Counter
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import product

import numpy as np
import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cudagraph_jax.batching.composition import Priced, Prices
from cudagraph_jax.batching.item_queue import Item, ItemQueue, Outcome, Times
from cudagraph_jax.batching.lane import Grid
from cudagraph_jax.errors import DeadlineError, QueueFullError
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.held_clock import HeldClock


class FixedLane:
    """Buckets of 1 and 4 rows, 8 and 32 long; a call costs 8 ms, and 0.1 for each element."""

    def __init__(self, *, is_measured=True):
        buckets = [Bucket(*sizes) for sizes in product((1, 4), (8, 32))]
        prices = Prices(Priced(bucket, 8 + bucket.elements / 10) for bucket in buckets)
        self._grid = Grid({}, prices, is_measured, 0.0)

    def grid(self):
        return self._grid


LANE = FixedLane()


def queue_of(clock, *, max_waiting=1000, max_wait_s=0.0):
    return ItemQueue(max_waiting=max_waiting, max_wait_s=max_wait_s, name="it", clock=clock)


def added(queue, length, *, lane=LANE, now=0.0, deadline=float("inf")):
    sizes = Bucket(1, length)
    item = Item(queue, lane, (), sizes, now=now, expires_at=now + deadline)
    queue.add(item)
    return item


def test_the_call_of_the_oldest_runs_next():
    """Of a composition the call runs that holds the oldest item, with others of like size."""
    queue = queue_of(HeldClock())
    items = [added(queue, length) for length in (7, 30, 5, 8, 31, 6, 32, 29)]
    chosen = queue.choose()
    assert chosen.items == [items[0], items[2], items[3], items[5]]
    assert (chosen.bucket, chosen.cost_s) == (Bucket(4, 8), pytest.approx(0.0112))
    assert all(queue.claim(item) for item in chosen.items)
    assert queue.choose().bucket == Bucket(4, 32)


def test_nothing_waits_while_the_device_is_free():
    """One item alone runs at once, in the cheapest bucket that holds it."""
    queue = queue_of(HeldClock())
    assert queue.choose() is None
    item = added(queue, 5)
    assert queue.choose().items == [item]
    assert queue.choose().bucket == Bucket(1, 8)


def test_waiting_for_company():
    """With max_wait_ms an item waits that long for others, or until a call is full."""
    clock = HeldClock()
    queue = queue_of(clock, max_wait_s=1.0)
    added(queue, 5)
    clock.now = 0.75
    assert (queue.choose(), queue.wait_s()) == (None, 0.25)
    for _ in range(3):
        added(queue, 5, now=0.75)
    assert len(queue.choose().items) == 4
    queue.clear()
    added(queue, 5, now=0.75)
    clock.now = 1.75
    assert (len(queue.choose().items), queue.wait_s()) == (1, 0.0)


def test_company_is_no_reason_to_be_late():
    """An item waits for others for half of the time that it can spare: timers are late."""
    clock = HeldClock()
    queue = queue_of(clock, max_wait_s=0.1)
    item = added(queue, 5, deadline=0.1088)
    assert (queue.choose(), queue.wait_s()) == (None, pytest.approx(0.05))
    clock.now = 0.06
    assert queue.choose().items == [item]


def test_whoever_has_the_least_time_decides():
    """Where several wait for others, they do so no longer than any of them can."""
    clock = HeldClock()
    queue = queue_of(clock, max_wait_s=1.0)
    oldest, hurried = added(queue, 5), added(queue, 5, lane=FixedLane(), deadline=0.2088)
    assert queue.wait_s() == pytest.approx(0.1)
    clock.now = 0.101
    first = queue.choose()
    assert first.items == [oldest]
    queue.claim(oldest)
    assert queue.choose(clock.now + first.cost_s).items == [hurried]


@pytest.mark.parametrize("reason", ["a full call of others", "no room for more", "closed"])
def test_when_nobody_waits_for_company(reason):
    """Nothing waits for others where none can come, or where a call of others is full."""
    queue = queue_of(HeldClock(), max_wait_s=1.0, max_waiting=2 if reason[0] == "n" else 100)
    item = added(queue, 5)
    assert queue.choose() is None
    others = FixedLane()
    for _ in range({"a full call of others": 4, "no room for more": 1, "closed": 0}[reason]):
        added(queue, 5, lane=others)
    queue.is_closed = reason == "closed"
    assert (queue.choose().items, queue.wait_s()) == ([item], 0.0)


def test_a_deadline_that_has_passed():
    """An item whose deadline has passed fails, and is not run."""
    clock = HeldClock()
    queue = queue_of(clock)
    late, other = added(queue, 5, deadline=0.5), added(queue, 5)
    clock.now = 0.5
    assert queue.choose().items == [other]
    with pytest.raises(DeadlineError, match="after 500 ms there is no answer"):
        late.result()
    assert queue.figures.items()["expired"] == 1


def test_a_deadline_that_would_pass():
    """An item that cannot be answered in time fails at once; the device is free at a time."""
    queue = queue_of(HeldClock())
    item = added(queue, 5, deadline=0.5)
    assert queue.choose(free_at=0.49).items == [item]
    assert queue.choose(free_at=0.493) is None
    assert isinstance(item.exception(), DeadlineError)


def test_a_call_that_takes_longer_than_ever():
    """What was foretold for the end of a call holds no more once that time has passed."""
    clock = HeldClock()
    queue = queue_of(clock)
    item = added(queue, 5, deadline=1.0)
    clock.now = 0.995
    assert queue.choose(free_at=0.5) is None
    assert isinstance(item.exception(), DeadlineError)


def test_a_short_deadline_gets_a_call_of_its_own():
    """Where all that waits is one call, an item in a hurry runs before it, alone."""
    queue = queue_of(HeldClock())
    hurried, other = added(queue, 5, deadline=0.01), added(queue, 5)
    first = queue.choose()
    assert (first.items, first.bucket) == ([hurried], Bucket(1, 8))
    assert queue.claim(hurried)
    assert queue.choose().items == [other]


@pytest.mark.parametrize("max_wait_s", [0.0, 0.05])
def test_hurried_items_pass_the_oldest_for_a_while(max_wait_s):
    """However many come in a hurry, the oldest runs as soon as two calls went by."""
    clock = HeldClock()
    queue = queue_of(clock, max_wait_s=max_wait_s)
    oldest = added(queue, 5)
    for _ in range(20):
        added(queue, 5, now=clock.now, deadline=0.01)
        clock.now += queue.wait_s() * 1.01
        chosen = queue.choose()
        assert all(queue.claim(item) for item in chosen.items)
        clock.now += chosen.cost_s
        if oldest in chosen.items:
            break
    assert oldest.running()
    assert clock.now <= max_wait_s + 4 * 0.0112


def test_costs_that_nobody_measured():
    """Where costs are elements and no times, no deadline is foretold."""
    queue = queue_of(HeldClock())
    item = added(queue, 5, lane=FixedLane(is_measured=False), deadline=1e-6)
    assert queue.choose().items == [item]


def test_items_of_other_programs():
    """Items of another lane share no call, and have their turn."""
    queue, other = queue_of(HeldClock()), FixedLane()
    first, second, third = added(queue, 5), added(queue, 5, lane=other), added(queue, 5)
    chosen = queue.choose()
    assert set(chosen.items) == {first, third}
    assert all(queue.claim(item) for item in chosen.items)
    assert queue.choose().items == [second]


def test_more_than_may_wait():
    """One more than max_waiting is refused, and told when to come again, as calls took; before the
    first of them, as full calls of those that wait were measured in the warm-up."""
    queue = queue_of(HeldClock(), max_waiting=2)
    items = [added(queue, 5), added(queue, 30)]
    with pytest.raises(QueueFullError, match="max_waiting=2") as caught:
        added(queue, 5)
    assert caught.value.retry_after_s == pytest.approx((11.2 / 4 + 20.8 / 4) * 1e-3)
    queue.figures.add_call(Bucket(4, 8), rows=2, real_elements=10, seconds=0.5)
    with pytest.raises(QueueFullError) as caught:
        added(queue, 5)
    assert caught.value.retry_after_s == 0.5
    assert items[0].cancel()
    added(queue, 5)
    assert queue.figures.items() == {
        **dict.fromkeys((outcome.value for outcome in Outcome), 0), "cancelled": 1
    }  # fmt: skip


def test_more_than_may_wait_where_nothing_was_measured():
    """Without any time at all the answer is a second."""
    queue, lane = queue_of(HeldClock(), max_waiting=1), FixedLane(is_measured=False)
    for other in (lane, LANE):
        added(queue, 5, lane=lane)
        with pytest.raises(QueueFullError, match="try again in 1 s") as caught:
            added(queue, 5, lane=other)
        assert caught.value.retry_after_s == 1.0
        queue.clear()


def test_percentiles():
    """Percentiles are those of the times, a fifth too long at the most."""
    times = Times()
    assert times.stats() == {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    for millisecond in range(1, 101):
        times.add(millisecond / 1e3)
    stats = times.stats()
    assert stats["max"] == 100
    assert stats["mean"] == pytest.approx(50.5)
    for percent in (50, 90, 99):
        assert percent <= stats[f"p{percent}"] <= percent * 1.2


def simulated(overload, *, deadline, seconds=20.0, max_waiting=300):
    """Items answered in a second, of a device that takes as long as its buckets cost."""
    clock = HeldClock()
    queue = queue_of(clock, max_waiting=max_waiting)
    random, came, items = np.random.default_rng(0), 0, []
    rate = 250 * overload  # of calls of four rows the device could do some 250 rows a second
    while clock.now < seconds:
        while came < rate * clock.now + 1:
            at = came / rate
            came += 1
            with suppress(QueueFullError):
                length = int(random.integers(1, 33))
                items.append(added(queue, length, now=at, deadline=deadline))
        chosen = queue.choose()
        if chosen is None:
            clock.now = came / rate
            continue
        claimed = [item for item in chosen.items if queue.claim(item)]
        clock.now += chosen.cost_s
        rows = len(claimed)
        queue.figures.add_call(chosen.bucket, rows=rows, real_elements=rows, seconds=chosen.cost_s)
        for item in claimed:
            assert clock.now <= item.expires_at
            item.set_result(clock.now - item.came_at)
    answered = [item.result() for item in items if item.done() and not item.exception()]
    assert len(answered) + queue.figures.items()["expired"] + len(queue.waiting) == len(items)
    return len(answered) / clock.now, max(answered)


def test_ten_times_overload():
    """Under ten times overload as much is answered in time as at saturation without deadlines."""
    saturated, _ = simulated(10, deadline=math.inf)
    goodput, slowest = simulated(10, deadline=0.5)
    assert goodput >= 0.95 * saturated
    assert slowest <= 0.5


def test_light_load():
    """Under light load hardly an item waits longer than the call before it and its own take."""
    answered, slowest = simulated(0.1, deadline=math.inf)
    assert answered == pytest.approx(25, rel=0.05)
    assert slowest < 3 * 0.0208


class Queueing(RuleBasedStateMachine):
    """Submissions, cancellations, deadlines, calls and closing in any order."""

    def __init__(self):
        super().__init__()
        self.clock = HeldClock()
        self.queue = queue_of(self.clock, max_waiting=9)
        self.items = []
        self.running = []
        self.answered = set()

    @rule(length=strategies.integers(1, 32), deadline=strategies.sampled_from([0, 0.05, 1, 1e9]))
    def submit(self, length, deadline):
        """One more comes."""
        try:
            item = added(self.queue, length, now=self.clock.now, deadline=deadline)
        except QueueFullError:
            assert len(self.queue.waiting) == 9
        else:
            self.items.append(item)

    @precondition(lambda self: self.items)
    @rule(data=strategies.data())
    def cancel(self, data):
        """A client gives up: an item that waits is cancelled, one that runs is not."""
        item = data.draw(strategies.sampled_from(self.items))
        waits = item in self.queue.waiting
        assert item.cancel() == (waits or item.cancelled())

    @rule(seconds=strategies.floats(0, 0.2))
    def pass_time(self, seconds):
        """Time passes."""
        self.clock.now += seconds

    @precondition(lambda self: not self.running)
    @rule()
    def start(self):
        """The device is free."""
        waiting = list(self.queue.waiting)
        chosen = self.queue.choose()
        if chosen is None:
            assert not self.queue.waiting
            return
        kept = [item for item in waiting if item in self.queue.waiting]
        assert kept[0] in chosen.items or len(chosen.items) < len(kept)
        assert len(chosen.items) <= chosen.bucket.batch_size
        for item in chosen.items:
            assert chosen.bucket.holds(item.sizes)
            assert item.expires_at >= self.clock.now + chosen.cost_s
            assert self.queue.claim(item)
        self.running = chosen.items

    @rule()
    def finish(self):
        """A call ends."""
        for item in self.running:
            self.queue.figures.count(Outcome.ANSWERED)
            item.set_result(item.sizes)
            self.answered.add(item)
        self.running = []

    @rule()
    def close(self):
        """What waits is cancelled."""
        self.queue.clear()
        assert not self.queue.waiting

    @invariant()
    def each_item_is_in_one_place(self):
        """Each item waits, runs or is settled, and is counted once."""
        found: Counter[str] = Counter()
        for item in self.items:
            if item in self.queue.waiting:
                assert not item.done()
                continue
            if item in self.running:
                assert item.running()
                continue
            assert item.done()
            if item.cancelled():
                found["cancelled"] += 1
                with pytest.raises(CancelledError):
                    item.result()
            elif item in self.answered:
                found["answered"] += 1
                assert item.result() == item.sizes
            else:
                found["expired"] += 1
                assert isinstance(item.exception(), DeadlineError)
        counts = self.queue.figures.items()
        assert {key: count for key, count in counts.items() if count} == dict(+found)


Queueing.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_queueing = Queueing.TestCase
