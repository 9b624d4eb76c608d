"""Throughput of many threads through one bucketed function, over that of the raw compiled call.

    python benchmarks/threads.py [--rounds 30] [--calls 1200]

Every number of threads shares the same number of calls. Rounds alternate between the two; the
median ratio and its quartiles are shown, for a function of two layers and for one of a single
small layer. In the second the Python of a call, cold in the processor's caches and under the
interpreter's lock, weighs as much as the function itself: it is shown and not promised.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import cudagraph_jax as cg

THREADS = (1, 2, 4, 8)
PROMISED = 0.9
ROWS = 16


def layers(weights, x):
    """Dense layers, one for each matrix."""
    for matrix in weights:
        x = jnp.tanh(x @ matrix)
    return x


def throughput(call: Callable[[], object], threads: int, calls: int) -> float:
    """Calls per second of `threads` threads that make `calls` calls among them."""
    ready = threading.Barrier(threads + 1)

    def work() -> None:
        ready.wait()
        for _ in range(calls // threads):
            call()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return calls / (time.perf_counter() - start)


def compare(number: int, width: int, options: argparse.Namespace, promised: float | None) -> bool:
    """Prints the rows of one function; whether what is promised of it held."""
    weights = [jnp.full((width, width), 1 / width)] * number
    x = jnp.ones((ROWS, width))
    raw = jax.jit(layers).lower(weights, x).compile()
    bucketed = cg.bucket_jit(
        layers,
        in_axes=(None, "batch _"),
        config=cg.CUDAGraphConfig(capture_sizes=(ROWS,)),
        unpad="none",
    )
    bucketed(weights, x)
    contenders = (
        lambda: raw(weights, x).block_until_ready(),
        lambda: bucketed(weights, x).block_until_ready(),
    )
    held = True
    for threads in THREADS:
        rounds = []
        for turn in range(options.rounds):
            # Who goes first changes, so that a machine that warms up favours neither.
            order = contenders if turn % 2 else contenders[::-1]
            rates = [throughput(call, threads, options.calls) for call in order]
            rounds.append(rates if turn % 2 else rates[::-1])
        ratios = [ours / theirs for theirs, ours in rounds]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        raw_rate, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        held &= promised is None or ratio >= promised
        print(
            f"{number}x{width:<6} {threads:7} {raw_rate:9.0f} {rate:12.0f} {ratio:6.2f} "
            f"{low:6.2f}-{high:<6.2f}  {f'>= {promised}' if promised else ''}"
        )
    return held


def main() -> int:
    """Prints the table; the exit status says whether the promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=1200)
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind}), {ROWS} rows")
    print(
        f"{'layers':8} {'threads':>7} {'raw /s':>9} {'bucketed /s':>12} {'ratio':>6} "
        f"{'quartiles':>13}  promised"
    )
    held = compare(2, 512, options, PROMISED)
    compare(1, 256, options, None)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
