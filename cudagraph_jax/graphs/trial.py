"""Trials of a bucket: calls with real values of any size, run with any padding."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from cudagraph_jax._base.text import error_text
from cudagraph_jax.config import CompareWhere
from cudagraph_jax.errors import CaptureError, CUDAGraphError, InputShapeError
from cudagraph_jax.graphs.compare import EXACT, USUAL, ArrayDifference, Tolerance, worst_difference
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import AbstractLeaf, Call, argument_leaf_names, is_key
from cudagraph_jax.program.donation import copied_key
from cudagraph_jax.program.eager import run_eagerly
from cudagraph_jax.program.outputs import OutputLeaf, RealOutputs
from cudagraph_jax.program.padded import without_padding
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import ANY, UNCHOSEN, Array, PadValue
from cudagraph_jax.shapes.pytrees import PyTree


def example_call(
    program: Program, call: Call, sizes: Bucket, *, zeros_of_rows: bool = False
) -> Call:
    """`call` with real values, brought to `sizes`; what may be donated is a copy.

    Arrays that are too large are cut, those that are too small repeat themselves. One that says
    nothing, because it is abstract or holds nothing but its own padding's value, gets other values:
    features are drawn at random, and integers and what may be a mask are ones, which every function
    takes (a token that is real, a valid index, a length that is not zero).

    Args:
        program: The call's program.
        call: Its arrays may be `jax.ShapeDtypeStruct`.
        sizes: Those that it shall have.
        zeros_of_rows: Whether integers for rows may be 0, as positions are, and no length is.

    Raises:
        InputShapeError: A PRNG key is abstract.
    """
    draw = np.random.default_rng(0)
    donated = program.donated_leaves
    known = program.known_leaves()
    leaves: list[PyTree] = []
    for index, (leaf, axes) in enumerate(zip(call.leaves, call.axes, strict=True)):
        abstract, pad = program.variant.leaves[index], program.leaf_pads[index]
        if axes.passes_through:
            given = known[index] if _is_abstract(leaf) and index not in donated else leaf
            value = _passed(given, abstract, draw, copies=index in donated)
        else:
            value = _fitted(leaf, abstract, axes, sizes, pad)
            if _says_nothing(leaf, value, pad) and not (zeros_of_rows and _is_of_rows(value, axes)):
                value = _drawn(value, axes, pad, draw)
        may_count = np.ndim(value) == 0 or not axes.passes_through
        if may_count:
            value = behind_no_cut(value, call.sizes, sizes, least=0 if zeros_of_rows else 1)
        leaves.append(value)
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return dataclasses.replace(call, args=args, kwargs=kwargs, leaves=tuple(leaves), sizes=sizes)


def _is_abstract(leaf: PyTree) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _passed(
    leaf: PyTree, abstract: AbstractLeaf, draw: np.random.Generator, *, copies: bool
) -> PyTree:
    if jnp.issubdtype(abstract.dtype, jax.dtypes.extended):
        if _is_abstract(leaf):
            raise InputShapeError(
                f"{abstract} is a PRNG key: give the key itself to warm-up, not its shape"
            )
        return copied_key(leaf) if copies else leaf
    if _is_abstract(leaf):
        return _drawn(np.zeros(leaf.shape, abstract.dtype), None, 0, draw)
    return np.array(leaf) if copies else leaf


def _fitted(
    leaf: PyTree, abstract: AbstractLeaf, axes: LeafAxes, sizes: Bucket, pad: PadValue
) -> Array:
    """A copy of `leaf` on the host, of the size wanted; zeros where it is abstract.

    It is cut where its padding stands, but in rows of which nothing but the padding's value would
    be left: those are padded on the other side.
    """
    shape = axes.resize(leaf.shape, sizes)
    if _is_abstract(leaf):
        return np.zeros(shape, abstract.dtype)
    value: Array = np.array(leaf, abstract.dtype)
    if not value.size and 0 not in shape:
        return np.zeros(shape, abstract.dtype)  # there is nothing to repeat
    for axis, length in axes.dims:
        if value.shape[axis] == shape[axis]:
            continue
        places = np.arange(shape[axis])
        first = np.take(value, places % value.shape[axis], axis)
        last = np.take(value, places - shape[axis], axis, mode="wrap")
        kept, other = (last, first) if length.left else (first, last)
        is_empty = np.all(kept == _padding(pad), axis=axis, keepdims=True)
        value = np.where(is_empty, other, kept)
    return value


def _padding(pad: PadValue) -> PadValue:
    return 0 if isinstance(pad, str) else pad


def _says_nothing(leaf: PyTree, value: Array, pad: PadValue) -> bool:
    return _is_abstract(leaf) or bool(np.all(value == _padding(pad)))


def _is_of_rows(value: Array, axes: LeafAxes) -> bool:
    """Whether it has an integer for each row, such as a length or a position."""
    return axes.names == ("batch",) and bool(jnp.issubdtype(value.dtype, np.integer))


def _drawn(value: Array, axes: LeafAxes | None, pad: PadValue, draw: np.random.Generator) -> Array:
    carried = dict(() if axes is None else axes.dims)
    besides = (size for axis, size in enumerate(value.shape) if axis not in carried)
    may_be_mask = axes is not None and all(size == 1 for size in besides)
    if jnp.issubdtype(value.dtype, np.inexact) and not may_be_mask:
        return np.asarray(draw.standard_normal(value.shape)).astype(value.dtype)
    # Padded with 1 it may be a mask of what is padding. Of integers for rows, that is a length.
    may_be_length = axes is not None and _is_of_rows(value, axes)
    return np.full(value.shape, 0 if pad == 1 and not may_be_length else 1, value.dtype)


def behind_no_cut(value: Any, before: Bucket, after: Bucket, *, least: int = 1) -> Any:
    """`value`, where it may hold lengths or positions, with none that reaches behind a cut.

    Args:
        value: An argument.
        before: The sizes for which it was given.
        after: The sizes to which the call is cut.
        least: To what those are lowered that may be positions, at the least.
    """
    value = without_padding(value)
    dtype = np.result_type(value) if isinstance(value, int) else getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, np.integer) or not np.size(value):
        return value
    for axis, old in before.sizes.items():
        new, largest = after.size(axis), int(np.max(value))
        if new < old and new <= largest <= old:
            # Only lengths are as large as the size; smaller ones may be positions, counted from 0.
            limit = new if largest == old else max(least, new - 1)
            if isinstance(value, int):
                value = min(value, limit)
            else:
                value = np.minimum(value, limit).astype(dtype)
    return value


def unshared(program: Program, call: Call) -> Call:
    """`call`, with copies of what is donated: a run uses up what is on the device."""
    leaves = list(call.leaves)
    for index in program.donated_leaves:
        leaf = leaves[index]
        leaves[index] = copied_key(leaf) if is_key(leaf) else np.array(leaf)
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return dataclasses.replace(call, args=args, kwargs=kwargs, leaves=tuple(leaves))


Poison = Mapping[int, PadValue]
"""The pad value of each leaf, by its index, that is not padded as usual."""


class Poisonable(NamedTuple):
    """The arrays whose padding must not matter, by their index among a call's leaves.

    Attributes:
        data: Arrays that can be no masks.
        doubtful: Arrays of nothing but 0 and 1, which may be data or a mask.
    """

    data: dict[int, Array]
    doubtful: dict[int, Array]


def poisonable(program: Program, call: Call, *, takes_chosen: bool = False) -> Poisonable:
    """What of `call` may be padded with anything.

    Not so bools, and numbers that look like a mask (ones, then zeros, along the sequence): their
    padding says what is padding. Nor arrays whose pad value was chosen, be it 0 or `"edge"`, so
    that the function ignores it. One that was declared as `"any"` may in any case.

    Args:
        program: The call's program.
        call: Its arrays have values.
        takes_chosen: Whether to take arrays whose pad value was chosen all the same, to see what
            an answer depends on.
    """
    found = Poisonable({}, {})
    for index, (leaf, axes, usual) in enumerate(
        zip(call.leaves, call.axes, program.pad_values, strict=False)
    ):
        if axes.passes_through or not (usual is UNCHOSEN or usual == ANY or takes_chosen):
            continue
        array = np.asarray(leaf)
        if array.size and usual == ANY:
            found.data[index] = array
            continue
        if not array.size or array.dtype == np.bool_ or looks_like_mask(array, axes):
            continue
        (found.doubtful if is_binary(array) else found.data)[index] = array
    return found


def full_masks(program: Program, call: Call) -> Call | None:
    """`call` with masks that say that all is real; None where they do, or anything else is padded.

    Beside other arrays they are left: what a mask leaves out of those may be no value for a loop.
    """
    leaves: list[PyTree] = list(call.leaves)
    is_full = True
    described = zip(call.leaves, call.axes, program.leaf_pads, strict=True)
    for index, (leaf, axes, pad) in enumerate(described):
        if axes.passes_through:
            continue
        array = np.asarray(leaf)
        if pad not in (0, 1) or not (array.dtype == np.bool_ or looks_like_mask(array, axes)):
            return None
        leaves[index] = np.full(array.shape, 0 if pad else 1, array.dtype)
        is_full = is_full and np.array_equal(array, leaves[index])
    if is_full:
        return None
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return dataclasses.replace(call, args=args, kwargs=kwargs, leaves=tuple(leaves))


def poison(data: Mapping[int, Array], floating: float, *, largest: bool) -> dict[int, PadValue]:
    """Padding of `floating`, or of an end of the range of integers that are surely valid.

    A number is at least beyond all that are real, so that it is the first or last of them in any
    order. Between 0 and their real values, integers are what the function may index with.
    """
    values: dict[int, PadValue] = {}
    for index, array in data.items():
        if jnp.issubdtype(array.dtype, np.inexact):
            limits = jnp.finfo(array.dtype)  # type: ignore[no-untyped-call]
            real = array.real.astype(np.float64)
            real = real[np.isfinite(real)]
            beyond = real + abs(real) * float(limits.eps) * (1 if largest else -1)
            value = (np.max if largest else np.min)(beyond, initial=floating)  # NaN stays NaN
            values[index] = float(np.clip(value, float(limits.min), float(limits.max)))
        elif largest:
            values[index] = max(0, int(array.max()))
        else:
            values[index] = min(0, int(array.min()))
    return values


def looks_like_mask(array: Array, axes: LeafAxes) -> bool:
    """Whether it is ones, then zeros, along the last axis: in the order of its padding's side."""
    lengths = [(place, length) for place, length in axes.dims if length.axis != "batch"]
    if not lengths:
        return False
    place, length = lengths[-1]
    is_one = np.moveaxis(array, place, -1)[..., :: -1 if length.left else 1] == 1
    ends_in_zeros = np.all(is_one[..., :-1] | ~is_one[..., 1:])
    return bool(is_binary(array) and ends_in_zeros and np.any(is_one) and not np.all(is_one))


