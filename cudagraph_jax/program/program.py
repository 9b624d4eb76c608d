"""A function whose inputs are fixed but for the sizes of a call, and what to compile of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import CaptureError, InputShapeError
from cudagraph_jax.program.arguments import checks_of
from cudagraph_jax.program.call import (
    AbstractLeaf,
    Call,
    Declarations,
    Variant,
    abstract_call,
    argument_leaf_names,
    is_key,
)
from cudagraph_jax.program.donation import copied_key
from cudagraph_jax.program.outputs import (
    OutputLeaf,
    Outputs,
    RealOutputs,
    declared_outputs,
    evaluated_outputs,
    outputs_at_size,
    outputs_of,
    real_outputs,
    untrimmed_outputs,
)
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.output_axes import (
    FoundAxes,
    OutputsAtSize,
    Probes,
    check_declared_axes,
    infer_output_axes,
    refuse_steps,
)
from cudagraph_jax.shapes.padding import PadValue
from cudagraph_jax.shapes.pytrees import PyTree, leaves_of_arguments, unflatten_shapes
from cudagraph_jax.xla.settings import ThreadSettings, mesh_of
from cudagraph_jax.xla.shardings import along, dividing, is_spread, multiples_of
from cudagraph_jax.xla.stages import (
    Executable,
    Lowering,
    evaluate_shapes,
    lower_function,
    stage_errors,
)


class Program:
    """A function with its arguments described: it can compile itself for any bucket.

    Args:
        call: A call whose arrays have the program's dtypes and other dimensions.

    Attributes:
        target: The function and what is asked of its outputs.
        example: The last call without its arrays; what it gave as a shape is of those before.
        argument_leaves: Which leaves belong to each positional argument.
        carried: The axes whose sizes its inputs carry.
        shardings: Where its inputs are declared to be; see `Declarations`.
        is_sharded: Whether it runs on several devices.
        is_cut: Whether what carries sizes lies on several devices.
        on_left: Those of them whose padding stands on the left.
        checks: What the arguments of its calls must be, beside what the executable checks.
        known_outputs: The outputs at the first bucket; None before. Others may have their own.
        settings: Those of the thread that called first, for threads that capture in its place.
    """

    def __init__(self, call: Call) -> None:
        self.target = call.target
        self.variant: Variant = call.variant
        self.axes: tuple[LeafAxes, ...] = call.axes
        self.pad_values: tuple[PadValue, ...] = tuple(call.declared.pad_values)
        self.argument_names = tuple(call.declared.argument_names)
        self.argument_leaves, _ = leaves_of_arguments(call.variant.structure)
        self.carried = call.carried
        self.shardings = call.declared.shardings
        spread = [
            axes
            for axes, leaf in zip(call.axes, call.variant.leaves, strict=True)
            if is_spread(leaf.sharding)
        ]
        self.is_cut = not all(axes.passes_through for axes in spread)
        self.on_left = frozenset(axis for axes in call.axes for axis in axes.on_left)
        self.checks = checks_of(call)
        self.settings = ThreadSettings()
        mesh = mesh_of(self.settings.values)
        self.is_sharded = bool(spread) or (mesh is not None and mesh.size > 1)
        self.known_outputs: Outputs | None = None
        self._first: dict[str, tuple[Outputs, list[jax.ShapeDtypeStruct]]] = {}
        self._known_arrays: list[jax.ShapeDtypeStruct] | None = None
        self._most_rows = 0
        self._known_moves: dict[tuple[tuple[str, ...], tuple[str, ...]], bool] = {}
        self.keys: dict[int, jax.Array] = {}
        self.example = abstract_call(call)
        self._passed: dict[int, weakref.ref[Any]] = {}
        self.renew(call)

    def renew(self, call: Call) -> None:
        """Takes what runs without a request borrow from another call of the same variant."""
        # Keys cannot be made up for a run without a request, and take next to no memory.
        donated = self.donated_leaves
        keys = {
            index: copied_key(leaf) if index in donated else leaf
            for index, leaf in enumerate(call.leaves)
            if is_key(leaf)
        }
        # Parameters live on with the server; a run without a request borrows them while they do.
        passed = {
            index: weakref.ref(leaf)
            for index, (leaf, axes) in enumerate(zip(call.leaves, call.axes, strict=True))
            if axes.passes_through and isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim
        }
        self.keys, self._passed = {**self.keys, **keys}, {**self._passed, **passed}
        self.example = abstract_call(call, unknown=self.example.leaves)

    @property
    def declared(self) -> Declarations:
        """How the leaves of its calls are declared, as far as it is known by now."""
        return Declarations(
            self.axes,
            self.pad_values,
            self.argument_names,
            shardings=self.shardings,
            usual=[leaf.sharding for leaf in self.variant.leaves],
        )

    @property
    def multiples(self) -> dict[str, int]:
        """What the sizes of its buckets have to be multiples of, to be cut as its inputs are."""
        placed = (leaf.sharding for leaf in self.variant.leaves)
        return multiples_of(zip(self.axes, placed, strict=True))

    def homes(self, bucket: Bucket) -> list[Sharding | None]:
        """Where each leaf is in a call of `bucket`; None: where JAX puts it."""
        return declared_homes(self.variant.leaves, self.axes, bucket)

    @property
    def donated_leaves(self) -> list[int]:
        """The places of the leaves whose buffers a run may use up."""
        donated = (self.argument_leaves[position] for position in self.target.donate_argnums)
        return [index for argument in donated for index in argument.indices]

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

    def arguments(self, bucket: Bucket) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
        """Positional and keyword arguments of `bucket`'s size, as `jax.ShapeDtypeStruct`.

        Raises:
            CaptureError: A length that follows is below 0, or a pytree class refuses that size.
        """
        self._check_lengths(bucket)
        leaves = [
            _struct(leaf, axes, bucket)
            for leaf, axes in zip(self.variant.leaves, self.axes, strict=True)
        ]
        with stage_errors("trace", self.target.name):  # a pytree class may refuse this size
            args, kwargs = unflatten_shapes(self.variant.structure, leaves)
        homes = self.mask_homes(bucket)
        masks = {
            mask.name: jax.ShapeDtypeStruct(
                mask.shape(self.carried, bucket), np.bool_, sharding=homes.get(mask.name)
            )
            for mask in self.target.masks
        }
        return args, {**kwargs, **masks}

    def mask_homes(self, bucket: Bucket) -> dict[str, Sharding]:
        """Where each mask is that has the axes of an array over a mesh: cut as that one is."""
        found: dict[str, Sharding] = {}
        for mask in self.target.masks if self.is_cut else ():
            names = self.carried if mask.axes is None else mask.axes
            for leaf, axes in zip(self.variant.leaves, self.axes, strict=True):
                places = [place for name in names if (place := axes.place(name)) is not None]
                cut = along(leaf.sharding, places)
                if cut is not None and len(places) == len(names):
                    found[mask.name] = dividing(cut, mask.shape(self.carried, bucket))
                    break
        return found

    def _check_lengths(self, bucket: Bucket) -> None:
        for index, axes in enumerate(self.axes):
            for place, length in axes.dims:
                if length.of(bucket) >= 0:
                    continue
                example = self.example
                names = argument_leaf_names(self.argument_names, example.args, example.kwargs)
                raise CaptureError(
                    f"{names[index]} has no bucket {bucket}, where {length} in dimension {place} "
                    f"is {length.of(bucket)}: leave so small a {length.axis} out of the grid",
                    stage="trace",
                )

    def padded_with(self, pad_values: Sequence[PadValue]) -> Program:
        """The same program with other padding."""
        other = copy.copy(self)
        other.pad_values = tuple(pad_values)
        return other

    def lower(
        self,
        bucket: Bucket,
        *,
        clock: Callable[[], float],
        keep_unused: bool = False,
        name: str | None = None,
        device: jax.Device | None = None,
    ) -> Lowering:
        """The function lowered for `bucket`, and for `device` if given; see `lower_function`.

        Raises:
            CaptureError: Tracing or lowering failed.
        """
        args, kwargs = self.arguments(bucket)
        if device is not None:
            args, kwargs = jax.tree.map(partial(_placed, device=device), (args, kwargs))
        return lower_function(
            self.target.function,
            args,
            kwargs,
            name=f"{self.target.name}_{bucket}" if name is None else name,
            donate_argnums=self.target.donate_argnums,
            keep_unused=keep_unused,
            clock=clock,
        )

    def outputs(
        self,
        bucket: Bucket,
        *,
        tree: PyTree = None,
        others: Sequence[Bucket] = (),
        searches: bool = True,
    ) -> Outputs:
        """The outputs' axes; found at one bucket, and the same for the next.

        Args:
            bucket: A size that the function takes.
            tree: The outputs there, as a trace gave them; traced here if None.
            others: Further sizes that it probably takes, best first.
            searches: Whether to find the axes of outputs that nobody trims, too.

        Raises:
            CaptureError: The function cannot be traced at `bucket`.
            InputShapeError: An output that must be trimmed has a dimension that follows the sizes
                without being one of them, or `out_axes` or `unpad` do not fit the outputs.
        """
        known = self.known_outputs
        if known is not None and (tree is None or self._fits(known, tree, bucket)):
            return known
        # Without a lock: the function may call itself, or wait for another thread's trace.
        tree = self.evaluate(bucket) if tree is None else tree
        found = self._find_outputs(bucket, tree, others, searches)
        first = self.restore_outputs(found, tree)
        return first if first == found else found

    def restore_outputs(self, outputs: Outputs, tree: PyTree) -> Outputs:
        """The outputs, from now on those given unless they are known already.

        Args:
            outputs: What is known of them.
            tree: Their shapes at the bucket where it was found.
        """
        first, arrays = self._first.setdefault("outputs", (outputs, jax.tree.leaves(tree)))
        self._known_arrays = arrays  # before the outputs, for whoever finds those
        self.known_outputs = first
        return first

    def evaluate(self, bucket: Bucket) -> PyTree:
        """The outputs at `bucket`, as `jax.ShapeDtypeStruct`; compiles nothing.

        Raises:
            CaptureError: The function cannot be traced.
        """
        args, kwargs = self.arguments(bucket)
        with self.settings.applied():  # a batcher's thread has none of its own
            return evaluate_shapes(self.target.function, args, kwargs, name=self.target.name)

    def _fits(self, outputs: Outputs, tree: PyTree, bucket: Bucket) -> bool:
        """Whether outputs like these, at `bucket`, are those that are known.

        What was constant at the first bucket has to be so here: it may be the lesser of two sizes.
        """
        if jax.tree.structure(tree) != outputs.structure:
            return False
        arrays = jax.tree.leaves(tree)
        before = arrays if self._known_arrays is None else self._known_arrays
        return all(
            leaf.ndim == len(array.shape)
            and (not leaf.comparable or _constants(leaf, first) == _constants(leaf, array))
            and leaf.axes.resize(array.shape, bucket) == array.shape
            for leaf, first, array in zip(outputs.leaves, before, arrays, strict=True)
        )

    def _find_outputs(
        self, bucket: Bucket, tree: PyTree, others: Sequence[Bucket], searches: bool
    ) -> Outputs:
        is_trimmed = set(jax.tree.leaves(self.target.unpad)) != {"none"}
        probes = self._probes(bucket, tree, others)
        if self.target.out_axes is not None:
            declared = declared_outputs(self.target.out_axes, tree, bucket)
            found = FoundAxes(tuple(declared))
            if is_trimmed or searches:
                found = check_declared_axes(probes, declared)
        elif not (is_trimmed or searches):
            found = FoundAxes(tuple(untrimmed_outputs(tree)))
        else:
            found = infer_output_axes(probes)
        if self.on_left:
            found = refuse_steps(probes, found, self.on_left)
        return outputs_of(tree, found, unpad=self.target.unpad, left=self.on_left)

    def _probes(self, bucket: Bucket, tree: PyTree, others: Sequence[Bucket]) -> Probes:
        grid = {
            axis: _distinct([size.size(axis) for size in others], bucket.size(axis))
            for axis in self.carried
        }

        @cache  # each output may be looked at in turn
        def evaluate(size: Bucket) -> OutputsAtSize:
            return outputs_at_size(tree if size == bucket else self.evaluate(size))

        return Probes(evaluate, base=bucket, grid=grid)

    def real_outputs(self, outputs: Outputs, sizes: Bucket) -> RealOutputs:
        """What of the outputs of a bucket is the plain function's answer to a call of `sizes`.

        The function is traced once where its outputs follow the sizes in a way of their own.

        Raises:
            InputShapeError: It takes no such call, or gives other outputs then.
        """
        if not outputs.follows:
            return real_outputs(outputs, sizes)
        return evaluated_outputs(outputs, self._evaluate_call(sizes), sizes, left=self.on_left)

    def refuse_spread(self, sizes: Bucket, *, bucket: Bucket) -> None:
        """Raises where the function spreads one element over others, as its padding would not be.

        `x + y` of (batch, src) and (batch, tgt) takes a tgt of 1 beside any src. In a bucket, where
        both are equal, it adds zeros instead.

        Args:
            sizes: Those of a call that the function takes.
            bucket: Where it is padded to.

        Raises:
            InputShapeError: It does.
        """
        single = self._single_axes(sizes, bucket)
        if not single or self._moves(single, bucket):
            return
        guilty = [axis for axis in single if not self._moves((axis,), bucket)] or single
        raise InputShapeError(
            f"{self.target.name} spreads the one element of {' or '.join(guilty)} over others at "
            f"{sizes.described}, which its padding keeps it from: repeat it before the call, as "
            "numpy.broadcast_to does"
        )

    def _single_axes(self, sizes: Bucket, bucket: Bucket) -> tuple[str, ...]:
        """The axes along which something of one element is padded."""
        return tuple(
            axis
            for axis in self.carried
            if 1 in self._lengths_at(sizes, axis) and sizes.size(axis) != bucket.size(axis)
        )

    def _lengths_at(self, sizes: Bucket, axis: str) -> list[int]:
        """One size, and the dimensions of the inputs that follow it."""
        follows = [length for axes in self.axes for _, length in axes.dims if length.axis == axis]
        return [sizes.size(axis), *(length.of(sizes) for length in follows)]

    def _moves(self, axes: tuple[str, ...], bucket: Bucket) -> bool:
        """Whether the function takes other sizes of these axes, all alike, beside the bucket's.

        What spreads one of them over another axis, or over a constant, takes 1 and its bucket's
        size alone. Axes that have to be equal, and spread nothing, move together. Whether they do
        does not depend on the call, so that the function is asked once for each set of them.
        """
        # What is spread over one element alone, of another axis, moves there and not elsewhere.
        ones = tuple(axis for axis in self.carried if 1 in self._lengths_at(bucket, axis))
        if (axes, ones) not in self._known_moves:
            others = (bucket.with_sizes(dict.fromkeys(axes, size)) for size in count(2))
            least = next(
                other
                for other in others
                if all(
                    1 < here != there
                    for axis in axes
                    for here, there in zip(
                        self._lengths_at(other, axis), self._lengths_at(bucket, axis), strict=True
                    )
                )
            )
            # The least may be one too many where the function takes even sizes alone.
            twice = dict.fromkeys(axes, 2 * max(map(bucket.size, axes)))
            moves = self._takes(least) or self._takes(bucket.with_sizes(twice))
            self._known_moves[axes, ones] = moves
        return self._known_moves[axes, ones]

    def _takes(self, sizes: Bucket) -> bool:
        try:
            self._evaluate_call(sizes)
        except InputShapeError:
            return False
        return True

    def check_rows(self, outputs: Outputs, sizes: Bucket) -> None:
        """Raises unless the outputs have a row for each of a batch that is larger than any bucket.

        What is cut to a fixed number of rows looks like the batch in all smaller ones. The function
        is traced once for each batch that is larger than those before.

        Raises:
            InputShapeError: They have not.
        """
        if sizes.batch_size <= self._most_rows:
            return
        arrays = jax.tree.leaves(self._evaluate_call(sizes))
        for leaf, array in zip(outputs.leaves, arrays, strict=True):
            rows = None if leaf.axes.batch is None else array.shape[leaf.axes.batch]
            if rows != sizes.batch_size:
                raise InputShapeError(
                    f"{leaf.name} has {rows} rows at {sizes.described}, so that pieces of the "
                    'batch do not make it up: set on_overflow="eager" or "exact", or add a larger '
                    "bucket"
                )
        self._most_rows = sizes.batch_size

    def _evaluate_call(self, sizes: Bucket) -> PyTree:
        """The outputs of the plain function at the sizes of a call."""
        try:
            with jax.no_tracing(False):  # nothing is compiled, so `no_compiles` has no say
                return self.evaluate(sizes)
        except CaptureError as error:
            raise InputShapeError(
                f"{self.target.name} does not take a call of {sizes.described}, "
                f"whose outputs it has to name: {error}"
            ) from error


def _constants(leaf: OutputLeaf, array: jax.ShapeDtypeStruct) -> tuple[object, list[int]]:
    """What of an output follows no size: its dtype, and the other dimensions."""
    following = dict(leaf.axes.dims) | dict(leaf.follows)
    return array.dtype, [size for axis, size in enumerate(array.shape) if axis not in following]


def declared_homes(
    leaves: Sequence[AbstractLeaf], axes: Sequence[LeafAxes], bucket: Bucket
) -> list[Sharding | None]:
    """Where the leaves of a call of `bucket` are declared to be, or were put; None: nowhere."""
    pairs = zip(leaves, axes, strict=True)
    return [_struct(leaf, follows, bucket).sharding for leaf, follows in pairs]


def _struct(leaf: AbstractLeaf, axes: LeafAxes, bucket: Bucket) -> jax.ShapeDtypeStruct:
    shape = axes.resize(tuple(size or 0 for size in leaf.shape), bucket)
    sharding = dividing(leaf.sharding, shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)


def _placed(struct: jax.ShapeDtypeStruct, *, device: jax.Device) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        struct.shape,
        struct.dtype,
        sharding=SingleDeviceSharding(device),
        weak_type=struct.weak_type,
    )


def _distinct(sizes: Sequence[int], known: int) -> list[int]:
    return [size for size in dict.fromkeys([*sizes, 2 * known]) if size != known]


class CompileRequest(NamedTuple):
    """What an entry needs.

    Attributes:
        program: What to compile.
        bucket: For which sizes.
        options: The compiler options.
        others: Further sizes of the grid, to find the outputs' axes by.
        searches: Whether the axes of outputs that nobody trims are found, too.
    """

    program: Program
    bucket: Bucket
    options: Mapping[str, str]
    others: Sequence[Bucket]
    searches: bool

    def __str__(self) -> str:
        return f"{self.program.target.name} {self.bucket}"

    def outputs(self, lowering: Lowering | None = None) -> Outputs:
        """The outputs, read off what was lowered, else by tracing.

        Raises:
            CaptureError: Tracing failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        return self.program.outputs(
            self.bucket,
            tree=None if lowering is None else lowering.output_info,
            others=self.others,
            searches=self.searches,
        )

    def lower(self, *, clock: Callable[[], float]) -> tuple[Outputs, Lowering]:
        """The outputs, and what to compile: one trace, and mostly two more for a new program.

        Raises:
            CaptureError: Tracing or lowering failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        lowering = self.program.lower(self.bucket, clock=clock)
        return self.outputs(lowering), lowering

    def compiling(
        self, lowering: Lowering, *, clock: Callable[[], float]
    ) -> Callable[[], Executable]:
        """A function that has XLA compile what `lower` gave; see `Lowering.compile`."""
        return partial(lowering.compile, compiler_options=self.options, clock=clock)


def request_for(
    program: Program, bucket: Bucket, *, config: CUDAGraphConfig, is_stored: bool = False
) -> CompileRequest:
    """What `program` needs at `bucket` under `config`.

    Args:
        program: What to compile.
        bucket: For which sizes.
        config: Compiler options, the grid and policies.
        is_stored: Whether a store keeps the outputs' axes, for servers of any policy.
    """
    return CompileRequest(
        program,
        bucket,
        options=config.xla_options(),
        others=config.along_axes(bucket),
        # Who compares outputs, or joins pieces of them, needs axes that nobody trims by.
        searches=is_stored or config.debug_mode or config.on_overflow == "split",
    )


class Compiler(Protocol):
    """Makes executables in the place of XLA; a test may have one that takes no time."""

    def __call__(
        self, request: CompileRequest, lowering: Lowering, *, clock: Callable[[], float]
    ) -> Executable:
        """The executable of `lowering`, which is that of `request`.

        Raises:
            CaptureError: It could not be compiled.
        """
