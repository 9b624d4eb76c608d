"""The only door to `jax.stages`: a function and its shapes in, a compiled executable out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from cudagraph_jax._base.text import error_text
from cudagraph_jax.errors import CaptureError, ConfigError, CUDAGraphError, UnexpectedCompileError
from cudagraph_jax.shapes.pytrees import PyTree, unflatten_shapes
from cudagraph_jax.xla.memory import Memory, closed_over_bytes, memory_of

REFUSAL = (
    "had to be compiled inside no_compiles(): warm the bucket up first, keep sizes inside the "
    'limits, and pad and trim in NumPy (unpad="host")'
)
"""What is said of a function that would compile inside `no_compiles()`."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Executable:
    """One XLA executable and what the compiler reports of it.

    Attributes:
        call: The compiled function; strict about shapes, dtypes and pytrees, and it refuses
            tracers.
        output_info: Its outputs, with `shape` and `dtype`.
        compile_ms: Milliseconds to trace, lower and compile; or to load, if it was loaded.
        memory: What it takes; None if the backend does not say.
        flops: Floating-point operations of one run; None if the backend does not say.
        is_loaded: Whether it was read from a store instead of compiled.
    """

    call: Compiled
    output_info: PyTree
    compile_ms: float
    memory: Memory | None
    flops: float | None
    is_loaded: bool = False

    @property
    def memory_bytes(self) -> int | None:
        """What it keeps and what a run borrows; None if the backend does not say."""
        return None if self.memory is None else self.memory.total_bytes

    @property
    def closed_over_bytes(self) -> int:
        """Of the arrays that its function closes over."""
        return 0 if self.memory is None else self.memory.closed_over_bytes


