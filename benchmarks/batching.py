"""Single texts through a batcher, against other ways to form batches, on the same function.

NumPy's passages in random order, each policy in turn, chunk by chunk, in one process:

    python benchmarks/batching.py
    python benchmarks/batching.py --texts 3000 --json

Ratios are what to look at: a machine that is slower for a while is slower for all. `--tiny` instead
measures what the batcher itself costs: an item of a function that computes next to nothing, and the
decision which rows share a call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np

import cudagraph_jax as cg
from cudagraph_jax.batching.composition import Priced, Prices, compose
from cudagraph_jax.demo import Encoder
from cudagraph_jax.demo.corpus import numpy_passages
from cudagraph_jax.demo.tokens import Row, stack

ROWS = (1, 4, 8, 16)
# What `plan_buckets(lengths, max_graphs=12)` gives for these passages.
LENGTHS = (15, 21, 30, 40, 53, 70, 87, 117, 141, 179, 222, 256)
# Two runs: the first one of a bucket loads code, and would be taken for its cost.
CONFIG = cg.CUDAGraphConfig(capture_sizes=ROWS, capture_seq_lens=LENGTHS, warmup_iterations=2)
WAITING = 64
WINDOW = 128

Serve = Callable[[Sequence[Row]], float]


class Policies:
    """Ways to form batches; each gives the elements that it computed.

    Args:
        encoder: What serves them.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.batcher = cg.Batcher(encoder.function, encoder.params, max_waiting=WAITING)

    def fifo(self, rows: Sequence[Row], size: int = 16) -> float:
        """Batches of 16 in the order in which texts come, padded to the longest."""
        computed = 0
        for start in range(0, len(rows), size):
            ids, mask = stack(rows[start : start + size])
            self._encoder.serve(ids, mask)
            computed += self._encoder.config.bucket_for(*ids.shape).elements
        return computed

    def sorted_windows(self, rows: Sequence[Row]) -> float:
        """Eight batches are sorted by length, then cut."""
        return sum(
            self.fifo(sorted(rows[start : start + WINDOW], key=len))
            for start in range(0, len(rows), WINDOW)
        )

    def one_by_one(self, rows: Sequence[Row]) -> float:
        """Each text is a call."""
        return self.fifo(rows, 1)

    def least_cost(self, rows: Sequence[Row]) -> float:
        """The batcher, with 64 texts waiting."""
        before = self.batcher.stats()["computed_elements"]
        items = [(np.array(row, np.int32), np.ones(len(row), np.int32)) for row in rows]
        self.batcher.map(items)
        return self.batcher.stats()["computed_elements"] - before


def measure(texts: int, *, chunk: int) -> dict[str, dict[str, float]]:
    """Texts a second and the real part of computed elements, by policy."""
    encoder = Encoder(CONFIG)
    rows = encoder.tokenize([passage.text for passage in numpy_passages()])
    order = np.random.default_rng(0).permutation(len(rows))[:texts]
    rows = [rows[place] for place in order]
    encoder.warmup(progress=False, workers=2)
    policies = Policies(encoder)
    contenders: dict[str, Serve] = {
        "FIFO of 16": policies.fifo,
        "sorted windows of 128": policies.sorted_windows,
        "one by one": policies.one_by_one,
        "batcher, 64 waiting": policies.least_cost,
    }
    took, computed = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0.0)
    with cg.no_compiles():
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            for name, serve in contenders.items():
                begin = time.perf_counter()
                computed[name] += serve(part)
                took[name] += time.perf_counter() - begin
    policies.batcher.close()
    real = sum(map(len, rows))
    return {
        name: {"texts/s": len(rows) / took[name], "real/computed": real / computed[name]}
        for name in contenders
    }


def measure_tiny(items: int = 20_000) -> dict[str, float]:
    """Microseconds for an item of a function that computes next to nothing, in a batcher or not."""
    function = cg.bucket_jit(
        lambda x: x * 2,
        in_axes="batch seq",
        config=cg.CUDAGraphConfig(capture_sizes=(1, 8, 16), capture_seq_lens=(32,)),
    )
    row = np.ones(20, np.float32)
    function.warmup(row[None], progress=False)
    start = time.perf_counter()
    for _ in range(items):
        function(row[None])
    direct = time.perf_counter() - start
    with cg.Batcher(function) as batcher:
        batcher.map([row] * 1000)
        start = time.perf_counter()
        batcher.map([row] * items)
        many = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(1000):
            batcher.submit(row).result()
        single = (time.perf_counter() - start) / 1000
    return {
        "direct call": direct / items * 1e6,
        "one of many": many / items * 1e6,
        "one alone": single * 1e6,
    }


def measure_deciding(waiting: int, times: int = 200) -> float:
    """Microseconds to compose calls of so many waiting rows, on the grid of the other figures."""
    buckets = (cg.Bucket(rows, length) for rows in ROWS for length in LENGTHS)
    prices = Prices(Priced(bucket, 0.2 + bucket.elements * 1e-3) for bucket in buckets)
    draw = np.random.default_rng(0)
    rows = [cg.Bucket(1, length) for length in draw.integers(5, max(LENGTHS), waiting).tolist()]
    took = []
    for _ in range(times):
        start = time.perf_counter()
        compose([found for row in rows if (found := prices.class_of(row))], prices)
        took.append(time.perf_counter() - start)
    return float(np.median(took)) * 1e6


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=512, help="texts before the next policy")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        found = measure_tiny()
        found |= {f"deciding, {n} waiting": measure_deciding(n) for n in (128, 512)}
        lines = [f"{name:>24}: {us:8.1f} us" for name, us in found.items()]
    else:
        table = measure(options.texts, chunk=options.chunk)
        base = table["FIFO of 16"]["texts/s"]
        lines = [
            f"{name:>24}: {row['texts/s']:7.1f} texts/s, {row['texts/s'] / base:5.2f} x, "
            f"{row['real/computed']:.3f} real"
            for name, row in table.items()
        ]
    print(json.dumps(found if options.tiny else table) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
