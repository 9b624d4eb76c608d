"""`Batcher`: single ragged requests become calls of captured buckets, by what each one costs."""

from __future__ import annotations

import asyncio
import math
import operator
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

import jax

from cudagraph_jax._base.changes import Changes, start_thread
from cudagraph_jax._base.checks import positive_size, waiting_time
from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax._base.fork import put_right_in_child, use_jax
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.text import one_line
from cudagraph_jax._base.worker import Worker, process_goes_on
from cudagraph_jax.batching.composition import rectangle
from cudagraph_jax.batching.lane import Lane, put_ahead
from cudagraph_jax.batching.queue import Chosen, Figures, Item, Line, Outcome, too_late
from cudagraph_jax.batching.rows import ItemArguments
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.errors import ConfigError, CUDAGraphError, InputShapeError, QueueFullError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.call import Args
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree

if TYPE_CHECKING:
    from cudagraph_jax.batching.batch_plan import BatchPlanOptions
    from cudagraph_jax.planning.plan import BucketPlan

_MAX_SHAPES = 1 << 14
"""Shapes of items that are remembered; beyond that the table starts anew."""

_POLL_S = 0.05
_IDLE_POLLS = 20
"""A worker without work ends after a second; the interpreter's exit waits for one poll of it."""

_EAGER = (CUDAGraphMode.NONE, CUDAGraphMode.DISABLED)


class _Prepared(NamedTuple):
    """A call that is padded, and maybe on the device, and has not started."""

    chosen: Chosen
    entry: CUDAGraphEntry
    rows: list[Bucket]
    arrays: Sequence[PyTree]
    masks: Mapping[str, PyTree]


class _Running(NamedTuple):
    """A call that has started, with those of its items that were not cancelled in between."""

    call: _Prepared
    items: list[Item]
    result: PyTree
    started_at: float


