"""`Batcher`: single ragged requests become calls of captured buckets, by what each one costs."""

from __future__ import annotations

import asyncio
import math
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import jax

from cudagraph_jax._base.checks import names_nearest, positive_size, waiting_time
from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax._base.fork import put_right_in_child, use_jax
from cudagraph_jax._base.text import one_line
from cudagraph_jax.batching.item_queue import Figures, Item, ItemQueue, Outcome
from cudagraph_jax.batching.lane import Begin, Lane, SharedArguments, put_ahead
from cudagraph_jax.batching.rows import ItemArguments
from cudagraph_jax.batching.runner import Runner
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.distributed.leading import Led
from cudagraph_jax.errors import (
    ConfigError,
    CUDAGraphError,
    DistributedError,
    InputShapeError,
    QueueFullError,
)
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import Args
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.settings import current_settings

if TYPE_CHECKING:
    from cudagraph_jax.batching.batch_plan import BatchPlanOptions
    from cudagraph_jax.planning.plan import BucketPlan

_MAX_SHAPES = 1 << 14
"""Shapes of items that are remembered; beyond that the table starts anew."""


class _Fits:
    """Items that fit, by JAX's settings and their shapes, until a bucket goes or the mode changes.

    Attributes:
        table: Their lane and sizes.
    """

    __slots__ = ("__weakref__", "table")

    def __init__(self) -> None:
        self.forget_routes()

    def forget_routes(self) -> None:
        """Looks at every item anew from now on."""
        self.table: dict[object, tuple[Lane, Bucket]] = {}


