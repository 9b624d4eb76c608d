"""A soak: many threads, random sizes, evictions, mode flips, failing captures, all checked.

    python benchmarks/soak.py [--seconds 60] [--threads 16] [--seed 0]

Exit status 0 means: no wrong answer, no lost call, counts that add up, and resident memory that is
flat over the second half.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import cudagraph_jax as cg
from cudagraph_jax import CUDAGraphMode

MAX_GROWTH = 0.10
BATCHES, SEQ_LENS, WIDTH = (1, 2, 3, 5, 8, 9, 12), (3, 8, 11, 16, 30, 32, 40), 3
CONFIG = cg.CUDAGraphConfig(
    capture_sizes=(1, 2, 4, 8),
    capture_seq_lens=(8, 16, 32),
    on_miss="background",
    on_overflow="split",
    max_graphs=20,
    warmup_iterations=1,
)


def dense(scale, x):
    """A layer of every position by itself."""
    return jnp.tanh(x * scale) + x


def reduced(scale, x):
    """A sum over the real positions; the padding is zero."""
    return {"sum": (x * scale).sum(axis=1), "rows": x[:, 0]}


def untraceable(scale, x):
    """A function that can only run eagerly."""
    return x * float(scale) if float(x.sum()) >= 0 else -x * float(scale)


def expected(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """The answers, in NumPy."""
    if name == "dense":
        return {"": np.tanh(x * 2) + x}
    if name == "reduced":
        return {"sum": (x * 2).sum(axis=1), "rows": x[:, 0]}
    return {"": x * 2 if x.sum() >= 0 else -x * 2}


class Soak:
    """The shared state of one run."""

    def __init__(self, seed: int) -> None:
        self.manager = cg.CUDAGraphManager(CONFIG)
        axes = (None, "batch seq _")
        self.functions = {
            function.__name__: cg.bucket_jit(function, in_axes=axes, manager=self.manager)
            for function in (dense, reduced, untraceable)
        }
        self.seed = seed
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run_eagerly_once(self) -> None:
        """Compiles the operations of eager calls, which JAX keeps for good, before the clock."""
        for function in self.functions.values():
            for batch in BATCHES:
                for seq in SEQ_LENS:
                    x = jnp.asarray(np.ones((batch, seq, WIDTH), np.float32))
                    function.__wrapped__(np.float32(2), x)

    def serve(self, number: int) -> None:
        """One thread's calls until the end."""
        draw = random.Random(self.seed * 1000 + number)
        values = np.random.default_rng(number)
        counts: Counter[str] = Counter()
        while not self.stop.is_set():
            try:
                self._call(draw, values, counts)
            except Exception as error:  # reported below, and the exit status is 1
                counts["wrong"] += 1
                self.problems.append(f"{type(error).__name__}: {error}")
        with self.lock:
            self.counts += counts

    def _call(self, draw: random.Random, values: np.random.Generator, counts: Counter[str]) -> None:
        name = draw.choices(list(self.functions), (10, 10, 1))[0]
        batch, seq = draw.choice(BATCHES), draw.choice(SEQ_LENS)
        x = values.standard_normal((batch, seq, WIDTH)).astype(np.float32)
        counts["calls"] += 1
        try:
            outputs = self.functions[name](np.float32(2), x)
        except cg.BucketOverflowError:
            counts["too long" if seq > max(CONFIG.capture_seq_lens) else "wrong"] += 1
            return
        found = outputs if isinstance(outputs, dict) else {"": outputs}
        for key, want in expected(name, x).items():
            if found[key].shape != want.shape or not np.allclose(found[key], want, atol=1e-4):
                counts["wrong"] += 1
                self.problems.append(f"{name} {key} at {batch}x{seq}")

    def disturb(self) -> None:
        """Evictions, mode flips and resets of what failed, until the end."""
        draw = random.Random(self.seed)
        modes = (CUDAGraphMode.NONE, CUDAGraphMode.REPLAY, CUDAGraphMode.DISABLED)
        while not self.stop.wait(0.25):
            action = draw.randrange(4)
            if action == 0:
                self.manager.registry.remove(draw.choice(CONFIG.capture_sizes), 16)
            elif action == 1:
                self.manager.mode = draw.choice(modes)
                self.stop.wait(0.02)
                self.manager.mode = CUDAGraphMode.CAPTURE
            elif action == 2:
                self.manager.stats()
            elif draw.random() < 0.1:
                self.manager.registry.clear()


def resident_mb() -> float:
    """Resident memory of this process, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> int:
    """Runs the soak and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", cg.CUDAGraphWarning)
    soak = Soak(options.seed)
    soak.run_eagerly_once()
    workers = [
        threading.Thread(target=soak.serve, args=(number,)) for number in range(options.threads)
    ]
    workers.append(threading.Thread(target=soak.disturb))
    for worker in workers:
        worker.start()
    memory = []
    for _ in range(20):
        time.sleep(options.seconds / 20)
        memory.append(resident_mb())
    soak.stop.set()
    for worker in workers:
        worker.join(timeout=60)
    hung = sum(worker.is_alive() for worker in workers)
    soak.manager.wait()
    soak.manager.close()
    return report(soak, memory, hung)


def report(soak: Soak, memory: list[float], hung: int) -> int:
    """Prints the table; the exit status."""
    stats = soak.manager.stats()
    half = memory[len(memory) // 2 :]
    growth = half[-1] / half[0] - 1
    print(f"calls            {soak.counts['calls']:>12,}")
    print(f"counted          {stats['calls']:>12,}")
    print(f"wrong            {soak.counts['wrong']:>12,}")
    print(f"hung threads     {hung:>12,}")
    print(f"replays          {stats['replays']}")
    print(f"splits           {stats['splits']:>12,}")
    print(f"eager            {stats['eager_by_reason']}")
    print(f"errors           {stats['errors_by_reason']}")
    print(f"captures         {stats['registry']['capture_count']:>12,}")
    print(f"evictions        {stats['evictions']:>12,}")
    print(f"resident MiB     {half[0]:.0f} -> {half[-1]:.0f} over the second half ({growth:+.1%})")
    for problem in soak.problems[:5]:
        print(f"problem: {problem}")
    lost = soak.counts["calls"] != stats["calls"]
    return int(bool(soak.counts["wrong"]) or lost or bool(hung) or growth > MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
