"""Faults: one bad row, cancelled and late items, a full queue, workers that die."""

import logging
import sys
import threading
from concurrent.futures import CancelledError, wait
from typing import Any

import jax
import numpy as np
import pytest

from cudagraph_jax import Batcher, DeadlineError, QueueFullError
from cudagraph_jax._base.log import logger
from cudagraph_jax.batching.lane import put_ahead
from cudagraph_jax.errors import CUDAGraphError
from tests.helpers.batched import BAD, Doubling, row
from tests.helpers.held_clock import HeldClock

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class BreakingClock(HeldClock):
    """A clock that fails the worker that asks it next, when so told."""

    is_broken = False

    def __call__(self):
        if self.is_broken and threading.current_thread() is not self._owner:
            self.is_broken = False
            raise MemoryError("no room for a number")
        return super().__call__()


@pytest.fixture
def doubling():
    return Doubling()


def test_a_bad_row_fails_alone(doubling, caplog):
    """A call that fails is tried once more row by row: the bad row fails, the others do not."""
    clock = HeldClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        clock.hold()
        futures = [batcher.submit(row(value)) for value in (1, BAD, 3, 4)]
        clock.release()
        wait(futures)
    assert [future.exception() is None for future in futures] == [True, False, True, True]
    assert "a bad row" in str(futures[1].exception())
    assert [future.result()[0] for future in futures if not future.exception()] == [2, 6, 8]
    assert sorted(map(len, doubling.calls)) == [1, 1, 1, 1, 4]
    items = batcher.stats()["items"]
    assert (items["answered"], items["failed"]) == (3, 1)
    (told,) = (text for text in caplog.messages if "its rows are tried one by one" in text)
    assert told.endswith("RuntimeError: a bad row"), "the traceback within JAX's words is left out"
    stats = doubling.function.stats()
    assert (stats["errors_by_reason"], stats["hits"]) == ({"run": 1}, 3)


def test_a_row_that_fails_alone_is_not_tried_again(doubling):
    """A call of one row that fails has failed."""
    with Batcher(doubling.function) as batcher:
        assert "a bad row" in str(batcher.submit(row(BAD)).exception())
        assert batcher.submit(row(1)).result().tolist() == [2, 2, 2]
    assert len(doubling.calls) == 2


def test_the_next_call_waits_for_no_answer(doubling):
    """While a call computes, items wait that can be cancelled; the next call is full of others."""
    with Batcher(doubling.function) as batcher:
        doubling.hold()
        first = batcher.submit(row(1))
        assert doubling.entered.wait(60)
        others = [batcher.submit(row(value)) for value in (2, 3, 4, 5, 6)]
        assert not first.cancel()
        assert others[1].cancel()
        assert batcher.stats()["waiting"] == 4
        doubling.go.set()
        assert [other.result()[0] for other in others if not other.cancelled()] == [4, 8, 10, 12]
        with pytest.raises(CancelledError):
            others[1].result()
    assert doubling.calls == [[1], [2, 4, 5, 6]]
    assert batcher.stats()["items"]["cancelled"] == 1


def test_the_next_call_is_put_on_the_device_while_another_computes(doubling):
    """Its inputs are brought there after the one that computes began, and before its answers."""
    ahead, clock = [], HeldClock()

    def put(inputs):
        ahead.append([future.running() for future in futures])
        return put_ahead(inputs, platform=lambda: "gpu")

    with Batcher(doubling.function, clock=clock, put=put) as batcher:
        clock.hold()
        futures = [batcher.submit(row(value)) for value in range(1, 9)]
        clock.release()
        assert [future.result()[0] for future in futures] == [2 * value for value in range(1, 9)]
    assert ahead == [[True] * 4 + [False] * 4]


def test_what_does_not_fit_beside_the_call_that_computes(doubling):
    """Where the next inputs cannot be put on the device yet, the call itself brings them."""
    clock = HeldClock()

    def put(inputs):
        raise MemoryError("no room")

    with Batcher(doubling.function, clock=clock, put=put) as batcher:
        clock.hold()
        futures = [batcher.submit(row(value)) for value in range(1, 9)]
        clock.release()
        assert [future.result()[0] for future in futures] == [2 * value for value in range(1, 9)]


