"""What a call's arguments need to be of the bucket's size, and its masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from jax.stages import Compiled

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.program.call import Call, argument_leaf_names, is_key
from cudagraph_jax.program.donation import on_device
from cudagraph_jax.program.padded import Padded, Refill, fetched, is_padded, without_padding
from cudagraph_jax.program.program import Program, declared_homes
from cudagraph_jax.shapes.axes import LeafAxes, Shape
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import ANY, Padder, PadValue, is_zero, mask_of, padder
from cudagraph_jax.shapes.pytrees import PyTree, leaves_of_arguments
from cudagraph_jax.xla.serialize import input_shardings
from cudagraph_jax.xla.shardings import is_cut, is_readable, is_spread, put

Take = Callable[[Padded], PyTree]
"""What makes an argument of a `Padded`."""

Pad = Padder | Take
"""What makes an argument of the bucket's size."""


class Homes(NamedTuple):
    """Where an executable takes what it is given.

    Attributes:
        leaves: The place of each leaf of a call; None: anywhere.
        masks: Those of masks, by their keywords.
        are_several: Whether they are on several devices.
    """

    leaves: Sequence[Sharding | None]
    masks: Mapping[str, Sharding]
    are_several: bool = True

    def cut(self, program: Program) -> dict[int, Sharding]:
        """The arguments that carry sizes and are cut over several devices, or have such a leaf.

        By their positions how that one is cut.
        """
        return {
            position: home
            for position, argument in enumerate(program.argument_leaves)
            for index in argument.indices
            if (home := self.leaves[index]) is not None
            if is_cut(home) and not program.axes[index].passes_through
        }


def homes_of(program: Program, call: Callable[..., PyTree], bucket: Bucket) -> Homes:
    """Where an executable takes what it is given: as was declared, or as XLA has chosen.

    Args:
        program: What it was compiled from.
        call: The compiled function.
        bucket: Its sizes.
    """
    declared = Homes(program.homes(bucket), program.mask_homes(bucket), program.is_sharded)
    if not isinstance(call, Compiled):  # of a compiler that compiles nothing
        return declared
    chosen = input_shardings(call)
    if not any(map(is_spread, chosen)):
        return declared._replace(are_several=False)
    args, kwargs = leaves_of_arguments(call.in_tree)
    names = {mask.name for mask in program.target.masks}
    masks = {name: kwargs.pop(name).indices[0] for name in names}
    indices = [index for each in (*args, *kwargs.values()) for index in each.indices]
    pairs = zip([chosen[index] for index in indices], declared.leaves, strict=True)
    return Homes(
        [home or wanted for home, wanted in pairs],
        {name: home for name, index in masks.items() if (home := chosen[index]) is not None},
    )


class Pads(NamedTuple):
    """What has to be padded in the positional arguments.

    Attributes:
        arrays: Position and padder of each argument that is an array itself.
        trees: Position of each argument that is a pytree, with a padder for every leaf of it; None
            for those that fit.
        donated: Positions of those of both whose buffers are the callee's to take.
        is_leaf: Tells the leaves of those pytrees that are nodes to JAX; None: there are none.
        homes: Where the leaves of each argument go in a program of several devices; else empty.
    """

    arrays: tuple[tuple[int, Pad], ...] = ()
    trees: tuple[tuple[int, tuple[Pad | None, ...]], ...] = ()
    donated: tuple[int, ...] = ()
    is_leaf: Callable[[object], bool] | None = None
    homes: Sequence[Sequence[Sharding | None]] = ()

    def apply(self, args: Sequence[PyTree]) -> Sequence[PyTree]:
        """The arguments, padded on the host; what is donated goes where the given ones are."""
        padded = list(args)
        for position, pad_array in self.arrays:
            padded[position] = pad_array(args[position])
        for position, padders in self.trees:
            leaves, structure = jax.tree.flatten(args[position], is_leaf=self.is_leaf)
            fitted = [
                leaf if pad is None else pad(leaf)
                for pad, leaf in zip(padders, leaves, strict=True)
            ]
            padded[position] = jax.tree.unflatten(structure, fitted)
        if not self.donated:
            return padded
        return on_device(args, padded, self.donated, homes=self.homes)

    def apply_explicitly(self, args: Sequence[PyTree]) -> Sequence[PyTree]:
        """The same for `jax.transfer_guard("disallow")`.

        What this package moves is moved explicitly; NumPy arrays of the caller's stay where they
        are, to be refused as under `jit`.
        """
        positions = [position for position, _ in (*self.arrays, *self.trees)]
        on_host = list(args)
        for position in positions:
            on_host[position] = jax.tree.map(_on_host, args[position], is_leaf=is_padded)
        padded = self._replace(donated=()).apply(on_host)
        return on_device(args, padded, positions, homes=self.homes)


