"""The specification's calls: functions of one pytree, whose axes are found by their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import jax

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.graphs.call import Call, Declared, describe_call
from cudagraph_jax.graphs.program import Program, Target
from cudagraph_jax.shapes.axes import LeafAxes, axes_by_size
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.prefix import PyTree
from cudagraph_jax.shapes.structs import as_structs, describe_mismatch

Function = Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Stands for a function that cannot be hashed; it keeps the function, so ids stay unique."""

    function: Function = dataclasses.field(hash=False, compare=False)
    number: int

    @classmethod
    def of(cls, function: Function) -> Hashable:
        """`function` itself where it can be hashed, else a stand-in."""
        try:
            hash(function)
        except TypeError:
            return cls(function, id(function))
        return function


def function_name(function: Callable[..., PyTree]) -> str:
    """What profiles and messages call `function`."""
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def single_call(function: Function, inputs: PyTree, sizes: Bucket) -> Call:
    """The description of `function(inputs)`.

    Raises:
        InputShapeError: A leaf of `inputs` is nothing that JAX computes with.
    """
    patterns = [_axes(leaf, sizes) for leaf in jax.tree.leaves(inputs)]
    call = describe_call(
        Identity.of(function),
        (inputs,),
        {},
        declared=Declared(patterns, [0] * len(patterns), ("inputs",)),
        name=function_name(function),
    )
    # The caller's word counts, also where no array carries a size.
    return dataclasses.replace(call, sizes=sizes)


def single_target(function: Function) -> Target:
    """`function` as what a program is made of."""
    return Target(function, function_name(function))


def single_program(function: Function, inputs: PyTree, sizes: Bucket) -> Program:
    """The program of `function(inputs)`."""
    return Program(single_target(function), single_call(function, inputs, sizes))


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