def test_where_inputs_are_put_ahead():
    """On the CPU they stay as they are; elsewhere they are arrays of the device."""
    inputs = {"x": np.ones(3)}
    assert put_ahead(inputs, platform=lambda: "cpu") is inputs
    assert isinstance(put_ahead(inputs, platform=lambda: "gpu")["x"], jax.Array)


def test_late_items_are_not_run(doubling):
    """An item whose deadline passes while another call computes fails, and is not run."""
    clock = HeldClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        doubling.hold()
        first = batcher.submit(row(1))
        assert doubling.entered.wait(60)
        late, other = batcher.submit(row(2), deadline=1.0), batcher.submit(row(3), deadline=1e6)
        clock.now = 1.5
        doubling.go.set()
        assert isinstance(late.exception(), DeadlineError)
        assert (first.result()[0], other.result()[0]) == (2, 6)
    assert [2.0] not in doubling.calls


def test_an_answer_that_comes_too_late(doubling):
    """A call that takes longer than ever gives an answer that is of no use any more: an error."""
    clock = HeldClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        doubling.hold()
        future = batcher.submit(row(1), deadline=1e6)
        assert doubling.entered.wait(60)
        clock.now = 2e6
        doubling.go.set()
        assert isinstance(future.exception(), DeadlineError)
    assert batcher.stats()["items"]["expired"] == 1


@pytest.mark.parametrize("deadline", [-1, float("nan"), float("inf"), "soon", True])
def test_deadlines_that_are_none(doubling, deadline):
    """A deadline is a number of seconds."""
    with Batcher(doubling.function) as batcher, pytest.raises(ValueError, match="deadline="):
        batcher.submit(row(1), deadline=deadline)


def test_a_full_queue(doubling):
    """One more than may wait is refused; `map` waits for room instead."""
    with Batcher(doubling.function, max_waiting=2) as batcher:
        doubling.hold()
        first = batcher.submit(row(1))
        assert doubling.entered.wait(60)
        others = [batcher.submit(row(value)) for value in (2, 3)]
        with pytest.raises(QueueFullError, match="2 items wait already"):
            batcher.submit(row(4))
        doubling.go.set()
        assert [future.result()[0] for future in (first, *others)] == [2, 4, 6]
        answers = batcher.map(row(value) for value in range(50))
        assert [answer[0] for answer in answers] == [2 * value for value in range(50)]


def test_map_on_a_batcher_that_is_closed(doubling):
    """`map` that waits for room ends when the batcher is closed, and each item is counted once."""
    errors: list[str] = []

    def map_rows():
        try:
            batcher.map([row(4), row(5)])
        except CUDAGraphError as error:
            errors.append(str(error))

    doubling.hold()
    batcher = Batcher(doubling.function, max_waiting=1)
    others = [batcher.submit(row(1))]
    assert doubling.entered.wait(60)
    others.append(batcher.submit(row(2)))
    mapping, closing = threading.Thread(target=map_rows), threading.Thread(target=batcher.close)
    try:
        mapping.start()
        closing.start()
        mapping.join(20)
        assert not mapping.is_alive()
        with pytest.raises(CUDAGraphError, match="doubling is closed"):
            batcher.submit(row(3))
    finally:
        doubling.go.set()
        closing.join(60)
    assert [other.result()[0] for other in others] == [2, 4]
    assert errors == ["the batcher doubling is closed: make a new one"]
    items = batcher.stats()["items"]
    assert {key: count for key, count in items.items() if count} == {"answered": 2, "refused": 2}


def test_what_finds_no_room_is_not_planned_for(doubling):
    """Items that were refused for want of room are none that a plan is made from."""
    with Batcher(doubling.function, max_waiting=1) as batcher:
        doubling.hold()
        batcher.submit(row(1))
        assert doubling.entered.wait(60)
        batcher.submit(row(2))
        for _ in range(3):
            with pytest.raises(QueueFullError):
                batcher.submit(row(3))
        doubling.go.set()
        assert batcher.replan(capture_sizes=(4,)).requests == 2
        assert batcher.stats()["items"]["full"] == 3