def _on_host(leaf: PyTree) -> PyTree:
    """An array in NumPy; what takes a `Padded` sees to that itself."""
    return leaf if is_padded(leaf) else jax.device_get(leaf)


def pads_for(
    program: Program, leaves: Sequence[object], homes: Homes, *, sizes: Bucket, bucket: Bucket
) -> Pads:
    """What a request with leaves like these needs padded."""
    arrays: list[tuple[int, Pad]] = []
    trees: list[tuple[int, tuple[Pad | None, ...]]] = []

    def pad_of(index: int) -> Pad | None:
        leaf, axes, home = leaves[index], program.axes[index], homes.leaves[index]
        pad = leaf_pad(
            leaf,
            program.variant.leaves[index].dtype,
            axes=axes,
            sizes=sizes,
            bucket=bucket,
            value=program.pad_values[index],
            home=home,
        )
        may_move = homes.are_several and not axes.passes_through
        if pad is None and may_move and is_elsewhere(leaf, home):
            return jax.device_get  # else JAX refuses it, or compiles how it is cut
        return pad

    for position, argument in enumerate(program.argument_leaves):
        padders = tuple(map(pad_of, argument.indices))
        needed = [pad for pad in padders if pad is not None]
        if argument.is_array:
            arrays += [(position, pad) for pad in needed]
        elif needed:
            trees.append((position, padders))
    padded = {position for position, _ in (*arrays, *trees)}
    donated = padded.intersection(program.target.donate_argnums)
    is_leaf = is_padded if trees and any(map(is_padded, leaves)) else None
    own = [[homes.leaves[index] for index in each.indices] for each in program.argument_leaves]
    return Pads(
        tuple(arrays),
        tuple(trees),
        tuple(sorted(donated)),
        is_leaf,
        own if homes.are_several else (),
    )


def _names(program: Program) -> Sequence[str]:
    example = program.example
    return argument_leaf_names(program.argument_names, example.args, example.kwargs)


def refuse_misplaced(
    program: Program, leaves: Sequence[object], homes: Homes, bucket: Bucket
) -> None:
    """Raises where an argument cannot come to where a bucket takes it.

    Raises:
        InputShapeError: One cannot; the message names it.
    """
    if not homes.are_several:
        return
    names = partial(_names, program)
    _refuse_passed_elsewhere(leaves, program.axes, homes.leaves, names)
    _refuse_unreadable(leaves, program.axes, program.pad_values, homes.leaves, bucket, names)


def _refuse_passed_elsewhere(
    leaves: Sequence[object],
    axes: Sequence[LeafAxes],
    places: Sequence[Sharding | None],
    names: Callable[[], Sequence[str]],
) -> None:
    """Raises where what is passed through was put elsewhere than where it is taken.

    Args:
        leaves: Those of a call.
        axes: Which of their dimensions follow a size.
        places: Where a program of several devices takes each; None: anywhere.
        names: What they are called.

    Raises:
        InputShapeError: One was; the compiled function would refuse it, as under `jit`.
    """
    for index, (leaf, follows, place) in enumerate(zip(leaves, axes, places, strict=True)):
        array = without_padding(leaf)
        if not follows.passes_through or not is_elsewhere(array, place) or not array.committed:
            continue
        raise InputShapeError(
            f"{names()[index]} lies on {array.sharding}, and is taken on {place}: put what is "
            "passed through there once, by jax.device_put, or declare in in_shardings where it is"
        )


def refuse_parameters_elsewhere(call: Call) -> None:
    """The same of a call, by what is declared: before anything is captured for it."""
    names = partial(argument_leaf_names, call.declared.argument_names, call.args, call.kwargs)
    places = [leaf.sharding for leaf in call.variant.leaves]
    _refuse_passed_elsewhere(call.leaves, call.axes, places, names)


