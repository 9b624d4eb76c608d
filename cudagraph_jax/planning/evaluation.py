"""What a grid does to observed sizes: how much of its work is padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cudagraph_jax.planning.costs import Cost, cost_of_each
from cudagraph_jax.planning.observed import Ints, Observed, distinct
from cudagraph_jax.shapes.ladder import Ladder

_LONGEST = 2**20


class Evaluation(NamedTuple):
    """A grid tried on requests.

    Attributes:
        graphs: Buckets, those left out that are smaller than every request needs.
        requests: All requests.
        overflows: Requests that are larger than the largest bucket.
        waste: The part of all cost that is spent on padding, overflows left out: from 0 to 1, or
            below 0 where larger buckets are cheaper.
    """

    graphs: int
    requests: int
    overflows: int
    waste: float


def evaluate(
    observed: Observed,
    ladders: Sequence[Sequence[int]],
    cost: Cost,
    *,
    ideal: float | None = None,
) -> Evaluation:
    """The grid of a ladder for each axis, tried on observed sizes.

    Args:
        observed: The sizes.
        ladders: One for each axis of the sizes.
        cost: What a replay costs, as `chosen_cost` gave it. It is asked for buckets in use, and
            for each size if `ideal` is None.
        ideal: What all requests cost without padding, where it is known and all of them fit.
    """
    steps = [np.array(ladder) for ladder in ladders]
    fits = np.ones(len(observed.counts), bool)
    for column, step in zip(observed.columns, steps, strict=True):
        fits &= column <= step[-1]
    columns, counts = [column[fits] for column in observed.columns], observed.counts[fits]
    held = [np.searchsorted(step, column) for step, column in zip(steps, columns, strict=True)]
    used, requests = distinct(np.stack(held, axis=1), counts)
    buckets = [step[at] for step, at in zip(steps, used.T, strict=True)]
    spent = requests @ cost_of_each(cost, *buckets, axes=observed.axes)
    if ideal is None:
        ideal = float(counts @ cost_of_each(cost, *columns, axes=observed.axes))
    return Evaluation(
        graphs=math.prod(len(np.unique(at)) for at in held),
        requests=observed.requests,
        overflows=observed.requests - int(counts.sum()),
        waste=waste(ideal, float(spent)),
    )


def worst_padding(observed: Observed, ladders: Sequence[Sequence[int]]) -> float:
    """The largest part of its bucket that is padding for any request, from 0 to 1.

    Args:
        observed: The sizes, all of which fit.
        ladders: One for each axis of the sizes.
    """
    filled = np.ones(len(observed.counts))
    for column, held in zip(observed.columns, padded_columns(observed, ladders), strict=True):
        filled *= column / held
    return float(1 - filled.min())


def padded_columns(observed: Observed, ladders: Sequence[Sequence[int]]) -> list[Ints]:
    """The size on each axis of the bucket of each request, k times int64 (N,).

    Args:
        observed: The sizes; one that does not fit counts as of the largest bucket.
        ladders: One for each axis of the sizes.
    """
    steps = map(np.array, ladders)
    return [
        step[np.minimum(np.searchsorted(step, column), len(step) - 1)]
        for step, column in zip(steps, observed.columns, strict=True)
    ]


def waste(ideal: float, spent: float) -> float:
    """The part of what is spent that is not ideal; 0 where nothing is spent."""
    part = 1 - ideal / spent if spent else 0.0
    # The two are sums in different orders: what is only rounding is nothing, never "-0.0%".
    return part if abs(part) > 1e-11 else 0.0


class Standard(NamedTuple):
    """A grid that others use.

    Attributes:
        name: What it is called.
        ladders: Its ladder on each axis.
    """

    name: str
    ladders: tuple[Ladder, ...]


def standard_grids(axes: Sequence[str], largest: Sequence[int]) -> tuple[Standard, ...]:
    """Powers of two, vLLM's and SGLang's ladders, on each axis, up to the largest sizes.

    Powers of two go up to the next one, from 16 on the axis "seq" and from 1 on the others. vLLM's
    and SGLang's lists are meant for batch sizes; an axis of a single size 1 needs no ladder. They
    are left out above a million, where they have hundreds of thousands of sizes.

    Args:
        axes: The names of the axes.
        largest: The largest size on each.
    """

    def each(name: str, make: Callable[[str, int], Ladder]) -> Standard:
        ladders = [
            Ladder((1,)) if size == 1 else make(axis, size)
            for axis, size in zip(axes, largest, strict=True)
        ]
        return Standard(name, tuple(ladders))

    powers = each("powers of two", _powers)
    if max(largest) > _LONGEST:
        return (powers,)
    return (
        powers,
        each("vLLM", lambda axis, size: Ladder.vllm(size)),
        each("SGLang", lambda axis, size: Ladder.sglang(size)),
    )


def _powers(axis: str, largest: int) -> Ladder:
    lowest = 16 if axis == "seq" else 1
    top = max(lowest, 1 << (largest - 1).bit_length())
    return Ladder(size for size in Ladder.powers_of_two(top) if size >= lowest)