def is_binary(array: Array) -> bool:
    """Whether it holds nothing but 0 and 1."""
    return array.dtype == np.bool_ or bool(np.all((array == 0) | (array == 1)))


class Masks(NamedTuple):
    """What the masks among a call's arguments say is real.

    Attributes:
        names: What errors call them.
        arrays: Where each is true, and the axes of its dimensions.
    """

    names: tuple[str, ...]
    arrays: tuple[tuple[npt.NDArray[np.bool_], tuple[str, ...]], ...]

    @property
    def any_real(self) -> bool:
        """Whether any element is real: true in all masks."""
        return bool(self._over({}).any())

    def over(self, leaf: OutputLeaf) -> npt.NDArray[np.bool_] | None:
        """Where an output is real, to be broadcast to it; None: all of it, as it has no axes.

        One that carries the batch alone is real in rows of which anything is, and likewise one that
        carries another axis alone; one that carries an axis twice, where both places are.
        """
        places: dict[str, list[int]] = {}
        for place, length in leaf.axes.dims:
            if length.is_size and any(length.axis in axes for _, axes in self.arrays):
                places.setdefault(length.axis, []).append(place)
        if not places:
            return None
        real: npt.NDArray[np.bool_] = np.ones((1,) * leaf.ndim, np.bool_)
        for turn in range(max(map(len, places.values()))):
            own = self._over({axis: at[min(turn, len(at) - 1)] for axis, at in places.items()})
            kept = {at[min(turn, len(at) - 1)] for at in places.values()}
            real = real & np.expand_dims(own, [n for n in range(leaf.ndim) if n not in kept])
        return real

    def _over(self, places: Mapping[str, int]) -> npt.NDArray[np.bool_]:
        """What is real along some axes, in the order of their places: of others, where any is.

        A mask over all axes would have as many elements as all sizes multiply to.
        """
        number: dict[str, int] = {}
        for axis in (axis for _, axes in self.arrays for axis in axes):
            number.setdefault(axis, len(number))
        terms: list[Any] = []
        for is_true, axes in self.arrays:
            terms += [is_true.astype(np.float64), [number[axis] for axis in axes]]
        kept = [number[axis] for axis in sorted(places, key=lambda axis: places[axis])]
        # How many combinations of the other axes are true: a sum of products is never below 0.
        counted: npt.NDArray[np.float64] = np.einsum(*terms, kept, optimize=True)
        return counted > 0


