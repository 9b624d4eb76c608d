"""A soak: many threads, random sizes, and everything that can disturb them; every answer checked.

    python benchmarks/soak.py [--seconds 60] [--threads 16] [--seed 0]

Calls come through `bucket_jit` and `execute_or_capture`, to a manager that captures in the
background and splits what is too large, and to one that captures in the request, exactly where it
is too large. Meanwhile buckets are evicted, removed and cleared, modes change, managers are sealed
and unsealed, and some captures cannot be traced or do not compile. Ten times in a run the calls
are counted up; then the managers are reset and closed under traffic, and new ones take over.

Exit status 0 means: no wrong answer, no lost call, counts that add up, no capture in a sealed
manager, no thread that hangs, and resident memory that is flat over the second half.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from memory import kept_by_jax_mb, resident_mb
from mix import BATCHES, BUCKETED, MIX, SEQ_LENS, WIDTH, expected, of_one, run_eagerly_once

import cudagraph_jax as cg
from cudagraph_jax import CUDAGraphMode

MAX_GROWTH = 0.10
GENERATIONS = 10
PATIENCE_S = 60
SPLITTING = cg.CUDAGraphConfig(
    capture_sizes=(1, 2, 4, 8),
    capture_seq_lens=(8, 16, 32),
    on_miss="background",
    on_overflow="split",
    max_graphs=20,
    warmup_iterations=1,
)
EXACT = dataclasses.replace(SPLITTING, on_miss="capture", on_overflow="exact")


class Served:
    """A manager with all functions, and how often it was called."""

    def __init__(self, config: cg.CUDAGraphConfig) -> None:
        self.manager = cg.CUDAGraphManager(config)
        self.calls = 0
        self._functions = {
            function.__name__: cg.bucket_jit(
                function, in_axes=(None, "batch seq _"), manager=self.manager
            )
            for function in BUCKETED
        }

    def call(self, name: str, x: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of one function by their names."""
        scale = np.float32(2)
        if name == "of_one":
            batch, seq, _ = x.shape
            outputs = self.manager.execute_or_capture(batch, seq, of_one, {"x": x, "scale": scale})
        else:
            outputs = self._functions[name](scale, x)
        return outputs if isinstance(outputs, dict) else {"": outputs}

    def may_refuse(self, error: Exception, x: np.ndarray) -> bool:
        """Whether that is the error that the policies ask for at this size."""
        config = self.manager.config
        if config.on_overflow == "split":
            return isinstance(error, cg.BucketOverflowError) and x.shape[1] > config.max_seq_len
        inside = config.should_use_cudagraph(*x.shape[:2])
        return isinstance(error, cg.SealedError) and not inside