def _refuse_unreadable(
    leaves: Sequence[PyTree],
    axes: Sequence[LeafAxes],
    values: Sequence[PadValue],
    places: Sequence[Sharding | None],
    bucket: Bucket,
    names: Callable[[], Sequence[str]],
) -> None:
    """Raises where an array would have to go through the host that no process can read.

    Raises:
        InputShapeError: One would.
    """
    described = enumerate(zip(leaves, axes, values, places, strict=True))
    for index, (leaf, follows, value, place) in described:
        array = leaf.array if is_padded(leaf) else leaf
        if follows.passes_through or not isinstance(array, jax.Array) or is_readable(array):
            continue
        if why := _why_by_host(leaf, axes=follows, bucket=bucket, value=value, place=place):
            raise InputShapeError(
                f"{names()[index]} lies on the devices of several processes, none of which can "
                f"read it to pad it or to move it, but {why}: give it as the bucket takes it (with "
                "the grid, in_shardings and pad_values of what made it), or replicate it there, by "
                "jax.lax.with_sharding_constraint with PartitionSpec()"
            )


def _why_by_host(
    leaf: PyTree, *, axes: LeafAxes, bucket: Bucket, value: PadValue, place: Sharding | None
) -> str:
    """Why an array of JAX's has to go through the host to come into a bucket; else empty."""
    if is_padded(leaf):
        return way_in_of(leaf, axes=axes, bucket=bucket, value=value, home=place).why
    wanted = axes.resize(leaf.shape, bucket)
    if leaf.shape != wanted:
        return f"it is {list(leaf.shape)}, and the bucket takes {list(wanted)}"
    return _ELSEWHERE if is_elsewhere(leaf, place) else ""


def refuse_elsewhere(program: Program, leaves: Sequence[object], homes: Homes) -> None:
    """Raises where an array that carries sizes would have to be copied to where it is taken.

    Raises:
        InputShapeError: One would; the message names it.
    """
    if not homes.are_several:
        return
    described = enumerate(zip(leaves, program.axes, homes.leaves, strict=True))
    for index, (leaf, axes, home) in described:
        if not axes.passes_through and is_elsewhere(without_padding(leaf), home):
            raise InputShapeError(
                f"{_names(program)[index]} lies elsewhere than {home}, where the bucket takes it, "
                "and cudagraph_copy_inputs=False forbids to copy it: put it there by "
                "jax.device_put, or leave cudagraph_copy_inputs on"
            )


def is_elsewhere(leaf: object, home: Sharding | None) -> bool:
    """Whether an array of JAX's is not where the program takes it.

    What lies somewhere by chance is where it is taken whole by each device: JAX copies it there,
    and compiles nothing for that.
    """
    if home is None or not isinstance(leaf, jax.Array) or is_key(leaf):
        return False
    if not leaf.committed and not is_cut(home):
        return False
    return not leaf.sharding.is_equivalent_to(home, leaf.ndim)


def leaf_pad(
    leaf: object,
    dtype: np.dtype[np.generic],
    *,
    axes: LeafAxes,
    sizes: Bucket,
    bucket: Bucket,
    value: PadValue,
    home: Sharding | None,
) -> Pad | None:
    """What brings a leaf of a call of `sizes` to `bucket`; None where it is at its size already."""
    if axes.passes_through:
        return without_padding if is_padded(leaf) else None
    if isinstance(leaf, Padded):
        way_in = way_in_of(leaf, axes=axes, bucket=bucket, value=value, home=home)
        return take_of(leaf, way_in, axes=axes, sizes=sizes, bucket=bucket)
    shape = getattr(leaf, "shape", ())
    return padder(shape, np.dtype(dtype), axes=axes, sizes=sizes, bucket=bucket, value=value)


class Way(Enum):
    """How a call takes a `Padded`."""

    AS_IS = "is passed on as it is"
    REFILLED = "has its padding filled with {value} on the device"
    HOST = "goes through the host, which waits for it: {why}"


_ELSEWHERE = "it lies on other devices, or is cut in another way"
_NOT_COMPILED = "nothing is compiled that fills its padding"


class WayIn(NamedTuple):
    """The way of a `Padded` into a bucket.

    Attributes:
        way: What is done.
        why: Why it cannot stay on the device; empty where it does.
        value: What its padding has to hold.
    """

    way: Way
    value: PadValue
    why: str = ""

    def __str__(self) -> str:
        return self.way.value.format(value=self.value, why=self.why)


