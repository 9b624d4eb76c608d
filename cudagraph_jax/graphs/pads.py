"""What a call's arguments need to be of the bucket's size, and its masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from cudagraph_jax.program.call import Call, argument_leaf_names, is_key
from cudagraph_jax.program.donation import on_device
from cudagraph_jax.program.padded import Padded, Refill, fetched, is_padded, without_padding
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import LeafAxes, Shape
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import ANY, Padder, PadValue, is_zero, mask_of, padder
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.shardings import dividing, is_spread

Take = Callable[[Padded], PyTree]
"""What makes an argument of a `Padded`."""

Pad = Padder | Take
"""What makes an argument of the bucket's size."""


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


def pads_for(program: Program, leaves: Sequence[object], *, sizes: Bucket, bucket: Bucket) -> Pads:
    """What a request with leaves like these needs padded."""
    arrays: list[tuple[int, Pad]] = []
    trees: list[tuple[int, tuple[Pad | None, ...]]] = []
    homes = program.homes(bucket) if program.is_sharded else [None] * len(leaves)

    def pad_of(index: int) -> Pad | None:
        leaf, axes = leaves[index], program.axes[index]
        abstract = program.variant.leaves[index]
        pad = leaf_pad(
            leaf,
            abstract.dtype,
            axes=axes,
            sizes=sizes,
            bucket=bucket,
            value=program.pad_values[index],
            sharding=abstract.sharding,
        )
        if pad is None and not axes.passes_through and is_elsewhere(leaf, homes[index]):
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
    own = [[homes[index] for index in each.indices] for each in program.argument_leaves]
    return Pads(
        tuple(arrays),
        tuple(trees),
        tuple(sorted(donated)),
        is_leaf,
        own if program.is_sharded else (),
    )


def is_elsewhere(leaf: object, home: Sharding | None) -> bool:
    """Whether an array of JAX's is not where the program takes it."""
    if home is None or not isinstance(leaf, jax.Array) or is_key(leaf):
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
    sharding: Sharding | None,
) -> Pad | None:
    """What brings a leaf of a call of `sizes` to `bucket`; None where it is at its size already."""
    if axes.passes_through:
        return without_padding if is_padded(leaf) else None
    if isinstance(leaf, Padded):
        way_in = way_in_of(leaf, axes=axes, bucket=bucket, value=value, sharding=sharding)
        return take_of(leaf, way_in, axes=axes, sizes=sizes, bucket=bucket)
    shape = getattr(leaf, "shape", ())
    return padder(shape, np.dtype(dtype), axes=axes, sizes=sizes, bucket=bucket, value=value)


class Way(Enum):
    """How a call takes a `Padded`."""

    AS_IS = "is passed on as it is"
    REFILLED = "has its padding filled with {value} on the device"
    HOST = "goes through the host, which waits for it: {why}"


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
    sharding: Sharding | None,
) -> WayIn:
    """The way of `padded` into a bucket.

    Args:
        padded: An argument.
        axes: Which of its dimensions follow a size.
        bucket: That of the call.
        value: What the function has its padding filled with.
        sharding: Where the function takes it; None: anywhere.
    """
    layout, whole = padded.layout, padded.array.shape
    wanted = axes.resize(layout.shape, bucket)
    if whole != wanted:
        return WayIn(Way.HOST, value, f"it is {list(whole)}, and the bucket takes {list(wanted)}")
    if is_elsewhere(padded.array, dividing(sharding, wanted)):
        return WayIn(Way.HOST, value, "it lies on other devices, or is cut in another way")
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


def ways_in(call: Call, bucket: Bucket) -> Iterator[tuple[str, WayIn]]:
    """The name of each `Padded` among the arguments of a call, and its way into a bucket."""
    if not any(map(is_padded, call.leaves)):
        return
    names = argument_leaf_names(call.declared.argument_names, call.args, call.kwargs)
    described = zip(call.leaves, call.axes, _values(call), call.variant.leaves, strict=True)
    for name, (leaf, axes, value, own) in zip(names, described, strict=True):
        if is_padded(leaf):
            sharding = own.sharding
            yield name, way_in_of(leaf, axes=axes, bucket=bucket, value=value, sharding=sharding)


def _values(call: Call) -> tuple[PadValue, ...]:
    """What each leaf of a call is padded with; nothing that is given by keyword is."""
    given = tuple(call.declared.pad_values)
    return (*given, *[0] * (len(call.leaves) - len(given)))


def fits_untouched(call: Call, bucket: Bucket) -> bool:
    """Whether the arrays of a call are at the bucket's size, so that none has to be copied."""
    leaves: Sequence[PyTree] = call.leaves
    return all(way_in.way is Way.AS_IS for _, way_in in ways_in(call, bucket)) and all(
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
    for leaf, axes, abstract, value in zip(
        leaves, call.axes, call.variant.leaves, _values(call), strict=True
    ):
        if axes.passes_through:
            found.append(leaf)
            continue
        dtype, sizes = abstract.dtype, call.sizes
        pad = leaf_pad(
            leaf,
            dtype,
            axes=axes,
            sizes=sizes,
            bucket=bucket,
            value=value,
            sharding=abstract.sharding,
        )
        home = abstract.sharding if is_spread(abstract.sharding) else None
        home = dividing(home, axes.resize(leaf.shape, bucket))
        if pad is None and is_elsewhere(leaf, home):
            pad = np.asarray
        if pad is None or pad is _whole:
            given = leaf if is_padded(leaf) else Padded(leaf, leaf.shape)
            if isinstance(given.array, np.ndarray):  # the caller's to change: JAX may alias it
                given = Padded.laid_out(_put(given.array.copy(), home), given.layout)
            found.append(given)
            continue
        array = pad(_on_host(leaf))
        if home is None:
            (array,) = on_device([leaf], [array], [0])
        left = [place for place, length in axes.dims if length.left]
        fill = 0 if value == ANY else value
        found.append(Padded(_put(array, home), leaf.shape, left=left, fill=fill))
    return found


def _put(array: PyTree, home: Sharding | None) -> jax.Array:
    """An array on the device, or on several; one that is there as it is."""
    with jax.ensure_compile_time_eval():  # also while another function is traced
        placed: jax.Array = jax.device_put(array, home)
    return placed


Masks = Callable[[], Mapping[str, PyTree]]
"""What makes the masks of a call, by the keywords that they are passed under."""


def masks_for(program: Program, sizes: Bucket, bucket: Bucket) -> Masks | None:
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

    homes = program.mask_homes(bucket)
    if sizes != bucket or (program.is_sharded and not homes):
        return make  # a route that kept its masks would keep the bucket's bytes
    full = put_masks(make(), homes)
    return lambda: full


def put_masks(masks: Mapping[str, PyTree], homes: Mapping[str, Sharding]) -> Mapping[str, PyTree]:
    """The masks on the device, or the devices that the program takes them on."""
    # Now, also where another function is being traced around this call.
    with jax.ensure_compile_time_eval():
        return {name: jax.device_put(mask, homes.get(name)) for name, mask in masks.items()}


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
    run: Callable[..., PyTree] = call.__call__ if isinstance(call, jax.stages.Compiled) else call
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
