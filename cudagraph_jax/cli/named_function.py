"""A function that is named on a command line, and what XLA records of it."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from cudagraph_jax._base.checks import nearest
from cudagraph_jax._base.text import error_text
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.bucket_jit import bucket_jit
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.graphs.inspection import inspect
from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.program.program import Program
from cudagraph_jax.report.command_buffers import Inspection
from cudagraph_jax.shapes.axes import AxisPattern, Length
from cudagraph_jax.shapes.ladder import Bucket

_SPEC = re.compile(r"(\w+)\[([\w, *+/-]*)\]")
Bucketed = BucketedFunction[..., Any]


def inspected(
    function: str,
    sizes: Mapping[str, int],
    *,
    arguments: Sequence[str],
    example: str | None,
    scopes: Sequence[CommandBufferScope],
    in_axes: Sequence[str] = (),
    compiler_options: Sequence[str] = (),
    gpu: str | None = None,
) -> Inspection:
    """What XLA records of a function that is named on a command line.

    Args:
        function: `MODULE:FUNCTION`.
        sizes: Those of the bucket, by the name of their axis.
        arguments: Descriptions of the positional arguments, such as `int32[batch,seq]`.
        example: What the module has them in.
        scopes: What to compile it with.
        in_axes: The axes of each argument of the example, where the function is a plain one.
        compiler_options: Further options of XLA for all of it, as `NAME=VALUE`.
        gpu: The GPU to compile for; None: for the default backend.

    Raises:
        ConfigError: Something of this is not there, or does not fit.
        CaptureError: The function cannot be compiled, or XLA dumped nothing.
    """
    module, found = _found(function)
    specs = [_spec(text, sizes) for text in arguments]
    if specs and example is not None:
        raise ConfigError("--arg and --example both describe the arguments: give one of the two")
    args = tuple(struct for struct, _ in specs) if example is None else _example(module, example)
    if in_axes and (example is None or isinstance(found, BucketedFunction)):
        raise ConfigError(
            f"--in-axes is for a plain function with --example, not for {function}: leave it out"
        )
    if isinstance(found, BucketedFunction):
        bucketed, own = found, found.manager.config.xla_options()
    else:
        axes = [axes for _, axes in specs] if specs else _in_axes(function, in_axes, args)
        config = CUDAGraphConfig(capture_axes=_ladders(axes, sizes))
        bucketed, own = bucket_jit(found, in_axes=axes, config=config), None
    options = compiled_with(own, scopes, compiler_options)
    program = _program(bucketed, args)
    with without_cache():
        return inspect(program, _bucket(program, sizes), options, gpu=gpu)


def compiled_with(
    own: Mapping[str, str] | None, scopes: Sequence[CommandBufferScope], further: Sequence[str]
) -> dict[str, dict[str, str]]:
    """XLA's options for each compile, by what the result calls it.

    Args:
        own: Those of a bucketed function, with which it is compiled first; None: it is a plain one.
        scopes: What to compile it with besides, its other options being as they are.
        further: Options for all of it, as `NAME=VALUE`.

    Raises:
        ConfigError: One of `further` is written otherwise.
    """
    options = {} if own is None else {"own options": dict(own)}
    options |= {scope.name: scope.in_place_of(own or {}) for scope in scopes}
    added = dict(_option(text) for text in further)
    return {name: {**given, **added} for name, given in options.items()}


@contextmanager
def without_cache() -> Iterator[None]:
    """Without JAX's persistent cache: what it gives is not dumped, nor can it take all of this."""
    name = "jax_enable_compilation_cache"
    usual = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, usual)


def _program(bucketed: Bucketed, args: tuple[Any, ...]) -> Program:
    if args:
        call = bucketed.describe(*args)
        return Program(call)
    captured = bucketed.registry.entries()
    if not captured:
        raise ConfigError(
            f"{bucketed!r} has captured nothing yet, so its arguments are not known: describe "
            "them with --arg or --example"
        )
    return captured[0].program


def _bucket(program: Program, sizes: Mapping[str, int]) -> Bucket:
    """The bucket, with the example's size where no argument carries one, or none was given."""
    for axis in sizes.keys() - {"batch", "seq"}:
        if axis not in program.carried:
            raise ConfigError(
                f"--size {axis}={sizes[axis]}: no argument of {program.target.name} carries "
                f"{axis!r}; {nearest(axis, program.carried)}"
            )
    given = {axis: size for axis, size in sizes.items() if axis in program.carried}
    return program.example.sizes.with_sizes(given)


