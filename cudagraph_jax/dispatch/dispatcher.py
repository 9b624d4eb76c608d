"""What is behind the manager: one call decided, served and counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import NamedTuple
from weakref import WeakSet

import jax

from cudagraph_jax._base.fork import put_right_in_child, use_jax
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.lru import CacheItem
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.capture.peers import PEERS
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.decision import (
    Decision,
    Holdings,
    Reason,
    bucket_to_pad,
    decide,
    has_every_length,
)
from cudagraph_jax.dispatch.fallback import (
    eager_answer,
    is_of_deleted,
    is_out_of_memory,
    refuse_alone,
    refuse_deleted,
    without_bucket,
    without_entry,
    without_memory,
)
from cudagraph_jax.dispatch.nearest import lengths_notice, overflow_notice, sealed_notice
from cudagraph_jax.dispatch.split import (
    check_joined,
    delete_donated,
    has_distinct_rows,
    joined,
    piece_route,
    piece_rows,
    pieces,
    uncuttable,
    unjoinable,
)
from cudagraph_jax.dispatch.stats import Outcomes
from cudagraph_jax.errors import (
    BucketOverflowError,
    CaptureError,
    CUDAGraphError,
    InputShapeError,
    PaddingLeakError,
)
from cudagraph_jax.graphs.entry import CUDAGraphEntry, homes_in
from cudagraph_jax.graphs.pads import Way, fits_untouched, ways_in
from cudagraph_jax.graphs.route import Route, Routes
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.call import Args, Call, Variant
from cudagraph_jax.program.function_ref import FunctionRef
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.settings import refuse_not_finite
from cudagraph_jax.xla.stages import Executable, is_of_traced


class Reply(NamedTuple):
    """The answer to a call.

    Attributes:
        outputs: What the caller gets.
        route: How a call of the same shapes is served without deciding again; None where each is
            decided anew.
    """

    outputs: PyTree
    route: Route | None = None


Act = Callable[[], Reply | None]
REFUSED = object()
"""What `Dispatcher.replay` gives for arguments that the compiled function does not take."""


class Dispatcher:
    """Serves calls: the state and the steps that `CUDAGraphManager` and `bucket_jit` share.

    Args:
        registry: Where captured buckets are; its configuration holds limits and policies.
        capturer: What captures.

    Attributes:
        outcomes: Counts of the calls that were no replays.
    """

    def __init__(self, registry: CUDAGraphRegistry, *, capturer: Capturer) -> None:
        self.registry = registry
        self.capturer = capturer
        self.outcomes = Outcomes(registry.sizes)
        # What a function is known by, which does not keep it.
        self._told: dict[tuple[FunctionRef, str], object] = {}
        # Those in which rows have proved not to depend on each other; of what is gone none is kept.
        self._independent: WeakSet[Executable] = WeakSet()
        self._is_child = False
        put_right_in_child(self)

    @property
    def mode(self) -> CUDAGraphMode:
        """The most that is done with a call."""
        return self.capturer.gate.mode

    @property
    def config(self) -> CUDAGraphConfig:
        """Limits and policies; re-planning changes the grid."""
        return self.registry.config

    def bucket_for(self, call: Call) -> Bucket:
        """The bucket that `call` is padded to; a size that no array carries stays as it is."""
        return self.config.padded(call.sizes, call.carried)

    def decide(self, call: Call) -> Decision:
        """What is done with `call`; nothing is run."""
        decision = self._decide(call, call.sizes)
        if not decision.piece_rows:
            return decision
        if (error := uncuttable(call.axes)) is not None:
            return decision._replace(reason=Reason.INPUT, error=error)
        parts = [
            self._decide(call, call.sizes.with_sizes({"batch": rows}))
            for rows in dict.fromkeys(piece_rows(call.sizes.batch_size, decision.piece_rows))
        ]
        refused = next((part for part in parts if part.error is not None), None)
        if refused is not None:
            return refused._replace(bucket=None)  # which was the piece's
        first = parts[0]
        if first.entry is not None and (error := unjoinable(first.entry.outputs)) is not None:
            return decision._replace(reason=Reason.INPUT, error=error)
        if not first.has_bucket:
            return decision._replace(reason=Reason.OVERFLOW)
        captures = any(part.mode is CUDAGraphMode.CAPTURE for part in parts)
        mode = CUDAGraphMode.CAPTURE if captures else first.mode
        return decision._replace(mode=mode, pieces=tuple(parts))

    def _decide(self, call: Call, sizes: Bucket) -> Decision:
        holdings = Holdings(
            find=lambda bucket: self.registry.find(bucket, call.variant),
            find_larger=lambda: self.registry.find_larger(sizes, call.variant),
            failed=lambda bucket: self._failure(bucket, call.variant),
            is_capturing_here=lambda bucket: self.registry.is_capturing_here(bucket, call.variant),
            queues=lambda bucket: self.capturer.background.accepts((bucket, call.variant)),
            fits_untouched=lambda bucket: fits_untouched(
                call, bucket, homes_in(self.registry.find(bucket, call.variant))
            ),
        )
        while True:
            config = self.config
            decision = decide(config, self.mode, sizes, call.carried, holdings)
            # A new grid comes before the old one goes: what was not found may be there by now.
            if config is self.config:
                return decision

    def bucket_to_pad(self, call: Call) -> Bucket:
        """The bucket that serves a call, or would if the mode allowed it, to pad its arrays to.

        Raises:
            BucketOverflowError: The call is outside the limits.
            DistributedError: The processes that it spans do not pad the same, or process 0 leads.
        """
        bucket, refused = None, None
        try:
            bucket = bucket_to_pad(self.config, self.decide(call), call.sizes, call.carried)
        except BucketOverflowError as error:
            refused = error
        if PEERS.spans(call, self.registry.entries):
            decision = f"padded to {bucket}"
            PEERS.agree_on_call(
                call, decision=decision, refused=refused, config=self.config, what="pad"
            )
        if bucket is None:
            raise refused or AssertionError
        return bucket

    def replay(
        self, route: Route, args: Args, kwargs: Mapping[str, PyTree], describe: Callable[[], Call]
    ) -> PyTree:
        """The outputs of a call whose route is known, or `REFUSED`; counted once unless refused.

        Args:
            route: The route of calls with these shapes.
            args: The positional arguments.
            kwargs: The keyword arguments.
            describe: Describes the call, where it has to be answered in another way.
        """
        try:
            return route.run(args, kwargs)
        except (TypeError, ValueError, OverflowError):
            return REFUSED
        except BaseException as error:
            if not self.may_answer(route, error):
                raise
            failure = error
        try:
            return self.rescue(describe, route, failure)
        finally:
            del failure  # whose traceback leads back to this frame, and the arguments in it

    def refuse_input(self, name: str, arguments: PyTree, error: BaseException) -> None:
        """Counts a call whose arguments are refused, and tells the processes that it spans.

        Raises:
            DistributedError: They do not refuse it, too.
        """
        self.outcomes.add("error", Reason.INPUT)
        own = [entry.is_shared for entry in self.registry.entries() if entry.variant.name == name]
        PEERS.tell_of_input(
            f"a call of {name}",
            arguments,
            error,
            timeout_s=self.config.process_timeout_s,
            is_shared=bool(own) and all(own),
        )

    @contextmanager
    def refusing_input(self, name: str, arguments: PyTree) -> Iterator[None]:
        """Has `refuse_input` told of what is raised in the block."""
        try:
            yield
        except BaseException as error:
            self.refuse_input(name, arguments, error)
            raise

    def may_answer(self, route: Route, error: BaseException) -> bool:
        """Whether a replay failed for want of memory, or of an array; counts what failed otherwise.

        Of an array that is gone `rescue` says which.

        Raises:
            FloatingPointError: It is what `jax.debug_nans` stops at.
        """
        if is_out_of_memory(error) or is_of_deleted(error):
            return True
        self.outcomes.add("error", Reason.RUN, route.request.sizes)
        refuse_not_finite(error, f"{route.request.sizes} in the bucket {route.bucket}")
        return False

    def rescue(self, describe: Callable[[], Call], route: Route, error: BaseException) -> PyTree:
        """The eager answer to a call for whose replay there was no memory; counted once.

        Args:
            describe: Describes the call.
            route: By which it was replayed.
            error: What the replay raised; it is raised where the donated arrays are gone.
        """
        sizes = route.request.sizes
        try:
            call = describe()
            refuse_deleted(call, error)
            outputs = without_memory(call, route.bucket, error)
        except BaseException:
            self.outcomes.add("error", Reason.RUN, sizes)
            raise
        self.outcomes.add("eager", Reason.MEMORY, sizes)
        return outputs

    def after_fork(self) -> None:
        """In a child, which may not use JAX where its parent did."""
        self._is_child = True

    def _failure(self, bucket: Bucket, variant: Variant) -> CaptureError | None:
        failures = self.capturer.failures
        return failures.get(bucket, variant) if failures.remembered else None

    def serve(
        self, call: Call, routes: Routes, key: Hashable | None, *, lead: PyTree = None
    ) -> PyTree:
        """The outputs of a call that has to be decided; counted once.

        Args:
            call: The call.
            routes: Where its route is remembered.
            key: Under what; None: nowhere.
            lead: The array that carries its sizes, by which alone it may be remembered, too.

        Raises:
            CUDAGraphError: What the policies turn into an error, and leaks in `debug_mode`.
        """
        if self._is_child:
            use_jax()
        draft = routes.draft()
        served = None
        while served is None:  # the mode has changed meanwhile, and forbids what was decided
            decision = self.decide(call)
            logger.debug("%s at %s: %s", call.variant.name, call.sizes, decision)
            self._tell_of_host(call, decision)
            try:
                decision = decision.agreed(call, self.config, self.registry.entries)
                served = self._act(call, decision)()
            except BaseException as error:
                self.outcomes.add("error", _error_reason(error, decision), call.sizes)
                if decision.is_agreed and not isinstance(error, Exception):
                    PEERS.failed(f"{call.target.name} at {call.sizes}", error)
                refuse_deleted(call, error)
                refuse_not_finite(error, f"{call.target.name} at {call.sizes}")
                raise
        if served.route is not None and key is not None:
            draft.add(served.route, key=key, lead=lead)
        return served.outputs

    def _tell_of_host(self, call: Call, decision: Decision) -> None:
        """Says once of each argument that a `Padded` does not stay on the device, and why."""
        bucket, name = decision.serving_bucket, call.target.name
        homes = homes_in(decision.entry)
        for argument, way_in in () if bucket is None else ways_in(call, bucket, homes):
            if way_in.way is Way.HOST and self._is_news(call, argument):
                logger.warning("%s at %s: %s %s. Said once", name, call.sizes, argument, way_in)

    def _is_news(self, call: Call, what: str) -> bool:
        """Whether nothing was said of this and the function of `call` before."""
        turn = object()
        return self._told.setdefault((call.variant.function, what), turn) is turn

    def _act(self, call: Call, decision: Decision) -> Act:
        """What does as was decided; it gives None where the mode forbids that by now."""
        if decision.error is not None:
            return partial(_refuse, decision.error)
        act: Callable[[Call, Decision], Reply | None] = self._eager
        if decision.piece_rows:
            act = self._split
        elif decision.in_background:
            act = self._queue_and_answer
        elif decision.entry is not None:
            act = self._replay_decided
        elif decision.mode is CUDAGraphMode.CAPTURE:
            return partial(self.capturer.gate.within, partial(self._capture, call, decision))
        return partial(act, call, decision)

    def _queue_and_answer(self, call: Call, decision: Decision) -> Reply | None:
        if not self._queue(call):
            return None
        queued = decision._replace(in_background=False)
        return self._act(call, queued)()

    def _queue(self, call: Call) -> bool:
        """Has the call's bucket captured in the background; False where the mode forbids it."""
        self._tell_of_lengths(call, self.bucket_for(call))

        def queue(is_admitted: bool) -> bool:
            if is_admitted:
                self.capturer.capture_later(self.bucket_for(call), call)
            return is_admitted

        return self.capturer.gate.within(queue)

    def _replay_decided(self, call: Call, decision: Decision) -> Reply:
        entry, reason = decision.entry, Reason.MEMORY
        assert entry is not None  # or this is not what was decided
        route = entry.route_for(call, fit=decision.fit)
        try:
            outputs = route.run(call.args, call.kwargs)
            # The bucket that is being captured takes over as soon as it is there.
            return Reply(outputs, None if decision.is_passing or entry.is_shared else route)
        except Exception as error:
            failure = error
        try:
            refuse_alone(entry, failure)
            if entry.is_loaded and not entry.replay_count:
                outputs = without_entry(self.capturer, call, entry, failure)
                reason = Reason.FAILED
            else:
                outputs = without_memory(call, route.bucket, failure)
        finally:
            del failure
        self.outcomes.add("eager", reason, call.sizes)
        return Reply(outputs)

    def _capture(self, call: Call, decision: Decision, is_admitted: bool) -> Reply | None:
        bucket, reason = decision.bucket, Reason.FAILED
        assert bucket is not None  # or this is not what was decided
        if not is_admitted:
            return None
        try:
            made = self.capturer.capture(call, bucket)
        except CaptureError as error:
            answer = partial(without_bucket, self.capturer, call, bucket, error)
            reason = Reason.TRANSFORMED if is_of_traced(error) else reason
        else:
            # What is compiled may show that it spans processes; the next call is compared again.
            decision.agreed(call, self.config, self.registry.entries)
            route = made.value.route_for(call)
            try:
                run = route.execute if made.is_new else route.run
                outputs = run(call.args, call.kwargs)
                if made.is_new:
                    self.outcomes.add("capture", decision.reason, call.sizes)
                    self._tell_of_lengths(call, bucket)
                return Reply(outputs, None if made.value.is_shared else route)
            except Exception as error:
                refuse_alone(made.value, error)
                answer = partial(without_entry, self.capturer, call, made.value, error)
        # Not within the `except`: a mistake in the function is to show its own traceback alone.
        try:
            outputs = answer()
        finally:
            del answer  # with the error, whose traceback leads back to this frame
        self.outcomes.add("eager", reason, call.sizes)
        return Reply(outputs)

    def _tell_of_lengths(self, call: Call, bucket: Bucket) -> None:
        """Says once for each function that every length is compiled for itself."""
        if not has_every_length(self.config, call):
            return
        notice = lengths_notice(self.registry, call, bucket)
        if notice is not None and self._is_news(call, "lengths"):
            logger.warning("%s", notice)

    def _split(self, call: Call, decision: Decision) -> Reply:
        """The call in pieces, each in its bucket; a piece without one runs eagerly."""
        donated = call.target.donate_argnums
        parts = list(pieces(call, largest=decision.piece_rows, donate_argnums=donated))
        distinct = {part.sizes: part for part in parts}
        held = {sizes: self._held(part) for sizes, part in distinct.items()}
        first = held[parts[0].sizes]
        if first is None:
            return self._eager(call, decision)
        outputs = first.value.outputs
        error = unjoinable(outputs)
        if error is not None:
            raise error
        first.value.program.check_rows(outputs, call.sizes)
        decision.agreed(call, self.config, self.registry.entries)
        rows = [part.sizes.batch_size for part in parts]
        with jax.transfer_guard("allow"):  # pieces are cut and joined on the host
            results = [self._run_piece(part, held[part.sizes]) for part in parts]
            whole = joined(results, first.value, rows, sizes=call.sizes)
            self._check_split(call, first.value, whole)
        delete_donated(call, donated)
        is_hit = all(made is not None and not made.is_new for made in held.values())
        self.outcomes.add("split", Reason.OVERFLOW if is_hit else Reason.MISS, call.sizes)
        return Reply(whole)

    def _check_split(self, call: Call, entry: CUDAGraphEntry, whole: PyTree) -> None:
        """In debug_mode: raises where rows depend on each other, until they have proved not to."""
        config = self.config
        if config.debug_mode and entry.executable not in self._independent:
            check_joined(whole, entry, call, compare_where=config.compare_where)
            if has_distinct_rows(call):
                self._independent.add(entry.executable)

    def _run_piece(self, call: Call, made: CacheItem[CUDAGraphEntry] | None) -> PyTree:
        if made is None:
            return eager_answer(self.registry, call)
        route = piece_route(made.value, call)
        try:
            return route.run(call.args, call.kwargs)
        except Exception as error:
            failure = error
        try:
            refuse_alone(made.value, failure)
            if made.is_new:
                return without_entry(self.capturer, call, made.value, failure)
            return without_memory(call, route.bucket, failure)
        finally:
            del failure

    def _held(self, call: Call) -> CacheItem[CUDAGraphEntry] | None:
        """The entry that serves a piece, captured where that is allowed."""
        while True:
            decision = self.decide(call)
            if decision.error is not None:
                raise decision.error
            if decision.in_background and not self._queue(call):
                continue
            if decision.mode is not CUDAGraphMode.CAPTURE or decision.bucket is None:
                return None if decision.entry is None else CacheItem(decision.entry, is_new=False)
            capture = partial(self._capture_piece, call, decision.bucket)
            is_settled, made = self.capturer.gate.within(capture)
            if is_settled:
                return made

    def _capture_piece(
        self, call: Call, bucket: Bucket, is_admitted: bool
    ) -> tuple[bool, CacheItem[CUDAGraphEntry] | None]:
        """Whether it was tried, and the entry."""
        if not is_admitted:
            return False, None
        try:
            return True, self.capturer.capture(call, bucket)
        except PaddingLeakError as error:
            self.capturer.failures.remember(bucket, call.variant, error)
            raise
        except CaptureError as error:
            failure = error
        try:
            self.capturer.failures.remember(bucket, call.variant, failure)
        finally:
            del failure
        return True, None

    def _eager(self, call: Call, decision: Decision) -> Reply:
        # Where this thread captures the very bucket, JAX may be in the middle of a trace, which
        # would take the operations for a part of it.
        is_within = decision.reason is Reason.QUEUED and self.registry.is_capturing_here(
            self.bucket_for(call), call.variant
        )
        start = perf_counter()
        with jax.ensure_compile_time_eval() if is_within else nullcontext():
            outputs = eager_answer(self.registry, call)
        self.outcomes.add("eager", decision.reason, call.sizes)
        self._tell_of_eager(call, decision, outputs, start)
        return Reply(outputs)

    def _tell_of_eager(self, call: Call, decision: Decision, outputs: PyTree, start: float) -> None:
        """Says once for each function what it took, where no bucket serves and nobody chose so."""
        rows, is_sealed = decision.piece_rows, self.mode is CUDAGraphMode.REPLAY
        if is_sealed and (rows or decision.reason is Reason.SEALED):
            sizes = call.sizes.with_sizes({"batch": rows}) if rows else call.sizes
            bucket = self.config.padded(sizes, call.carried)
            if self._failure(bucket, call.variant) is not None:
                return  # which was warned of
            what, notice = "sealed", partial(sealed_notice, bucket=bucket)
        elif decision.reason is Reason.OVERFLOW and not rows:
            what, notice = "overflow", partial(overflow_notice, is_sealed=is_sealed)
        else:
            return
        if self._is_news(call, what):
            jax.block_until_ready(outputs)
            took_ms = (perf_counter() - start) * 1e3
            logger.warning("%s", notice(self.registry, call, took_ms))


