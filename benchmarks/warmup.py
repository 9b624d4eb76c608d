"""How long a warm-up takes with several workers, over one.

    python benchmarks/warmup.py [--rounds 3] [--workers 1 2 4]

The demo's MiniLM encoder with its grid of 25 buckets, compiled anew each time. The contenders take
turns; no bucket is run meanwhile (`warmup_iterations=0`), which would take as long for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence

import jax

import cudagraph_jax as cg
from cudagraph_jax.demo import encoder, tokens, weights
from cudagraph_jax.demo.model import encode

CONFIG = cg.CUDAGraphConfig(
    capture_sizes=encoder.BATCH_SIZES, capture_seq_lens=encoder.SEQ_LENS, warmup_iterations=0
)
BUCKETS = len(CONFIG.buckets())


def warmup_seconds(*, workers: Sequence[int], rounds: int) -> dict[int, list[float]]:
    """Seconds of each warm-up, by the number of workers; round by round in turn."""
    files = weights.find_model()
    params = jax.device_put(weights.load_params(files.weights))
    ids, mask = tokens.stack(tokens.load_tokenizer(files.tokenizer)(["How do I sort an array?"]))
    taken: dict[int, list[float]] = {count: [] for count in workers}
    for _ in range(rounds):
        for count, seconds in taken.items():
            function = cg.bucket_jit(
                encode, in_axes=(None, "batch seq", "batch seq"), config=CONFIG
            )
            start = time.perf_counter()
            report = function.warmup(params, ids, mask, progress=False, workers=count)
            seconds.append(time.perf_counter() - start)
            assert report.captured == len(report.buckets) == BUCKETS, report
    return taken


def main() -> int:
    """Prints a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", action="store_true", help="print the seconds, for a program")
    options = parser.parse_args()
    taken = warmup_seconds(workers=options.workers, rounds=options.rounds)
    if options.json:
        print(json.dumps(taken))
        return 0
    device, cores = jax.devices()[0].device_kind, os.cpu_count()
    print(f"jax {jax.__version__}, {device}, {cores} cores, {BUCKETS} buckets, medians")
    first = taken[options.workers[0]]
    for workers, seconds in taken.items():
        ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
        print(
            f"workers={workers:<3} {statistics.median(seconds):6.2f} s  {ratio:.2f} times as fast"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