def way_in_of(
    padded: Padded,
    *,
    axes: LeafAxes,
    bucket: Bucket,
    value: PadValue,
    home: Sharding | None,
) -> WayIn:
    """The way of `padded` into a bucket.

    Args:
        padded: An argument.
        axes: Which of its dimensions follow a size.
        bucket: That of the call.
        value: What the function has its padding filled with.
        home: Where the bucket takes it; None: anywhere.
    """
    layout, whole = padded.layout, padded.array.shape
    wanted = axes.resize(layout.shape, bucket)
    if whole != wanted:
        return WayIn(Way.HOST, value, f"it is {list(whole)}, and the bucket takes {list(wanted)}")
    if is_elsewhere(padded.array, home):
        return WayIn(Way.HOST, value, _ELSEWHERE)
    left = {place for place, length in axes.dims if length.left}
    short = {place for place, size in enumerate(layout.shape) if size != whole[place]}
    if (left ^ layout.left) & short:
        return WayIn(Way.HOST, value, "it is padded on the other side")
    if not short or _holds(layout.fill, value):
        return WayIn(Way.AS_IS, value)
    if isinstance(value, str):
        return WayIn(Way.HOST, value, f'pad_values="{value}" is filled in there alone')
    if layout.refill is None or not layout.refill.takes(padded.array):
        return WayIn(Way.HOST, value, _NOT_COMPILED)
    return WayIn(Way.REFILLED, value)


def ways_in(call: Call, bucket: Bucket, homes: Homes | None = None) -> Iterator[tuple[str, WayIn]]:
    """The name of each `Padded` among the arguments of a call, and its way into a bucket.

    Args:
        call: The call.
        bucket: What serves it.
        homes: Where that takes its arguments; None: as they were declared, as far as it is known.
    """
    if not any(map(is_padded, call.leaves)):
        return
    names = argument_leaf_names(call.declared.argument_names, call.args, call.kwargs)
    places = _declared(call, bucket) if homes is None else homes.leaves
    described = zip(call.leaves, call.axes, _values(call), places, strict=True)
    for name, (leaf, axes, value, home) in zip(names, described, strict=True):
        if is_padded(leaf):
            yield name, way_in_of(leaf, axes=axes, bucket=bucket, value=value, home=home)


def _declared(call: Call, bucket: Bucket) -> list[Sharding | None]:
    return declared_homes(call.variant.leaves, call.axes, bucket)


def _values(call: Call) -> tuple[PadValue, ...]:
    """What each leaf of a call is padded with; nothing that is given by keyword is."""
    given = tuple(call.declared.pad_values)
    return (*given, *[0] * (len(call.leaves) - len(given)))


def fits_untouched(call: Call, bucket: Bucket, homes: Homes | None = None) -> bool:
    """Whether the arrays of a call are at the bucket's size, so that none has to be copied."""
    leaves: Sequence[PyTree] = call.leaves
    return all(way_in.way is Way.AS_IS for _, way_in in ways_in(call, bucket, homes)) and all(
        is_padded(leaf) or axes.resize(leaf.shape, bucket) == leaf.shape
        for leaf, axes in zip(leaves, call.axes, strict=True)
        if not axes.passes_through
    )


def _holds(fill: PadValue | None, value: PadValue) -> bool:
    """Whether padding that holds `fill` is such as a function asks for."""
    if value == ANY:
        return True
    return fill is value or (fill == value and is_zero(fill) == is_zero(value))


def take_of(
    padded: Padded, way_in: WayIn, *, axes: LeafAxes, sizes: Bucket, bucket: Bucket
) -> Take:
    """What takes a `Padded` like this one; it is made once for each shape.

    Args:
        padded: An argument; it is not kept.
        way_in: Its way into the bucket.
        axes: Which of its dimensions follow a size.
        sizes: Those of the call.
        bucket: Those of the bucket.
    """
    value = way_in.value
    if way_in.way is Way.AS_IS:
        return _whole
    shape, dtype = padded.shape, np.dtype(padded.dtype)
    pad = padder(shape, dtype, axes=axes, sizes=sizes, bucket=bucket, value=value)

    def by_host(padded: Padded) -> PyTree:
        part = fetched(padded)
        return part.copy() if pad is None else pad(part)

    # Another one of these sizes may bring what fills it.
    may_stay = way_in.way is Way.REFILLED or way_in.why == _NOT_COMPILED
    return _refilled(shape, value, by_host) if may_stay else by_host


def _whole(padded: Padded) -> PyTree:
    return padded.array


