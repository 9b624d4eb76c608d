"""`Runner`: the thread that composes a batcher's calls, runs them and hands out the answers."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import jax

from cudagraph_jax._base.changes import Changes, start_thread
from cudagraph_jax._base.log import log_in_worker
from cudagraph_jax._base.text import error_text
from cudagraph_jax._base.worker import Worker, process_goes_on
from cudagraph_jax.batching.composition import rectangle
from cudagraph_jax.batching.item_queue import Item, ItemQueue, Outcome, Selection, too_late
from cudagraph_jax.batching.lane import Lane
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree

_POLL_S = 0.05
_IDLE_POLLS = 20
"""A thread without work ends after a second; the interpreter's exit waits for one poll of it."""

_EAGER = (CUDAGraphMode.NONE, CUDAGraphMode.DISABLED)


class _PaddedCall(NamedTuple):
    """A call that is padded, and maybe on the device, and has not started."""

    chosen: Selection
    entry: CUDAGraphEntry
    rows: list[Bucket]
    arrays: Sequence[PyTree]
    masks: Mapping[str, PyTree]


class _Running(NamedTuple):
    """A call that has started, with those of its items that were not cancelled in between.

    Attributes:
        call: As it was padded.
        items: Those of its items.
        result: The outputs, or what kept it from starting.
        started_at: When it was to start.
    """

    call: _PaddedCall
    items: list[Item]
    result: PyTree | Exception
    started_at: float

    def wait(self) -> Exception | None:
        """Waits until the outputs are there; what they failed with."""
        if isinstance(self.result, Exception):
            return self.result
        return _wait(self.result)


