"""`BucketedFunction`: what `bucket_jit` makes, the door for serving code and the hot path."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from time import perf_counter
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, Unpack

import jax
from jax.sharding import Sharding
from jax.tree_util import PyTreeDef
from numpy import ndarray

from cudagraph_jax._base.checks import positive_size
from cudagraph_jax._base.copies import belongs_to_process, global_name
from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.text import one_line
from cudagraph_jax.capture.peers import CAPTURES_TAKE, PEERS
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.dispatch.dispatcher import REFUSED
from cudagraph_jax.dispatch.manager import CUDAGraphManager, PlanOptions
from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.graphs.pads import padded_leaves
from cudagraph_jax.graphs.route import NO_KWARGS, Route, Routes
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.program.arguments import commitments, leading_leaf
from cudagraph_jax.program.binding import Binder, BoundCall, Form, Pick, picker, unbound
from cudagraph_jax.program.call import (
    Args,
    Call,
    Declarations,
    Target,
    bare_leaves,
    describe_call,
    has_tracers,
    is_array,
    placement,
    refuse_abstract,
)
from cudagraph_jax.program.donation import refuses_transfer
from cudagraph_jax.program.eager import is_plain, run_traced
from cudagraph_jax.program.function_ref import FunctionRef, Holder
from cudagraph_jax.program.padded import (
    Padded,
    flatten_arguments,
    is_padded,
    real_part,
    without_padding,
)
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.settings import ASKED, DEVICE, PRECISION, X64, Settings, current_settings
from cudagraph_jax.xla.shardings import is_spread

if TYPE_CHECKING:
    from cudagraph_jax.planning.plan import BucketPlan
    from cudagraph_jax.report.explanation import Explanation
    from cudagraph_jax.report.progress import Callback
    from cudagraph_jax.report.report import Report
    from cudagraph_jax.report.warmup_report import WarmupReport


P = ParamSpec("P")
R = TypeVar("R")

MAX_DECLARATIONS = 256
"""Forms and structures of calls whose declarations are remembered."""

_shape_and_dtype = attrgetter("shape", "dtype")
# What compiled functions raise for arguments that do not fit them.
_REFUSALS = (TypeError, ValueError, OverflowError)


@belongs_to_process
class BucketedFunction(Generic[P, R]):
    """A function whose calls are padded up to buckets, each compiled once.

    Made by `bucket_jit`, which describes the options. Safe to call from many threads. Called with
    tracers, so under `jit`, `vmap` or `grad`, it is simply the function.

    Attributes:
        manager: What decides and counts.
        binder: What may be given, and what was declared of it.
        target: The function, and what is asked of its outputs.
    """

    __name__: str
    __wrapped__: Callable[P, R]

    def __init__(
        self, function: Callable[P, R], *, binder: Binder, target: Target, manager: CUDAGraphManager
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        for attribute, value in getattr(function, "__dict__", {}).items():
            if not hasattr(type(self), attribute):  # a model may have its own `stats`
                self.__dict__.setdefault(attribute, value)
        self.manager = manager
        self._holder = Holder(function)  # alone: what is captured goes with this object
        self._function = FunctionRef(self._holder)
        self.binder = binder
        self.target = replace(target, function=self._function)
        self._routes = Routes()
        self._forms: dict[tuple[int, tuple[str, ...]], Form] = {}
        self._instead: dict[Form, Form] = {}
        self._picks: dict[Form, Pick] = {}
        self._declarations: dict[tuple[Form, PyTreeDef], tuple[Target, Declarations]] = {}
        self._usual: dict[tuple[tuple[int, ...], PyTreeDef], list[Sharding | None]] = {}
        self._lead = binder.lead
        self._leads_in_tree = False
        self._binds_all = bool(binder.static_argnames)
        self._has_defaults = binder.has_defaults
        self._settings: Settings | None = None  # of the first call, which the tables stand for
        self._outcomes = manager.dispatcher.outcomes
        manager.registry.watch(self._routes)
        manager.registry.require(self._function, binder.multiples)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's outputs, trimmed to the real sizes and handed out as `unpad` says."""
        if kwargs or self._binds_all:
            return self._call_bound(args, kwargs)
        # Longer than any other function here: a hit is one frame, each further one 0.05 us.
        failure = None
        try:
            lead = args[self._lead]
            if self._leads_in_tree:
                lead = leading_leaf(lead)
            if (kind := type(lead)) is ndarray:
                route = self._routes.numpy[_shape_and_dtype(lead)]
                sure = route.device is DEVICE.value
            else:
                route = self._routes.exact[lead.shape]  # type: ignore[attr-defined]  # or caught
                sure = kind is route.lead_type or route.takes(lead, args)
            if (
                route.x64 is not X64.value
                or route.precision != PRECISION.value
                or (ASKED and not route.serves_thread())
            ):
                sure = False
            for position, shape, dtypes in route.others:
                value: Any = args[position]
                kind = type(value)
                # JAX narrows NumPy's 64-bit floats silently, and drops what a subclass holds; what
                # is padded is copied into a buffer, which takes any dtype, and a number for a row.
                if kind is ndarray or (kind is route.device_array and not route.pads_nothing):
                    if value.dtype not in dtypes or value.shape != shape:
                        sure = False
                elif kind is not route.device_array and (shape or kind not in route.kinds):
                    sure = False
        except (KeyError, AttributeError, IndexError, TypeError):
            sure = False
        if sure:
            try:
                outputs: R
                if (direct := route.direct) is not None:
                    start = perf_counter()
                    outputs = direct(*args)
                    if route.finish is not None:
                        outputs = route.finish(outputs)
                    tally = route.tally
                    tally.used_at = end = perf_counter()
                    tally.seconds += end - start
                    next(tally.count)
                    return outputs
                if route.checks.numbers.agree(args, NO_KWARGS):
                    outputs = route.run(args)
                    return outputs
            except BaseException as error:
                if not self._may_answer(route, error):
                    raise
                failure = error
        # Nothing is called within an `except`: who looks for a mistake of theirs sees it alone.
        if failure is None:
            return self._call_bound(args, kwargs)
        try:
            return self._answer_after(failure, route, args)
        finally:
            failure = None  # its traceback leads back to this frame, and the arguments in it

    def _may_answer(self, route: Route, error: BaseException) -> bool:
        """Whether a call that failed by `route` may be answered in another way."""
        return (
            isinstance(error, _REFUSALS)
            or refuses_transfer(error)  # or it is made explicitly
            or self.manager.dispatcher.may_answer(route, error)
        )

    def _answer_after(self, error: BaseException, route: Route, args: Args) -> R:
        if isinstance(error, _REFUSALS):
            # The compiled function refuses what does not fit it: other parameters, tracers.
            # Refusals are slow, so calls that alternate are told apart by all their arrays.
            self._routes.exact.clear()
            self._routes.numpy.clear()
            return self._call_bound(args, NO_KWARGS, refused=route)
        if refuses_transfer(error):
            return self._call_bound(args, NO_KWARGS)
        describe = functools.partial(self.describe, *args)
        outputs: R = self.manager.dispatcher.rescue(describe, route, error)
        return outputs

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """A method's function with its object as the first argument, as of any function.

        Of a class that holds it beside its methods, it stays itself: only what has a `self` binds.
        """
        if instance is None or not self.binder.is_method:
            return self
        return MethodType(self, instance)

    def __repr__(self) -> str:
        return one_line(f"BucketedFunction({self.target.name}, {self.registry.num_graphs} graphs)")

    def __reduce__(self) -> str:
        # By reference, as functions and `jax.jit` are: the other process has a manager of its own.
        return global_name(self)

    def _repr_html_(self) -> str:
        from cudagraph_jax.report.summary import stats_html

        return stats_html(self.target.name, self.stats())

    @property
    def called(self) -> str:
        """What reports, logs and profiles call it."""
        return self.target.name

    @property
    def in_axes(self) -> PyTree:
        """Which dimensions of the arguments carry which size, as declared."""
        return jax.tree.map(attrgetter("text"), self.binder.in_axes)

    @property
    def pad_side(self) -> PyTree:
        """On which side the padding of the arguments stands, with the structure of `in_axes`."""
        return jax.tree.map(attrgetter("side"), self.binder.in_axes)

    def describe(self, /, *args: PyTree, **kwargs: PyTree) -> Call:
        """A call with these arguments, described; nothing is run or compiled.

        Raises:
            InputShapeError: The arguments do not fit `in_axes`, as in the call itself.
        """
        return self._captured(self._bind(args, kwargs))[1]

    def with_manager(self, manager: CUDAGraphManager) -> BucketedFunction[P, R]:
        """The same function, decided and counted by another manager."""
        return BucketedFunction(
            self._holder.function, binder=self.binder, target=self.target, manager=manager
        )

    def _call_bound(
        self, args: Args, kwargs: Mapping[str, PyTree], *, refused: Route | None = None
    ) -> R:
        """Any call: with keywords, static arguments or pytrees, refused, or of a new shape."""
        dispatcher = self.manager.dispatcher
        outputs: R
        try:
            written = self._bind(args, kwargs)
            bound = self._as_known(written)
            plain = bool(ASKED) and is_plain(self.target.unpad)
            key = None if plain else self._key(bound)
            draft = self._routes.draft()
            route = None if key is None else draft.table.get(key)
            is_taken = (
                route is not None
                and (route is not refused or bound is not written)
                and route.checks.accept(bound.args, bound.kwargs)
            )
        except BaseException as error:
            dispatcher.refuse_input(self.called, (args, kwargs), error)
            raise
        if route is not None and is_taken:
            outputs = dispatcher.replay(
                route, bound.args, bound.kwargs, lambda: self._describe(bound)
            )
            if outputs is not REFUSED:
                # The next call may go by one array, whoever made the route: a JAX array, say.
                draft.add(route, key=key, lead=self._lead_of(bound))
                return outputs
        try:
            if plain or has_tracers(written.args, written.kwargs):
                use_jax()  # as the operations will, many of them at once
                call = None
            else:
                bound, call = self._captured(written)
                refuse_abstract(call)
                key = self._key(bound)
        except BaseException as error:
            dispatcher.refuse_input(self.called, (args, kwargs), error)
            raise
        if call is None:
            return self._trace(written)
        outputs = dispatcher.serve(call, self._routes, key, lead=self._lead_of(bound))
        return outputs

    def _trace(self, bound: BoundCall) -> R:
        """What the plain function gives, for tracers or where it runs within another one."""
        self._outcomes.add("eager", Reason.TRANSFORMED)
        args, kwargs = jax.tree.map(real_part, (bound.args, bound.kwargs), is_leaf=is_padded)
        target, declared = self._declared(bound, jax.tree.structure((args, kwargs)))
        outputs: R = run_traced(target, args, kwargs, declared)
        return outputs

    def _lead_of(self, bound: BoundCall) -> PyTree:
        """The array that carries the sizes; None where one does not decide alone."""
        if not bound.form.plain or not 0 <= self._lead < len(bound.args):
            return None
        lead = bound.args[self._lead]
        if not hasattr(lead, "shape"):
            self._leads_in_tree = True
            lead = leading_leaf(lead)
        return lead if getattr(lead, "shape", ()) else None  # a number carries no sizes

    def _as_known(self, bound: BoundCall) -> BoundCall:
        """The call as that one was served which was written like it before."""
        form = self._instead.get(bound.form)
        other = None if form is None else self.binder.rewritten(bound, form)
        return bound if other is None else other

    def _captured(self, bound: BoundCall) -> tuple[BoundCall, Call]:
        """The call and its description, written in a way whose bucket is captured if there is one.

        A default that is left out is part of the program, as for `jax.jit`, and one that is given
        is an argument of it: two programs, with the same answer where the value is the default.
        """
        call = self._describe(bound)
        decide = self.manager.dispatcher.decide
        if not self._has_defaults or decide(call).mode is CUDAGraphMode.REPLAY:
            self._instead.pop(bound.form, None)
            return bound, call
        for form in list(self._forms.values()):
            if form.given == bound.form.given:
                continue
            with suppress(InputShapeError):  # a default that JAX does not take as an argument
                other = self.binder.rewritten(bound, form)
                described = call if other is None else self._describe(other)
                if other is not None and decide(described).mode is CUDAGraphMode.REPLAY:
                    self._instead[bound.form] = form
                    return other, described
        return bound, call

    def _bind(self, args: Args, kwargs: Mapping[str, PyTree]) -> BoundCall:
        if Padded in map(type, (*args, *kwargs.values())):
            args = tuple(map(without_padding, args))
            kwargs = dict(zip(kwargs, map(without_padding, kwargs.values()), strict=True))
        written = (len(args), tuple(kwargs))
        form = self._forms.get(written)
        if form is None:
            form = self._forms[written] = self.binder.form(*written)
        if form.plain:
            return BoundCall(form, (*args, *kwargs.values()), {}, ())
        return form.bind(args, kwargs)

    def _key(self, bound: BoundCall) -> Hashable | None:
        """What the route of a call depends on; None where its arguments are no arrays."""
        form = bound.form
        pick = self._picks.get(form)
        if pick is None:
            pick = self._picks[form] = picker(self.binder.bucketed(form))
        picked = pick(bound.args)
        arrays: Hashable
        placed: tuple[object, ...] = ()
        if all(type(value) is ndarray for value in picked):  # as of most servers: nothing is placed
            arrays = tuple(map(_shape_and_dtype, picked))
        else:
            leaves, structure = jax.tree.flatten(picked)
            if not all(map(is_array, leaves)):
                return None
            arrays = tuple(map(_shape_and_dtype, leaves))
            if committed := commitments(leaves):
                arrays = (arrays, committed)
            if not jax.tree_util.all_leaves(picked):
                arrays = (structure, arrays)
            placed = tuple(map(placement, leaves))
        settings = current_settings()
        if self._settings is None:
            self._settings = settings
        if any(placed) or settings != self._settings:
            arrays = (arrays, placed, settings)
        return arrays if form.plain else (form, bound.statics, arrays)

    def _describe(self, bound: BoundCall) -> Call:
        leaves, structure = flatten_arguments((bound.args, bound.kwargs))
        target, declared = self._declared(bound, structure)
        if self._usual and (usual := self._usual.get((bound.form.places, structure))):
            declared = declared._replace(usual=usual)
        return describe_call(
            self._function,
            bound.args,
            bound.kwargs,
            declared=declared,
            target=target,
            statics=bound.statics,
            places=bound.form.places,  # which are part of what is computed
            flat=(leaves, structure),
        )

    def _declared(self, bound: BoundCall, structure: PyTreeDef) -> tuple[Target, Declarations]:
        """What calls of one form and structure share, whatever their shapes."""
        key, known = (bound.form, structure), None
        with suppress(TypeError, ValueError):  # what a pytree holds beside its leaves is no key
            known = self._declarations.get(key)
        if known is None:
            fingerprint = self.target.fingerprint
            target = replace(
                self.target,
                function=self._function if bound.statics else unbound(self._function, bound),
                donate_argnums=self.binder.donated(bound.form),
                fingerprint=fingerprint and fingerprint._replace(places=bound.form.places),
            )
            declared = self.binder.declared(bound)._replace(bare=bare_leaves(structure))
            known = (target, declared)
            if len(self._declarations) >= MAX_DECLARATIONS:
                self._declarations.clear()
            with suppress(TypeError, ValueError):
                self._declarations[key] = known
        target, declared = known
        if bound.statics:  # they may be large, and equal ones may differ: 0.0 and -0.0
            target = replace(target, function=unbound(self._function, bound))
        return target, declared

    @property
    def registry(self) -> CUDAGraphRegistry:
        """The captured buckets."""
        return self.manager.registry

    def warmup(
        self,
        /,
        *args: PyTree,
        progress: Callback | bool | None = None,
        workers: int = 1,
        **kwargs: PyTree,
    ) -> WarmupReport:
        """Captures the whole grid for arguments like these, then runs each bucket.

        Args:
            *args: Example arguments of any sizes: arrays, or `jax.ShapeDtypeStruct`. The runs are
                on their rows, padded or cut, or where there are none on padding that the mask
                calls so. What is passed through is used as it is, so give the real parameters.
                Arrays that carry sizes and lie on several devices have later calls in NumPy go
                there, too.
            progress: None: a bar in a notebook, and where rich is installed and stderr is a
                terminal, else log lines. False: nothing. A function: called with (done, total,
                bucket) after each step; the bucket's `phase` is `"compile"` or `"run"`, and its
                `note` is not empty where a run takes long and is not done yet.
            workers: How many buckets XLA compiles at a time, at most. Order and limits are kept.
                From a store, several are loaded at once in any case.
            **kwargs: Example keyword arguments.

        Returns:
            What became of each bucket: those first that a store knows to be in use, then the
            largest. A bucket that cannot be captured is reported, warned of, and served eagerly.

        Raises:
            InputShapeError: The arguments do not fit `in_axes`, or an output cannot be trimmed.
            SealedError: The manager's mode does not allow captures.
            ConfigError: The grid does not fit into the limits, or the mesh does not divide it.
            CaptureError: The function itself fails on the example; the cause says how. Or it closes
                over a traced value, so that a call is the plain function's.

        Example:
            >>> import numpy as np, cudagraph_jax
            >>> config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(1, 2), capture_seq_lens=(8,))
            >>> double = cudagraph_jax.bucket_jit(
            ...     lambda x: x * 2, in_axes="batch seq", config=config
            ... )
            >>> double.warmup(np.ones((1, 3), np.float32), progress=False).captured
            2
        """
        wait_s = CAPTURES_TAKE * self.manager.config.process_timeout_s
        with PEERS.refusing_input(
            f"the warm-up of {self.called}", (args, kwargs), timeout_s=wait_s
        ):
            self.binder.check_keywords(kwargs, options=("progress", "workers"))
            if not (args or kwargs):
                what = "give the arguments of a call, arrays or jax.ShapeDtypeStruct of any sizes"
                raise InputShapeError(f"warmup() of {self.called} has no example: {what}")
            bound = self._bind(args, kwargs)
            call = self._describe(bound)
        # Here, because importing this package is to cost little.
        from cudagraph_jax.capture.warmup import warm_grid
        from cudagraph_jax.report.progress import Progress

        report = warm_grid(
            self.manager.dispatcher.capturer,
            call,
            progress=Progress(progress),
            workers=positive_size(workers, name="workers"),
        )
        if report.buckets:
            self._remember_shardings(bound, call)
        return report

    def _remember_shardings(self, bound: BoundCall, call: Call) -> None:
        """Has what is nowhere on purpose, as in NumPy, go where the arrays of a warm-up are."""
        usual = [
            leaf.sharding if is_spread(leaf.sharding) and not axes.passes_through else None
            for leaf, axes in zip(call.variant.leaves, call.axes, strict=True)
        ]
        known = (bound.form.places, call.variant.structure)
        if not any(usual) or self._usual.get(known) == usual:
            return
        self._usual[known] = usual
        self._routes.forget_routes()

    def pad(self, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, ...]:
        """The arguments at the size of the bucket of a call with them, to prepare that ahead.

        What carries axes comes as a `Padded` on the device, as the call would pad it; all else as
        it is. A call with it is served by the same bucket, and has nothing to pad, copy or fill.

        Args:
            *args: The arguments of a call.
            **kwargs: Those that are given by keyword, which are not among what is returned. What
                carries axes has to come by position.

        Returns:
            The positional arguments, in their order.

        Raises:
            InputShapeError: The arguments do not fit `in_axes`, as in the call itself, or one that
                carries axes is given by keyword.
            BucketOverflowError: The call is outside the limits, and so has no bucket.
            DistributedError: It spans several processes that do not pad the same, or process 0
                leads.

        Example:
            >>> import numpy as np, cudagraph_jax
            >>> config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,))
            >>> double = cudagraph_jax.bucket_jit(
            ...     lambda x: x * 2, in_axes="batch seq", config=config
            ... )
            >>> ahead = double.pad(np.ones((3, 5), np.float32))
            >>> ahead
            (Padded(float32[3,5] in [4,8]),)
            >>> double(*ahead).shape
            (3, 5)
        """
        dispatcher = self.manager.dispatcher
        wait_s = dispatcher.config.process_timeout_s
        with PEERS.refusing_input(f"pad of {self.called}", (args, kwargs), timeout_s=wait_s):
            bound = self._bind(args, kwargs)
            call = self._describe(bound)
            refuse_abstract(call)
        bucket = dispatcher.bucket_to_pad(call)
        padded, _ = jax.tree.unflatten(call.variant.structure, padded_leaves(call, bucket))
        values = list(args)
        for index, name, argument in zip(bound.form.args, bound.form.names, padded, strict=True):
            if index < len(args):
                values[index] = argument
            elif any(map(is_padded, flatten_arguments(argument)[0])):
                raise InputShapeError(
                    f"{name} carries axes and is given by keyword, and pad returns the positional "
                    "arguments: give it by position"
                )
        return tuple(values)

    def seal(self) -> None:
        """Captures nothing from now on."""
        self.manager.seal()

    def replan(
        self, *, max_graphs: int | None = None, **options: Unpack[PlanOptions]
    ) -> BucketPlan:
        """Plans the manager's grid from what was asked for; see `CUDAGraphManager.replan`."""
        return self.manager.replan(max_graphs=max_graphs, **options)

    def report(self, path: str | os.PathLike[str] | None = None) -> Report:
        """Everything that the manager knows; see `CUDAGraphManager.report`."""
        return self.manager.report(path)

    def stats(self) -> dict[str, Any]:
        """The manager's counts and times; see `CUDAGraphManager.stats`."""
        return self.manager.stats()

    def explain(self, /, *args: PyTree, **kwargs: PyTree) -> Explanation:
        """What a call with these arguments would do, and why; nothing is run or compiled.

        Raises:
            InputShapeError: The arguments do not fit `in_axes`, as in the call itself.

        Example:
            >>> import numpy as np, cudagraph_jax
            >>> config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(4,), on_miss="eager")
            >>> double = cudagraph_jax.bucket_jit(
            ...     lambda x: x * 2, in_axes="batch seq", config=config, name="double"
            ... )
            >>> explanation = double.explain(np.ones((3, 5), np.float32))
            >>> explanation.mode, explanation.bucket
            (<CUDAGraphMode.NONE: 'none'>, Bucket(batch_size=4, seq_len=5))
        """
        from cudagraph_jax.dispatch.explain import explain

        return explain(self.manager.dispatcher, self.describe(*args, **kwargs))