def masks_of(program: Program, call: Call) -> Masks | None:
    """What the caller's own masks say is real; None where no argument is one.

    A mask is an array of bools that carries sizes of the call, each once, and no other dimension,
    or one of nothing but 0 and 1 that carries two of them at least, or all that there are. One that
    is padded with 1 is true where there is padding; one that is padded with anything but 0 and 1 is
    no mask.

    Args:
        program: The call's program.
        call: Its arrays have values.
    """
    names = argument_leaf_names(program.argument_names, call.args, call.kwargs)
    found: list[str] = []
    arrays: list[tuple[npt.NDArray[np.bool_], tuple[str, ...]]] = []
    for name, leaf, axes, pad in zip(names, call.leaves, call.axes, program.leaf_pads, strict=True):
        if axes.passes_through or pad not in (0, 1):
            continue
        is_true = _as_mask(np.asarray(leaf), axes, program.carried)
        if is_true is not None:
            found.append(name)
            arrays.append((~is_true if pad else is_true, axes.names))
    return Masks(tuple(found), tuple(arrays)) if found else None


def _as_mask(array: Array, axes: LeafAxes, carried: Sequence[str]) -> npt.NDArray[np.bool_] | None:
    """Where an array is true, by the axes that it carries; None: it is no mask."""
    sizes = [array.shape[place] for place, _ in axes.dims]
    carries_once = len(axes.names) == len(sizes) and all(length.is_size for _, length in axes.dims)
    if not carries_once or array.size != np.prod(sizes):
        return None
    if array.dtype != np.bool_:
        # Numbers of one axis are more often labels, and nothing but 0 may be anything.
        is_of_rows = len(sizes) < min(2, len(carried))
        if is_of_rows or not (is_binary(array) and np.any(array == 1)):
            return None
    is_true: npt.NDArray[np.bool_] = (array != 0).reshape(sizes)
    return is_true


