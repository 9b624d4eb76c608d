"""Proof that rows of their own lengths may share a call: each gets its own answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.config import CompareWhere
from cudagraph_jax.errors import PaddingLeakError
from cudagraph_jax.graphs.check import trial_sizes
from cudagraph_jax.graphs.compare import USUAL, Tolerance
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.trial import (
    OutputDifference,
    Trial,
    example_call,
    is_binary,
    looks_like_mask,
)
from cudagraph_jax.program.call import Call
from cudagraph_jax.shapes.axes import LeafAxes, side
from cudagraph_jax.shapes.padding import Array

if TYPE_CHECKING:
    from cudagraph_jax.batching.lane import Lane

_MOST_ROWS = 4
"""Each takes an eager run: the longest, one that is one shorter, and two more."""

_PARTS = 8
"""Values that are the same everywhere become an eighth smaller in each further row."""

_APART = "let no mean, maximum or softmax go over the rows"


class RowDifference(NamedTuple):
    """A row that gets another answer in company than alone.

    Attributes:
        row: Which of the call.
        output: How it differs.
        message: The same in words.
    """

    row: int
    output: OutputDifference
    message: str


def differing_row(
    lane: Lane,
    entry: CUDAGraphEntry,
    rows: Sequence[Call],
    *,
    compare_where: CompareWhere = "all",
    tolerance: Tolerance = USUAL,
) -> RowDifference | None:
    """The first row that gets another answer in one call of them all than from the plain function.

    Args:
        lane: What such items come to.
        entry: A bucket that holds all of the rows.
        rows: Calls of one row each, with real values.
        compare_where: As for `CUDAGraphConfig`.
        tolerance: How far answers may be apart.

    Raises:
        CaptureError: The plain function does not take a row.
    """
    layout, sizes = lane.layout, [row.sizes for row in rows]
    arrays = layout.pad([layout.arrays(row) for row in rows], sizes, entry.bucket)
    masks = layout.masks(sizes, entry.bucket)
    result = lane.begin(entry, layout.arguments(rows[0].args, arrays), masks)
    for place, answer in enumerate(lane.answers(entry, result, sizes)):
        trial = Trial(entry, rows[place], compare_where=compare_where, tolerance=tolerance)
        found: list[Array] = [
            np.expand_dims(part, leaf.axes.batch or 0)
            for part, leaf in zip(jax.tree.leaves(answer), entry.outputs.leaves, strict=True)
        ]
        difference = trial.difference(found, trial.expected)
        if difference is not None:
            return RowDifference(place, difference, _message(entry, rows, place, difference))
    return None


def _message(
    entry: CUDAGraphEntry, rows: Sequence[Call], place: int, difference: OutputDifference
) -> str:
    name, worst, _ = difference
    others = ", ".join(row.sizes.short for at, row in enumerate(rows) if at != place)
    is_masked = bool(entry.program.target.masks)
    remedy = (
        "cudagraph_jax.testing.assert_bucketing_preserves says why: padding is enough for it"
        if not others
        else f"go by each row's own part of the mask, not the first row's or the longest; {_APART}"
        if is_masked
        else f"name mask_argname, for a mask of each row's own length, and go by that; {_APART}"
    )
    return (
        f"{entry.program.target.name} gives a row another answer in company than alone\n"
        f"  row:    {place}, {rows[place].sizes.short}, beside {others or 'no other'} in the "
        f"bucket {entry.bucket}\n"
        f"  output: {name}{list(worst.at)} is {worst.found}, but alone {worst.expected}\n"
        f"  remedy: {remedy}"
    )


def check_company(
    lane: Lane,
    entry: CUDAGraphEntry,
    row: Call,
    *,
    pads_seq: bool,
    compare_where: CompareWhere = "all",
) -> None:
    """Raises unless rows of several sizes and values each get the answer that they get alone.

    Args:
        lane: What such items come to.
        entry: One of its buckets.
        row: A call of one row, with real values; other sizes and values are made of it.
        pads_seq: Whether sequences are padded.
        compare_where: As for `CUDAGraphConfig`.

    Raises:
        PaddingLeakError: One gets another answer.
    """
    rows = _companions(entry, row, pads_seq=pads_seq)
    if len(rows) < 2:
        return
    # Whoever goes by the first row, by the longest or by the last is right in one order alone.
    for order in (rows, rows[::-1]):
        difference = differing_row(lane, entry, order, compare_where=compare_where)
        if difference is not None:
            raise PaddingLeakError(difference.message)


def _companions(entry: CUDAGraphEntry, row: Call, *, pads_seq: bool) -> list[Call]:
    """As many rows as the bucket holds, four at the most, that the plain function takes."""
    bucket, batch = entry.bucket, {"batch": 1}
    tried = trial_sizes(entry, row, pads_seq=pads_seq)
    sizes = dict.fromkeys([bucket.with_sizes(batch), *(size.with_sizes(batch) for size in tried)])
    most = min(_MOST_ROWS, bucket.batch_size)
    rows: list[Call] = []
    for turn, size in enumerate(islice(cycle(sizes), max(most, len(sizes)))):
        made = _with_other_values(example_call(entry.program, row, size), turn)
        if Trial(entry, made).refusal() is None:
            rows.append(made)
    return rows[:most]


def _with_other_values(call: Call, turn: int) -> Call:
    """A call of one row, as another item might be: the rows of one item agree at each place.

    Then a mean, a maximum or a softmax over the rows would be each row's own.
    """
    leaves = [
        leaf if axes.passes_through else _other_values(np.asarray(leaf), axes, turn)
        for leaf, axes in zip(call.leaves, call.axes, strict=True)
    ]
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return dataclasses.replace(call, args=args, kwargs=kwargs, leaves=tuple(leaves))


def _other_values(value: Array, axes: LeafAxes, turn: int) -> Array:
    """Values that an array of another row might have.

    They are its own, from `turn` places later on, in their order: ids stay valid, and what is
    sorted stays so. Where they are the same everywhere they become smaller, towards 0 or, of
    integers, 1; ones that may be a mask are a shorter one. Integers of 1 stay: no other is surely
    valid, and of 0 a loop may not end.
    """
    if not turn or not value.size or looks_like_mask(value, axes):
        return value
    later = value
    for place, length in axes.dims:
        if length.axis != "batch":
            later = _from_later_on(later, place, turn)
    if not np.array_equal(later, value):
        return later
    is_integer = jnp.issubdtype(value.dtype, np.integer)
    if is_binary(value) and axes.along is not None and not is_integer:
        return _shorter_mask(value, axes, turn)
    smaller: Array = value
    if jnp.issubdtype(value.dtype, np.inexact):
        smaller = np.multiply(value, 1 - turn / _PARTS)
    elif is_integer:
        whole, rest = np.divmod(value.astype(np.int64), _PARTS)
        kept = whole * (_PARTS - turn) + rest * (_PARTS - turn) // _PARTS
        smaller = np.where(np.greater(value, 1), np.maximum(kept, 1), value)
    return smaller.astype(value.dtype)


def _from_later_on(value: Array, place: int, turn: int) -> Array:
    """What stands `turn` places later along a dimension; the same values at its end stay there.

    They may be padding of the item's own, which its mask or its length says.
    """
    size, along = value.shape[place], np.moveaxis(value, place, 0)
    is_last = np.reshape(np.equal(along, along[-1:]), (size, -1)).all(axis=1)
    end = size - int(np.argmin(np.flip(is_last)))
    places = np.arange(size)
    moved = np.where(places < end, np.minimum(places + turn, end - 1), places)
    return np.take(value, moved, place)


def _shorter_mask(value: Array, axes: LeafAxes, turn: int) -> Array:
    """A mask that is the same everywhere, with the last places turned to the other of 0 and 1."""
    along = axes.along or 0
    shorter = value.copy()
    index = [slice(None)] * value.ndim
    last = min(turn, value.shape[along] - 1)
    index[along] = side(last, left=not dict(axes.dims)[along].left)
    shorter[tuple(index)] = shorter[tuple(index)] == 0
    return shorter
