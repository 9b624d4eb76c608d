"""What a call costs whose arrays are cut over eight devices of a CPU, over that of `jax.jit`.

    python benchmarks/mesh.py [--rounds 40] [--calls 50]

Both have the same `in_shardings`, over a mesh of two by four, and the same arrays. Where the
bucketed call pads, `jit` is given what was padded by hand in the same call.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX is imported
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from timing import interleaved

import cudagraph_jax as cg

CONFIG = cg.CUDAGraphConfig(capture_sizes=(2, 4, 8, 16), capture_seq_lens=(16, 32, 64, 128))
PROMISED = 1.3


def scores(w, x):
    """A function whose run time is next to nothing."""
    return x * w + 1.0


def contenders() -> dict[str, Callable[[], object]]:
    """The calls, by name; those of `jit` are called as their peers with ", jit" behind."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    jitted = jax.jit(scores, in_shardings=(whole, rows))
    bucketed = cg.bucket_jit(
        scores,
        in_axes=(None, "batch seq"),
        in_shardings=(whole, rows),
        config=CONFIG,
        unpad="none",
    )
    w = jax.device_put(np.float32(2.0), whole)
    x, ragged = np.ones((4, 16), np.float32), np.ones((3, 13), np.float32)
    placed = jax.device_put(x, rows)

    def padded_by_hand() -> object:
        buffer = np.zeros((4, 16), np.float32)
        buffer[:3, :13] = ragged
        return jitted(w, buffer)

    return {
        "NumPy": lambda: bucketed(w, x),
        "NumPy, jit": lambda: jitted(w, x),
        "NumPy, padded": lambda: bucketed(w, ragged),
        "NumPy, padded, jit": padded_by_hand,
        "JAX arrays in place": lambda: bucketed(w, placed),
        "JAX arrays in place, jit": lambda: jitted(w, placed),
    }


def main() -> int:
    """Prints the table; the exit status says whether the promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50)
    options = parser.parse_args()
    times = interleaved(contenders(), rounds=options.rounds, calls=options.calls)
    print(f"jax {jax.__version__}, {len(jax.devices())} CPU devices, 2 x 4, medians")
    print(f"{'call':24} {'us':>8} {'jit us':>8} {'ratio':>6} {'quartiles':>13}  promised")
    held = True
    for name, timing in times.items():
        if name.endswith(", jit"):
            continue
        peer = times[f"{name}, jit"]
        low, ratio, high = timing.ratio_to(peer)
        held &= ratio <= PROMISED
        print(
            f"{name:24} {timing.median_us:8.1f} {peer.median_us:8.1f} {ratio:6.2f} "
            f"{low:6.2f}-{high:<6.2f}  <= {PROMISED}"
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
