"""Proof that rows of their own lengths may share a call: each gets its own answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from cudagraph_jax.config import CompareWhere
from cudagraph_jax.errors import PaddingLeakError
from cudagraph_jax.graphs.check import trial_sizes
from cudagraph_jax.graphs.compare import USUAL, Tolerance
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.trial import OutputDifference, Trial, example_call
from cudagraph_jax.program.call import Call
from cudagraph_jax.shapes.padding import Array

if TYPE_CHECKING:
    from cudagraph_jax.batching.lane import Lane

_MOST_ROWS = 4
"""Each takes an eager run: the longest, one that is one shorter, and two more."""


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
        else "go by each row's own part of the mask, not by the first row's or the longest"
        if is_masked
        else "name mask_argname, which gives each row a mask of its own length, and go by that"
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
    """Raises unless rows of several sizes each get from one call the answer that they get alone.

    Args:
        lane: What such items come to.
        entry: One of its buckets.
        row: A call of one row, with real values; it is cut and repeated for rows of other sizes.
        pads_seq: Whether sequences are padded.
        compare_where: As for `CUDAGraphConfig`.

    Raises:
        PaddingLeakError: One gets another answer.
    """
    bucket, batch = entry.bucket, {"batch": 1}
    tried = trial_sizes(entry, row, pads_seq=pads_seq)
    sizes = [bucket.with_sizes(batch), *(size.with_sizes(batch) for size in tried)]
    rows: list[Call] = []
    for size in dict.fromkeys(sizes):
        made = example_call(entry.program, row, size)
        if Trial(entry, made).refusal() is None:
            rows.append(made)
    rows = rows[: min(_MOST_ROWS, bucket.batch_size)]
    if len(rows) < 2:
        return
    # Whoever goes by the first row, by the longest or by the last is right in one order alone.
    for order in (rows, rows[::-1]):
        difference = differing_row(lane, entry, order, compare_where=compare_where)
        if difference is not None:
            raise PaddingLeakError(difference.message)