def _refilled(shape: Shape, value: PadValue, by_host: Take) -> Take:
    """What fills a `Padded` anew by its own executable; by the host one that has none."""
    held: tuple[Refill | None, tuple[PyTree, ...]] = (None, ())

    def take(padded: Padded) -> PyTree:
        nonlocal held
        refill, operands = held
        if (own := padded.layout.refill) is None:
            return by_host(padded)
        if own is not refill:
            if not own.takes(padded.array):
                return by_host(padded)
            operands = own.operands(shape, value)
            held = own, operands
        return own(padded.array, operands)

    return take


def padded_leaves(call: Call, bucket: Bucket) -> list[PyTree]:
    """The leaves of a call, each that carries axes as a `Padded` of the bucket, on the device."""
    found: list[PyTree] = []
    leaves: Sequence[PyTree] = call.leaves
    places, values = _declared(call, bucket), _values(call)
    names = partial(argument_leaf_names, call.declared.argument_names, call.args, call.kwargs)
    _refuse_unreadable(leaves, call.axes, values, places, bucket, names)
    for leaf, axes, abstract, value, place in zip(
        leaves, call.axes, call.variant.leaves, values, places, strict=True
    ):
        if axes.passes_through:
            found.append(leaf)
            continue
        dtype, sizes = abstract.dtype, call.sizes
        pad = leaf_pad(leaf, dtype, axes=axes, sizes=sizes, bucket=bucket, value=value, home=place)
        home = place if is_spread(place) else None
        if pad is None and is_elsewhere(leaf, home):
            pad = np.asarray
        if pad is None or pad is _whole:
            given = leaf if is_padded(leaf) else Padded(leaf, leaf.shape)
            if isinstance(given.array, np.ndarray):  # the caller's to change: JAX may alias it
                given = Padded.laid_out(put(given.array.copy(), home), given.layout)
            found.append(given)
            continue
        array = pad(_on_host(leaf))
        if home is None:
            (array,) = on_device([leaf], [array], [0])
        left = [place for place, length in axes.dims if length.left]
        fill = 0 if value == ANY else value
        found.append(Padded(put(array, home), leaf.shape, left=left, fill=fill))
    return found


Masks = Callable[[], Mapping[str, PyTree]]
"""What makes the masks of a call, by the keywords that they are passed under."""


def masks_for(program: Program, homes: Homes, sizes: Bucket, bucket: Bucket) -> Masks | None:
    """What makes the masks of calls of `sizes` in `bucket`; None where the function takes none."""
    if not program.target.masks:
        return None
    parts = [
        (
            mask.name,
            mask.shape(program.carried, bucket),
            mask.real(program.carried, sizes, program.on_left),
        )
        for mask in program.target.masks
    ]

    def make() -> dict[str, PyTree]:
        return {name: mask_of(shape, index) for name, shape, index in parts}

    if sizes != bucket or (homes.are_several and not homes.masks):
        return make  # a route that kept its masks would keep the bucket's bytes
    full = put_masks(make(), homes.masks)
    return lambda: full


def put_masks(masks: Mapping[str, PyTree], homes: Mapping[str, Sharding]) -> Mapping[str, PyTree]:
    """The masks on the device, or the devices that the program takes them on."""
    return {name: put(mask, homes.get(name)) for name, mask in masks.items()}


def direct_call(
    call: Callable[..., PyTree], pads: Pads, masks: Masks | None
) -> Callable[..., PyTree] | None:
    """`call` of a call's positional arguments, padded in the same frame; None where that is more.

    More than copies into zeros: other padding, pytrees, donated arrays.
    """
    # A frame costs 0.05 us, and so does an attribute of `self` with each use of it.
    zero_pads = tuple(
        (place, pad.shape, pad.dtype, pad.index)
        for place, pad in pads.arrays
        if isinstance(pad, Padder) and pad.is_zero
    )
    if pads.trees or pads.donated or len(zero_pads) < len(pads.arrays):
        return None
    # A method takes 0.05 us less than its object.
    run: Callable[..., PyTree] = call.__call__ if isinstance(call, Compiled) else call
    if not pads.arrays:
        return run if masks is None else lambda *args: run(*args, **masks())
    zeros = np.zeros

    def padded_call(*args: PyTree) -> PyTree:
        padded = list(args)
        for position, shape, dtype, index in zero_pads:
            padded[position] = buffer = zeros(shape, dtype)
            buffer[index] = args[position]
        return run(*padded) if masks is None else run(*padded, **masks())

    return padded_call
