"""Latency of a stream that meets new sizes: plain jit, capture in the request, in the background.

    python benchmarks/latency.py [--calls 400]

The stream has a new size every few calls, as traffic that drifts outside what was seen before.
Each contender serves the same stream, and has compiled the largest size, and nothing else, before.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import cudagraph_jax as cg
from cudagraph_jax.xla.compiles import COMPILE_EVENT

CAPTURE_SIZES = (1, 2, 4, 8, 16)
CAPTURE_SEQ_LENS = (16, 32, 64, 128)
AXES = (None, "batch seq _")
WIDTH, LAYERS = 64, 6
LARGEST = np.zeros((CAPTURE_SIZES[-1], CAPTURE_SEQ_LENS[-1], WIDTH), np.float32)


def encoder(weights, x):
    """A stack of dense layers: long enough to compile that a stall shows."""
    for layer in weights:
        x = jnp.tanh(x @ layer["up"]) @ layer["down"] + x
    return x


def parameters() -> list[dict[str, jax.Array]]:
    """The encoder's weights."""
    draw = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal((rows, columns)) / rows**0.5, jnp.float32)

    return [
        {"up": matrix(WIDTH, 2 * WIDTH), "down": matrix(2 * WIDTH, WIDTH)} for _ in range(LAYERS)
    ]


def stream(calls: int) -> list[np.ndarray]:
    """Requests of random sizes."""
    draw = np.random.default_rng(1)
    sizes = draw.integers((1, 1), (CAPTURE_SIZES[-1] + 1, CAPTURE_SEQ_LENS[-1] + 1), (calls, 2))
    return [draw.standard_normal((*size, WIDTH)).astype(np.float32) for size in sizes]


def latencies(
    call: Callable[[np.ndarray], object], requests: Sequence[np.ndarray]
) -> tuple[list[float], int]:
    """Milliseconds of each call, answer on the host included; how many compiled in their thread."""
    taken, owner, compiled = [], threading.get_ident(), set()

    def on_duration(event: str, duration_secs: float, **kwargs: object) -> None:
        if event == COMPILE_EVENT and threading.get_ident() == owner:
            compiled.add(len(taken))

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        for request in requests:
            start = time.perf_counter()
            np.asarray(call(request))
            taken.append((time.perf_counter() - start) * 1e3)
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
    return taken, len(compiled)


def bucketed(weights: object, on_miss: cg.config.OnMiss) -> cg.BucketedFunction:
    """The encoder with its largest bucket captured."""
    config = cg.CUDAGraphConfig(
        capture_sizes=CAPTURE_SIZES, capture_seq_lens=CAPTURE_SEQ_LENS, on_miss=on_miss
    )
    function = cg.bucket_jit(encoder, in_axes=AXES, config=config)
    function(weights, LARGEST)
    function.manager.wait()
    function(weights, LARGEST)
    return function


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=400)
    options = parser.parse_args()
    weights, requests = parameters(), stream(options.calls)
    jitted = jax.jit(encoder)
    jitted(weights, LARGEST)
    capturing = bucketed(weights, "capture")
    background = bucketed(weights, "background")
    contenders = {
        "plain jax.jit": lambda request: jitted(weights, request),
        'on_miss="capture"': lambda request: capturing(weights, request),
        'on_miss="background"': lambda request: background(weights, request),
    }
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {options.calls} calls of random sizes")
    print(f"{'':22} {'p50 ms':>8} {'p99 ms':>8} {'worst ms':>9}  waited for a compile")
    for name, call in contenders.items():
        taken, waited = latencies(call, requests)
        taken.sort()
        p99 = taken[int(len(taken) * 0.99)]
        print(
            f"{name:22} {statistics.median(taken):8.2f} {p99:8.2f} {taken[-1]:9.2f}  {waited} calls"
        )
    stats = background.stats()
    print(f"background: {stats['replays']} replays, {stats['eager_by_reason']} eager")
    background.manager.close()


if __name__ == "__main__":
    main()