def test_map_cancels_the_others(doubling):
    """Where one of many fails, its error is raised, and those that wait are cancelled."""
    with Batcher(doubling.function, max_waiting=100) as batcher:
        with pytest.raises(Exception, match="a bad row"):
            batcher.map(row(value) for value in (BAD, *range(60)))
        with pytest.raises(TypeError, match="axes are 'batch seq'"):
            batcher.map([row(1), [2.0]])
    assert sum(batcher.stats()["items"].values()) == 63
    assert batcher.stats()["waiting"] == 0


def test_a_callback_that_raises(doubling, caplog):
    """What a callback of one item raises costs no other item its answer."""

    def leave(future):
        raise SystemExit

    clock = HeldClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        clock.hold()
        futures = [batcher.submit(row(value)) for value in (1, 2)]
        futures[0].add_done_callback(leave)
        clock.release()
        assert [future.result()[0] for future in futures] == [2, 4]
        assert batcher.submit(row(3)).result()[0] == 6
    assert "a callback of an item" in caplog.text


def test_a_worker_that_dies_is_replaced(doubling, caplog):
    """An error of the batcher's own fails what it was at, is logged, and later items are served."""

    clock = BreakingClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        batcher.submit(row(1)).result()
        clock.is_broken = True
        assert isinstance(batcher.submit(row(2)).exception(), MemoryError)
        assert batcher.submit(row(3)).result()[0] == 6
    assert "begins anew" in caplog.text


def test_a_worker_that_dies_before_it_has_an_item(doubling, caplog):
    """Items that it was about to take fail once, and wait no more."""

    def die(frame, event, argument):
        if event == "call" and frame.f_code.co_qualname == "ItemQueue.claim":
            threading.setprofile(None)
            raise MemoryError("no room for a frame")

    batcher = Batcher(doubling.function)
    threading.setprofile(die)
    try:
        assert isinstance(batcher.submit(row(1)).exception(), MemoryError)
    finally:
        threading.setprofile(None)
    assert batcher.submit(row(2)).result()[0] == 4
    batcher.close()
    assert caplog.text.count("begins anew") == 1
    assert batcher.stats()["items"]["failed"] == 1


def test_answers_within_callbacks(doubling):
    """A callback may submit the next item, and close the batcher: it waits for nobody."""
    batcher = Batcher(doubling.function)
    done, answers = threading.Event(), []

    def follow(future):
        answers.append(batcher.submit(row(2)))
        batcher.close()
        done.set()

    first = batcher.submit(row(1))
    first.add_done_callback(follow)
    assert done.wait(60)
    assert answers[0].result()[0] == 4


def test_closing(doubling):
    """Closed, a batcher takes nothing; what waits is answered, or cancelled if so asked."""
    batcher = Batcher(doubling.function)
    doubling.hold()
    futures = [batcher.submit(row(1))]
    assert doubling.entered.wait(60)
    futures += [batcher.submit(row(value)) for value in (2, 3)]
    closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
    closing.start()
    assert wait(futures[1:], timeout=60).not_done == set()
    assert all(future.cancelled() for future in futures[1:])
    assert closing.is_alive()  # it waits for what runs
    doubling.go.set()
    closing.join(60)
    assert futures[0].result()[0] == 2
    with pytest.raises(CUDAGraphError, match="doubling is closed"):
        batcher.submit(row(4))
    batcher.close()
    assert batcher.stats()["waiting"] == 0


