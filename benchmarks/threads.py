"""Throughput of many threads through one bucketed function, over that of the raw compiled call.

    python benchmarks/threads.py [--rounds 30] [--calls 2000]

Every number of threads shares the same number of calls. Rounds alternate between the two; the
median ratio and its quartiles are shown.
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


def dense(weights, x):
    """A small layer: some tens of microseconds."""
    return jnp.tanh(x @ weights)


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


def main() -> int:
    """Prints the table; the exit status says whether the promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    weights, x = jnp.ones((256, 256)), jnp.ones((16, 256))
    raw = jax.jit(dense).lower(weights, x).compile()
    bucketed = cg.bucket_jit(
        dense,
        in_axes=(None, "batch _"),
        config=cg.CUDAGraphConfig(capture_sizes=(16,)),
        unpad="none",
    )
    bucketed(weights, x)
    contenders = (
        lambda: raw(weights, x).block_until_ready(),
        lambda: bucketed(weights, x).block_until_ready(),
    )
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind})")
    print(
        f"{'threads':>7} {'raw /s':>9} {'bucketed /s':>12} {'ratio':>6} {'quartiles':>13}  promised"
    )
    held = True
    for threads in THREADS:
        rounds = [
            [throughput(call, threads, options.calls) for call in contenders]
            for _ in range(options.rounds)
        ]
        ratios = [ours / theirs for theirs, ours in rounds]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        raw_rate, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        held &= ratio >= PROMISED
        print(
            f"{threads:7} {raw_rate:9.0f} {rate:12.0f} {ratio:6.2f} {low:6.2f}-{high:<6.2f}  "
            f">= {PROMISED}"
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