@belongs_to_process
class Batcher:
    """Gathers single rows into calls of a function's captured buckets.

    Whenever the device is free, what waits is sorted by size and cut into calls so that their
    measured costs are least; the call that holds the oldest item runs next, and meanwhile the one
    after it is composed, padded and put on the device. All methods are safe to call from many
    threads and event loops.

    Args:
        function: What `bucket_jit` made, warmed up: only captured buckets are used.
        *passed: What `in_axes` passes through, such as parameters, in its order.
        max_waiting: Items that may wait; one more is refused.
        max_wait_ms: How long an item may wait for others while the device is free.
        name: What reports and logs call it; the function's name if None.
        clock: Seconds.
        put: Brings the inputs of the next call to the device while another computes.

    Raises:
        ConfigError: The function cannot be batched, or an argument is not valid.

    Example:
        >>> import jax.numpy as jnp, numpy as np, cudagraph_jax
        >>> config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(8,))
        >>> @cudagraph_jax.bucket_jit(
        ...     in_axes=(None, "batch seq"), mask_argname="mask", config=config
        ... )
        ... def mean(scale, x, *, mask):
        ...     return scale * jnp.sum(x * mask, axis=1) / jnp.sum(mask, axis=1)
        >>> report = mean.warmup(2.0, np.ones((1, 3), np.float32), progress=False)
        >>> with Batcher(mean, 2.0) as batcher:
        ...     answers = batcher.map([np.ones(3, np.float32), np.arange(5, dtype=np.float32)])
        >>> [answer.item() for answer in answers]
        [2.0, 4.0]
    """

    def __init__(
        self,
        function: BucketedFunction[..., PyTree],
        *passed: PyTree,
        max_waiting: int = 2048,
        max_wait_ms: float = 0.0,
        name: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        put: Callable[[PyTree], PyTree] = put_ahead,
    ) -> None:
        if not isinstance(function, BucketedFunction):
            raise ConfigError(
                f"function={function!r:.80} is not what bucket_jit makes: decorate it, and for a "
                "method pass the object's own: self.f = bucket_jit(self.f, ...)"
            )
        wait_s = waiting_time("max_wait_ms", max_wait_ms) / 1e3
        self.name = function.called if name is None else str(name)
        self._function, self._clock, self._put = function, clock, put
        self._arguments = ItemArguments(function.in_axes, name=self.name)
        self._arguments.check_passed(passed)
        self._passed = passed
        self._line = Line(
            max_waiting=positive_size(max_waiting, name="max_waiting"),
            max_wait_s=wait_s,
            clock=clock,
        )
        self._lanes: dict[object, Lane] = {}
        self._fits: dict[object, tuple[Lane, Bucket]] = {}
        self._is_closed = False
        self._busy_until = -math.inf
        self._begin()
        put_right_in_child(self)

    def _begin(self) -> None:
        self._changes = Changes()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_idle = False
        self._worker: threading.Thread | None = None
        self._under_way: dict[Item, None] = {}

    def after_fork(self) -> None:
        """Fails what waits in a child, whose parent has the worker that would answer it."""
        left = [*self._line.waiting, *self._under_way]
        self._line.waiting.clear()
        self._begin()
        for item in left:
            # A lock of the future may have been taken by a thread that is not here.
            Item.__init__(item, self._line, item.lane, item.arrays, item.sizes, now=item.came_at)
            item.set_exception(
                CUDAGraphError("this process was forked while the item waited: its parent answers")
            )

    @property
    def figures(self) -> Figures:
        """What became of its items, as it is counted on."""
        return self._line.figures

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._line.waiting)

    def __repr__(self) -> str:
        return one_line(f"Batcher({self.name}, {self.waiting} waiting)")

    def submit(self, *arrays: PyTree, deadline: float | None = None) -> Future[PyTree]:
        """Has one row answered; its future.

        Args:
            *arrays: The row: what the function takes for each of the batch, without the batch
                dimension. It is copied.
            deadline: Seconds from now, after which the answer is of no use: then the item fails
                with `DeadlineError` and is not run.

        Raises:
            InputShapeError: The row does not fit the function, or what is captured of it.
            PaddingLeakError: In `debug_mode`: a row gets another answer in company than alone.
            BucketOverflowError: It is larger than every captured bucket.
            QueueFullError: As many wait as may.
            CUDAGraphError: The batcher is closed, or this process is forked from one that used JAX.
        """
        use_jax()
        now = self._clock()
        expires_at = math.inf if deadline is None else now + waiting_time("deadline", deadline)
        try:
            lane, sizes, leaves = self._fit(arrays)
            item = Item(
                self._line, lane, lane.converted(leaves), sizes, now=now, expires_at=expires_at
            )
        except BaseException:
            self._line.figures.count(Outcome.REFUSED)
            raise
        lane.asked.append(sizes.seq_len)
        self._line.add(item)
        if self._is_closed and self._line.drop(item):  # maybe by another thread, just now
            raise CUDAGraphError(f"the batcher {self.name} is closed: make a new one")
        if self._is_idle:
            self._wakes.put(None)
        if self._worker is None and not self._start_worker() and self._line.drop(item):
            raise CUDAGraphError(
                f"no thread can be started to answer what {self.name} is asked: the interpreter "
                "exits, or has no memory for one"
            )
        return item

    async def __call__(self, *arrays: PyTree, deadline: float | None = None) -> PyTree:
        """One row's answer, for asyncio; cancelled before its call starts, it is not run."""
        return await asyncio.wrap_future(self.submit(*arrays, deadline=deadline))

    def map(self, items: Iterable[PyTree]) -> list[PyTree]:
        """The answers to many rows, in their order; they come as there is room for them to wait.

        Args:
            items: Arrays, or tuples of arrays for a function of several.

        Raises:
            Exception: What any of them fails with; the others are cancelled then.
        """
        futures: list[Future[PyTree]] = []
        try:
            for item in items:
                futures.append(self._submit_when_there_is_room(item))
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _submit_when_there_is_room(self, item: PyTree) -> Future[PyTree]:
        arrays = item if isinstance(item, tuple) else (item,)
        while True:
            if not self._line.has_room:
                self._changes.wait_for(lambda: self._line.has_room or self._is_closed)
            try:
                return self.submit(*arrays)
            except QueueFullError:  # others were faster
                continue

    def update(self, *passed: PyTree) -> None:
        """Passes these from the next call on, in the place of what was given before.

        Raises:
            ConfigError: There are more or fewer of them than the function passes through.
            InputShapeError: They have other shapes or dtypes, for which nothing is captured.
        """
        self._arguments.check_passed(passed)
        for lane in list(self._lanes.values()):
            if not lane.accepts(passed):
                raise InputShapeError(
                    f"what {self.name} passes through has other shapes or dtypes than before, for "
                    f"which nothing is captured: give the same as for {lane.variant}, or make a "
                    "new Batcher after a warmup with these"
                )
        self._passed = passed

    def replan(
        self, *, max_graphs: int | None = None, **options: Unpack[BatchPlanOptions]
    ) -> BucketPlan:
        """Plans the grid anew from the items that came, and returns once it has taken its place.

        Meanwhile items are answered from the old grid. What is captured and freed, and what becomes
        of other functions of the manager, `BucketedFunction.replan` says.

        Args:
            max_graphs: The most buckets; as many as the grid has now if None.
            **options: Keywords of `plan_for_batcher`: cost, waiting, capture_sizes, seq_multiple,
                headroom. Costs are those measured, and lengths go as far as now, if None.

        Raises:
            ConfigError: No item came yet, an option is not valid, or there is no grid to plan.
            SealedError: The mode does not allow captures.
        """
        from cudagraph_jax.batching.batch_plan import change_grid

        return change_grid(self._function, list(self._lanes.values()), max_graphs, **options)

    def stats(self) -> dict[str, Any]:
        """Counts and times, in values that JSON can hold.

        `items` by outcome, `waiting`, `queue_ms` until the call starts, `service_ms` from there to
        the answer, `real_elements` (each row's own sizes count), `computed_elements`, and `calls`
        by bucket. Percentiles are rounded up by a fifth at the most.
        """
        return {
            "name": self.name,
            "waiting": self.waiting,
            **self.figures.stats(),
        }

    def close(self, *, drain: bool = True) -> None:
        """Takes no more items, and waits for those that are there.

        Args:
            drain: Whether those that wait are answered; else they are cancelled, and what runs is
                waited for.
        """
        self._is_closed = True
        if not drain:
            self._line.clear()
        self._changes.tell()
        self._wakes.put(None)
        if threading.current_thread() is self._worker:  # a callback of an item: it cannot wait
            return
        if self._line.waiting and self._worker is None and not self._start_worker():
            self._line.clear()  # an interrupt has left them without one
        self._changes.wait_for(lambda: not (self._line.waiting or self._under_way))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drain=error is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # In a thread, so that the loop goes on with those who wait for their answers.
        await asyncio.to_thread(self.close, drain=error is None)

    def _fit(self, arrays: Args) -> tuple[Lane, Bucket, Sequence[PyTree]]:
        """The lane of an item, its sizes, and its arrays."""
        try:
            key = tuple([(type(array), array.dtype, array.shape) for array in arrays])
            return *self._fits[key], arrays
        except (KeyError, AttributeError):
            pass
        row, leaves = self._arguments.one_row(arrays), jax.tree.leaves(arrays)
        made = Lane(
            self._function,
            row,
            leaves,
            arguments=self._arguments,
            passed=self._passed,
            clock=self._clock,
        )
        if made.sizes.is_empty:
            raise InputShapeError(f"an item of {self.name} has no elements, {row}: leave it out")
        sizes = made.sizes
        lane = self._lanes.setdefault(made.key, made)
        lane.entry_for(sizes)
        if all(map(operator.is_, leaves, arrays)):  # no pytrees among them, so that there is a key
            if len(self._fits) >= _MAX_SHAPES:
                self._fits.clear()
            self._fits[key] = (lane, sizes)
        return lane, sizes, leaves

    # What follows runs in the worker.

    def _start_worker(self) -> bool:
        """Starts one; whether there is one now."""
        # Not a daemon: a thread that is killed inside XLA takes the process down with it.
        worker = Worker(target=self._work, name=f"{self.name}-batcher")
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
                logger.exception("the worker of the batcher %s failed, and begins anew", self.name)
                self._fail_all(error)
            self._worker = None
            self._changes.tell()
            # Who submitted before that has left it to this worker.
            if not self._line.waiting:
                return

    def _fail_all(self, error: BaseException) -> None:
        """Fails what runs, or where nothing does, what waits: it may be to blame."""
        running, self._under_way = self._under_way, {}
        for item in running:
            self._line.drop(item)
            if not item.done():
                self._settle(item, Outcome.FAILED, error=error)
        if not running:
            for item in list(self._line.waiting):
                self._line.fail(item, error)

    def _serve(self) -> None:
        """Runs one call after the other, until nothing came for a while."""
        running: _Running | None = None
        idle = 0
        while True:
            if not process_goes_on():
                self._line.clear()  # nobody is left who could ask for the answers
            free_at = None if running is None else running.started_at + running.call.chosen.cost_s
            prepared = self._prepare(free_at)
            if running is not None:
                failure = _wait(running.result)
                done_at = self._clock()
                if prepared is None or self._is_stale(prepared):
                    prepared = self._prepare()
                following = None if prepared is None or failure else self._start(prepared)
                self._finish(running, failure, done_at)
                running = following
            elif prepared is not None:
                running, idle = self._start(prepared), 0
            elif self._rests():
                idle += 1
                if idle >= _IDLE_POLLS or self._is_closed or not process_goes_on():
                    return
            else:
                idle = 0

    def _rests(self) -> bool:
        """Waits until an item comes, or has waited for others long enough; whether none came."""
        self._is_idle = True
        try:
            wait_s = self._line.wait_s()
            if wait_s != 0:
                self._wakes.get(timeout=_POLL_S if wait_s is None else min(wait_s, _POLL_S))
            return False
        except queue.Empty:
            return not self._line.waiting
        finally:
            self._is_idle = False

    def _prepare(self, free_at: float | None = None) -> _Prepared | None:
        """The next call, padded; None where nothing may run."""
        chosen = self._line.choose(free_at)
        if chosen is None:
            return None
        lane, rows = chosen.lane, [item.sizes for item in chosen.items]
        entry = chosen.grid.entries[chosen.bucket]
        arrays = lane.layout.pad([item.arrays for item in chosen.items], rows, chosen.bucket)
        inputs: tuple[PyTree, PyTree] = arrays, lane.layout.masks(rows, chosen.bucket)
        if free_at is not None:
            inputs = lane.put(entry, inputs, put=self._put)
        return _Prepared(chosen, entry, rows, *inputs)

    def _is_stale(self, prepared: _Prepared) -> bool:
        """Whether so much has changed since it was composed that another call may be better."""
        waiting, now = self._line.waiting, self._clock()
        return len(waiting) > 2 * prepared.chosen.waited or any(
            item not in waiting or item.expires_at < now + prepared.chosen.cost_s
            for item in prepared.chosen.items
        )

    def _start(self, prepared: _Prepared) -> _Running | None:
        """Starts a call; None where there is nothing to wait for."""
        # Before they leave the line, so that whoever waits for all of them finds each in one place.
        self._under_way.update(dict.fromkeys(prepared.chosen.items))
        items = [item for item in prepared.chosen.items if self._claim(item)]
        self._changes.tell()
        if not items:
            return None
        lane, started_at = prepared.chosen.lane, self._clock()
        for item in items:
            self._line.figures.queued.add(started_at - item.came_at)
        if self._function.manager.mode in _EAGER:
            self._one_by_one(lane, items, self._run_eagerly)
            return None
        try:
            args = lane.arguments(self._passed, prepared.arrays)
            result = lane.begin(prepared.entry, args, prepared.masks)
            return _Running(prepared, items, result, started_at)
        except Exception as error:
            self._retry(prepared, items, error)
            return None

    def _claim(self, item: Item) -> bool:
        if self._line.claim(item):
            return True
        self._under_way.pop(item, None)
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
            self._line.figures.served.add(done_at - running.started_at)
            self._answer(item, of_items[item], done_at)
        self._changes.tell()

    def _count(self, entry: CUDAGraphEntry, rows: Sequence[Bucket], seconds: float) -> None:
        real_elements = sum(row.elements for row in rows)
        entry.count_rows(rectangle(rows), real_elements=real_elements, seconds=seconds)
        self._line.figures.add_call(
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
        self._line.figures.count(outcome)
        try:
            if error is None:
                item.set_result(answer)
            else:
                item.set_exception(error)
        except BaseException:
            # What a callback of the caller's raises is not the next item's fault.
            logger.exception("a callback of an item of the batcher %s failed", self.name)
        self._under_way.pop(item, None)

    def _retry(self, call: _Prepared, items: Sequence[Item], error: Exception) -> None:
        """Tries the rows of a call that failed one by one, once, so that a bad one fails alone."""
        sizes = rectangle(call.rows)
        self._function.manager.dispatcher.outcomes.add("error", Reason.RUN, sizes)
        if len(call.chosen.items) == 1:
            self._settle(items[0], Outcome.FAILED, error=error)
            self._changes.tell()
            return
        logger.warning(
            "a call of %d rows of %s failed, and its rows are tried one by one: %s",
            *(len(items), self.name, error),
        )
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
            self._line.figures.served.add(done_at - started_at)
            self._answer(item, answer, done_at)
        self._changes.tell()

    def _run_alone(self, lane: Lane, item: Item) -> PyTree:
        """The answer of the cheapest bucket to one row."""
        entry, rows = lane.entry_for(item.sizes), [item.sizes]
        started_at = self._clock()
        args = lane.arguments(self._passed, lane.layout.pad([item.arrays], rows, entry.bucket))
        result = lane.begin(entry, args, lane.layout.masks(rows, entry.bucket))
        if (failure := _wait(result)) is not None:
            raise failure
        answer = lane.answers(entry, result, rows)[0]
        self._count(entry, rows, self._clock() - started_at)
        return answer

    def _run_eagerly(self, lane: Lane, item: Item) -> PyTree:
        return lane.run_eagerly(self._passed, item.arrays, item.sizes)


def _wait(result: PyTree) -> Exception | None:
    """Waits until the outputs are there; what they failed with."""
    try:
        jax.block_until_ready(result)
    except Exception as error:
        return error
    return None
