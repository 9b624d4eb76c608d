"""Everything at once: threads, event loops, cancels, deadlines, other weights, faults."""

import asyncio
import random
import threading
from collections import Counter
from concurrent.futures import CancelledError

import numpy as np

from cudagraph_jax import Batcher, CUDAGraphConfig, DeadlineError, QueueFullError, bucket_jit
from tests.helpers.batched import row

CONFIG = CUDAGraphConfig(capture_sizes=(1, 3, 8), capture_seq_lens=(4, 9), warmup_iterations=2)
ITEMS = 80


class Client:
    """Asks for one item after the other, and counts what came of them."""

    def __init__(self, batcher, seed):
        self.batcher = batcher
        self.random = random.Random(seed)
        self.came: Counter[str] = Counter()
        self.wrong = []

    def draw(self):
        """A row, and how much time it has."""
        value = self.random.uniform(1, 2)
        deadline = self.random.choice([None, None, 60, 0, 1e-3])
        return row(value, self.random.randint(1, 9)), deadline

    def check(self, item, answer):
        """An answer is the row, scaled by weights that there were."""
        self.came["answered"] += 1
        if not any(np.allclose(answer, item * scale) for scale in (2, 3)):
            self.wrong.append((item, answer))

    def ask(self):
        """Asks from a thread."""
        for _ in range(ITEMS):
            item, deadline = self.draw()
            try:
                future = self.batcher.submit(item, deadline=deadline)
                if self.random.random() < 0.2:
                    future.cancel()
                self.check(item, future.result(60))
            except QueueFullError:
                self.came["full"] += 1
            except DeadlineError:
                self.came["expired"] += 1
            except CancelledError:
                self.came["cancelled"] += 1

    async def ask_one(self, gives_up):
        """Asks from an event loop."""
        item, deadline = self.draw()
        task = asyncio.ensure_future(self.batcher(item, deadline=deadline))
        if gives_up:
            await asyncio.sleep(0)
            task.cancel()
        try:
            self.check(item, await task)
        except QueueFullError:
            self.came["full"] += 1
        except DeadlineError:
            self.came["expired"] += 1
        except asyncio.CancelledError:
            self.came["given up"] += 1

    async def ask_all(self):
        """Asks for several at a time."""
        for _ in range(ITEMS // 10):
            await asyncio.gather(*(self.ask_one(self.random.random() < 0.2) for _ in range(10)))


def test_everything_at_once():
    """No answer is wrong or lost, and the counts are exact."""
    function = bucket_jit(
        lambda scale, x: x * scale, in_axes=(None, "batch seq"), config=CONFIG, name="scaled"
    )
    scales = [np.float32(2), np.float32(3)]
    function.warmup(scales[0], row(1.0)[None], progress=False)
    is_over = threading.Event()

    def update():
        while not is_over.is_set():
            for scale in scales:
                batcher.update(scale)

    with Batcher(function, scales[0], max_waiting=40) as batcher:
        threaded = [Client(batcher, seed) for seed in range(8)]
        looped = [Client(batcher, 100 + seed) for seed in range(3)]
        threads = [threading.Thread(target=client.ask) for client in threaded]
        threads += [
            threading.Thread(target=lambda client=client: asyncio.run(client.ask_all()))
            for client in looped
        ]
        updating = threading.Thread(target=update)
        for thread in (updating, *threads):
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        is_over.set()
        updating.join(60)
    came = sum((client.came for client in (*threaded, *looped)), Counter())
    assert [client.wrong for client in (*threaded, *looped) if client.wrong] == []
    assert sum(came.values()) == (len(threaded) + len(looped)) * ITEMS
    counts = Counter(batcher.stats()["items"])
    # Given up in a loop, an item may be cancelled, or have got its answer or its error just then;
    # and a task that is cancelled at once has asked for nothing.
    assert counts["full"] >= came["full"]
    assert counts["failed"] == counts["refused"] == 0
    for outcome in ("answered", "expired", "cancelled"):
        assert came[outcome] <= counts[outcome] <= came[outcome] + came["given up"]
    stats = function.stats()
    assert stats["hits"] == sum(batcher.stats()["calls"].values())
    assert batcher.stats()["waiting"] == 0
