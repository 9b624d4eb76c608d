"""A batch larger than every bucket, in pieces, joined as if it had been one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.config import CompareWhere
from cudagraph_jax.errors import InputShapeError, PaddingLeakError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.replay_counts import Fit
from cudagraph_jax.graphs.route import Route
from cudagraph_jax.graphs.trial import Trial
from cudagraph_jax.program.call import Call, is_key
from cudagraph_jax.program.donation import copied_key
from cudagraph_jax.program.outputs import OutputLeaf, Outputs
from cudagraph_jax.program.padded import Padded
from cudagraph_jax.shapes.axes import LeafAxes, Length, side
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array, read_only, real_index
from cudagraph_jax.shapes.pytrees import PyTree, leaves_of_arguments
from cudagraph_jax.xla.shardings import dividing, put


def piece_rows(rows: int, largest: int) -> list[int]:
    """The rows of each piece: `largest` as often as it fits, then what is left."""
    full, rest = divmod(rows, largest)
    return [largest] * full + ([rest] if rest else [])


def pieces(call: Call, *, largest: int, donate_argnums: Sequence[int] = ()) -> Iterator[Call]:
    """`call` in calls of `largest` rows each, the last one of what is left.

    Arrays are cut on the host, which compiles nothing.

    Args:
        call: A call that carries a batch.
        largest: Rows of a piece.
        donate_argnums: Arguments that a piece would use up: each gets a copy.
    """
    rows = call.sizes.batch_size
    arguments, _ = leaves_of_arguments(call.variant.structure)
    donated = {index for position in donate_argnums for index in arguments[position].indices}
    on_host: list[Any] = [
        leaf if is_key(leaf) or (axes.batch is None and index not in donated) else np.asarray(leaf)
        for index, (leaf, axes) in enumerate(zip(call.leaves, call.axes, strict=True))
    ]
    start = 0
    for count in piece_rows(rows, largest):
        stop = start + count
        leaves = [
            copied_key(leaf)
            if index in donated and is_key(leaf)
            else leaf
            if axes.batch is None
            else leaf[(slice(None),) * axes.batch + (slice(start, stop),)]
            for index, (leaf, axes) in enumerate(zip(on_host, call.axes, strict=True))
        ]
        args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
        yield dataclasses.replace(
            call,
            args=args,
            kwargs=kwargs,
            leaves=tuple(leaves),
            sizes=call.sizes.with_sizes({"batch": count}),
        )
        start = stop


def uncuttable(axes: Iterable[LeafAxes]) -> InputShapeError | None:
    """The error where an argument has a length that follows from the batch, so that none is cut."""
    for leaf in axes:
        for place, length in leaf.dims:
            if length.axis == "batch" and not length.is_size:
                return InputShapeError(
                    f"dimension {place} of an argument is {length}, which pieces of a batch do not "
                    'share: set on_overflow="eager" or "exact", or add a larger bucket'
                )
    return None


def unjoinable(outputs: Outputs) -> InputShapeError | None:
    """The error where an output does not carry the batch, so that pieces cannot be joined."""
    for leaf in outputs.leaves:
        follows = {size for _, size in leaf.follows}
        batches = [length for _, length in leaf.axes.dims if length.axis == "batch"]
        if batches != [Length("batch")] or "batch" in follows:
            has = "has not one row for each of the" if batches or follows else "carries no"
            return InputShapeError(
                f'{leaf.name} {has} batch, so on_overflow="split" cannot join it: '
                'return one row per request, or set on_overflow="eager"'
            )
        if follows and leaf.unpad in ("device", "padded"):
            return InputShapeError(
                f'{leaf.name} has a length that follows the sequence, so on_overflow="split" '
                'joins it on the host alone: ask for unpad="host", or set on_overflow="eager"'
            )
    return None


def piece_route(entry: CUDAGraphEntry, piece: Call) -> Route:
    """The route of a piece through `entry`; what stays on the device is trimmed by `joined`."""
    leaves = tuple(
        leaf._replace(unpad="none") if leaf.unpad in ("device", "padded") else leaf
        for leaf in entry.outputs.leaves
    )
    return entry.route_for(piece, fit=Fit.PIECE, outputs=entry.outputs._replace(leaves=leaves))


def joined(
    results: Sequence[PyTree], entry: CUDAGraphEntry, rows: Sequence[int], *, sizes: Bucket
) -> PyTree:
    """The outputs of all pieces as those of one call.

    With `unpad="none"` the padding of the last piece alone stays; pieces that were served by
    buckets of different lengths are cut to the shortest. With `unpad="padded"` there is none.

    Args:
        results: The outputs of each piece.
        entry: One that served a piece: where its outputs carry the sizes.
        rows: The real rows of each piece.
        sizes: Those of the whole call.
    """
    outputs = entry.outputs
    columns = zip(*map(jax.tree.leaves, results), strict=True)
    leaves = [
        _join(column, leaf, rows, sizes)
        for column, leaf in zip(columns, outputs.leaves, strict=True)
    ]
    structure = outputs.structure
    if outputs.structure_follows:
        structure = entry.program.real_outputs(outputs, sizes).structure
    return jax.tree.unflatten(structure, leaves)


def check_joined(
    whole: PyTree, entry: CUDAGraphEntry, call: Call, *, compare_where: CompareWhere
) -> None:
    """Raises unless what pieces were joined to is the plain function's answer to the whole call.

    Args:
        whole: What they were joined to.
        entry: One that served a piece.
        call: The whole call.
        compare_where: As for `CUDAGraphConfig`.

    Raises:
        PaddingLeakError: It is not.
        CaptureError: The plain function does not take the whole call.
    """
    trial = Trial(entry, call, compare_where=compare_where)
    real = entry.program.real_outputs(entry.outputs, call.sizes)
    columns = zip(jax.tree.leaves(whole), entry.outputs.leaves, real.indices, strict=True)
    found = [np.asarray(array)[index] for array, leaf, index in columns if leaf.comparable]
    difference = trial.difference(found, trial.expected)
    if difference is not None:
        name, worst, _ = difference
        raise PaddingLeakError(
            f"{entry.program.target.name} at {call.sizes.short}, in pieces of at most "
            f"{entry.batch_size} rows: {name}{list(worst.at)} is {worst.found}, but should be "
            f"{worst.expected}: a row of it depends on other rows (or on what is no argument), and "
            'on_overflow="split" needs rows that are independent of each other: set '
            'on_overflow="exact", or add larger buckets'
        )


def has_distinct_rows(call: Call) -> bool:
    """Whether any two rows of a call differ: where all agree, so does a mean of them."""
    for leaf, axes in zip(call.leaves, call.axes, strict=True):
        if axes.batch is not None and not is_key(leaf):
            rows = np.moveaxis(np.asarray(leaf), axes.batch, 0)
            if np.any(rows != rows[:1]):
                return True
    return False


def was_donated(call: Call, donate_argnums: Sequence[int]) -> bool:
    """Whether a donated array of `call` is gone already."""
    return any(
        isinstance(leaf, jax.Array) and leaf.is_deleted()
        for position in donate_argnums
        for leaf in jax.tree.leaves(call.args[position])
    )


def delete_donated(call: Call, donate_argnums: Sequence[int]) -> None:
    """Ends the life of the donated arrays of a call whose pieces were copies."""
    for position in donate_argnums:
        for leaf in jax.tree.leaves(call.args[position]):
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.delete()


def _join(parts: Sequence[PyTree], leaf: OutputLeaf, rows: Sequence[int], sizes: Bucket) -> PyTree:
    batch, trims = leaf.axes.batch or 0, leaf.unpad != "none"
    if trims:
        indices = [
            real_index(leaf.axes, leaf.ndim, sizes.with_sizes({"batch": count})) for count in rows
        ]
    else:  # they are cut to the shortest, and the last one keeps its padding
        least = map(min, *(part.shape for part in parts), parts[0].shape)
        left = {place for place, length in leaf.axes.dims if length.left}
        cut = tuple(side(size, left=place in left) for place, size in enumerate(least))
        counts = [*rows[:-1], parts[-1].shape[batch]]
        indices = [(*cut[:batch], slice(count), *cut[batch + 1 :]) for count in counts]
    if jnp.issubdtype(parts[0].dtype, jax.dtypes.extended):
        # NumPy cannot hold PRNG keys.
        return jnp.concatenate(
            [part[index] for part, index in zip(parts, indices, strict=True)], axis=batch
        )
    # On the host: JAX compiles a slice or a concatenation once for every new size.
    whole = np.concatenate(
        [np.asarray(part)[index] for part, index in zip(parts, indices, strict=True)], axis=batch
    )
    if leaf.unpad == "host":
        return read_only(whole)
    placed = _placed_like(parts[0], whole)
    return Padded(placed, whole.shape) if leaf.unpad == "padded" else placed


def _placed_like(array: PyTree, whole: Array) -> PyTree:
    """`whole` on the device, or devices, of `array`; as it is if that is NumPy's, as of float0."""
    if not isinstance(array, jax.Array):
        return whole
    if not array.committed:
        return jax.device_put(whole)
    sharding = dividing(array.sharding, whole.shape)
    try:
        sharding.shard_shape(whole.shape)
    except ValueError:
        return jax.device_put(whole)  # uneven: not committed, so that it goes where others are
    return put(whole, sharding)
