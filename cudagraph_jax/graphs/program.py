"""A function whose inputs are fixed but for the two sizes: what every bucket of it shares."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.fork import forkable_lock
from cudagraph_jax.graphs.call import Call, abstract_call
from cudagraph_jax.graphs.executable import Executable, compile_function, evaluate_shapes
from cudagraph_jax.graphs.variant import AbstractLeaf, Variant
from cudagraph_jax.shapes.axes import AxisPattern, LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.outputs import OutputAxes, OutputShape, infer_output_axes
from cudagraph_jax.shapes.padding import PadValue
from cudagraph_jax.shapes.prefix import PyTree, broadcast_prefix

Unpad = Literal["host", "device", "none"]


@dataclass(frozen=True, slots=True)
class Target:
    """The function of a program, and what is asked of its outputs.

    Attributes:
        function: Takes the program's arguments.
        name: What profiles and messages call it.
        unpad: A pytree prefix of `Unpad` for the outputs.
        out_axes: A pytree prefix of axis patterns for the outputs; None: they are found.
        donate_argnums: Positions of the arguments whose buffers may be taken over.
        mask_argname: The keyword that takes `bool[batch, seq]`, True where an element is real.
    """

    function: Callable[..., PyTree]
    name: str
    unpad: PyTree = "host"
    out_axes: PyTree = None
    donate_argnums: tuple[int, ...] = ()
    mask_argname: str | None = None


class OutputLeaf(NamedTuple):
    """One output array of a program.

    Attributes:
        name: What errors call it.
        axes: Where it carries the two sizes.
        unpad: What the caller gets of it.
        ndim: Its rank.
        comparable: Whether `axes` is known and NumPy can hold it; always so where it is trimmed.
    """

    name: str
    axes: LeafAxes
    unpad: Unpad
    ndim: int
    comparable: bool = True


class Outputs(NamedTuple):
    """All outputs of a program: the same for each of its buckets."""

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[OutputLeaf, ...]


class Program:
    """A function with its arguments described: it can compile itself for any bucket.

    Args:
        target: The function and what is asked of its outputs.
        call: A call whose arrays have the program's dtypes and other dimensions.

    Attributes:
        example: That call without its arrays.
    """

    def __init__(self, target: Target, call: Call) -> None:
        self.target = target
        self.variant: Variant = call.variant
        self.axes: tuple[LeafAxes, ...] = call.axes
        self.pad_values: tuple[PadValue, ...] = tuple(call.declared.pad_values)
        self.argument_names = tuple(call.declared.argument_names)
        # Keys cannot be made up for a run without a request, and take next to no memory.
        self.keys = {
            index: leaf
            for index, leaf in enumerate(call.leaves)
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        }
        self.example = abstract_call(call)
        # Parameters live on with the server; a run without a request borrows them while they do.
        self._passed = {
            index: weakref.ref(leaf)
            for index, (leaf, axes) in enumerate(zip(call.leaves, call.axes, strict=True))
            if axes.passes_through and isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim
        }
        self._outputs: Outputs | None = None
        self._lock = forkable_lock()

    @property
    def donated_leaves(self) -> list[int]:
        """The places of the leaves whose buffers a run may use up."""
        args, _ = jax.tree.unflatten(self.variant.structure, range(len(self.axes)))
        return jax.tree.leaves([args[position] for position in self.target.donate_argnums])

    def known_leaves(self) -> list[object]:
        """The leaves of the call that it was made from, those arrays that are gone as shapes."""
        leaves = list(self.example.leaves)
        for index, reference in self._passed.items():
            leaf = reference()
            leaves[index] = leaves[index] if leaf is None else leaf
        return [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            if isinstance(leaf, jax.Array) and leaf.is_deleted()
            else leaf
            for leaf in leaves
        ]

    @property
    def leaf_pads(self) -> tuple[PadValue, ...]:
        """What each leaf is padded with, those of keyword arguments included."""
        return self.pad_values + (0,) * (len(self.axes) - len(self.pad_values))

    @property
    def carries_batch(self) -> bool:
        """Whether any input carries the batch."""
        return any(axes.batch is not None for axes in self.axes)

    @property
    def carries_seq(self) -> bool:
        """Whether any input carries the sequence."""
        return any(axes.seq is not None for axes in self.axes)

    def arguments(self, bucket: Bucket) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
        """Positional and keyword arguments of `bucket`'s size, as `jax.ShapeDtypeStruct`."""
        leaves = [
            _struct(leaf, axes, bucket)
            for leaf, axes in zip(self.variant.leaves, self.axes, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(self.variant.structure, leaves)
        if self.target.mask_argname is not None:
            kwargs = {**kwargs, self.target.mask_argname: jax.ShapeDtypeStruct(bucket, np.bool_)}
        return args, kwargs

    def padded_with(self, pad_values: Sequence[PadValue]) -> Program:
        """The same program with other padding."""
        other = copy.copy(self)
        other.pad_values = tuple(pad_values)
        return other

    def compile(
        self,
        bucket: Bucket,
        *,
        compiler_options: Mapping[str, str],
        clock: Callable[[], float],
    ) -> Executable:
        """The executable of `bucket`.

        Raises:
            CaptureError: Tracing, lowering or compiling failed.
        """
        args, kwargs = self.arguments(bucket)
        return compile_function(
            self.target.function,
            args,
            kwargs,
            name=f"{self.target.name}_{bucket}",
            donate_argnums=self.target.donate_argnums,
            compiler_options=compiler_options,
            clock=clock,
        )

    def outputs(self, bucket: Bucket, *, others: Sequence[Bucket] = ()) -> Outputs:
        """The outputs' axes; found once, by abstract evaluation at up to three sizes.

        Args:
            bucket: A size that the function takes.
            others: Further sizes that it probably takes, best first.

        Raises:
            CaptureError: The function cannot be traced at `bucket`.
            InputShapeError: An output that must be trimmed has a dimension that follows the sizes
                without being one of them, or `out_axes` or `unpad` do not fit the outputs.
        """
        with self._lock:
            if self._outputs is None:
                self._outputs = self._find_outputs(bucket, others)
            return self._outputs

    def evaluate(self, bucket: Bucket) -> PyTree:
        """The outputs at `bucket`, as `jax.ShapeDtypeStruct`; compiles nothing.

        Raises:
            CaptureError: The function cannot be traced.
        """
        args, kwargs = self.arguments(bucket)
        return evaluate_shapes(self.target.function, args, kwargs, name=self.target.name)

    def _find_outputs(self, bucket: Bucket, others: Sequence[Bucket]) -> Outputs:
        tree = self.evaluate(bucket)
        arrays, structure = jax.tree.flatten(tree)
        modes = broadcast_prefix(self.target.unpad, tree, name="unpad")
        found = (
            self._infer(bucket, others)
            if self.target.out_axes is None
            else _declared(self.target.out_axes, tree, bucket)
        )
        leaves = tuple(
            _output_leaf(array, axes, mode)
            for array, axes, mode in zip(arrays, found, modes, strict=True)
        )
        return Outputs(structure, leaves)

    def _infer(self, bucket: Bucket, others: Sequence[Bucket]) -> tuple[OutputAxes, ...]:
        batches = [size.batch_size for size in others] + [bucket.batch_size * 2]
        lengths = [size.seq_len for size in others] + [bucket.seq_len * 2]
        return infer_output_axes(
            lambda size: _named(self.evaluate(size)),
            base=bucket,
            batches=_distinct(batches, bucket.batch_size) if self.carries_batch else (),
            lengths=_distinct(lengths, bucket.seq_len) if self.carries_seq else (),
        )


def _struct(leaf: AbstractLeaf, axes: LeafAxes, bucket: Bucket) -> jax.ShapeDtypeStruct:
    shape = axes.resize(tuple(size or 0 for size in leaf.shape), bucket)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.weak_type)


def _distinct(sizes: Sequence[int], known: int) -> list[int]:
    return [size for size in dict.fromkeys(sizes) if size != known]


def _named(tree: PyTree) -> list[OutputShape]:
    found = []
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        where = jax.tree_util.keystr(path)
        found.append(OutputShape(f"output {where}" if where else "the output", array.shape))
    return found


def _declared(out_axes: PyTree, tree: PyTree, bucket: Bucket) -> list[OutputAxes]:
    patterns = broadcast_prefix(out_axes, tree, name="out_axes")
    found = []
    for pattern, (name, shape) in zip(patterns, _named(tree), strict=True):
        axes = (
            AxisPattern.parse(pattern).resolve(len(shape), name=name)
            if isinstance(pattern, str)
            else LeafAxes()
        )
        if axes.resize(shape, bucket) != shape:
            raise InputShapeError(
                f"{name} has the shape {shape} at (batch, seq_len)={tuple(bucket)}, but out_axes "
                f"says {pattern!r}: correct out_axes, or leave it out to have it found"
            )
        found.append(OutputAxes(name, axes))
    return found


def _output_leaf(array: jax.ShapeDtypeStruct, found: OutputAxes, mode: object) -> OutputLeaf:
    unpad = check_unpad(mode)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    if unpad == "none":
        comparable = found.problem is None and not is_key
        return OutputLeaf(found.name, found.axes, unpad, len(array.shape), comparable)
    if unpad == "host" and is_key:
        raise InputShapeError(
            f"{found.name} is a PRNG key array, which NumPy cannot hold: "
            'return jax.random.key_data of it, or ask for unpad="device" or "none"'
        )
    return OutputLeaf(found.name, found.checked(), unpad, len(array.shape), not is_key)


def check_unpad(mode: object) -> Unpad:
    """`mode` as one of the three ways to hand out an output.

    Raises:
        InputShapeError: It is none of them.
    """
    if mode == "host" or mode == "device" or mode == "none":
        return mode
    raise InputShapeError(f'unpad={mode!r} is unknown: use "host", "device" or "none"')
