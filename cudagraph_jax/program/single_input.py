"""The specification's calls: functions of one pytree, whose axes are found by their sizes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from types import FunctionType

import jax

from cudagraph_jax._base.checks import request_size, require_arrays_from
from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.program.arguments import commitments
from cudagraph_jax.program.call import Call, Declarations, Target, describe_call, is_array
from cudagraph_jax.program.function_ref import FunctionRef
from cudagraph_jax.program.padded import flatten_arguments
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import LeafAxes, axes_by_size
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import UNCHOSEN
from cudagraph_jax.shapes.pytrees import PyTree, as_structs, describe_mismatch
from cudagraph_jax.xla.settings import current_settings

Function = Callable[[PyTree], PyTree]


def function_name(function: Callable[..., PyTree]) -> str:
    """What profiles and messages call `function`."""
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def single_call(
    function: Function,
    inputs: PyTree,
    sizes: Bucket,
    *,
    output_shapes: PyTree = None,
    keeps_function: bool = False,
) -> Call:
    """The description of `function(inputs)`.

    Args:
        function: The function.
        inputs: Its only argument.
        sizes: The call's (batch, seq_len).
        output_shapes: What it is expected to give at these sizes; None: anything.
        keeps_function: Whether what is captured for it keeps it alive.

    Raises:
        ConfigError: The function cannot be called, or is a coroutine or generator function.
        InputShapeError: A leaf of `inputs` is nothing that JAX computes with.
    """
    require_arrays_from("function", function)
    patterns = [_axes(leaf, sizes) for leaf in flatten_arguments(inputs)[0]]
    reference = FunctionRef(function)
    call = describe_call(
        reference,
        (inputs,),
        {},
        declared=Declarations(patterns, [UNCHOSEN] * len(patterns), ("inputs",)),
        target=Target(
            function if keeps_function else reference,
            function_name(function),
            single_input=True,
            output_shapes=output_shapes,
        ),
    )
    # The caller's word counts, also where no array carries a size.
    return dataclasses.replace(call, sizes=sizes)


def request_sizes(batch_size: int, seq_len: int) -> Bucket:
    """The (batch, seq_len) of a request, each 0 or more.

    Raises:
        InputShapeError: One is no such integer.
    """
    return _sizes(batch_size, seq_len, minimum=0)


def capture_sizes(batch_size: int, seq_len: int) -> Bucket:
    """The (batch, seq_len) of a bucket, each 1 or more.

    Raises:
        InputShapeError: One is no such integer.
    """
    return _sizes(batch_size, seq_len, minimum=1)


def _sizes(batch_size: int, seq_len: int, *, minimum: int) -> Bucket:
    return Bucket(
        request_size("batch_size", batch_size, minimum=minimum),
        request_size("seq_len", seq_len, minimum=minimum),
    )


def single_program(
    function: Function, input_shapes: PyTree, output_shapes: PyTree, sizes: Bucket
) -> tuple[Program, Call]:
    """The program of `function` for inputs of these shapes, and a call of it.

    Raises:
        InputShapeError: `input_shapes` are no shapes, or `output_shapes` not what comes.
        CaptureError: The function cannot be traced.
    """
    structs = as_structs(input_shapes, name="input_shapes")
    call = single_call(function, structs, sizes, keeps_function=True)
    program = Program(call)
    if output_shapes is not None:
        check_outputs(program, sizes, output_shapes)
    return program, call


def check_outputs(program: Program, sizes: Bucket, output_shapes: PyTree) -> None:
    """Raises unless `program` gives `output_shapes` at `sizes`.

    Raises:
        InputShapeError: It gives something else.
        CaptureError: It cannot be traced.
    """
    found = program.evaluate(sizes)
    mismatch = describe_mismatch(as_structs(output_shapes, name="output_shapes"), found)
    if mismatch is not None:
        raise InputShapeError(
            f"output_shapes do not match what {program.target.name} gives at {sizes}: {mismatch}"
        )


def check_inputs(inputs: PyTree, input_shapes: PyTree) -> None:
    """Raises unless `inputs` have the shapes and dtypes of `input_shapes`.

    Raises:
        InputShapeError: They have not.
    """
    declared = as_structs(input_shapes, name="input_shapes")
    mismatch = describe_mismatch(declared, as_structs(inputs, name="inputs"))
    if mismatch is not None:
        raise InputShapeError(f"input_shapes do not match the inputs: {mismatch}")


def _axes(leaf: object, sizes: Bucket) -> LeafAxes | None:
    axes = axes_by_size(getattr(leaf, "shape", ()), sizes)
    return None if axes.passes_through else axes


def route_key(
    function: Callable[[PyTree], PyTree], inputs: PyTree, sizes: Bucket
) -> Hashable | None:
    """What the route of `function(inputs)` depends on; None where it cannot be remembered."""
    leaves, structure = jax.tree.flatten(inputs)
    if not all(map(is_array, leaves)):
        return None  # a Python number, or what JAX does not take as it is
    known_by = weakref.ref if type(function) is FunctionType else FunctionRef
    arrays = [(leaf.shape, leaf.dtype) for leaf in leaves]
    placed = (current_settings(), commitments(leaves))
    key = (known_by(function), sizes, structure, placed, *arrays)
    try:
        hash(key)
    except TypeError:
        return None  # what is static in a pytree may be anything
    return key


def any_function(inputs: PyTree) -> PyTree:
    """Stands for a function that is not known."""
    return inputs