class Runner:
    """Runs what waits in a queue, one call after the other.

    Its thread starts with an item, and ends when none came for a second.

    Args:
        function: What is called.
        items: What waits.
        name: What logs call it.
        clock: Seconds.
        put: Brings the inputs of the next call to the device while another computes.

    Attributes:
        under_way: Items whose call has started, and that have no answer yet.
        changes: Tells of every item that is settled.
    """

    def __init__(
        self,
        function: BucketedFunction[..., PyTree],
        items: ItemQueue,
        *,
        name: str,
        clock: Callable[[], float],
        put: Callable[[PyTree], PyTree],
    ) -> None:
        self._function, self._queue = function, items
        self._name, self._clock, self._put = name, clock, put
        self._busy_until = -math.inf
        self._blocking: set[Bucket] = set()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Begins without a thread, and with nothing under way."""
        self.changes = Changes()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_idle = False
        self._worker: threading.Thread | None = None
        self.under_way: dict[Item, None] = {}

    def has_settled_all(self) -> bool:
        """Whether no item waits or runs."""
        return not (self._queue.waiting or self.under_way)

    def runs_here(self) -> bool:
        """Whether this is called by its thread, so by a callback of an item."""
        return threading.current_thread() is self._worker

    def runs_eagerly(self) -> bool:
        """Whether the manager runs calls eagerly whatever is captured, so that rows are, too."""
        is_disabled: bool = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # no stub
        return is_disabled or self._function.manager.mode in _EAGER

    def wake(self) -> bool:
        """Has it look at what waits; False where no thread can be started for that."""
        if self._is_idle:
            self._wakes.put(None)
        return self._worker is not None or not self._queue.waiting or self._start_worker()

    def _start_worker(self) -> bool:
        """Starts one; whether there is one now."""
        # Not a daemon: a thread that is killed inside XLA takes the process down with it.
        worker = Worker(target=self._work, name=f"{self._name}-batcher")
        return (process_goes_on() and start_thread(worker)) or self._worker is not None

    def _work(self) -> None:
        worker = threading.current_thread()
        while True:
            # One line without a call, which nobody cuts in two: of several threads one works.
            self._worker = worker if self._worker is None else self._worker
            if self._worker is not worker:
                return
            try:
                self._serve()
            except BaseException as error:
                what = "the worker of the batcher %s failed, and begins anew"
                log_in_worker(logging.ERROR, what, self._name, is_error=True)
                with suppress(BaseException):  # where there is no memory: of the next error, then
                    self._fail_all(error)
            self._worker = None
            self.changes.tell()
            # Who submitted before that has left it to this worker.
            if not self._queue.waiting:
                return

    def _fail_all(self, error: BaseException) -> None:
        """Fails what runs, or where nothing does, what waits: it may be to blame."""
        for item in list(self.under_way) or list(self._queue.waiting):
            if item in self._queue.waiting and not self._claim(item):
                continue
            if item.done():
                self.under_way.pop(item, None)
            else:
                self._settle(item, Outcome.FAILED, error=error)

    def _serve(self) -> None:
        """Runs one call after the other, until nothing came for a while."""
        running: _Running | None = None
        idle = 0
        while True:
            if not process_goes_on():
                self._queue.clear()  # nobody is left who could ask for the answers
            free_at = None if running is None else running.started_at + running.call.chosen.cost_s
            prepared = self._prepare(free_at)
            if running is not None:
                failure = running.wait()
                done_at = self._clock()
                if prepared is None or self._is_stale(prepared):
                    prepared = self._prepare()
                running = self._follow(running, failure, done_at, prepared)
            elif prepared is not None:
                running, idle = self._start(prepared), 0
            elif self.runs_eagerly() and (item := self._queue.oldest()) is not None:
                self._answer_eagerly(item)
                idle = 0
            elif self._rests():
                idle += 1
                if idle >= _IDLE_POLLS or self._queue.is_closed or not process_goes_on():
                    return
            else:
                idle = 0

    def _follow(
        self,
        running: _Running,
        failure: Exception | None,
        done_at: float,
        prepared: _PaddedCall | None,
    ) -> _Running | None:
        """Starts the next call and hands out what the last one gave, mostly in this order."""
        if failure or prepared is None or prepared.chosen.bucket in self._blocking:
            self._finish(running, failure, done_at)
            return None if failure or prepared is None else self._start(prepared)
        following = self._start(prepared)
        self._finish(running, failure, done_at)
        return following

    def _rests(self) -> bool:
        """Waits until an item comes, or has waited for others long enough; whether none came."""
        self._is_idle = True
        try:
            wait_s = self._queue.wait_s()
            if wait_s != 0:
                self._wakes.get(timeout=_POLL_S if wait_s is None else min(wait_s, _POLL_S))
            return False
        except queue.Empty:
            return not self._queue.waiting
        finally:
            self._is_idle = False

    def _prepare(self, free_at: float | None = None) -> _PaddedCall | None:
        """The next call, padded; None where nothing may run in a bucket."""
        if self.runs_eagerly():
            return None
        chosen = self._queue.choose(free_at)
        if chosen is None:
            return None
        lane, rows = chosen.lane, [item.sizes for item in chosen.items]
        entry = chosen.grid.entries[chosen.bucket]
        arrays = lane.layout.pad([item.arrays for item in chosen.items], rows, chosen.bucket)
        inputs: tuple[PyTree, PyTree] = arrays, lane.layout.masks(rows, chosen.bucket)
        if free_at is not None:
            inputs = lane.put(entry, inputs, put=self._put)
        return _PaddedCall(chosen, entry, rows, *inputs)

    def _is_stale(self, prepared: _PaddedCall) -> bool:
        """Whether so much has changed since it was composed that another call may be better."""
        waiting, now = self._queue.waiting, self._clock()
        return (
            len(waiting) > 2 * prepared.chosen.waiting
            or self.runs_eagerly()
            or any(
                item not in waiting or item.expires_at < now + prepared.chosen.cost_s
                for item in prepared.chosen.items
            )
        )

    def _start(self, prepared: _PaddedCall) -> _Running | None:
        """Starts a call; None where there is nothing to wait for."""
        # Before they leave the queue: whoever waits for all of them finds each in one place.
        self.under_way.update(dict.fromkeys(prepared.chosen.items))
        items = [item for item in prepared.chosen.items if self._claim(item)]
        self.changes.tell()
        if not items:
            return None
        lane, started_at = prepared.chosen.lane, self._clock()
        for item in items:
            self._queue.figures.queued.add(started_at - item.came_at)
        try:
            args = lane.arguments(prepared.arrays)
            result = lane.begin(prepared.entry, args, prepared.masks)
            is_over = all(array.is_ready() for array in jax.tree.leaves(result))
        except Exception as error:
            # It is retried in its turn, after the answers of the call before.
            result, is_over = error, True
        # Small programs of the CPU, and such as call the host, run within the start of their call.
        (self._blocking.add if is_over else self._blocking.discard)(prepared.chosen.bucket)
        return _Running(prepared, items, result, started_at)

    def _claim(self, item: Item) -> bool:
        if self._queue.claim(item):
            return True
        self.under_way.pop(item, None)
        return False

    def _finish(self, running: _Running, failure: Exception | None, done_at: float) -> None:
        """Hands out what a call gave; the next one computes meanwhile."""
        call, items = running.call, running.items
        lane, rows = call.chosen.lane, call.rows
        if failure is None:
            try:
                answers = lane.answers(call.entry, running.result, rows)
            except Exception as error:
                failure = error
        if failure is not None:
            self._retry(call, items, failure)
            return
        seconds = done_at - max(running.started_at, self._busy_until)
        self._busy_until = done_at
        self._count(call.entry, rows, seconds)
        of_items = dict(zip(call.chosen.items, answers, strict=True))
        for item in items:
            self._queue.figures.served.add(done_at - running.started_at)
            self._answer(item, of_items[item], done_at)
        self.changes.tell()

    def _count(self, entry: CUDAGraphEntry, rows: Sequence[Bucket], seconds: float) -> None:
        real_elements = sum(row.elements for row in rows)
        entry.count_rows(rectangle(rows), real_elements=real_elements, seconds=seconds)
        self._queue.figures.add_call(
            entry.bucket, rows=len(rows), real_elements=real_elements, seconds=seconds
        )

    def _answer(self, item: Item, answer: PyTree, done_at: float) -> None:
        if item.expires_at < done_at:  # it took longer than it ever had
            self._settle(item, Outcome.EXPIRED, error=too_late(item, done_at))
        else:
            self._settle(item, Outcome.ANSWERED, answer)

    def _settle(
        self,
        item: Item,
        outcome: Outcome,
        answer: PyTree = None,
        *,
        error: BaseException | None = None,
    ) -> None:
        """Gives one that runs its answer or its error."""
        self._queue.settle(item, outcome, answer, error=error)
        self.under_way.pop(item, None)

    def _retry(self, call: _PaddedCall, items: Sequence[Item], error: Exception) -> None:
        """Tries the rows of a call that failed one by one, once, so that a bad one fails alone."""
        sizes = rectangle(call.rows)
        self._function.manager.dispatcher.outcomes.add("error", Reason.RUN, sizes)
        if len(call.chosen.items) == 1:
            self._settle(items[0], Outcome.FAILED, error=error)
            self.changes.tell()
            return
        what = "a call of %d rows of %s failed, and its rows are tried one by one: %s"
        log_in_worker(logging.WARNING, what, len(items), self._name, error_text(error))
        self._one_by_one(call.chosen.lane, items, self._run_alone)

    def _one_by_one(
        self, lane: Lane, items: Sequence[Item], run: Callable[[Lane, Item], PyTree]
    ) -> None:
        for item in items:
            started_at = self._clock()
            if item.expires_at < started_at:
                self._settle(item, Outcome.EXPIRED, error=too_late(item, started_at))
                continue
            try:
                answer = run(lane, item)
            except Exception as error:
                self._settle(item, Outcome.FAILED, error=error)
                continue
            done_at = self._clock()
            self._queue.figures.served.add(done_at - started_at)
            self._answer(item, answer, done_at)
        self.changes.tell()

    def _run_alone(self, lane: Lane, item: Item) -> PyTree:
        """The answer of the cheapest bucket to one row."""
        entry, rows = lane.entry_for(item.sizes), [item.sizes]
        started_at = self._clock()
        args = lane.arguments(lane.layout.pad([item.arrays], rows, entry.bucket))
        result = lane.begin(entry, args, lane.layout.masks(rows, entry.bucket))
        if (failure := _wait(result)) is not None:
            raise failure
        answer = lane.answers(entry, result, rows)[0]
        self._count(entry, rows, self._clock() - started_at)
        return answer

    def _answer_eagerly(self, item: Item) -> None:
        """Has the plain function answer one row."""
        self.under_way[item] = None
        is_claimed = self._claim(item)
        self.changes.tell()
        if is_claimed:
            self._queue.figures.queued.add(self._clock() - item.came_at)
            self._one_by_one(
                item.lane, [item], lambda lane, item: lane.run_eagerly(item.arrays, item.sizes)
            )


def _wait(result: PyTree) -> Exception | None:
    """Waits until the outputs are there; what they failed with."""
    try:
        jax.block_until_ready(result)
    except Exception as error:
        return error
    return None
