"""How long planning takes: along one axis, a million samples, over two axes and three.

    python benchmarks/plan.py [TRACE.csv] [--column ContextTokens]

Without a trace the lengths are drawn, as many as the Azure conversation trace of 2023 has. Beside
the plan's waste stands that of powers of two, and how many buckets these need.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cudagraph_jax import BucketPlan, plan_buckets
from cudagraph_jax.planning.costs import PolynomialCost

REQUESTS = 19_366
MEASURED = PolynomialCost(constant=0.2, rows=0.01, elements=1e-3, pairs=1e-7)


def drawn(number: int, *, median: float = 800.0, top: int = 14_000) -> np.ndarray:
    """Lengths as of conversations: many short ones, few long ones."""
    draw = np.random.default_rng(0)
    return np.clip(median * draw.lognormal(0.0, 1.1, number), 1, top).astype(np.int64)


def read(trace: Path, column: str) -> np.ndarray:
    """One column of a CSV file."""
    with trace.open(newline="") as lines:
        return np.array([int(row[column]) for row in csv.DictReader(lines)])


def pairs(number: int, batches: int, lengths: int) -> np.ndarray:
    """(batch, seq_len) pairs, every batch as likely as the other, lengths as of conversations."""
    sizes = np.random.default_rng(1).integers(1, batches + 1, number)
    return np.stack([sizes, drawn(number, median=200.0, top=lengths)], axis=1)


def show(name: str, sizes: np.ndarray, plan: Callable[[], BucketPlan]) -> None:
    """Prints a row: the least of three times."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        found = plan()
        taken.append(time.perf_counter() - start)
    different = [len(np.unique(axis)) for axis in np.atleast_2d(sizes.T)]
    powers = found.comparison[0]
    print(
        f"{name:28} {len(sizes):>9,} {'x'.join(map(str, different)):>12} {found.num_graphs:>7} "
        f"{found.expected_waste:>6.1%} {powers.graphs:>7} {powers.waste:>6.1%} {min(taken):>8.2f}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--column", default="ContextTokens")
    options = parser.parse_args()
    lengths = read(options.trace, options.column) if options.trace else drawn(REQUESTS)
    million, both = drawn(1_000_000), pairs(20_000, 32, 4096)
    wide = pairs(200_000, 256, 5000)
    print(
        f"{'':28} {'requests':>9} {'different':>12} {'buckets':>7} {'waste':>6} "
        f"{'powers of two':>14} {'seconds':>8}"
    )
    for graphs in (16, 32):
        show("lengths", lengths, lambda graphs=graphs: plan_buckets(lengths, max_graphs=graphs))
    show("a million lengths", million, lambda: plan_buckets(million, max_graphs=32))
    for graphs in (16, 32, 64):
        show("both axes", both, lambda graphs=graphs: plan_buckets(both, max_graphs=graphs))
    show("both axes, measured cost", both, lambda: plan_buckets(both, max_graphs=32, cost=MEASURED))
    show("both axes, wide", wide, lambda: plan_buckets(wide, max_graphs=32))
    show(
        "both axes, wide, a function",
        wide,
        lambda: plan_buckets(wide, max_graphs=32, cost=lambda batch, seq: float(batch * seq)),
    )
    answers = np.random.default_rng(2).permutation(both[:, 1])
    three = np.column_stack([both, answers])
    axes = ("batch", "src", "tgt")
    show("three axes", three, lambda: plan_buckets(three, axes=axes, max_graphs=64))


if __name__ == "__main__":
    main()
