"""`CUDAGraphManager`: what may be done with calls, what is held for them, and what they did."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from cudagraph_jax._base.checks import names_nearest, require_arguments, require_bool
from cudagraph_jax._base.copies import belongs_to_process
from cudagraph_jax._base.fork import use_jax
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.capture.peers import PEERS
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.dispatch.dispatcher import REFUSED, Dispatcher, mode_for, replayable
from cudagraph_jax.dispatch.stats import manager_stats
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.replay_counts import Fit
from cudagraph_jax.graphs.route import Routes
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.call import Call, has_tracers, refuse_abstract
from cudagraph_jax.program.program import Compiler
from cudagraph_jax.program.single_input import (
    any_function,
    capture_sizes,
    check_inputs,
    function_name,
    request_sizes,
    route_key,
    single_call,
    single_program,
)
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.environment import environment

if TYPE_CHECKING:
    from cudagraph_jax.planning.costs import Cost
    from cudagraph_jax.planning.plan import BucketPlan
    from cudagraph_jax.planning.planner import Headroom
    from cudagraph_jax.report.replay_profile import ReplayProfile
    from cudagraph_jax.report.report import Report
    from cudagraph_jax.store import GraphStore


@belongs_to_process
class CUDAGraphManager:
    """Has each call replayed, captured or run eagerly, as its mode and its policies say.

    It holds the buckets of any number of functions, says what may be done from when to when (modes,
    sealing, closing), plans its grid anew, and shows what it knows. One call is decided and served
    by its dispatcher, the same for `bucket_jit` and for `execute_or_capture`. All methods are safe
    to call from many threads.

    Args:
        config: Limits and policies.
        clock: Seconds, for capture times.
        store: Where executables are kept; None: in the directory of the config, if it has one.
        compiler: What compiles in the place of XLA, as in a test; None: XLA.

    Attributes:
        registry: The captured buckets.
        dispatcher: What serves the calls.

    Example:
        >>> import numpy as np
        >>> config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,))
        >>> manager = CUDAGraphManager(config)
        >>> x = np.ones((3, 5), np.float32)
        >>> manager.execute_or_capture(3, 5, lambda inputs: inputs["x"] * 2, {"x": x}).shape
        (3, 5)
        >>> manager.get_mode_for_batch(2, 8)
        <CUDAGraphMode.REPLAY: 'replay'>
    """

    @names_nearest
    def __init__(
        self,
        config: CUDAGraphConfig | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        store: GraphStore | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.registry = CUDAGraphRegistry(config, clock=clock, store=store, compiler=compiler)
        self.dispatcher = Dispatcher(self.registry, capturer=Capturer(self.registry))
        self._routes = Routes()
        self.registry.watch(self._routes)

    def __repr__(self) -> str:
        return f"CUDAGraphManager({self.mode.name}, {self.registry.num_graphs} graphs)"

    def _repr_html_(self) -> str:
        # Here, because most processes that serve show nothing.
        from cudagraph_jax.report.summary import stats_html

        return stats_html("CUDAGraphManager", self.stats())

    @property
    def _capturer(self) -> Capturer:
        return self.dispatcher.capturer

    @property
    def store(self) -> GraphStore | None:
        """Where executables are kept; None: nowhere."""
        return None if self.registry.shelf is None else self.registry.shelf.store

    def should_capture(self, batch_size: int, seq_len: int) -> bool:
        """Whether a call of this size would capture a bucket."""
        return self.get_mode_for_batch(batch_size, seq_len) is CUDAGraphMode.CAPTURE

    def get_mode_for_batch(self, batch_size: int, seq_len: int) -> CUDAGraphMode:
        """What would be done with a call of this size, any captured function taken for its own."""
        return mode_for(self.dispatcher, request_sizes(batch_size, seq_len))

    @names_nearest
    def capture_graph(
        self,
        batch_size: int,
        seq_len: int,
        capture_fn: Callable[[PyTree], PyTree],
        input_shapes: PyTree,
        output_shapes: PyTree = None,
    ) -> CUDAGraphEntry | None:
        """The entry of the bucket that this size is padded to, captured where absent.

        Args:
            batch_size: Rows of a request.
            seq_len: Sequence length of a request.
            capture_fn: A JAX function of one pytree.
            input_shapes: That pytree at this size; see `CUDAGraphRegistry.capture`.
            output_shapes: What the function is expected to give at this size; checked if not None.

        Returns:
            The entry; None where the mode or the limits do not allow a capture.

        Raises:
            CaptureError: The function could not be traced, lowered, compiled or run.
            InputShapeError: `input_shapes` or `output_shapes` do not fit.
        """
        use_jax()
        sizes = capture_sizes(batch_size, seq_len)
        if not self.config.should_use_cudagraph(*sizes):
            return None
        _, call = single_program(capture_fn, input_shapes, output_shapes, sizes)
        bucket = self.config.bucket_for(*sizes)
        entry = self.registry.find(bucket, call.variant)

        def capture(is_admitted: bool) -> CUDAGraphEntry | None:
            if entry is not None or not is_admitted:
                return entry
            iterations = self.config.warmup_iterations
            return self._capturer.capture(call, bucket, iterations=iterations).value

        made = self._capturer.gate.within(capture)
        return made if self.is_enabled() else None

    def replay_graph(self, batch_size: int, seq_len: int, inputs: PyTree) -> PyTree | None:
        """The outputs of the captured bucket that fits `inputs`.

        Args:
            batch_size: Rows of the request.
            seq_len: Sequence length of the request.
            inputs: The pytree that the captured function takes.

        Returns:
            The outputs, trimmed, as NumPy arrays; None where no such bucket is captured, or the
            mode does not allow a replay.

        Raises:
            InputShapeError: `inputs` fit none of the buckets captured for this size.
            CUDAGraphError: Several functions are captured for this size and these inputs.
        """
        if self.mode not in (CUDAGraphMode.CAPTURE, CUDAGraphMode.REPLAY):
            return None
        sizes = request_sizes(batch_size, seq_len)
        entries = replayable(self.dispatcher, sizes)
        if len(entries) > 1:
            leaves = single_call(any_function, inputs, sizes).variant.leaves
            entries = [entry for entry in entries if entry.variant.leaves == leaves] or entries[:1]
        if len({entry.variant.function for entry in entries}) > 1:
            raise CUDAGraphError(
                f"{len(entries)} functions are captured for {entries[0].bucket} and these inputs: "
                "call entry.replay(inputs) or execute_or_capture, which name the function"
            )
        if not entries:
            return None
        own = (sizes, self.config.bucket_for(*sizes))
        return entries[0].serve(inputs, fit=None if entries[0].bucket in own else Fit.LARGER)

    def execute_or_capture(
        self,
        batch_size: int,
        seq_len: int,
        execute_fn: Callable[[PyTree], PyTree],
        inputs: PyTree,
        input_shapes: PyTree = None,
        output_shapes: PyTree = None,
    ) -> PyTree:
        """The outputs of `execute_fn(inputs)`: replayed, captured and run, or run eagerly.

        Axis 0 of an array is the batch where its size is `batch_size`, axis 1 the sequence where
        its size is `seq_len`; `bucket_jit` names axes explicitly. Pass the same function object
        each time: another one is another program. The manager does not keep it alive.

        Args:
            batch_size: Rows of the request.
            seq_len: Sequence length of the request.
            execute_fn: A JAX function of one pytree.
            inputs: That pytree.
            input_shapes: What `inputs` are expected to be; checked if not None.
            output_shapes: What the function is expected to give for them; checked if not None.

        Returns:
            The outputs as NumPy arrays, trimmed to the real sizes; with tracers, as under `jit`,
            simply what `execute_fn` gives.

        Raises:
            BucketOverflowError: The size is outside the limits and `on_overflow="error"`.
            InputShapeError: The inputs do not fit what was declared.
            SealedError: The bucket is not captured and `on_miss="error"`.
        """
        outcomes = self.dispatcher.outcomes

        def describe() -> Call:
            return single_call(execute_fn, inputs, sizes, output_shapes=output_shapes)

        with self.dispatcher.refusing_input(function_name(execute_fn), inputs):
            sizes = request_sizes(batch_size, seq_len)
            if input_shapes is not None:
                check_inputs(inputs, input_shapes)
            key = route_key(execute_fn, inputs, sizes)
        route = None if key is None else self._routes.table.get(key)
        if route is not None and route.checks.accept((inputs,), {}):
            outputs = self.dispatcher.replay(route, (inputs,), {}, describe)
            if outputs is not REFUSED:
                return outputs
        with self.dispatcher.refusing_input(function_name(execute_fn), inputs):
            if has_tracers(inputs):
                use_jax()  # as the operations will
                call = None
            else:
                call = describe()
                refuse_abstract(call)
        if call is None:
            outcomes.add("eager", Reason.TRANSFORMED)
            return execute_fn(inputs)
        return self.dispatcher.serve(call, self._routes, key)

    def annotate(self, *, replays: bool) -> None:
        """Shows each replay in the profiles of `jax.profiler`, such as `replay embed 8x128`.

        Captures are always there, as `capture embed 8x128`. A replay costs a few microseconds more
        while this is on, and nothing while it is off.

        Args:
            replays: Whether to show them, from the next call on.

        Raises:
            ConfigError: `replays` is no bool.
        """
        require_bool("replays", replays)
        self.registry.observers.annotate_replays = replays

    def stats(self) -> dict[str, Any]:
        """Counts and times, in values that JSON can hold.

        `calls` are hits, captures, splits, eager calls and errors, each one of these. `hits` are
        replays; `misses` are captures in a request, split calls with a piece that was captured in
        the request or ran eagerly, and eager runs inside the limits.
        `captures` counts the calls that captured their bucket. Of the split calls
        `splits_by_reason` tells those of replays alone, `"overflow"`, from those with such a piece,
        `"miss"`. So nothing is captured in a request where `captures` and that are 0, as after a
        warm-up; `registry.capture_count` counts every capture, by whomever.
        Times are milliseconds unless named otherwise; `waste` is the part of all elements computed
        by replays that was padding, from 0 to 1.
        """
        return manager_stats(self.dispatcher.outcomes, self._capturer)

    @property
    def config(self) -> CUDAGraphConfig:
        """Limits and policies; `replan` changes the grid."""
        return self.registry.config

    @property
    def mode(self) -> CUDAGraphMode:
        """The most that is done with a call; setting it takes effect for the next call."""
        return self.dispatcher.mode

    @mode.setter
    def mode(self, mode: CUDAGraphMode) -> None:
        if not isinstance(mode, CUDAGraphMode):
            raise ConfigError(f"mode={mode!r:.80} is no CUDAGraphMode: use one of its members")
        if not self.config.enabled and mode is not CUDAGraphMode.DISABLED:
            raise ConfigError(
                f"mode={mode.name} cannot be set while the config has enabled=False: "
                "make a manager with an enabled config"
            )
        self._capturer.gate.change(mode)
        self.registry.changed()

    def is_enabled(self) -> bool:
        """False when the config is disabled or the mode is DISABLED."""
        return self.mode is not CUDAGraphMode.DISABLED

    def seal(self) -> None:
        """Captures nothing from now on: the mode becomes REPLAY.

        What is under way or queued in the background is captured first. Then every bucket is run
        once where a new capture throws recorded graphs away, so that none is stale. Called from
        within a warm-up or a capture, as by a callback of one, it does not wait for that one.
        """
        self.mode = CUDAGraphMode.REPLAY
        capturer = self._capturer
        capturer.gate.settle(is_waited_for=capturer.background.runs_here())
        self.wait()
        self._capturer.record_again()

    def wait(self) -> None:
        """Waits until every capture that is queued in the background has ended.

        From within a capture, as a signal handler may call it, it does not wait: the background may
        wait for that very capture.
        """
        if not self.registry.captures_here:
            self._capturer.background.drain()

    def close(self) -> None:
        """Ends the background worker; what waits is dropped, and calls are served on."""
        self._capturer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self) -> None:
        """Drops all buckets, counts and remembered failures; the mode stays, if sealed, too.

        Raises:
            DistributedError: Several processes share captured buckets, and process 0 leads.
        """
        PEERS.refuse_dropping(self.registry.entries())
        # What waits goes first, so that none of it begins between the two.
        self._capturer.reset()
        self.registry.reset()
        self.dispatcher.outcomes.clear()

    @property
    def multiples(self) -> dict[str, int]:
        """What the sizes of the grid are multiples of, by axis, so that meshes divide them.

        As `in_shardings` say it, and arrays that were warmed up with. `replan` keeps to it; for a
        plan of one's own it is an argument, as in
        `plan_buckets(manager.sizes(), max_graphs=8, multiples=manager.multiples)`.
        """
        return dict(self.registry.multiples)

    def sizes(self) -> dict[Bucket, int]:
        """How often each size was asked for, since the start or `reset`.

        Where there are thousands of different sizes, similar ones are counted together, rounded
        up. `replan` halves the counts (no size is forgotten), so that newer requests weigh more in
        the next one.
        """
        return self.registry.asked_sizes()

    def replan(
        self, *, max_graphs: int | None = None, **options: Unpack[PlanOptions]
    ) -> BucketPlan:
        """Plans the grid anew from the sizes that were asked for, and changes to it.

        The new grid is captured in the background, for every program that has captured buckets,
        while the old one serves; then it takes its place as a whole, and no request waits. Both
        are held until then. If anything fails, the old grid stays and a `CUDAGraphWarning` says
        why. A newer plan takes the place of one that waits. `wait()` waits for the end.

        The largest size that was asked for gets a bucket, also where it was outside the limits:
        `max_batch_size` and `max_seq_len` leave larger ones to `on_overflow`. What fits today
        still fits, limits above the ladders included, unless `headroom`, `max_batch_size` or
        `max_seq_len` says otherwise: `headroom=0.0` gives it up for less padding. Under
        `max_bucket_elements` that holds for what was asked for; what is over it counts in the
        pieces that `"split"` serves, and not at all with another `on_overflow`. Sizes are such
        multiples as `multiples` has, too.

        Args:
            max_graphs: The most buckets; as many as the grid has now if None.
            **options: Keywords of `PlanOptions`: cost, batch_multiple, seq_multiple, multiples,
                headroom, max_padding, max_batch_size, max_seq_len.

        Returns:
            The plan that is being put in place.

        Raises:
            ConfigError: Nothing was asked for yet, an option is not valid, or the new grid does
                not fit the limits.
            SealedError: The mode does not allow captures.
            CUDAGraphError: The manager is closed, or its queue of captures is full.
        """
        from cudagraph_jax.dispatch.replan import plan_from, replan_later

        require_arguments("replan", options, ["max_graphs", *PlanOptions.__annotations__])
        plan = plan_from(
            self.sizes(),
            self.dispatcher.config,
            max_graphs=max_graphs,
            divided=self.multiples,
            **options,
        )
        given = (options.get(name) for name in ("headroom", "max_batch_size", "max_seq_len"))
        replan_later(self.dispatcher, plan, keeps_limits=all(value is None for value in given))
        return plan

    def report(self, path: str | os.PathLike[str] | None = None) -> Report:
        """Everything that is known at this moment, to print, to look at and to keep.

        `print(manager.report())` shows it as text, a notebook shows it with heat maps, and
        `manager.report("cache.html")` also writes it as a page of its own. What is rendered is a
        snapshot: no lock is held, and no call waits.

        Args:
            path: An HTML file to write, whole or not at all; one that is there is replaced. Its
                folder must exist. The page loads nothing from elsewhere and runs no script.

        Raises:
            ConfigError: `path` is no path.
            OSError: The file cannot be written, as a `CUDAGraphError` that says why.
        """
        from cudagraph_jax.report.report import Report

        names = {entry.variant.name for entry in self.registry.entries()}
        has_buckets = self.registry.capture_count + self.registry.load_count > 0
        report = Report(
            name=", ".join(sorted(names)) or "no function yet",
            made_at=datetime.now().astimezone(),
            stats=self.stats(),
            config=_config(self.registry),
            environment=environment(backend_started=has_buckets),
            sizes=self.sizes(),
            failures=[
                (str(bucket), str(variant), str(error))
                for bucket, variant, error in self._capturer.failures.snapshot()
            ],
        )
        if path is not None:
            report.save(path)
        return report

    def profile_replays(self, run: Callable[[], object]) -> ReplayProfile:
        """What XLA's command buffers do while `run` runs: executed, updated, recorded.

        A hot loop must show executions alone. An argument that lies elsewhere each time has its
        command buffer updated; the profile says which ones moved. Afterwards `stats()` calls those
        buckets `"replaying"` that were seen to, until something else is captured.

        XLA runs no command buffers while it is profiled, unless the buckets were captured with
        `compiler_options={"xla_enable_command_buffers_during_profiling": "True"}`. Replays from
        all threads count; they are slower meanwhile, the more the more arguments there are.

        Args:
            run: Called once; let it wait for its last result. A server may pass
                `lambda: time.sleep(5)`.

        Raises:
            ConfigError: `run` cannot be called.
            CUDAGraphError: A profile is running already.
        """
        from cudagraph_jax.dispatch.profiling import profile_replays

        if not callable(run):
            raise ConfigError(f"run={run!r:.60} cannot be called: pass a function that replays")
        return profile_replays(self.registry, run)


class PlanOptions(TypedDict, total=False):
    """What `replan` takes beside the number of buckets.

    Attributes:
        cost: As for `plan_buckets`, and so are the next five.
        batch_multiple: Batch sizes are multiples of it.
        seq_multiple: Sequence lengths are multiples of it.
        multiples: The same for any axis by its name: `{"src": 8}`.
        max_padding: The most of its bucket's elements that may be padding for any request.
        headroom: A bucket for sizes that were not seen yet; None: up to the largest bucket of
            today, so that what fits now still does; 0.0: up to the largest that was asked for.
        max_batch_size: Larger batches are left out of the plan.
        max_seq_len: Longer sequences are left out of the plan.
    """

    cost: Cost | None
    batch_multiple: int
    seq_multiple: int
    multiples: Mapping[str, int] | None
    max_padding: float | None
    headroom: Headroom | None
    max_batch_size: int
    max_seq_len: int


def _config(registry: CUDAGraphRegistry) -> CUDAGraphConfig:
    """The configuration, with the store that is used, however it was given."""
    if registry.shelf is None:
        return registry.config
    return replace(registry.config, store=str(registry.shelf.store.path))