class ClosingAtEachStep:
    """A profile function of a worker: at each place of its code another thread closes the batcher.

    Attributes:
        batcher: Which; None: nothing happens yet.
        begun: Set when the worker is there.
        future: What should be done by the time that it is closed.
        was_done: Whether it was, by the place where the worker had been.
    """

    def __init__(self):
        self.batcher: Any = None
        self.future: Any = None
        self.begun = threading.Event()
        self.was_done: dict[tuple[str, int, str], bool | None] = {}
        self._closings = []

    def __call__(self, frame, event, argument):
        self.begun.set()
        place = (frame.f_code.co_qualname, frame.f_lineno, event)
        is_ours = "/cudagraph_jax/batching/" in frame.f_code.co_filename
        batcher = self.batcher
        if batcher is not None and is_ours and place not in self.was_done:
            self.was_done[place] = None
            goes_on = threading.Event()
            closing = threading.Thread(target=self._close, args=(batcher, place, goes_on))
            self._closings.append(closing)
            closing.start()
            assert goes_on.wait(60)

    def _close(self, batcher, place, goes_on):
        def watch(frame, event, argument):
            if event == "c_call" and argument.__qualname__ == "SimpleQueue.get":
                goes_on.set()  # it waits for the worker

        sys.setprofile(watch)
        batcher.close()
        self.was_done[place] = self.future.done()
        goes_on.set()

    def end(self):
        self.batcher = None
        for closing in self._closings:
            closing.join(60)


def test_closing_waits_wherever_the_worker_is(doubling):
    """Once a batcher is closed its items are answered, at whatever step its worker was then."""
    clock, closing = HeldClock(), ClosingAtEachStep()
    batcher = Batcher(doubling.function, clock=clock)
    clock.hold()
    threading.setprofile(closing)
    try:
        closing.future = batcher.submit(row(1))
        assert closing.begun.wait(60)
    finally:
        threading.setprofile(None)
    closing.batcher = batcher
    clock.release()
    assert closing.future.result()[0] == 2
    closing.end()
    was_done = dict(closing.was_done)
    assert ("ItemQueue.drop", "c_return") in {(name, event) for name, _, event in was_done}
    assert [place for place, done in was_done.items() if done is False] == []


def test_leaving_the_block_in_trouble(doubling):
    """`with` answers all that wait; left by an error it cancels them."""
    doubling.hold()
    with Batcher(doubling.function) as batcher:
        future = batcher.submit(row(1))
        doubling.go.set()
    assert future.result()[0] == 2
    doubling.hold()
    waiting = []

    def leave():
        with Batcher(doubling.function) as batcher:
            batcher.submit(row(1))
            assert doubling.entered.wait(60)
            waiting.append(batcher.submit(row(2)))
            waiting[0].add_done_callback(lambda future: doubling.go.set())
            raise KeyError("trouble")

    with pytest.raises(KeyError):
        leave()
    assert waiting[0].cancelled()


def test_many_threads(doubling):
    """From many threads each gets its own answers, and the counts are exact."""
    answers: dict[int, list] = {}

    def ask(number):
        rows = [row(100 * number + value, 1 + value % 8) for value in range(40)]
        answers[number] = [answer.tolist() for answer in batcher.map(rows)]

    with Batcher(doubling.function, max_waiting=50) as batcher:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for number in range(8):
        assert answers[number] == [
            [2.0 * (100 * number + value)] * (1 + value % 8) for value in range(40)
        ]
    items = batcher.stats()["items"]
    assert items["answered"] == 320
    assert sum(items.values()) == 320
    assert doubling.function.stats()["hits"] == sum(batcher.stats()["calls"].values())


def test_no_copy_of_it(doubling):
    """A batcher belongs to its process."""
    import copy
    import pickle

    batcher = Batcher(doubling.function)
    assert copy.deepcopy(batcher) is batcher
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(batcher)


def test_answers_keep_no_more_than_themselves(doubling):
    """An answer cannot be written to, as those of calls."""
    with Batcher(doubling.function) as batcher:
        answer = batcher.submit(row(1)).result()
    assert isinstance(answer, np.ndarray)
    assert not answer.flags.writeable


class Raising(logging.Handler):
    """A handler of the log that fails, as one whose connection is gone."""

    def emit(self, record):
        raise SystemExit("no connection")


@pytest.fixture
def broken_log():
    handler = Raising()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def leave(future):
    """A callback that ends its thread."""
    raise SystemExit


@pytest.mark.usefixtures("broken_log")
def test_a_log_that_raises(doubling):
    """A handler of the log that raises costs no item its answer, and no batcher its worker."""
    clock = HeldClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        clock.hold()
        futures = [batcher.submit(row(value)) for value in (1, BAD, 3)]
        futures[0].add_done_callback(leave)
        clock.release()
        assert [future.exception(60) is None for future in futures] == [True, False, True]
        assert batcher.submit(row(4)).result(60)[0] == 8