class OutputDifference(NamedTuple):
    """An output that differs by more than it may.

    Attributes:
        name: What errors call it.
        worst: Its worst element.
        is_masked_out: Whether outputs differ only where a mask is false.
    """

    name: str
    worst: ArrayDifference
    is_masked_out: bool = False


class Trial:
    """Runs of an entry on one example, with any padding, and the plain function's.

    Args:
        entry: What is tried.
        example: A call of its program with real values.
        compare_where: Whether outputs are compared where the example's masks are false, too.
        tolerance: How far answers may be apart.
    """

    def __init__(
        self,
        entry: CUDAGraphEntry,
        example: Call,
        *,
        compare_where: CompareWhere = "all",
        tolerance: Tolerance = USUAL,
    ) -> None:
        self.entry = entry
        self.example = example
        self.compare_where: CompareWhere = compare_where
        self.tolerance = tolerance

    def at(self, sizes: Bucket, *, zeros_of_rows: bool = False) -> Trial:
        """The same with the example brought to `sizes`; see `example_call`."""
        example = example_call(self.entry.program, self.example, sizes, zeros_of_rows=zeros_of_rows)
        return Trial(
            self.entry, example, compare_where=self.compare_where, tolerance=self.tolerance
        )

    @property
    def place(self) -> str:
        """What errors call the function, the sizes and the bucket."""
        name, sizes = self.entry.program.target.name, self.example.sizes
        return f"{name} at {sizes.short} in the bucket {self.entry.bucket}"

    @cached_property
    def masks(self) -> Masks | None:
        """What the example's own masks say is real."""
        return masks_of(self.entry.program, self.example)

    @cached_property
    def usual(self) -> list[Array]:
        """The trimmed outputs with the usual padding, those that can be compared."""
        return self.run({})

    @cached_property
    def expected(self) -> list[Array]:
        """The plain function's outputs.

        Raises:
            CaptureError: It does not run, or gives another pytree.
        """
        outputs = self.entry.outputs
        leaves, structure = jax.tree.flatten(self._plain)
        if structure != self._real.structure:
            raise CaptureError(
                f"{self.place} gives {self._real.structure}, but the plain function {structure}: "
                "return the same pytree for every size, traced or not",
                stage="check",
            )
        pairs = zip(leaves, outputs.leaves, strict=True)
        return [np.asarray(value) for value, leaf in pairs if leaf.comparable]

    def refusal(self) -> CaptureError | None:
        """What the plain function says of the example, where it does not take it.

        Raises:
            CaptureError: The device cannot run it.
        """
        try:
            self._plain  # noqa: B018  # a cached property that runs it
        except CaptureError as error:
            if error.stage != "check":
                raise
            return error
        return None

    def run(self, padding: Poison) -> list[Array]:
        """The trimmed outputs; `padding` is the pad value of leaves not padded as usual."""
        program = self.entry.program
        values = [padding.get(index, usual) for index, usual in enumerate(program.pad_values)]
        filled = dataclasses.replace(self.entry, program=program.padded_with(values))
        with self._failing("was compiled, but does not run"):
            outputs = filled.padded_outputs(unshared(program, self.example))
            return [
                np.asarray(output)[index]
                for output, leaf, index in zip(
                    outputs, self.entry.outputs.leaves, self._real.indices, strict=True
                )
                if leaf.comparable
            ]

    def first_move(self, paddings: Sequence[Poison]) -> Poison | None:
        """The first of `paddings` to move the real rows further than rounding does.

        None where not one does, or the first one, ordinary values, moves nothing at all: then huge
        ones, which may overflow or outweigh a mask of -10,000, say nothing.
        """
        found = self.run(paddings[0])
        if not self.differ(found, self.usual, exactly=True):
            return None
        moves = (padding for padding in paddings if self.differ(self.run(padding), self.usual))
        return next(moves, None)

    def differ(self, some: list[Array], others: list[Array], *, exactly: bool = False) -> bool:
        """Whether any output differs, by more than is allowed unless `exactly`."""
        return self.difference(some, others, exactly=exactly) is not None

    def difference(
        self, found: list[Array], expected: list[Array], *, exactly: bool = False
    ) -> OutputDifference | None:
        """The first output that differs, by more than is allowed unless `exactly`.

        Raises:
            CaptureError: Their shapes differ.
        """
        tolerance = EXACT if exactly else self.tolerance
        if self.masks is None or self.compare_where == "mask":
            return self._first(found, expected, tolerance, self.masks)
        anywhere = self._first(found, expected, tolerance, None)
        if anywhere is None:
            return None
        real = self._first(found, expected, tolerance, self.masks)
        return anywhere._replace(is_masked_out=True) if real is None else real

    def _first(
        self,
        found: list[Array],
        expected: list[Array],
        tolerance: Tolerance,
        masks: Masks | None,
    ) -> OutputDifference | None:
        leaves = [leaf for leaf in self.entry.outputs.leaves if leaf.comparable]
        for leaf, have, want in zip(leaves, found, expected, strict=True):
            where = None if masks is None else masks.over(leaf)
            worst = worst_difference(have, want, tolerance=tolerance, where=where)
            if worst is not None:
                return OutputDifference(leaf.name, worst)
        return None

    @cached_property
    def _real(self) -> RealOutputs:
        return self.entry.program.real_outputs(self.entry.outputs, self.example.sizes)

    @cached_property
    def _plain(self) -> PyTree:
        example = self.example
        target = dataclasses.replace(self.entry.program.target, unpad="none")
        with self._failing("was compiled, but the plain function does not run"):
            result = run_eagerly(example, target=target)
            return jax.block_until_ready(result)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except CUDAGraphError:
            raise
        except Exception as error:
            # The device may have memory again later; what Python raises, it raises every time.
            is_device = isinstance(error, jax.errors.JaxRuntimeError)
            raise CaptureError(
                f"{self.place} {what}: {error_text(error)}",
                stage="warm-up" if is_device else "check",
            ) from error
