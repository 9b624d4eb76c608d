"""A batcher under everything at once, and under ten times what it can answer; every answer checked.

    python benchmarks/batcher_soak.py [--seconds 60]
    python benchmarks/batcher_soak.py --overload [--seconds 60]

16 threads and 4 event loops ask for rows of a function that fails for some of them; some are
cancelled, some are in a hurry, and the weights change all the while. Exit status 0 means: no wrong
answer, no lost future, and counts that add up.

`--overload`: NumPy's passages through the demo's encoder, ten times as many as it was measured to
answer, each with a deadline. Exit status 0 means: what was accepted was answered in time or failed
with `DeadlineError`, the goodput was 95 % of that measure at least, and resident memory was flat
over the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, Future

import jax
import numpy as np
from memory import resident_mb

import cudagraph_jax as cg

THREADS, LOOPS, TASKS = 16, 4, 10
PATIENCE_S = 60
BAD = -1.0
SCALES = (np.float32(2), np.float32(3))
MAX_GROWTH = 0.10
ENOUGH = 0.95
LATE_S = 0.25  # a call that takes longer than ever, and the thread that notes the time


def _checked(x: np.ndarray) -> np.ndarray:
    if (np.asarray(x) == BAD).any():
        raise RuntimeError("a bad row")
    return np.asarray(x)


def scaled(scale: jax.Array, x: jax.Array) -> jax.Array:
    """Rows times `scale`; the host refuses some."""
    return scale * jax.pure_callback(_checked, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


class Client:
    """Asks for one row after the other until the end.

    Attributes:
        came: What came of them.
        wrong: Rows with another answer than theirs.
    """

    def __init__(self, batcher: cg.Batcher, seed: int, stop: threading.Event) -> None:
        self._batcher, self._stop = batcher, stop
        self._draw = random.Random(seed)
        self.came: Counter[str] = Counter()
        self.wrong: list[tuple[float, object]] = []

    def _row(self) -> tuple[float, np.ndarray, float | None]:
        value = BAD if self._draw.random() < 0.01 else self._draw.uniform(1, 2)
        deadline = self._draw.choice([None, None, 60, 0, 1e-3])
        return value, np.full(self._draw.randint(1, 9), value, np.float32), deadline

    def _answered(self, value: float, row: np.ndarray, answer: np.ndarray) -> None:
        self.came["answered"] += 1
        if value == BAD or not any(np.allclose(answer, row * scale) for scale in SCALES):
            self.wrong.append((value, answer))

    def _failed(self, value: float, error: Exception) -> None:
        if isinstance(error, cg.QueueFullError):
            self.came["full"] += 1
        elif isinstance(error, cg.DeadlineError):
            self.came["expired"] += 1
        elif value == BAD and "a bad row" in str(error):
            self.came["failed"] += 1
        else:
            self.wrong.append((value, error))

    def ask(self) -> None:
        """Asks from a thread."""
        while not self._stop.is_set():
            value, row, deadline = self._row()
            try:
                future = self._batcher.submit(row, deadline=deadline)
                if self._draw.random() < 0.1:
                    future.cancel()
                self._answered(value, row, future.result(PATIENCE_S))
            except CancelledError:
                self.came["cancelled"] += 1
            except Exception as error:  # reported below, and the exit status is 1
                self._failed(value, error)

    async def ask_one(self) -> None:
        """Asks from an event loop."""
        value, row, deadline = self._row()
        task = asyncio.ensure_future(self._batcher(row, deadline=deadline))
        if self._draw.random() < 0.1:
            await asyncio.sleep(0)
            task.cancel()
        try:
            self._answered(value, row, await asyncio.wait_for(task, PATIENCE_S))
        except asyncio.CancelledError:
            self.came["given up"] += 1
        except Exception as error:  # as above
            self._failed(value, error)

    async def ask_some(self) -> None:
        """Asks for some at a time."""
        while not self._stop.is_set():
            await asyncio.gather(*(self.ask_one() for _ in range(TASKS)))


def soak(seconds: float) -> list[str]:
    """Everything at once; what was not as it should be."""
    config = cg.CUDAGraphConfig(capture_sizes=(1, 3, 8), capture_seq_lens=(4, 9))
    function = cg.bucket_jit(scaled, in_axes=(None, "batch seq"), config=config)
    function.warmup(SCALES[0], np.ones((1, 3), np.float32), progress=False)
    stop = threading.Event()
    with cg.Batcher(function, SCALES[0], max_waiting=40) as batcher:
        clients = [Client(batcher, seed, stop) for seed in range(THREADS + LOOPS)]

        def update() -> None:
            for scale in itertools.cycle(SCALES):
                if stop.wait(1e-3):
                    return
                batcher.update(scale)

        threads = [threading.Thread(target=client.ask) for client in clients[:THREADS]]
        threads += [
            threading.Thread(target=asyncio.run, args=(client.ask_some(),))
            for client in clients[THREADS:]
        ]
        threads.append(threading.Thread(target=update))
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        stop.set()
        for thread in threads:
            thread.join(2 * PATIENCE_S)
        hanging = sum(thread.is_alive() for thread in threads)
    came = sum((client.came for client in clients), Counter[str]())
    stats = batcher.stats()
    counts = stats["items"]
    print(f"{sum(came.values())} items in {seconds:.0f} s: {dict(sorted(came.items()))}")
    print(f"counted: {counts}, in {sum(stats['calls'].values())} calls")
    wrong = [
        f"wrong: {value}: {answer!r:.200}" for client in clients for value, answer in client.wrong
    ]
    if hanging:
        wrong.append(f"{hanging} threads hang")
    # A task that is given up has asked for nothing, or its item is counted as what came just then.
    given_up = came["given up"]
    wrong += [
        f"{came[outcome]} {outcome} were counted as {counts[outcome]}"
        for outcome in ("answered", "failed", "expired", "cancelled", "full")
        if not came[outcome] <= counts[outcome] <= came[outcome] + given_up
    ]
    if (left := batcher.waiting) or counts["refused"]:
        wrong.append(f"{left} wait, {counts['refused']} were refused")
    return wrong


class Overload:
    """Texts at ten times the rate that an encoder answers, each with a deadline."""

    def __init__(self, deadline_s: float) -> None:
        from cudagraph_jax.demo import Encoder
        from cudagraph_jax.demo.corpus import numpy_passages

        encoder = Encoder()
        encoder.warmup(progress=False, workers=2)
        self.batcher = encoder.batcher
        texts = [passage.text for passage in numpy_passages()]
        order = np.random.default_rng(0).permutation(len(texts))
        self.items = [encoder.item(row) for row in encoder.tokenize([texts[n] for n in order])]
        self.deadline_s = deadline_s
        self.came: Counter[str] = Counter()
        self.accepted = 0
        self.latest_s = 0.0

    def saturated(self, items: int = 1024) -> float:
        """Items a second, with as many waiting as may."""
        start = time.perf_counter()
        self.batcher.map(self.items[:items])
        return items / (time.perf_counter() - start)

    def drain(self) -> None:
        """Waits until nothing is left of what was offered."""
        until = time.perf_counter() + PATIENCE_S
        while self.batcher.waiting and time.perf_counter() < until:
            time.sleep(0.01)

    def offer(self, rate: float, seconds: float) -> tuple[float, list[float]]:
        """Offers items at a rate; how long that took, and the memory by and by."""
        start, resident = time.perf_counter(), []
        for count in itertools.count():
            due = start + count / rate
            now = time.perf_counter()
            if now > start + seconds:
                return now - start, resident
            if due > now:
                time.sleep(due - now)
            if now - start >= len(resident):
                resident.append(resident_mb())
            self._offer(self.items[count % len(self.items)])
        raise AssertionError("unreachable")

    def _offer(self, item: tuple[np.ndarray, ...]) -> None:
        came_at = time.perf_counter()
        try:
            future = self.batcher.submit(*item, deadline=self.deadline_s)
        except cg.QueueFullError:
            self.came["full"] += 1
            return

        self.accepted += 1

        def done(of: Future[object]) -> None:
            error = of.exception()
            if error is None:
                self.came["answered"] += 1
                self.latest_s = max(self.latest_s, time.perf_counter() - came_at)
            else:
                self.came["expired" if isinstance(error, cg.DeadlineError) else "failed"] += 1

        future.add_done_callback(done)


def overload(seconds: float, *, deadline_s: float = 2.0) -> list[str]:
    """Ten times the load that can be answered; what was not as it should be."""
    load = Overload(deadline_s)
    load.saturated(256)
    before = load.saturated()
    took, resident = load.offer(10 * before, seconds)
    goodput = load.came["answered"] / took
    load.drain()
    after = load.saturated()
    load.batcher.close()
    saturated = max(before, after)
    growth = max(resident[len(resident) // 2 :]) / resident[len(resident) // 2] - 1
    print(f"saturated: {before:.1f} items/s before, {after:.1f} behind it")
    print(
        f"offered {sum(load.came.values()) / took:.0f} items/s for {took:.0f} s: {dict(load.came)}"
    )
    print(f"goodput: {goodput:.1f} items/s, {goodput / saturated:.1%} of the larger of the two")
    print(f"the latest answer came after {load.latest_s:.2f} s of {deadline_s} s")
    print(
        f"resident: {resident[0]:.0f} MB, {resident[-1]:.0f} MB, {growth:+.1%} in the second half"
    )
    wrong = []
    if load.came["failed"]:
        wrong.append(f"{load.came['failed']} items failed")
    if lost := load.accepted - load.came["answered"] - load.came["expired"] - load.came["failed"]:
        wrong.append(f"{lost} futures are lost")
    if load.latest_s > deadline_s + LATE_S:
        wrong.append(f"an answer came {load.latest_s - deadline_s:.2f} s after its deadline")
    if goodput < ENOUGH * saturated:
        wrong.append(f"the goodput is below {ENOUGH:.0%}")
    if growth > MAX_GROWTH:
        wrong.append("memory grows")
    return wrong


def main() -> int:
    """Runs one of them and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--overload", action="store_true")
    options = parser.parse_args()
    for name in ("jax", "cudagraph_jax"):  # which tell of each call that fails
        logging.getLogger(name).setLevel(logging.CRITICAL)
    wrong = (overload if options.overload else soak)(options.seconds)
    print("\n".join(wrong) or "all well")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
