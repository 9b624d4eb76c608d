"""How long a warm-up takes with several workers, over one.

    python benchmarks/warmup.py [--rounds 3] [--workers 1 2 4]

The demo's MiniLM encoder on a grid of 25 buckets, compiled anew each time. The contenders take
turns; no bucket is run meanwhile (`warmup_iterations=0`), which would take as long for all. Where
the model package is missing, random weights of the same shapes take their place.
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
import numpy as np

import cudagraph_jax as cg
from cudagraph_jax.demo.bert import model_folder, tokens, weights
from cudagraph_jax.demo.bert.model import MINILM, Dense, Layer, Norm, Params, encode
from cudagraph_jax.demo.requirements import DemoError

CONFIG = cg.CUDAGraphConfig(
    capture_sizes=(1, 4, 8, 12, 16), capture_seq_lens=(32, 48, 72, 176, 256), warmup_iterations=0
)
BUCKETS = len(CONFIG.buckets())
RANDOM = "random weights"


def find_params() -> tuple[Params, str]:
    """The encoder's weights, and whose they are: the model package's, or else random ones."""
    try:
        return weights.load_params(model_folder.find_model()), model_folder.PACKAGE
    except DemoError:
        return random_params(), RANDOM


def random_params() -> Params:
    """Weights of MiniLM's shapes as NumPy arrays, the same each time."""
    draw = np.random.default_rng(0)

    def kernel(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)

    def dense(inputs: int, outputs: int) -> Dense:
        return Dense(kernel(inputs, outputs), np.zeros(outputs, np.float32))

    hidden = MINILM.hidden_size
    norm = Norm(np.ones(hidden, np.float32), np.zeros(hidden, np.float32))
    layers = tuple(
        Layer(
            *(dense(hidden, hidden) for _ in range(4)),
            norm,
            dense(hidden, 4 * hidden),
            dense(4 * hidden, hidden),
            norm,
        )
        for _ in range(MINILM.layers)
    )
    return Params(kernel(MINILM.vocab_size, hidden), kernel(MINILM.positions, hidden), norm, layers)


def warmup_seconds(
    params: Params, *, workers: Sequence[int], rounds: int
) -> dict[int, list[float]]:
    """Seconds of each warm-up, by the number of workers; round by round in turn."""
    params = jax.device_put(params)
    ids, mask = tokens.stack([[1] * 10])  # nothing is run: any token will do
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
    params, whose = find_params()
    taken = warmup_seconds(params, workers=options.workers, rounds=options.rounds)
    if options.json:
        print(json.dumps({"weights": whose, "seconds": taken}))
        return 0
    device, cores = jax.devices()[0].device_kind, os.cpu_count()
    print(f"jax {jax.__version__}, {device}, {cores} cores, {BUCKETS} buckets, {whose}, medians")
    first = taken[options.workers[0]]
    for workers, seconds in taken.items():
        ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
        print(
            f"workers={workers:<3} {statistics.median(seconds):6.2f} s  {ratio:.2f} times as fast"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
