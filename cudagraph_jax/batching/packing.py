"""Packing: several short rows in one row of a call, for models that take segments."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np

from cudagraph_jax._base.checks import positive_size
from cudagraph_jax.config import CUDAGraphConfig, checked_config
from cudagraph_jax.errors import BucketOverflowError, InputShapeError
from cudagraph_jax.graphs.route import on_host
from cudagraph_jax.shapes.padding import Array
from cudagraph_jax.shapes.pytrees import PyTree


class _Place(NamedTuple):
    """Where a given row stands: in which row of the call, as which segment, from where."""

    row: int
    segment: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Rows that share rows of one call, and the way back.

    Attributes:
        ids: The rows, one behind the other, padded with 0: `(batch, seq)`.
        positions: Of each element in its own row, from 0: int32 `(batch, seq)`.
        segments: Which of the rows that share one it belongs to, from 1; 0 where nothing is: int32
            `(batch, seq)`.
        places: Where each given row stands.
        max_segments: Of one row at the most.
    """

    ids: Array
    positions: Array
    segments: Array
    places: tuple[_Place, ...]
    max_segments: int

    def __repr__(self) -> str:
        batch, seq = self.ids.shape
        return f"Packed({len(self.places)} rows in {batch}x{seq})"

    def unpack(self, outputs: PyTree) -> list[PyTree]:
        """The output of each given row, in their order.

        Args:
            outputs: Of one call, `(batch, max_segments, …)` arrays; or a list of those for each
                packed row, `(max_segments, …)`, as `Batcher.map(packed.items())` gives. A call
                whose outputs are a list gives them as a tuple.

        Raises:
            InputShapeError: They are of other rows.
        """
        rows = self._by_row(outputs, "max_segments", [{self.max_segments}] * len(self.ids))
        return [_part_of(rows[at.row], at.segment) for at in self.places]

    def unpack_tokens(self, outputs: PyTree) -> list[PyTree]:
        """The outputs for the elements of each given row, in their order.

        Args:
            outputs: Of one call, `(batch, seq, …)` arrays; or a list of those for each packed row,
                as long as it is, as `Batcher.map(packed.items())` gives. A call whose outputs are a
                list gives them as a tuple.

        Raises:
            InputShapeError: They are of other rows.
        """
        seq = self.ids.shape[1]
        rows = self._by_row(outputs, "seq", [{length, seq} for length in self._lengths])
        return [_part_of(rows[at.row], slice(at.start, at.start + at.length)) for at in self.places]

    def items(self) -> list[tuple[Array, Array, Array]]:
        """What each row holds, `(ids, positions, segments)`, as items of a `Batcher`.

        Without the padding behind: the batcher finds a bucket for each. `unpack` and
        `unpack_tokens` take the list of its answers.
        """
        whole = zip(self.ids, self.positions, self.segments, strict=True)
        return [
            (ids[:length], positions[:length], segments[:length])
            for (ids, positions, segments), length in zip(whole, self._lengths, strict=True)
        ]

    @property
    def _lengths(self) -> list[int]:
        """How much of each packed row is real."""
        lengths: list[int] = np.count_nonzero(self.segments, axis=1).tolist()
        return lengths

    def _by_row(self, outputs: PyTree, name: str, held: Sequence[set[int]]) -> list[PyTree]:
        """The outputs for each packed row.

        Args:
            outputs: Of one call, or a list of those for each row.
            name: What errors call the first dimension of a row.
            held: How long that may be, row by row.
        """
        arrays, count = jax.tree.map(on_host, outputs), len(self.ids)
        is_list = isinstance(arrays, list)
        counts = (
            [arrays] if is_list else [leaf if leaf.ndim else () for leaf in jax.tree.leaves(arrays)]
        )
        if other := {*map(len, counts)} - {count}:
            raise InputShapeError(
                f"there are outputs of {max(other)} rows, but {count} are packed: give those of "
                "one call of these, as a tuple where they are a list, or a list with one for each "
                "row, as Batcher.map(packed.items()) gives"
            )
        rows = list(arrays) if is_list else [_part_of(arrays, row) for row in range(count)]
        for row, sizes in enumerate(held):
            for array in jax.tree.leaves(rows[row]):
                if not array.ndim or len(array) not in sizes:
                    raise InputShapeError(
                        f"packed row {row} has an output of the shape {array.shape}, expected "
                        f"({name}, …)=({max(sizes)}, …): give the outputs for these very rows"
                    )
        return rows


def _part_of(outputs: PyTree, index: int | slice) -> PyTree:
    return jax.tree.map(itemgetter(index), outputs)


