"""Finds the function that `cudagraph-jax inspect` names, and inspects it."""

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

from cudagraph_jax.dispatch.bucket_jit import bucket_jit
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.graphs.inspection import inspect
from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.program.program import Program
from cudagraph_jax.report.command_buffers import Inspection
from cudagraph_jax.shapes.ladder import Bucket

_SPEC = re.compile(r"(\w+)\[([\w, ]*)\]")
_SIZES = ("batch", "seq")

Bucketed = BucketedFunction[..., Any]


def inspected(
    function: str,
    bucket: Bucket,
    *,
    arguments: Sequence[str],
    example: str | None,
    scopes: Sequence[CommandBufferScope],
    compiler_options: Sequence[str] = (),
    gpu: str | None = None,
) -> Inspection:
    """What XLA records of a function that is named on a command line.

    Args:
        function: `MODULE:FUNCTION`.
        bucket: The sizes.
        arguments: Descriptions of the positional arguments, such as `int32[batch,seq]`.
        example: What the module has them in.
        scopes: What to compile it with.
        compiler_options: Further options of XLA for all of it, as `NAME=VALUE`.
        gpu: The GPU to compile for; None: for the default backend.

    Raises:
        ConfigError: Something of this is not there, or does not fit.
        CaptureError: The function cannot be compiled, or XLA dumped nothing.
    """
    module, found = _found(function)
    specs = [_spec(text) for text in arguments]
    if specs and example is not None:
        raise ConfigError("--arg and --example both describe the arguments: give one of the two")
    if isinstance(found, BucketedFunction):
        bucketed, own = found, found.manager.config.xla_options()
    else:
        bucketed, own = bucket_jit(found, in_axes=_in_axes(function, specs)), None
    options = compiled_with(own, scopes, compiler_options)
    args = tuple(struct for struct, _ in specs) if example is None else _example(module, example)
    program = _program(bucketed, args, bucket)
    with without_cache():
        return inspect(program, _carried(program, bucket), options, gpu=gpu)


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


def _program(bucketed: Bucketed, args: tuple[Any, ...], bucket: Bucket) -> Program:
    if args:
        task = bucketed.task(*args)
        return Program(task.target, task.call)
    captured = bucketed.registry.entries()
    if not captured:
        raise ConfigError(
            f"{bucketed!r} has captured nothing yet, so its arguments are not known: describe "
            "them with --arg or --example"
        )
    return captured[0].program


def _carried(program: Program, bucket: Bucket) -> Bucket:
    """The bucket, with the example's size where no argument carries one."""
    sizes = program.example.sizes
    return Bucket(
        bucket.batch_size if program.carries_batch else sizes.batch_size,
        bucket.seq_len if program.carries_seq else sizes.seq_len,
    )


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
        is_nowhere = isinstance(error, ModuleNotFoundError) and error.name == name
        remedy = ": run it from the directory that has the module" if is_nowhere else ""
        raise ConfigError(
            f"cannot import {name}: {type(error).__name__}: {error}{remedy}"
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
            raise ConfigError(f"{module.__name__} has no {path}: {error}") from error
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


def _spec(text: str) -> tuple[jax.ShapeDtypeStruct, str | None]:
    """An argument, and its entry of `in_axes`."""
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"--arg {text!r} describes no array: write it as 'int32[batch,seq]'")
    dims = [dim.strip() for dim in found[2].split(",")] if found[2].strip() else []
    for dim in dims:
        if dim not in _SIZES and not re.fullmatch(r"[1-9][0-9]{0,14}", dim):
            raise ConfigError(
                f"--arg {text!r} has the dimension {dim!r}: use a number, batch or seq"
            )
    try:
        dtype = jnp.dtype(found[1])
    except TypeError as error:
        raise ConfigError(f"--arg {text!r} has an unknown dtype: {found[1]}") from error
    struct = jax.ShapeDtypeStruct([1 if dim in _SIZES else int(dim) for dim in dims], dtype)
    if not set(dims) & set(_SIZES):
        return struct, None
    return struct, " ".join(dim if dim in _SIZES else "_" for dim in dims)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"--option {text!r} sets nothing: write it as NAME=VALUE")
    return name, value


def _in_axes(function: str, specs: Sequence[tuple[object, str | None]]) -> tuple[str | None, ...]:
    if not specs:
        raise ConfigError(
            f"{function} is a plain function: describe its arguments with --arg, once for each"
        )
    return tuple(axes for _, axes in specs)
