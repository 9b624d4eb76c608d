"""Which rows share a call: the cheapest cut of what waits, by what each captured bucket costs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cudagraph_jax.shapes.ladder import Bucket


class Priced(NamedTuple):
    """A captured bucket and what a run of it costs, in any unit."""

    bucket: Bucket
    cost: float


class Part(NamedTuple):
    """One call of a composition.

    Attributes:
        start: Its first row, counted in the order of the lengths.
        stop: Behind its last row.
        bucket: Where it runs.
        cost: What that costs.
    """

    start: int
    stop: int
    bucket: Bucket
    cost: float


class Prices:
    """What it costs to run so many rows of some length, from the buckets that there are.

    Args:
        buckets: Captured buckets with their costs.

    Attributes:
        lengths: The sequence lengths of the buckets, ascending.
        most_rows: Those of the largest batch.
    """

    def __init__(self, buckets: Iterable[Priced]) -> None:
        held = list(buckets)
        self.lengths = sorted({bucket.seq_len for bucket, _ in held})
        self.most_rows = max((bucket.batch_size for bucket, _ in held), default=0)
        self._options = [_options(held, length) for length in self.lengths]

    def options(self, length: int) -> Sequence[Priced]:
        """The buckets worth a thought for rows of `length`, by rows; none holds more for less."""
        rung = bisect_left(self.lengths, length)
        return self._options[rung] if rung < len(self.lengths) else ()

    def holding(self, rows: int, length: int) -> Priced | None:
        """The cheapest bucket of `rows` of `length`; None where none is large enough."""
        # Of the options each holds more than those before it, and costs more.
        fitting = (option for option in self.options(length) if option.bucket.batch_size >= rows)
        return next(fitting, None)


def _options(held: Sequence[Priced], length: int) -> list[Priced]:
    options: list[Priced] = []
    for priced in sorted(
        (priced for priced in held if priced.bucket.seq_len >= length),
        key=lambda priced: (priced.cost, -priced.bucket.batch_size, priced.bucket.elements),
    ):
        if not options or priced.bucket.batch_size > options[-1].bucket.batch_size:
            options.append(priced)
    return options


def compose(lengths: Sequence[int], prices: Prices) -> list[Part]:
    """The calls of the least total cost that serve rows of these lengths.

    Rows of neighbouring lengths share a call: for any cut into calls there is one of these that
    costs no more. So does a call that takes as many as it holds, since fewer rows never cost more.
    Dynamic programming over the first rows, as in TurboTransformers (https://arxiv.org/abs/2010.05680,
    algorithm 3), over buckets of two dimensions that are measured.

    Args:
        lengths: Ascending, each held by some bucket.
        prices: The buckets.

    Returns:
        The calls, those of the longest rows first.
    """
    least = [0.0]  # for the first rows, as many as the index says
    chosen: list[_Option] = []
    rung, options = -1, list[_Option]()
    rungs = prices.lengths
    for count, length in enumerate(lengths, start=1):
        if rung < 0 or length > rungs[rung]:
            rung = bisect_left(rungs, length)
            options = [(*priced, priced.bucket.batch_size) for priced in prices.options(length)]
        best = math.inf
        for option in options:
            _, cost, rows = option
            if rows >= count:
                if cost < best:
                    best, pick = cost, option
                break  # those behind it hold more than there are, and cost more
            total = least[count - rows] + cost
            if total <= best:  # of two that cost the same the one of more rows, and fewer calls
                best, pick = total, option
        least.append(best)
        chosen.append(pick)
    return _parts(chosen)


_Option = tuple[Bucket, float, int]
"""A bucket, its cost and its rows: an attribute costs more than all else that is done with them."""


def _parts(chosen: Sequence[_Option]) -> list[Part]:
    """The calls, from what was chosen for the last of the first 1, 2, 3, … rows."""
    parts, stop = [], len(chosen)
    while stop:
        bucket, cost, rows = chosen[stop - 1]
        start = max(0, stop - rows)
        parts.append(Part(start, stop, bucket, cost))
        stop = start
    return parts
