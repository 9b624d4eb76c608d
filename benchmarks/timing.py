"""Interleaved timing: every contender in turn, many rounds, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds per call over all rounds."""

    rounds_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """The median round."""
        return statistics.median(self.rounds_us)

    def ratio_to(self, peer: Timing) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratio, round by round."""
        ratios = [a / b for a, b in zip(self.rounds_us, peer.rounds_us, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return low, middle, high


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, calls: int
) -> dict[str, Timing]:
    """Times each contender `calls` times in every round, in turn."""
    for contender in contenders.values():
        for _ in range(20):
            contender()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            for _ in range(calls):
                contender()
            taken[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: Timing(tuple(times)) for name, times in taken.items()}
