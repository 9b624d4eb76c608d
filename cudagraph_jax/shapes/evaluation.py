"""What a grid does to observed sizes: how much of its work is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cudagraph_jax.shapes.costs import Cost, cost_of_each
from cudagraph_jax.shapes.ladder import Ladder
from cudagraph_jax.shapes.observed import Observed


class Evaluation(NamedTuple):
    """A grid tried on requests.

    Attributes:
        graphs: Buckets, those left out that are smaller than every request needs.
        requests: All requests.
        overflows: Requests that are larger than the largest bucket.
        waste: The part of all cost that is spent on padding, from 0 to 1; overflows left out.
    """

    graphs: int
    requests: int
    overflows: int
    waste: float


def evaluate(
    observed: Observed, batch_sizes: Sequence[int], seq_lens: Sequence[int], cost: Cost
) -> Evaluation:
    """The grid of two ladders, tried on observed sizes."""
    batch_ladder, seq_ladder = np.array(batch_sizes), np.array(seq_lens)
    fits = (observed.batches <= batch_ladder[-1]) & (observed.seq_lens <= seq_ladder[-1])
    batches, lengths = observed.batches[fits], observed.seq_lens[fits]
    counts = observed.counts[fits]
    held_batch = np.searchsorted(batch_ladder, batches)
    held_seq = np.searchsorted(seq_ladder, lengths)
    ideal = counts @ cost_of_each(cost, batches, lengths)
    spent = counts @ cost_of_each(cost, batch_ladder[held_batch], seq_ladder[held_seq])
    return Evaluation(
        graphs=len(np.unique(held_batch)) * len(np.unique(held_seq)),
        requests=observed.requests,
        overflows=observed.requests - int(counts.sum()),
        waste=waste(float(ideal), float(spent)),
    )


def waste(ideal: float, spent: float) -> float:
    """The part of what is spent that is not ideal; 0 where nothing is spent."""
    return 1 - ideal / spent if spent else 0.0


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
    """

    def pair(name: str, batches: Ladder, lengths: Ladder) -> Standard:
        return Standard(
            name,
            Ladder((1,)) if max_batch_size == 1 else batches,
            Ladder((1,)) if max_seq_len == 1 else lengths,
        )

    return (
        pair("powers of two", _powers(1, max_batch_size), _powers(16, max_seq_len)),
        pair("vLLM", Ladder.vllm(max_batch_size), Ladder.vllm(max_seq_len)),
        pair("SGLang", Ladder.sglang(max_batch_size), Ladder.sglang(max_seq_len)),
    )


def _powers(lowest: int, largest: int) -> Ladder:
    top = max(lowest, 1 << (largest - 1).bit_length())
    return Ladder(size for size in Ladder.powers_of_two(top) if size >= lowest)