@pytest.mark.usefixtures("broken_log")
def test_a_worker_that_cannot_say_why_it_died(doubling):
    """A worker dies, and so does what would report it: later items are served all the same."""
    clock = BreakingClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        batcher.submit(row(1)).result(60)
        clock.is_broken = True
        future = batcher.submit(row(2))
        assert isinstance(future.exception(60), MemoryError)
        assert batcher.submit(row(3)).result(60)[0] == 6


@pytest.mark.parametrize("others", [0, 1])
def test_a_callback_of_a_late_item_that_raises(doubling, others):
    """What a callback of an item raises that was never run is nobody else's error, either."""
    clock = HeldClock()
    with Batcher(doubling.function, clock=clock) as batcher:
        clock.hold()
        late = [batcher.submit(row(1), deadline=0.0) for _ in range(1 + others)]
        for future in late:
            future.add_done_callback(leave)
        other = batcher.submit(row(2))
        clock.release()
        assert other.result(60)[0] == 4
        for future in late:
            assert isinstance(future.exception(60), DeadlineError)


def test_a_callback_of_a_cancelled_item_that_raises(doubling):
    """All that wait are cancelled, also where a callback of the first of them raises."""

    def go_and_leave(future):
        doubling.go.set()
        raise SystemExit

    doubling.hold()
    batcher = Batcher(doubling.function)
    first = batcher.submit(row(1))
    assert doubling.entered.wait(60)
    others = [batcher.submit(row(value)) for value in (2, 3)]
    others[0].add_done_callback(go_and_leave)
    with pytest.raises(SystemExit):
        batcher.close(drain=False)
    batcher.close()
    assert first.result(60)[0] == 2
    assert [other.cancelled() for other in others] == [True, True]


def test_an_item_that_is_cancelled_as_its_worker_dies(doubling):
    """It is counted once, and whoever waits for it is told."""

    def die(frame, event, argument):
        if event == "call" and frame.f_code.co_qualname == "ItemQueue.claim":
            threading.setprofile(None)
            raise MemoryError("no room for a frame")

    def let_it_die(future):
        clock.release()
        assert isinstance(other.exception(60), MemoryError)

    clock = HeldClock()
    batcher = Batcher(doubling.function, clock=clock)
    clock.hold()
    threading.setprofile(die)
    item = batcher.submit(row(1))
    threading.setprofile(None)
    other = batcher.submit(row(2))
    item.add_done_callback(let_it_die)
    assert item.cancel()
    assert wait([item], timeout=60).not_done == set()
    batcher.close()
    items = batcher.stats()["items"]
    assert {key: count for key, count in items.items() if count} == {"cancelled": 1, "failed": 1}


@pytest.mark.parametrize("fails", [False, True])
def test_answers_do_not_wait_for_a_call_that_blocks(doubling, fails):
    """Where a call runs within its start, or has to be tried anew, those before are answered."""
    answered = []

    def look(x):
        answered.append([future.done() for future in futures[1:5]])

    with Batcher(doubling.function) as batcher:
        batcher.submit(row(1)).result()
        doubling.hold()
        futures = [batcher.submit(row(1))]
        assert doubling.entered.wait(60)
        values = (2, 3, 4, 5, BAD if fails else 6, 7, 8, 9)
        futures += [batcher.submit(row(value)) for value in values]
        doubling.when_called = look
        doubling.go.set()
        wait(futures)
    assert answered[1:3] == [[False] * 4, [True] * 4]


def test_a_callback_that_waits_for_further_items(doubling):
    """It is told that those cannot come while it waits, and the others get their answers."""
    told: list[str] = []

    def ask(_):
        try:
            batcher.map([row(1.0)])
        except CUDAGraphError as error:
            told.append(str(error))

    with Batcher(doubling.function) as batcher:
        doubling.hold()
        futures = [batcher.submit(row(value)) for value in (1.0, 2.0, 3.0)]
        futures[0].add_done_callback(ask)
        doubling.go.set()
        assert [future.result(60)[0] for future in futures] == [2, 4, 6]
    assert "wait in a thread of your own" in told[0]
