"""A grid from the first part of a stream: what a server knows after a while of traffic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cudagraph_jax import BucketPlan, CUDAGraphConfig, plan_buckets
from cudagraph_jax.demo.bert.tokens import MAX_TOKENS
from cudagraph_jax.demo.encoder import default_config
from cudagraph_jax.demo.requirements import DemoError
from cudagraph_jax.demo.traffic import MicroBatch

# What the demo's micro-batches need: up to 16 texts of up to 256 tokens.
BATCH_POWERS = (1, 2, 4, 8, 16)
SEQ_POWERS = (16, 32, 64, 128, MAX_TOKENS)

_FEWEST = 3
# plan_buckets counts in whole requests: so many of each batch size.
_RESOLUTION = 10_000


def powers_of_two() -> CUDAGraphConfig:
    """What one guesses without a trace: twenty-five buckets."""
    return with_grid(default_config(), BATCH_POWERS, SEQ_POWERS)


def with_grid(
    config: CUDAGraphConfig, batch_sizes: Sequence[int], seq_lens: Sequence[int]
) -> CUDAGraphConfig:
    """The same policies over another grid."""
    return dataclasses.replace(
        config,
        capture_sizes=batch_sizes,
        capture_seq_lens=seq_lens,
        max_capture_batch_size=None,
        max_capture_seq_len=None,
    )


def first_tenth(batches: Sequence[MicroBatch]) -> int:
    """How many micro-batches a plan is made from: a tenth, but a few, and half at the most.

    Raises:
        DemoError: There are not even two.
    """
    if len(batches) < 2:
        raise DemoError(
            f"{len(batches)} micro-batch is too few to plan from one part and serve another: "
            "raise --limit to 40 or more"
        )
    return min(max(_FEWEST, -(-len(batches) // 10)), len(batches) // 2)


def plan_grid(seen: Sequence[MicroBatch], config: CUDAGraphConfig) -> BucketPlan:
    """The grid for traffic of which `seen` is a sample: no more buckets than `config` has.

    Args:
        seen: Micro-batches.
        config: Its largest bucket must fit into the plan's, as any call may still be as large.
    """
    lengths = [int(length) for batch in seen for length in batch.mask.sum(axis=1)]
    largest = (max(config.capture_sizes), config.max_seq_len)
    return plan_buckets(
        likely_sizes(lengths, max_size=largest[0]),
        max_graphs=len(config.buckets()),
        headroom=largest,
    )


def likely_sizes(lengths: Sequence[int], *, max_size: int) -> dict[tuple[int, int], int]:
    """How often each (batch, seq_len) is to be expected of micro-batches of such texts.

    A few micro-batches are a small sample of sizes, but of many texts. A micro-batch is as long as
    the longest of its texts, drawn independently: its length is at most `n` with the chance that
    one text's is, to the power of the batch. All batch sizes are taken to be equally likely.

    Args:
        lengths: Tokens of each text that was seen.
        max_size: Texts in the largest micro-batch.
    """
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    at_most = np.cumsum(counts) / counts.sum()
    expected = {}
    for batch in range(1, max_size + 1):
        chances = np.diff(at_most**batch, prepend=0.0)
        for length, chance in zip(values.tolist(), chances.tolist(), strict=True):
            expected[batch, length] = round(_RESOLUTION * chance)
    return expected