def _ladders(axes: Sequence[str | None], sizes: Mapping[str, int]) -> dict[str, tuple[int]]:
    """One size for each further axis, as a plain function is compiled for one bucket."""
    lengths = [length for text in axes if text for length in AxisPattern.parse(text).lengths]
    names = {length.axis for length in lengths} - {"batch", "seq"}
    return {name: (sizes.get(name, 1),) for name in names}


def _found(text: str) -> tuple[ModuleType, Callable[..., Any]]:
    name, colon, attribute = text.partition(":")
    if not (name and colon and attribute):
        raise ConfigError(f"{text!r} names no function: write MODULE:FUNCTION, as model:embed")
    # As `python -m` does, and an installed command does not.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(name)
    except CUDAGraphError:
        raise
    except Exception as error:
        remedy = ""
        if isinstance(error, ModuleNotFoundError) and name.endswith(".py"):
            module_name = name.removesuffix(".py").replace("/", ".")
            remedy = f": write the module, not its file: {module_name}:{attribute}"
        elif isinstance(error, ModuleNotFoundError) and error.name == name:
            remedy = ": run it from the directory that has the module"
        raise ConfigError(
            f"cannot import {name}: {type(error).__name__}: {error_text(error)}{remedy}"
        ) from error
    found = _attribute(module, attribute)
    if not callable(found):
        raise ConfigError(f"{text} is no function but {found!r:.60}")
    return module, found


def _attribute(module: ModuleType, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise ConfigError(f"{module.__name__} has no {path}: {error_text(error)}") from error
    return found


def _example(module: ModuleType, name: str) -> tuple[Any, ...]:
    found = _attribute(module, name)
    args = found() if callable(found) else found
    if not isinstance(args, (tuple, list)) or not args:
        raise ConfigError(
            f"{module.__name__}.{name} gives {args!r:.60}: it must give the positional arguments "
            "as a tuple"
        )
    return tuple(args)


def _spec(text: str, sizes: Mapping[str, int]) -> tuple[jax.ShapeDtypeStruct, str | None]:
    """An argument in a call of `sizes`, and its entry of `in_axes`."""
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"--arg {text!r} describes no array: write it as 'int32[batch,seq]'")
    dims = [dim.strip() for dim in found[2].split(",")] if found[2].strip() else []
    lengths = [Length.parse(dim) for dim in dims]
    for dim, length in zip(dims, lengths, strict=True):
        is_known = length is not None and length.axis in sizes
        if not is_known and not re.fullmatch(r"[1-9][0-9]{0,14}", dim):
            raise ConfigError(
                f"--arg {text!r} has the dimension {dim!r}: use a number, batch, seq, or the axis "
                "of a --size, as in --size height=224"
            )
    try:
        dtype = jnp.dtype(found[1])
    except TypeError as error:
        raise ConfigError(f"--arg {text!r} has an unknown dtype: {found[1]}") from error
    bucket = Bucket.of(sizes)
    shape = [
        int(dim) if length is None else length.of(bucket)
        for dim, length in zip(dims, lengths, strict=True)
    ]
    axes = " ".join("_" if length is None else str(length) for length in lengths)
    return jax.ShapeDtypeStruct(shape, dtype), axes if any(lengths) else None


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"--option {text!r} sets nothing: write it as NAME=VALUE")
    return name, value


def _in_axes(function: str, axes: Sequence[str], args: tuple[Any, ...]) -> list[str | None]:
    if not args:
        raise ConfigError(
            f"{function} is a plain function: describe its arguments with --arg, once for each, "
            "or with --example and --in-axes"
        )
    if len(axes) != len(args):
        shown = ", ".join(_shape(arg) for arg in args)
        wanted = " ".join(["--in-axes none"] * (len(args) - 1) + ["--in-axes 'batch ...'"])
        raise ConfigError(
            f"{function} is a plain function, and its example has {len(args)} argument(s), "
            f"{shown}, for {len(axes)} --in-axes: say which of their dimensions are "
            f"batch, seq or another axis, once for each, as in {wanted}"
        )
    return [None if text.strip().lower() == "none" else text for text in axes]


def _shape(arg: object) -> str:
    if hasattr(arg, "shape") and hasattr(arg, "dtype"):
        return f"{arg.dtype}[{','.join(map(str, arg.shape))}]"
    return f"a {type(arg).__name__}"
