"""What a grid does to observed sizes: how much of its work is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from cudagraph_jax.planning.costs import Cost, cost_of_each
from cudagraph_jax.planning.observed import Observed
from cudagraph_jax.shapes.ladder import Ladder

_Make: TypeAlias = Callable[[int], Ladder]
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
    batch_sizes: Sequence[int],
    seq_lens: Sequence[int],
    cost: Cost,
    *,
    ideal: float | None = None,
) -> Evaluation:
    """The grid of two ladders, tried on observed sizes.

    Args:
        observed: The sizes.
        batch_sizes: The batch ladder.
        seq_lens: The sequence ladder.
        cost: What a replay costs. It is asked for buckets in use, and for each size if `ideal`
            is None.
        ideal: What all requests cost without padding, where it is known and all of them fit.
    """
    batch_ladder, seq_ladder = np.array(batch_sizes), np.array(seq_lens)
    fits = (observed.batches <= batch_ladder[-1]) & (observed.seq_lens <= seq_ladder[-1])
    batches, lengths = observed.batches[fits], observed.seq_lens[fits]
    counts = observed.counts[fits]
    held_batch = np.searchsorted(batch_ladder, batches)
    held_seq = np.searchsorted(seq_ladder, lengths)
    used, place = np.unique(held_batch * len(seq_ladder) + held_seq, return_inverse=True)
    held = np.bincount(place, counts, minlength=len(used))
    in_batch, in_seq = np.divmod(used, len(seq_ladder))
    spent = held @ cost_of_each(cost, batch_ladder[in_batch], seq_ladder[in_seq])
    if ideal is None:
        ideal = float(counts @ cost_of_each(cost, batches, lengths))
    return Evaluation(
        graphs=len(np.unique(in_batch)) * len(np.unique(in_seq)),
        requests=observed.requests,
        overflows=observed.requests - int(counts.sum()),
        waste=waste(ideal, float(spent)),
    )


def waste(ideal: float, spent: float) -> float:
    """The part of what is spent that is not ideal; 0 where nothing is spent."""
    part = 1 - ideal / spent if spent else 0.0
    # The two are sums in different orders: what is only rounding is nothing, never "-0.0%".
    return part if abs(part) > 1e-11 else 0.0


class Standard(NamedTuple):
    """A pair of ladders that others use.

    Attributes:
        name: What it is called.
        batch_sizes: Its batch ladder.
        seq_lens: Its sequence ladder.
    """

    name: str
    batch_sizes: Ladder
    seq_lens: Ladder


def standard_grids(max_batch_size: int, max_seq_len: int) -> tuple[Standard, ...]:
    """Powers of two, vLLM's and SGLang's ladders, on both axes, up to the largest sizes.

    Powers of two go up to the next one, from 1 on the batch axis and from 16 on the other. vLLM's
    and SGLang's lists are meant for batch sizes; a single batch size or length needs no ladder.
    They are left out above a million, where they have hundreds of thousands of sizes.
    """

    def pair(name: str, batches: _Make, lengths: _Make) -> Standard:
        return Standard(
            name,
            Ladder((1,)) if max_batch_size == 1 else batches(max_batch_size),
            Ladder((1,)) if max_seq_len == 1 else lengths(max_seq_len),
        )

    powers = pair("powers of two", partial(_powers, 1), partial(_powers, 16))
    if max(max_batch_size, max_seq_len) > _LONGEST:
        return (powers,)
    return (
        powers,
        pair("vLLM", Ladder.vllm, Ladder.vllm),
        pair("SGLang", Ladder.sglang, Ladder.sglang),
    )


def _powers(lowest: int, largest: int) -> Ladder:
    top = max(lowest, 1 << (largest - 1).bit_length())
    return Ladder(size for size in Ladder.powers_of_two(top) if size >= lowest)