@dataclass(frozen=True, slots=True)
class Lowering:
    """A function that is traced and lowered for its arguments, and can be compiled.

    Attributes:
        lowered: JAX's own stage.
        output_info: Its outputs, with `shape` and `dtype`.
        name: What profiles and logs call it.
        took_ms: Milliseconds to trace and lower it.
        closed_over_bytes: Of the arrays that the function closes over.
    """

    lowered: Lowered
    output_info: PyTree
    name: str
    took_ms: float
    closed_over_bytes: int = 0

    @property
    def text(self) -> str:
        """Its StableHLO, the same in every process."""
        text: str = self.lowered.as_text()
        return text

    @property
    def drops_arguments(self) -> bool:
        """Whether the executable takes only those arguments that it needs."""
        main = next(
            operation
            for operation in self._module().body.operations
            if operation.attributes["sym_name"].value == "main"
        )
        taken = main.regions[0].blocks[0].arguments
        return len(taken) < len(jax.tree.leaves(self.lowered.args_info))

    @property
    def partitions(self) -> int:
        """How many devices it runs on."""
        attributes = self._module().operation.attributes
        return int(attributes["mhlo.num_partitions"].value * attributes["mhlo.num_replicas"].value)

    def _module(self) -> Any:
        return self.lowered.compiler_ir("stablehlo")

    def compile(
        self,
        *,
        compiler_options: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Executable:
        """The executable.

        Args:
            compiler_options: XLA options by name, as text.
            clock: Seconds, for `compile_ms`.

        Raises:
            CaptureError: It could not be compiled.
            ConfigError: XLA does not know one of the compiler options, or its value.
        """
        start = clock()
        with stage_errors("compile", self.name):
            compiled = self.lowered.compile(compiler_options=dict(compiler_options or {}))
            count_executable()
            return Executable(
                call=compiled,
                output_info=self.output_info,
                compile_ms=self.took_ms + (clock() - start) * 1e3,
                memory=memory_of(compiled, closed_over_bytes=self.closed_over_bytes),
                flops=_flops(compiled),
            )


@dataclass(slots=True)
class _Compiled:
    number: int = 0


# Of the process, as what XLA has recorded. Of two threads that add at once one may get lost.
_compiled = _Compiled()


def count_executable() -> None:
    """Tells that there is a new executable, compiled or loaded."""
    _compiled.number += 1


def compiled_so_far() -> int:
    """A number that changes with each new executable of this package in this process."""
    return _compiled.number


def lower_function(
    function: Callable[..., PyTree],
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
    *,
    name: str,
    donate_argnums: Sequence[int] = (),
    keep_unused: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Lowering:
    """Lowers `function` for `args` and `kwargs`, ahead of time.

    Args:
        function: What to compile.
        args: Its positional arguments, with `jax.ShapeDtypeStruct` leaves.
        kwargs: Its keyword arguments, likewise.
        name: What profiles and logs call the executable.
        donate_argnums: Positions of arguments whose buffers the outputs may take over.
        keep_unused: Whether the executable takes also the arguments that it does not need.
        clock: Seconds, for `compile_ms`.

    Raises:
        CaptureError: Tracing or lowering failed; `stage` says which.
        UnexpectedCompileError: Called inside `no_compiles()`.
    """
    start = clock()
    # JAX keeps an executable for as long as the function object lives: a new one for each bucket
    # is freed together with its entry (docs/xla.md, "Compiling, freeing, counting").
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_flat = not _takes_infos(structure, leaves)
    if is_flat:
        function, donate_argnums = _of_leaves(function, structure), _leaves_at(args, donate_argnums)
        args, kwargs = leaves, {}
    fresh = _fresh(function, name)
    donated = tuple(donate_argnums)
    with stage_errors("trace", name), tracing_refusals(name):
        if axes := _axis_names():  # a size of theirs would become a constant
            raise jax.errors.UnexpectedTracerError(
                f"it is within a transformation that names the axes {axes}, where calls are the "
                "plain function's: capture it outside"
            )
        jitted = jax.jit(fresh, donate_argnums=donated, keep_unused=keep_unused)
        traced = jitted.trace(*args, **kwargs)
        if len(traced.jaxpr.in_avals) > len(leaves):  # JAX has tracers in front of the arguments
            raise jax.errors.UnexpectedTracerError(
                "it closes over a value that is traced: by a transformation around it, such as "
                "jax.jit, where calls are the plain function's (capture it outside, with that as "
                "an argument), or by an earlier trace, which left it in a global, say"
            )
    with stage_errors("lower", name), tracing_refusals(name):
        lowered = traced.lower()
        if is_flat:  # what it compiles to takes the arguments in the pytree of these
            lowered.args_info = unflatten_shapes(structure, jax.tree.leaves(lowered.args_info))
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in traced.jaxpr.out_avals]
    outputs = unflatten_shapes(lowered.out_tree, shapes)
    took_ms = (clock() - start) * 1e3
    return Lowering(lowered, outputs, name, took_ms, closed_over_bytes(traced.jaxpr))


def _axis_names() -> Sequence[object]:
    """The axes that the transformations around this name."""
    from jax.extend import core  # here, since it takes 20 ms, with Pallas

    # Experimental, and the only name for it that is not private: a JAX without it captures there.
    names: Callable[[], Sequence[object]] = getattr(core, "unsafe_get_axis_names_DO_NOT_USE", tuple)
    return names()


def is_of_traced(error: CaptureError) -> bool:
    """Whether a function could not be lowered for what a transformation around it brings in."""
    return isinstance(error.__cause__, jax.errors.UnexpectedTracerError)


def _takes_infos(structure: jax.tree_util.PyTreeDef, leaves: Sequence[PyTree]) -> bool:
    """Whether the arguments can hold what JAX puts in the place of arrays while it lowers.

    That has a shape and a dtype and nothing else, which a class of the caller's may refuse.
    """
    infos = [
        jax.stages.ArgInfo(jax.core.ShapedArray(leaf.shape, leaf.dtype), False) for leaf in leaves
    ]
    try:
        jax.tree.unflatten(structure, infos)
    except Exception:  # whatever the class raises; what is wrong otherwise is raised by the trace
        return False
    return True


def _of_leaves(
    function: Callable[..., PyTree], structure: jax.tree_util.PyTreeDef
) -> Callable[..., PyTree]:
    """`function` as one of the leaves of its arguments."""

    def flat(*leaves: PyTree) -> PyTree:
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return function(*args, **kwargs)

    return flat


def _leaves_at(args: Sequence[PyTree], places: Sequence[int]) -> list[int]:
    """The numbers of the leaves of those arguments."""
    ends = list(accumulate((len(jax.tree.leaves(arg)) for arg in args), initial=0))
    return [number for place in places for number in range(ends[place], ends[place + 1])]


class Wholes:
    """Functions that are compiled whole, as by `jax.jit`, and freed after others were called.

    Other than operations that run one by one, they take arrays that a mesh does not divide.
    """

    KEPT = 8
    """Of how many sizes what was compiled is kept, for each kind of call."""

    def __init__(self) -> None:
        self._known: dict[Hashable, dict[Hashable, Callable[..., PyTree]]] = {}

    def __contains__(self, kind: Hashable) -> bool:
        return kind in self._known

    def of(
        self, kind: Hashable, sizes: Hashable, function: Callable[..., PyTree]
    ) -> Callable[..., PyTree]:
        """`function`, compiled whole; of one kind and sizes it is the same again."""
        own = self._known.setdefault(kind, {})
        whole = own.pop(sizes, None) or jax.jit(_fresh(function, "whole"))
        own[sizes] = whole  # the last one now
        for oldest in list(own)[: -self.KEPT]:
            own.pop(oldest, None)
        return whole


def evaluate_shapes(
    function: Callable[..., PyTree],
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
    *,
    name: str,
) -> PyTree:
    """The outputs of `function` as `jax.ShapeDtypeStruct`; traces, compiles nothing.

    Raises:
        CaptureError: Tracing failed.
        UnexpectedCompileError: Called inside `no_compiles()`.
    """
    structures: list[jax.tree_util.PyTreeDef] = []

    def flat(*args: PyTree, **kwargs: PyTree) -> list[PyTree]:
        leaves, structure = jax.tree.flatten(function(*args, **kwargs))
        structures.append(structure)
        return leaves

    with stage_errors("trace", name), tracing_refusals(name):
        leaves = jax.eval_shape(_fresh(flat, name), *args, **kwargs)
    return unflatten_shapes(structures[-1], leaves)


def _fresh(function: Callable[..., PyTree], name: str) -> Callable[..., PyTree]:
    # JAX cannot trace a function that takes `*args` with a keyword of that name.
    def bucket(*_args: PyTree, **_kwargs: PyTree) -> PyTree:
        return function(*_args, **_kwargs)

    bucket.__name__ = bucket.__qualname__ = name
    return bucket


@contextmanager
def stage_errors(stage: str, name: str) -> Iterator[None]:
    """Raises what fails as a `CaptureError` of its stage.

    Raises:
        CaptureError: Something failed.
        ConfigError: XLA does not know one of the compiler options, or its value.
    """
    try:
        yield
    except CUDAGraphError:
        raise
    except Exception as error:
        reason = error_text(error).split("\n", 1)[0].rstrip(". ")
        if stage == "compile" and "INVALID_ARGUMENT" in reason and "option" in reason:
            raise ConfigError(
                f"XLA refuses the compiler options: {reason}: correct compiler_options"
            ) from error
        raise CaptureError(
            f"cannot {stage} {name}: {type(error).__name__}: {reason}", stage=stage
        ) from error


def _flops(compiled: Compiled) -> float | None:
    report = compiled.cost_analysis()
    # A list of one per device in some versions; absent on some backends.
    first = report[0] if isinstance(report, list) and report else report
    flops = first.get("flops") if isinstance(first, dict) else None
    return None if flops is None else float(flops)


@contextmanager
def tracing_refusals(what: str = "a function") -> Iterator[None]:
    """Raises JAX's refusal to trace inside `no_compiles()` as an `UnexpectedCompileError`.

    Args:
        what: What is traced.
    """
    try:
        yield
    except UnexpectedCompileError:
        raise
    except RuntimeError as error:
        # JAX has no class of its own for this; the option's name is in every such message.
        if "no_tracing" not in error_text(error):
            raise
        raise UnexpectedCompileError(f"{what} {REFUSAL} (JAX: {error})") from error