def _refuse(error: CUDAGraphError) -> Reply:
    raise error


def _error_reason(error: BaseException, decision: Decision) -> Reason:
    if isinstance(error, PaddingLeakError):
        return Reason.LEAK
    if decision.error is not None:
        return decision.reason
    return Reason.INPUT if isinstance(error, InputShapeError) else Reason.RUN


def mode_for(dispatcher: Dispatcher, sizes: Bucket) -> CUDAGraphMode:
    """What would be done with a call of this size, any captured function taken for its own."""
    registry, config = dispatcher.registry, dispatcher.config

    def find(bucket: Bucket) -> CUDAGraphEntry | None:
        return next(iter(registry.at(bucket)), None)

    def find_larger() -> CUDAGraphEntry | None:
        found = (registry.find_larger(sizes, entry.variant) for entry in registry.entries())
        return next((entry for entry in found if entry is not None), None)

    holdings = Holdings(find, find_larger, lambda bucket: None)
    return decide(config, dispatcher.mode, sizes, ("batch", "seq"), holdings).mode


def replayable(dispatcher: Dispatcher, sizes: Bucket) -> list[CUDAGraphEntry]:
    """The entries of the first bucket that may serve `sizes`, the one captured last in front.

    Only those of functions of one pytree: the specification's calls.
    """
    registry, config = dispatcher.registry, dispatcher.config
    buckets = [sizes]
    if config.cudagraph_copy_inputs:
        buckets.append(config.bucket_for(*sizes))
        if dispatcher.mode is CUDAGraphMode.REPLAY:
            larger = (registry.find_larger(sizes, entry.variant) for entry in registry.entries())
            found = {entry.bucket for entry in larger if entry is not None}
            buckets += sorted(found, key=lambda bucket: bucket.elements)
    for bucket in dict.fromkeys(buckets):
        entries = [entry for entry in registry.at(bucket) if entry.single_input]
        if entries:
            return entries[::-1]
    return []
