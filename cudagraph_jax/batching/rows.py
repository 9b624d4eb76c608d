"""Rows of their own lengths in one call: where they go in, their masks, and each one's answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np

from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.graphs.route import on_host
from cudagraph_jax.program.arguments import ArgumentPlaces, is_passed
from cudagraph_jax.program.call import Args, Call, Mask, Target, is_array
from cudagraph_jax.program.outputs import OutputLeaf, Outputs, RealOutputs
from cudagraph_jax.program.padded import flatten_arguments
from cudagraph_jax.shapes.axes import AxisPattern, LeafAxes, Length, side
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import EDGE, Array, PadValue, is_zero, own_part, padder
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix, leaves_of_arguments

_BATCH = Length("batch")


class ItemArguments:
    """Which arguments of a function are an item's, and which are the same for all.

    Args:
        function: What is called.
        name: What errors call it.

    Attributes:
        places: Where those are that all items share, and the others.

    Raises:
        ConfigError: The function cannot be batched, whatever its arguments are.
    """

    def __init__(self, function: BucketedFunction[..., PyTree], *, name: str) -> None:
        self._name = name
        in_axes = function.in_axes
        self.places = ArgumentPlaces(in_axes)
        self._entries = self.places.entries
        self._for_all = in_axes if self._entries is None else None
        for entry in jax.tree.leaves(in_axes):
            _check_pattern(AxisPattern.parse(entry), name)
        for place, entry in enumerate(self._entries or ()):
            kinds = set(map(_is_none, jax.tree.leaves(entry, is_leaf=_is_none)))
            if len(kinds) > 1:
                raise ConfigError(
                    f"in_axes[{place}]={entry!r} of {name} is batched in part: pass what all "
                    "items share as an argument of its own, with None in in_axes"
                )
            if place in function.target.donate_argnums and is_passed(entry):
                raise ConfigError(
                    f"donate_argnums of {name} has {place}, which all items share: after one call "
                    "it would be gone; donate what has rows alone"
                )
        masks = [f"{mask.name} is built for each row" for mask in function.target.masks]
        passed = ["what is passed through was given to the Batcher"] if self.places.passed else []
        self._given_elsewhere = "".join(f"; {each}" for each in (*masks, *passed))
        _check_values(function, self._entries, name)
        _check_target(function.target, name)

    def check_passed(self, passed: Args) -> None:
        """Raises unless there is one for each argument that all items share.

        Raises:
            ConfigError: There is not.
        """
        if len(passed) != self.places.passed:
            raise ConfigError(
                f"{self._name} passes {self.places.passed} argument(s) through, as "
                f"in_axes={self._entries or self._for_all!r} says, but {len(passed)} were given: "
                "give those beside the function, and items without them"
            )

    def one_row(self, item: Args) -> Args:
        """The item as shapes of a batch of one.

        Raises:
            InputShapeError: It has more or fewer arrays than the function takes, or one of another
                rank, or something else.
        """
        prefixes = [entry for entry in self._entries or () if not is_passed(entry)]
        if self._entries is None:
            prefixes = [self._for_all] * len(item)
        if len(item) != len(prefixes) or not item:
            raise InputShapeError(
                f"an item of {self._name} is {len(prefixes) or 'at least one'} array(s), those "
                f"that in_axes={self._entries or self._for_all!r} names axes for, but {len(item)} "
                f"came: give each without its batch dimension{self._given_elsewhere}"
            )
        leaves, structure = flatten_arguments(item)
        patterns = broadcast_prefix(tuple(prefixes), item, name="in_axes")
        return tuple(jax.tree.unflatten(structure, list(map(self._one_row, leaves, patterns))))

    def _one_row(self, array: PyTree, text: str) -> jax.ShapeDtypeStruct:
        if isinstance(array, jax.core.Tracer):
            raise InputShapeError(
                f"an item of {self._name} is traced, as within jax.jit, and has no values yet: "
                "call the function itself there"
            )
        if not (is_array(array) or isinstance(array, np.generic)):
            raise InputShapeError(
                f"an item of {self._name} holds a value of type {type(array).__name__} where its "
                f"axes are {text!r}: pass a NumPy or JAX array of one row, without the batch "
                "dimension (of a list of numbers numpy.asarray(row, dtype))"
            )
        try:
            place = AxisPattern.parse(text).resolve(array.ndim + 1, name="it").batch or 0
        except InputShapeError:
            raise InputShapeError(
                f"an item of {self._name} has an array of shape {array.shape}, but one row of "
                f"{text!r} has no such number of dimensions: leave out the batch alone (map takes "
                "a sequence of rows)"
            ) from None
        shape = (*array.shape[:place], 1, *array.shape[place:])
        return jax.ShapeDtypeStruct(shape, array.dtype)


def _is_none(leaf: object) -> bool:
    return leaf is None


def _has_rows(lengths: Sequence[Length]) -> bool:
    """Whether the batch itself is one dimension of an array, and no other follows it."""
    return [length for length in lengths if length.axis == "batch"] == [_BATCH]


def _check_values(
    function: BucketedFunction[..., PyTree], entries: Sequence[PyTree] | None, name: str
) -> None:
    """Raises where an argument has neither a default nor an entry of `in_axes`."""
    masks = [mask.name for mask in function.target.masks]
    signature = inspect.signature(function).parameters.values()
    parameters = [each for each in signature if each.name not in masks]
    by_place = [
        each.name
        for each in parameters
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    given = by_place if entries is None else by_place[: len(entries)]
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for each in parameters:
        if each.name in given or each.kind in starred or each.default is not each.empty:
            continue
        raise ConfigError(
            f"{name} needs a value for {each.name!r}, and a batcher passes what in_axes has an "
            "entry for: make it part of the function, as "
            f"bucket_jit(functools.partial(f, {each.name}=…), …) does, or give it an entry"
        )


def _check_target(target: Target, name: str) -> None:
    """Raises where masks or outputs are declared to have no row for each item."""
    for mask in target.masks:
        if mask.axes is not None and "batch" not in mask.axes:
            raise ConfigError(
                f"the mask {mask.name} of {name} has no rows: a batcher's calls have rows of their "
                "own lengths, so name batch among its axes in mask_argname"
            )
    if target.out_axes is None:
        if set(jax.tree.leaves(target.unpad)) == {"none"}:
            raise ConfigError(
                f'unpad="none" of {name} leaves nobody to know the rows of its outputs: name '
                'their axes in out_axes, or use unpad="host"'
            )
        return
    for entry in jax.tree.leaves(target.out_axes):  # None may stand for an output that is None
        if not _has_rows(AxisPattern.parse(entry).lengths):
            raise ConfigError(
                f"out_axes of {name} has {entry!r}, an output without a row for each item, which a "
                "batcher cannot hand out: return arrays with the batch in one dimension"
            )


def _check_pattern(pattern: AxisPattern, name: str) -> None:
    if not _has_rows(pattern.lengths):
        raise ConfigError(
            f"in_axes={pattern!r} of {name} has no row for each item: a batcher needs the batch in "
            "every array that is not passed through (None)"
        )


class _Input(NamedTuple):
    """An array of a call that has a row for each item."""

    axes: LeafAxes
    shape: tuple[int | None, ...]
    dtype: np.dtype[np.generic]
    pad: PadValue


class RowLayout:
    """How rows stand in the calls of one program, and their answers in its outputs.

    Args:
        call: A call of one row.

    Attributes:
        dtypes: What the arrays of an item are converted to.
    """

    def __init__(self, call: Call) -> None:
        self._masks = call.target.masks
        self._carried = call.carried
        self._on_left = frozenset(axis for axes in call.axes for axis in axes.on_left)
        pads = (*call.declared.pad_values, *[0] * len(call.leaves))
        self._inputs = [
            _Input(axes, leaf.shape, leaf.dtype, pad)
            for axes, leaf, pad in zip(call.axes, call.variant.leaves, pads, strict=False)
            if not axes.passes_through
        ]
        self._indices = [n for n, axes in enumerate(call.axes) if not axes.passes_through]
        self.dtypes = [given.dtype for given in self._inputs]
        arguments, _ = leaves_of_arguments(call.variant.structure)
        self._places = [
            place
            for place, argument in enumerate(arguments)
            if any(not call.axes[index].passes_through for index in argument.indices)
        ]
        self._structure = jax.tree.structure([call.args[place] for place in self._places])

    def _axes(self, mask: Mask) -> Sequence[str]:
        return self._carried if mask.axes is None else mask.axes

    def arguments(self, args: Args, arrays: Sequence[PyTree]) -> list[PyTree]:
        """The arguments of a call: those that it shares with `args`, and `arrays`."""
        whole = list(args)
        for place, argument in zip(self._places, self.own(arrays), strict=True):
            whole[place] = argument
        return whole

    def own(self, arrays: Sequence[PyTree]) -> Args:
        """The arguments that have rows, from their arrays."""
        return tuple(jax.tree.unflatten(self._structure, arrays))

    def arrays(self, call: Call, row: int = 0) -> list[Array]:
        """The arrays of one row of a call, as those of an item."""
        return [
            np.take(np.asarray(call.leaves[index]), row, axis=given.axes.batch or 0)
            for index, given in zip(self._indices, self._inputs, strict=True)
        ]

    def pad(
        self, items: Sequence[Sequence[Array]], rows: Sequence[Bucket], bucket: Bucket
    ) -> list[Array]:
        """The arrays of a call at the bucket's size, with a row for each item.

        Args:
            items: The arrays of each.
            rows: The sizes of each.
            bucket: Not smaller than they.
        """
        columns = zip(*items, strict=True)
        return [
            _padded(given, column, rows, bucket)
            for given, column in zip(self._inputs, columns, strict=True)
        ]

    def masks(self, rows: Sequence[Bucket], bucket: Bucket) -> dict[str, Array]:
        """The masks of a call, True where an element of a row is real."""
        made: dict[str, Array] = {}
        for mask in self._masks:
            made[mask.name] = array = np.zeros(mask.shape(self._carried, bucket), np.bool_)
            batch = self._axes(mask).index("batch")
            for row, sizes in enumerate(rows):
                index: list[slice | int] = [*mask.real(self._carried, sizes, self._on_left)]
                index[batch] = row
                array[tuple(index)] = True
        return made


def _padded(
    given: _Input, column: Sequence[Array], rows: Sequence[Bucket], bucket: Bucket
) -> Array:
    shape = given.axes.resize(tuple(size or 0 for size in given.shape), bucket)
    is_edge, batch = given.pad == EDGE, given.axes.batch or 0
    padded: Array = np.zeros(shape, given.dtype)
    if not (is_edge or is_zero(given.pad)):
        padded.fill(given.pad)
    left = {at - (at > batch) for at, length in given.axes.dims if length.left}
    for place, (array, sizes) in enumerate(zip(column, rows, strict=True)):
        row = _with_edges(given, array, sizes, bucket) if is_edge else array
        index: list[slice | int] = [side(n, left=at in left) for at, n in enumerate(row.shape)]
        index.insert(batch, place)
        padded[tuple(index)] = row
    if is_edge:
        behind = (slice(None),) * batch
        last = len(column) - 1
        padded[(*behind, slice(last + 1, None))] = padded[(*behind, slice(last, last + 1))]
    return padded


def _with_edges(given: _Input, row: Array, sizes: Bucket, bucket: Bucket) -> Array:
    batch = given.axes.batch or 0
    one, room = np.expand_dims(row, batch), bucket.with_sizes({"batch": 1})
    pad = padder(one.shape, given.dtype, axes=given.axes, sizes=sizes, bucket=room, value=EDGE)
    edged: Array = np.take(one if pad is None else pad(one), 0, axis=batch)
    return edged


class RowOutputs:
    """The answers to rows within the outputs of one bucket.

    Args:
        outputs: Its outputs.
        real: What of them is the plain function's answer to a call of so large.

    Raises:
        ConfigError: An output has no row for each item, or nobody looked for its axes.
    """

    def __init__(self, outputs: Outputs, real: Callable[[Bucket], RealOutputs]) -> None:
        self._outputs = outputs
        is_leaf = jax.tree_util.treedef_is_leaf(outputs.structure)
        self._is_one = is_leaf and not outputs.structure_follows
        for leaf in outputs.leaves:
            _check_output(leaf)
        self._real = lru_cache(maxsize=4096)(real)

    def check(self, sizes: Bucket) -> None:
        """Raises where the answer to a row of these sizes is not known.

        Raises:
            InputShapeError: The function takes no such row, or its answer is larger.
        """
        self._real(sizes)

    def answers(self, result: PyTree, rows: Sequence[Bucket]) -> list[PyTree]:
        """Each row's own part, without the batch dimension: NumPy arrays, read-only."""
        arrays = [on_host(array) for array in jax.tree.leaves(result)]
        return [self._answer(arrays, row, self._real(sizes)) for row, sizes in enumerate(rows)]

    def _answer(self, arrays: Sequence[Array], row: int, real: RealOutputs) -> PyTree:
        parts = []
        for array, leaf, real_index in zip(arrays, self._outputs.leaves, real.indices, strict=True):
            index: list[slice | int] = [*real_index]
            index[leaf.axes.batch or 0] = row
            parts.append(own_part(array, (*index, ...)))
        return parts[0] if self._is_one else jax.tree.unflatten(real.structure, parts)


def _check_output(leaf: OutputLeaf) -> None:
    has_rows = _has_rows([length for _, length in leaf.axes.dims])
    follows = {size for _, size in leaf.follows}
    if not leaf.comparable:
        raise ConfigError(
            f'nobody knows the rows of {leaf.name}: name its axes in out_axes, or use unpad="host"'
        )
    if not has_rows or "batch" in follows:
        raise ConfigError(
            f"{leaf.name} has no row for each item, so that a batcher cannot hand it out: return "
            "arrays with the batch in one dimension"
        )