@belongs_to_process
class Batcher:
    """Gathers single rows into calls of a function's captured buckets.

    Whenever the device is free, what waits is sorted by size and cut into calls so that their
    measured costs are least; the call that holds the oldest item runs next, and meanwhile the one
    after it is composed, padded and put on the device. While the manager runs calls eagerly, as
    when it is paused, so are items, one by one. All methods are safe to call from many threads and
    event loops.

    Args:
        function: What `bucket_jit` made, warmed up: only captured buckets are used. Of several
            processes what `cudagraph_jax.distributed.lead` yields, without what is passed through.
        *passed: What `in_axes` passes through, such as parameters, in its order.
        max_waiting: Items that may wait; one more is refused.
        max_wait_ms: How long an item may wait for others while the device is free; with a deadline
            no longer than half of what it can spare.
        name: What reports and logs call it; the function's name if None.
        clock: Seconds.
        put: Brings the inputs of the next call to the device while another computes.

    Raises:
        ConfigError: The function cannot be batched as it was declared, or an argument is not valid.

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

    @names_nearest
    def __init__(
        self,
        function: BucketedFunction[..., PyTree] | Led,
        *passed: PyTree,
        max_waiting: int = 2048,
        max_wait_ms: float = 0.0,
        name: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        put: Callable[[PyTree], PyTree] = put_ahead,
    ) -> None:
        self._begin: Begin = CUDAGraphEntry.begin_rows
        self._is_led = isinstance(function, Led)
        if isinstance(function, Led):
            # What it passes through is on all processes already, and stays what it is.
            self._begin, passed = function.begin_rows, (*function.passed, *passed)
            function, put = function.function, lambda inputs: inputs
        if not isinstance(function, BucketedFunction):
            raise ConfigError(
                f"function={function!r:.80} is not what bucket_jit makes: decorate it, and for a "
                "method pass the object's own: self.f = bucket_jit(self.f, ...)"
            )
        wait_s = waiting_time("max_wait_ms", max_wait_ms) / 1e3
        self.name = function.called if name is None else str(name)
        self._function, self._clock = function, clock
        self._arguments = ItemArguments(function, name=self.name)
        self._arguments.check_passed(passed)
        self._shared = SharedArguments(passed)
        self._queue = ItemQueue(
            max_waiting=positive_size(max_waiting, name="max_waiting"),
            max_wait_s=wait_s,
            name=self.name,
            clock=clock,
        )
        self._runner = Runner(function, self._queue, name=self.name, clock=clock, put=put)
        self._lanes: dict[object, Lane] = {}
        self._fits = _Fits()
        function.registry.watch(self._fits)
        put_right_in_child(self)

    def after_fork(self) -> None:
        """Fails what waits in a child, whose parent has the worker that would answer it."""
        left = [*self._queue.waiting, *self._runner.under_way]
        self._queue.waiting.clear()
        self._runner.begin_anew()
        error = CUDAGraphError("this process was forked while the item waited: its parent answers")
        for item in left:
            item.after_fork(error)

    @property
    def figures(self) -> Figures:
        """What became of its items, as it is counted on."""
        return self._queue.figures

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._queue.waiting)

    def expected_s(self, more: int = 1) -> float:
        """Seconds until so many more would be answered, behind what waits and runs now.

        By what rows took of late, before the first call by what the warm-up measured; 0 where
        nothing waits and runs, or nothing was measured.
        """
        before = self.waiting + len(self._runner.under_way)
        return (before + more - 1) * (self._queue.seconds_each() or 0.0) if before else 0.0

    def __repr__(self) -> str:
        return one_line(f"Batcher({self.name}, {self.waiting} waiting)")

    def submit(self, *arrays: PyTree, deadline: float | None = None) -> Future[PyTree]:
        """Has one row answered; its future.

        Args:
            *arrays: The row: what the function takes for each of the batch, without the batch
                dimension. It is copied.
            deadline: Seconds from now, after which the answer is of no use: the item fails with
                `DeadlineError`, and is not run unless its call had started by then. It is told
                between two calls, so at the latest when the one that runs then ends.

        Raises:
            InputShapeError: The row does not fit the function, or what is captured of it.
            ConfigError: An output has no row for each item, as tracing the function shows.
            PaddingLeakError: In `debug_mode`: a row gets another answer in company than alone.
            BucketOverflowError: It is larger than every captured bucket.
            QueueFullError: As many wait as may.
            CUDAGraphError: The batcher is closed, or this process is forked from one that used JAX.
        """
        try:
            return self._submit(arrays, deadline)
        except QueueFullError:
            self.figures.count(Outcome.FULL)
            raise

    def _submit(self, arrays: Args, deadline: float | None = None) -> Item:
        """As `submit`, but that nothing is counted where as many wait as may."""
        try:
            use_jax()
            now = self._clock()
            expires_at = math.inf if deadline is None else now + waiting_time("deadline", deadline)
            lane, sizes, leaves = self._fit(arrays)
            item = Item(
                self._queue, lane, lane.converted(leaves), sizes, now=now, expires_at=expires_at
            )
            self._queue.add(item)
        except QueueFullError:
            raise
        except BaseException:
            self.figures.count(Outcome.REFUSED)
            raise
        lane.recent.append(sizes)
        if not self._runner.wake() and self._queue.drop(item):
            self.figures.count(Outcome.REFUSED)
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
            CUDAGraphError: It is called by a callback of an item, for which no answers come.
        """
        if self._runner.runs_here():
            raise CUDAGraphError(
                f"a callback of an item of {self.name} waits for further ones, which come when it "
                "is done: submit them, and wait in a thread of your own"
            )
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
            if not self._queue.has_room:
                self._runner.changes.wait_for(lambda: self._queue.has_room or self._queue.is_closed)
            try:
                return self._submit(arrays)
            except QueueFullError:  # others were faster
                continue

    def update(self, *passed: PyTree) -> None:
        """Passes these from the next call on, in the place of what was given before.

        Raises:
            CUDAGraphError: The batcher is closed.
            DistributedError: It is of several processes, of which the others keep theirs.
            ConfigError: There are more or fewer of them than the function passes through.
            InputShapeError: They have other shapes or dtypes than with the items before. Without
                such an item that is said of the first one.
        """
        self._queue.check_open()
        if self._is_led:
            raise DistributedError(
                f"{self.name} is led with what it passes through, which the other processes keep: "
                "close both, and lead it with the new ones"
            )
        self._arguments.check_passed(passed)
        for lane in list(self._lanes.values()):
            lane.check_shared(passed)
        self._shared.change(passed)

    def replan(
        self, *, max_graphs: int | None = None, **options: Unpack[BatchPlanOptions]
    ) -> BucketPlan:
        """Plans the grid anew from the items that came, and returns once it has taken its place.

        Meanwhile items are answered from the old grid. What is captured and freed, and what becomes
        of other functions of the manager, `BucketedFunction.replan` says.

        Args:
            max_graphs: The most buckets; as many as the grid has now if None.
            **options: Keywords of `plan_for_batcher`: cost, waiting, capture_sizes, seq_multiple,
                multiples, headroom. Costs are those measured, and sizes go as far as now, if None.

        Raises:
            ConfigError: No item came yet, an option is not valid, or there is no grid to plan.
            SealedError: The mode does not allow captures.
            CUDAGraphError: The grid could not be captured, and the old one stays, or another one
                came in its place; or the batcher is closed.
        """
        from cudagraph_jax.batching.batch_plan import change_grid

        self._queue.check_open()
        return change_grid(self._function, list(self._lanes.values()), max_graphs, **options)

    def stats(self) -> dict[str, Any]:
        """Counts and times, in values that JSON can hold.

        `name`, `items` by outcome, `waiting`, `queue_ms` until the call starts, `service_ms` from
        there to the answer, `real_elements` (each row's own sizes count), `computed_elements`,
        `waste` (the part of those that was padding), and `calls` by bucket. Percentiles are rounded
        up by a fifth at the most, or to 10 µs.
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
        self._queue.is_closed = True
        if not drain:
            self._queue.clear()
        self._runner.changes.tell()
        if self._runner.runs_here():  # a callback of an item: it cannot wait
            return
        if not self._runner.wake():
            self._queue.clear()
        self._runner.changes.wait_for(self._runner.has_settled_all)

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
        table = self._fits.table  # whoever forgets it meanwhile makes another one
        try:
            shapes = [(type(array), array.dtype, array.shape) for array in arrays]
            return *table[key := (current_settings(), *shapes)], arrays
        except (KeyError, AttributeError):
            pass
        row, leaves = self._arguments.one_row(arrays), jax.tree.leaves(arrays)
        made = Lane(
            self._function,
            row,
            leaves,
            arguments=self._arguments,
            shared=self._shared,
            clock=self._clock,
            begin=self._begin,
        )
        if made.sizes.is_empty:
            raise InputShapeError(
                f"an item of {self.name} has no elements, {made.sizes.described}: leave it out, or "
                "call the function itself, which runs it eagerly"
            )
        sizes = made.sizes
        lane = self._lanes.get(made.key, made)
        if self._runner.runs_eagerly():
            return lane, sizes, leaves
        lane.check(sizes)  # before others find it: what is refused leaves nothing behind
        lane = self._lanes.setdefault(made.key, lane)
        # Without pytrees among them, or None, which is an empty one, there is a key.
        if len(leaves) == len(arrays) and all(map(operator.is_, leaves, arrays)):
            if len(table) >= _MAX_SHAPES:
                table.clear()
            table[key] = (lane, sizes)
        return lane, sizes, leaves