class Door:
    """Lets calls in while it is open, and can wait until all of them have left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = False
        self._inside = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        """A block that runs while the door is open."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def open(self) -> None:
        """Lets calls in."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def shut(self) -> int:
        """Waits for the calls inside; how many of them hang."""
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: not self._inside, PATIENCE_S)
            return self._inside


class Soak:
    """The shared state of one run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.door = Door()
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.served: list[Served] = []
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def renew(self) -> None:
        """Puts new managers in place."""
        self.served = [Served(SPLITTING), Served(EXACT)]

    def wrong(self, problem: str) -> None:
        """Notes what must not be."""
        with self.lock:
            self.counts["wrong"] += 1
            self.problems.append(problem)

    def serve(self, number: int) -> None:
        """One thread's calls until the end."""
        draw = random.Random(self.seed * 1000 + number)
        values = np.random.default_rng(number)
        while not self.stop.is_set():
            name = draw.choices(list(MIX), list(MIX.values()))[0]
            shape = (draw.choice(BATCHES), draw.choice(SEQ_LENS), WIDTH)
            with self.door.call():
                if not self.stop.is_set():
                    served = draw.choice(self.served)
                    self._call(served, name, values.standard_normal(shape).astype(np.float32))

    def _call(self, served: Served, name: str, x: np.ndarray) -> None:
        with self.lock:
            served.calls += 1
        where = f"{name} at {x.shape[0]}x{x.shape[1]}"
        try:
            outputs = served.call(name, x)
        except Exception as error:  # reported below, and the exit status is 1
            if not served.may_refuse(error, x):
                self.wrong(f"{where}: {type(error).__name__}: {error}")
            return
        for key, want in expected(name, x).items():
            if outputs[key].shape != want.shape or not np.allclose(outputs[key], want, atol=1e-4):
                self.wrong(f"{where} {key}")

    def disturb(self) -> None:
        """Evictions, mode flips and seals until the end."""
        draw = random.Random(self.seed)
        modes = (CUDAGraphMode.NONE, CUDAGraphMode.REPLAY, CUDAGraphMode.DISABLED)
        while not self.stop.wait(0.1):
            manager = draw.choice(self.served).manager
            action = draw.randrange(5)
            if action == 0:
                manager.registry.remove(draw.choice(SPLITTING.capture_sizes), 16)
            elif action == 1:
                manager.mode = draw.choice(modes)
                self.stop.wait(0.02)
                manager.mode = CUDAGraphMode.CAPTURE
            elif action == 2:
                self._seal(manager)
            elif action == 3:
                manager.stats()
            elif draw.random() < 0.1:
                manager.registry.clear()

    def _seal(self, manager: cg.CUDAGraphManager) -> None:
        manager.seal()
        captured = manager.registry.capture_count
        self.stop.wait(0.05)
        # A reset meanwhile counts from zero.
        if manager.registry.capture_count > captured:
            self.wrong("a sealed manager captured")
        manager.mode = CUDAGraphMode.CAPTURE

    def count(self) -> None:
        """Compares the calls with what was counted, while nobody calls."""
        for served in self.served:
            stats = served.manager.stats()
            reasons = {**stats["eager_by_reason"], **stats["errors_by_reason"]}
            parts = {"captures": stats["captures"], "splits": stats["splits"]}
            parts |= {f"{fit} replays": n for fit, n in stats["replays"].items()}
            parts |= {f"eager, {reason}": n for reason, n in stats["eager_by_reason"].items()}
            parts |= {f"error, {reason}": n for reason, n in stats["errors_by_reason"].items()}
            if not served.calls == stats["calls"] == sum(parts.values()):
                self.wrong(f"{served.calls} calls were counted as {stats['calls']}: {reasons}")
            self.counts["calls"] += served.calls
            self.outcomes.update(parts)
            self.counts["captures in all"] += stats["registry"]["capture_count"]
            self.counts["evictions"] += stats["evictions"]

    def storm(self) -> None:
        """Resets and closes the managers under traffic, when no counts can add up."""
        self.door.open()
        for _ in range(3):
            for served in self.served:
                served.manager.reset()
            time.sleep(0.02)
        for served in self.served:
            served.manager.close()
        time.sleep(0.05)


def main() -> int:
    """Runs the soak and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", cg.CUDAGraphWarning)
    run_eagerly_once()
    soak, memory, captures, hung = Soak(options.seed), [], [], 0
    soak.renew()
    targets = [lambda number=number: soak.serve(number) for number in range(options.threads)]
    workers = [threading.Thread(target=target) for target in (*targets, soak.disturb)]
    for worker in workers:
        worker.start()
    for _ in range(GENERATIONS):
        soak.door.open()
        time.sleep(options.seconds / GENERATIONS)
        memory.append(resident_mb())
        hung += soak.door.shut()
        soak.count()
        captures.append(soak.counts["captures in all"])
        soak.storm()
        hung += soak.door.shut()
        if hung:
            break
        soak.renew()
    soak.stop.set()
    soak.door.open()
    for worker in workers:
        worker.join(timeout=PATIENCE_S)
    hung += sum(worker.is_alive() for worker in workers)
    return report(soak, memory, captures, hung)


def report(soak: Soak, memory: list[float], captures: list[int], hung: int) -> int:
    """Prints the table; the exit status."""
    middle = len(memory) // 2
    half, captured = memory[middle:], captures[-1] - captures[middle]
    growth = half[-1] / half[0] - 1
    for name in ("calls", "wrong", "captures in all", "evictions"):
        print(f"{name:22} {soak.counts[name]:>12,}")
    print(f"{'hung threads':22} {hung:>12,}")
    for name, count in sorted(soak.outcomes.items()):
        print(f"  {name:20} {count:>12,}")
    print(f"resident MiB: {half[0]:.0f} -> {half[-1]:.0f} over the second half ({growth:+.1%})")
    print(
        f"with {captured:,} captures; JAX alone, for as many: {kept_by_jax_mb(captured):+.0f} MiB"
    )
    for problem in soak.problems[:5]:
        print(f"problem: {problem}")
    return int(bool(soak.counts["wrong"]) or bool(hung) or growth > MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
