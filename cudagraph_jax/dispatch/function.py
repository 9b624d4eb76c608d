"""`bucket_jit` and the functions that it makes: the door for serving code, and the hot path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from time import perf_counter
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from numpy import ndarray

from cudagraph_jax._base.text import one_line
from cudagraph_jax.capture.capturer import Task
from cudagraph_jax.dispatch.decision import Reason
from cudagraph_jax.dispatch.manager import CUDAGraphManager
from cudagraph_jax.dispatch.operated import Operated
from cudagraph_jax.graphs.passed import leading_leaf
from cudagraph_jax.graphs.route import Route
from cudagraph_jax.graphs.route_table import Routes
from cudagraph_jax.program.binding import Binder
from cudagraph_jax.program.call import describe_call, refuse_abstract
from cudagraph_jax.program.eager import has_tracers, run_traced
from cudagraph_jax.program.forms import ALL, Bound, Form, Pick, picker, unbound
from cudagraph_jax.program.program import Target
from cudagraph_jax.program.variant import placement
from cudagraph_jax.shapes.pytrees import PyTree

P = ParamSpec("P")
R = TypeVar("R")

_shape_and_dtype = attrgetter("shape", "dtype")


class BucketedFunction(Operated, Generic[P, R]):
    """A function whose calls are padded up to buckets, each compiled once.

    Made by `bucket_jit`, which describes the options. Safe to call from many threads. Called with
    tracers, so under `jit`, `vmap` or `grad`, it is simply the function.

    Attributes:
        manager: What decides and counts.
    """

    __name__: str
    __wrapped__: Callable[P, R]

    def __init__(
        self, function: Callable[P, R], *, binder: Binder, target: Target, manager: CUDAGraphManager
    ) -> None:
        functools.update_wrapper(self, function)
        self.manager = manager
        self._function = function
        self._binder = binder
        self._target = target
        self._routes = Routes()
        self._forms: dict[tuple[int, tuple[str, ...]], Form] = {}
        self._picks: dict[Form, Pick] = {}
        self._pick = picker(binder.bucketed_places) if binder.has_entries else ALL
        self._lead = binder.lead
        self._leads_in_tree = False
        self._binds_all = bool(binder.static_argnames)
        self._outcomes = manager.dispatcher.outcomes
        manager.registry.watch(self._routes)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's outputs, trimmed to the real sizes and handed out as `unpad` says."""
        if kwargs or self._binds_all:
            return self._call_bound(args, kwargs)
        try:
            lead = args[self._lead]
            if self._leads_in_tree:
                lead = leading_leaf(lead)
            if type(lead) is ndarray:
                route = self._routes.table[tuple(map(_shape_and_dtype, self._pick(args)))]
                sure = route.takes_numpy(args)
            else:
                route = self._routes.exact[lead.shape]  # type: ignore[attr-defined]  # or caught
                # JAX narrows NumPy's 64-bit floats silently, so NumPy arrays are looked at.
                sure = True
                for position in route.others:
                    if type(args[position]) is ndarray:
                        sure = False
        except (KeyError, AttributeError, IndexError, TypeError):
            return self._call_bound(args, kwargs)
        direct = route.direct
        if not sure or (direct is None and not route.takes(args)):
            return self._call_bound(args, kwargs)
        outputs: R
        try:
            if direct is not None:
                start = perf_counter()
                outputs = direct(*args)
                if route.finish is not None:
                    outputs = route.finish(outputs)
                tally = route.tally
                tally.used_at = end = perf_counter()
                tally.seconds += end - start
                next(tally.count)
            else:
                outputs = route.run(args)
        except (TypeError, ValueError):
            # The compiled function refuses what does not fit it: other parameters, tracers.
            # Refusals are slow, so calls that alternate are told apart by all their arrays.
            self._routes.exact.clear()
            outputs = self._call_bound(args, kwargs, refused=route)
        except BaseException as error:
            outputs = self._rescued(self._bind(args, kwargs), route, error)
        return outputs

    def __repr__(self) -> str:
        return one_line(f"BucketedFunction({self._target.name}, {self.registry.num_graphs} graphs)")

    def _repr_html_(self) -> str:
        from cudagraph_jax.report.stats import stats_html

        return stats_html(self._target.name, self.stats())

    @property
    def in_axes(self) -> PyTree:
        """Which dimensions of the arguments are the batch and the sequence, as declared."""
        return jax.tree.map(attrgetter("text"), self._binder.in_axes)

    def task(self, *args: P.args, **kwargs: P.kwargs) -> Task:
        """A call as the manager's dispatcher takes it."""
        return self.task_of(args, kwargs)

    def task_of(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> Task:
        """As `task`, with the arguments together."""
        return self._task(self._bind(args, kwargs))

    def with_manager(self, manager: CUDAGraphManager) -> BucketedFunction[P, R]:
        """The same function, decided and counted by another manager."""
        return BucketedFunction(
            self._function, binder=self._binder, target=self._target, manager=manager
        )

    def _call_bound(
        self,
        args: Sequence[PyTree],
        kwargs: Mapping[str, PyTree],
        *,
        refused: Route | None = None,
    ) -> R:
        """Any call: with keywords, static arguments or pytrees, refused, or of a new shape."""
        with self._outcomes.counting_input_errors():
            bound = self._bind(args, kwargs)
            key = self._key(bound)
        route = None if key is None else self._routes.table.get(key)
        outputs: R
        if (
            route is not None
            and route is not refused
            and route.takes(bound.args, bound.kwargs)
            and route.takes_numpy(bound.args)
        ):
            try:
                outputs = route.run(bound.args, bound.kwargs)
            except (TypeError, ValueError):
                pass  # refused as in __call__, and decided anew
            except BaseException as error:
                return self._rescued(bound, route, error)
            else:
                return outputs
        outputs = self._decided(bound, key)
        return outputs

    def _rescued(self, bound: Bound, route: Route, error: BaseException) -> R:
        """The answer to a call whose replay failed, where it can be had another way."""
        outputs: R = self.manager.dispatcher.rescue(self._task(bound), route.bucket, error)
        return outputs

    def _decided(self, bound: Bound, key: Hashable | None) -> Any:
        """A call that has to be decided; its route is remembered under `key`."""
        with self._outcomes.counting_input_errors():
            traced = has_tracers(bound.args, bound.kwargs)
        if traced:
            self._outcomes.add("eager", Reason.TRANSFORMED)
            target = replace(self._target, function=unbound(self._function, bound))
            return run_traced(target, bound.args, bound.kwargs, self._binder.declared(bound))
        draft = self._routes.draft()
        with self._outcomes.counting_input_errors():
            task = self._task(bound)
            refuse_abstract(task.call)
        served = self.manager.dispatcher.serve(task)
        if served.route is not None and served.route.is_reusable and key is not None:
            draft.add(served.route, key=key, lead=self._lead_shape(bound))
        return served.outputs

    def _lead_shape(self, bound: Bound) -> Hashable | None:
        """The key for exact calls with JAX arrays alone; None where one array does not decide."""
        if not bound.form.plain or not 0 <= self._lead < len(bound.args):
            return None
        lead = bound.args[self._lead]
        if not hasattr(lead, "shape"):
            self._leads_in_tree = True
            lead = leading_leaf(lead)
        return getattr(lead, "shape", None)

    def _bind(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> Bound:
        written = (len(args), tuple(kwargs))
        form = self._forms.get(written)
        if form is None:
            form = self._forms[written] = self._binder.form(*written)
        return form.bind(args, kwargs)

    def _key(self, bound: Bound) -> Hashable | None:
        """What the route of a call depends on; None where its arguments are no arrays."""
        form = bound.form
        pick = self._picks.get(form)
        if pick is None:
            pick = self._picks[form] = picker(self._binder.bucketed(form))
        picked = pick(bound.args)
        try:
            arrays: Hashable = tuple(map(_shape_and_dtype, picked))
        except AttributeError:
            leaves, structure = jax.tree.flatten(picked)
            try:
                arrays = (structure, *map(_shape_and_dtype, leaves))
            except AttributeError:
                return None
        placed = tuple(map(placement, jax.tree.leaves(picked)))
        if any(placed):
            arrays = (arrays, placed)
        return arrays if form.plain else (form, bound.statics, arrays)

    def _task(self, bound: Bound) -> Task:
        call = describe_call(
            # Where each argument stands is part of what is computed.
            (self, bound.form.places),
            bound.args,
            bound.kwargs,
            declared=self._binder.declared(bound),
            name=self._target.name,
            statics=bound.statics,
        )
        fingerprint = self._target.fingerprint
        target = replace(
            self._target,
            function=unbound(self._function, bound),
            donate_argnums=self._binder.donated(bound.form),
            fingerprint=fingerprint and fingerprint._replace(places=bound.form.places),
        )
        return Task(call, target)
