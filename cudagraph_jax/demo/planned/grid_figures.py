"""What `demo --plan` measured, as plain values that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from cudagraph_jax.demo.figures import (
    Answer,
    Environment,
    Padding,
    TrafficFigures,
)
from cudagraph_jax.demo.warmup_figures import WarmupFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class GridFigures:
    """One grid, and how it served the rest of the stream.

    Attributes:
        batch_sizes: Its batch ladder.
        seq_lens: Its sequence ladder.
        warmup: Its capture.
        traffic: Its calls.
        padding: What they computed beside the real elements.
    """

    batch_sizes: tuple[int, ...]
    seq_lens: tuple[int, ...]
    warmup: WarmupFigures
    traffic: TrafficFigures
    padding: Padding


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedResult:
    """All that the demo prints with `--plan`.

    Attributes:
        environment: Where it ran.
        passages: Texts in the stream.
        micro_batches: Calls in the stream.
        seen_micro_batches: The first of them, which the plan was made from.
        seen_passages: Texts in those.
        plan: `BucketPlan.to_dict()`.
        powers_of_two: The grid that one guesses, on the rest of the stream.
        planned: The planned grid, on the same.
        least_waste: Of as many buckets, had the rest of the stream been known.
        answers: The queries' best passages.
        total_seconds: From start to end.
    """

    environment: Environment
    passages: int
    micro_batches: int
    seen_micro_batches: int
    seen_passages: int
    plan: Mapping[str, object]
    powers_of_two: GridFigures
    planned: GridFigures
    least_waste: float
    answers: tuple[Answer, ...]
    total_seconds: float

    @property
    def padding_ratio(self) -> float:
        """Padded elements of the planned grid over those of powers of two."""
        before = self.powers_of_two.padding.padded_elements
        return self.planned.padding.padded_elements / before if before else 1.0

    @property
    def throughput_ratio(self) -> float:
        """Passages a second of the planned grid over those of powers of two."""
        before = self.powers_of_two.traffic.passages_per_second
        return self.planned.traffic.passages_per_second / before

    def to_dict(self) -> dict[str, object]:
        """The same in dicts, tuples and numbers, with the two ratios."""
        return {
            **dataclasses.asdict(self),
            "padding_ratio": self.padding_ratio,
            "throughput_ratio": self.throughput_ratio,
        }