def pack(
    rows: Sequence[Array],
    *,
    config: CUDAGraphConfig | None = None,
    max_segments: int = 8,
    row_len: int | None = None,
) -> Packed:
    """Rows of a call filled with several of `rows` each, the longest first (first-fit decreasing).

    Rows of the call are as long as the smallest captured length that holds the longest row, and at
    least as long as makes the call fit the largest captured batch, if any length does.

    Args:
        rows: One-dimensional arrays of one dtype.
        config: The grid; without `capture_seq_lens` rows are as long as the longest one.
        max_segments: How many rows may share one.
        row_len: For rows that a `Batcher` puts into calls (`Packed.items`), as many as there are:
            each is filled up to the smallest captured length of at least so many elements, or of
            those of the longest that it holds.

    Raises:
        ConfigError: `max_segments` or `row_len` is no positive integer.
        InputShapeError: There are no rows, or of two dtypes, or one is empty, or no one-dimensional
            array.
        BucketOverflowError: One is longer than every captured length.
    """
    config = checked_config(config)
    most = positive_size(max_segments, name="max_segments")
    arrays = [_row(row, index) for index, row in enumerate(rows)]
    if not arrays:
        raise InputShapeError("rows is empty: give one row at least")
    if len(dtypes := {str(array.dtype) for array in arrays}) > 1:
        raise InputShapeError(
            f"rows have the dtypes {', '.join(sorted(dtypes))}: give all of them one"
        )
    lengths = [len(array) for array in arrays]
    if row_len is None:
        places, seq = _placed_in_a_call(config, lengths, most)
    else:
        places, seq = _placed_in_rows(config, lengths, most, positive_size(row_len, name="row_len"))
    shape = (1 + max(place.row for place in places), seq)
    ids: Array = np.zeros(shape, arrays[0].dtype)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for array, at in zip(arrays, places, strict=True):
        here = (at.row, slice(at.start, at.start + at.length))
        ids[here], positions[here] = array, np.arange(at.length)
        segments[here] = at.segment + 1
    return Packed(ids, positions, segments, tuple(places), most)


def _placed_in_a_call(
    config: CUDAGraphConfig, lengths: Sequence[int], most: int
) -> tuple[list[_Place], int]:
    """Where each row stands in a call whose rows are as short as its batch allows; their length."""
    for seq in _candidates(config, max(lengths)):
        places = _first_fit(lengths, [seq], most)
        if max(place.row for place in places) < max(config.capture_sizes):
            break
    # As none of them does where all lengths are too short; the call is then split or refused.
    return places, seq


def _placed_in_rows(
    config: CUDAGraphConfig, lengths: Sequence[int], most: int, least: int
) -> tuple[list[_Place], int]:
    """Where each row stands in as many rows as there need be; the length of the longest."""
    candidates = _candidates(config, max(lengths))
    rungs = sorted(config.capture_seq_lens or {least, *candidates})
    held = rungs[min(bisect_left(rungs, least), len(rungs) - 1) :]
    return _first_fit(lengths, held, most), max(held[0], candidates[0])


def _row(row: object, index: int) -> Array:
    if not isinstance(row, np.ndarray | jax.Array) or row.ndim != 1 or not row.size:
        shape = getattr(row, "shape", type(row).__name__)
        raise InputShapeError(
            f"rows[{index}] is {shape}, expected a one-dimensional array of one element or more: "
            "give token ids without a batch dimension"
        )
    return np.asarray(row)


def _candidates(config: CUDAGraphConfig, longest: int) -> Sequence[int]:
    """Lengths of the call's rows that hold the longest, the shortest first."""
    if config.capture_seq_lens is None:
        return [longest]
    lengths = [length for length in sorted(config.capture_seq_lens) if length >= longest]
    if not lengths:
        raise BucketOverflowError(
            f"a row has seq_len={longest}, longer than the longest of "
            f"capture_seq_lens={tuple(config.capture_seq_lens)}: cut it, or add a longer one"
        )
    return lengths


def _first_fit(lengths: Sequence[int], rungs: Sequence[int], most: int) -> list[_Place]:
    """The place of each row: in the first row of the call with room, the longest placed first.

    A row of the call is as long as the smallest of `rungs` that holds the first that stands there.
    """
    room: list[int] = []
    used: list[int] = []
    counts: list[int] = []
    places: dict[int, _Place] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fits = (row for row, left in enumerate(room) if length <= left)
        row = next(fits, len(room))
        if row == len(room):
            used.append(0)
            room.append(rungs[bisect_left(rungs, length)])
            counts.append(0)
        places[index] = _Place(row, counts[row], used[row], length)
        used[row] += length
        counts[row] += 1
        room[row] = room[row] - length if counts[row] < most else 0
    return [places[index] for index in range(len(lengths))]
