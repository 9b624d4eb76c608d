"""The only door to `jax.stages`: a function and its shapes in, a compiled executable out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from cudagraph_jax._base.text import said_by
from cudagraph_jax.errors import CaptureError, ConfigError, CUDAGraphError, UnexpectedCompileError
from cudagraph_jax.shapes.pytrees import PyTree

REFUSAL = (
    "had to be compiled inside no_compiles(): warm the bucket up first, keep sizes inside the "
    'limits, and pad and trim in NumPy (unpad="host")'
)
"""What is said of a function that would compile inside `no_compiles()`."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Executable:
    """One XLA executable and what the compiler reports of it.

    Attributes:
        call: The compiled function; strict about shapes, dtypes and pytrees, and it refuses
            tracers.
        compile_ms: Milliseconds to trace, lower and compile; or to load, if it was loaded.
        memory_bytes: Generated code and temporary memory; None if the backend does not say.
        flops: Floating-point operations of one run; None if the backend does not say.
        is_loaded: Whether it was read from a store instead of compiled.
    """

    call: Compiled
    compile_ms: float
    memory_bytes: int | None
    flops: float | None
    is_loaded: bool = False

    @property
    def output_info(self) -> PyTree:
        """Its outputs, with `shape` and `dtype`."""
        return self.call.out_info


@dataclass(frozen=True, slots=True)
class Lowering:
    """A function that is traced and lowered for its arguments, and can be compiled.

    Attributes:
        lowered: JAX's own stage.
        name: What profiles and logs call it.
        took_ms: Milliseconds to trace and lower it.
    """

    lowered: Lowered
    name: str
    took_ms: float

    @property
    def text(self) -> str:
        """Its StableHLO, the same in every process."""
        text: str = self.lowered.as_text()
        return text

    @property
    def output_info(self) -> PyTree:
        """Its outputs, with `shape`, `dtype` and `weak_type`."""
        return self.lowered.out_info

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
                compile_ms=self.took_ms + (clock() - start) * 1e3,
                memory_bytes=_memory_bytes(compiled),
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
    fresh = _fresh(function, name)
    donated = tuple(donate_argnums)
    with stage_errors("trace", name), tracing_refusals(name):
        jitted = jax.jit(fresh, donate_argnums=donated, keep_unused=keep_unused)
        traced = jitted.trace(*args, **kwargs)
    with stage_errors("lower", name), tracing_refusals(name):
        lowered = traced.lower()
    return Lowering(lowered, name, (clock() - start) * 1e3)


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
    with stage_errors("trace", name), tracing_refusals(name):
        return jax.eval_shape(_fresh(function, name), *args, **kwargs)


def _fresh(function: Callable[..., PyTree], name: str) -> Callable[..., PyTree]:
    def bucket(*args: PyTree, **kwargs: PyTree) -> PyTree:
        return function(*args, **kwargs)

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
        reason = said_by(error).split("\n", 1)[0]
        if stage == "compile" and "INVALID_ARGUMENT" in reason and "option" in reason:
            raise ConfigError(
                f"XLA refuses the compiler options: {reason}: correct compiler_options"
            ) from error
        raise CaptureError(
            f"cannot {stage} {name}: {type(error).__name__}: {reason}", stage=stage
        ) from error


def _memory_bytes(compiled: Compiled) -> int | None:
    report = compiled.memory_analysis()
    if report is None:
        return None
    return int(report.generated_code_size_in_bytes + report.temp_size_in_bytes)


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
        if "no_tracing" not in str(error):
            raise
        raise UnexpectedCompileError(f"{what} {REFUSAL} (JAX: {error})") from error
