"""Single texts that come at random: how long they take, policy by policy, from idle to saturated.

    python benchmarks/queueing.py               # invented costs: 1.5 ms a call, little for a token
    python benchmarks/queueing.py --measured    # what the demo's buckets cost on this machine
    python benchmarks/queueing.py --live        # the demo's function and its batcher, by the clock
    python benchmarks/queueing.py --capacity    # texts a second for a limit of p99, on this machine

Time is virtual, but with `--live`. Texts have the lengths of NumPy's passages, drawn at random, and
come as a Poisson process; rates are parts of what the least cost serves of texts that are all there
at once. Good is what is answered within ten times what the dearest text takes alone.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import cudagraph_jax as cg
from cudagraph_jax.batching.composition import Priced, Prices, compose
from cudagraph_jax.demo import Encoder
from cudagraph_jax.demo.bert.model import MAX_SEGMENTS
from cudagraph_jax.demo.bert.model_folder import find_model
from cudagraph_jax.demo.bert.tokens import Row, load_tokenizer, stack
from cudagraph_jax.demo.corpus import numpy_passages
from cudagraph_jax.demo.encoder import PACKED_ROW_LEN, default_config

RATES = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95)
CAPACITY_LIMITS_MS = (50, 100, 200, 500, 1000)
LIVE_RATES = (0.1, 0.3, 0.6, 0.8)
BATCH, BATCHES = 16, 8
# As a `Batcher` composes: no more than sixteen of the largest calls hold.
WINDOW = 16 * BATCH
INVENTED = cg.PolynomialCost(constant=1.5, elements=2e-4)
FIFO, SORTED, LEAST = "FIFO of 16", "sorted windows of 128", "least cost"

Floats = npt.NDArray[np.float64]
Costs = Mapping[cg.Bucket, float]


class Call(NamedTuple):
    """What runs next.

    Attributes:
        places: Of its texts among those that wait.
        cost_ms: What it takes.
    """

    places: list[int]
    cost_ms: float


Policy = Callable[[Sequence[int]], list[Call]]
"""The next calls, from the lengths of what waits, the oldest first."""


class Policies:
    """Ways to form calls of one grid.

    Args:
        costs: Milliseconds of its buckets.
        packed: Those of rows that several texts share.
    """

    def __init__(self, costs: Costs, packed: Costs) -> None:
        self._costs, self._config = costs, config_of(costs)
        self._prices, self._packed_prices = prices_of(costs), prices_of(packed)
        self._packed = config_of(packed)

    def all(self) -> dict[str, Policy]:
        """Each by its name."""
        return {
            FIFO: self.fifo,
            SORTED: self.sorted_windows,
            "one by one": self.one_by_one,
            LEAST: self.least_cost,
            "packed, least cost": self.packed,
        }

    def fifo(self, lengths: Sequence[int]) -> list[Call]:
        """Batches of 16 in the order in which texts come, padded to the longest."""
        return [self._batch(list(range(len(lengths[:BATCH]))), lengths)]

    def one_by_one(self, lengths: Sequence[int]) -> list[Call]:
        """Each text is a call."""
        return [self._batch([0], lengths)]

    def sorted_windows(self, lengths: Sequence[int]) -> list[Call]:
        """Up to eight batches are sorted by length, cut, and run one behind the other."""
        places = range(len(lengths[: BATCH * BATCHES]))
        order = sorted(places, key=lengths.__getitem__)
        starts = range(0, len(order), BATCH)
        return [self._batch(order[start : start + BATCH], lengths) for start in starts]

    def least_cost(self, lengths: Sequence[int]) -> list[Call]:
        """What a `Batcher` does: of the cheapest calls the one of the oldest text."""
        return [cheapest(lengths, self._prices)]

    def packed(self, lengths: Sequence[int]) -> list[Call]:
        """Rows are filled with several texts first, and composed then."""
        rows = [np.ones(length, np.int8) for length in lengths]
        packed = cg.pack(
            rows, config=self._packed, max_segments=MAX_SEGMENTS, row_len=PACKED_ROW_LEN
        )
        held: dict[int, list[int]] = {}
        for place, at in enumerate(packed.places):
            held.setdefault(at.row, []).append(place)
        filled = sorted(held.values())  # the row of the oldest text first
        used = [sum(lengths[place] for place in places) for places in filled]
        call = cheapest(used, self._packed_prices)
        return [Call([place for row in call.places for place in filled[row]], call.cost_ms)]

    def _batch(self, places: list[int], lengths: Sequence[int]) -> Call:
        longest = max(lengths[place] for place in places)
        return Call(places, self._costs[self._config.bucket_for(len(places), longest)])


def config_of(costs: Costs) -> cg.CUDAGraphConfig:
    """The grid of these buckets."""
    return cg.CUDAGraphConfig(
        capture_sizes=sorted({bucket.batch_size for bucket in costs}),
        capture_seq_lens=sorted({bucket.seq_len for bucket in costs}),
    )


def prices_of(costs: Costs) -> Prices:
    """What composition goes by."""
    return Prices(Priced(bucket, cost_ms) for bucket, cost_ms in costs.items())


def cheapest(lengths: Sequence[int], prices: Prices) -> Call:
    """Of the cheapest calls that serve these the one of the first."""
    classes = [prices.class_of(cg.Bucket(1, length)) for length in lengths]
    parts = compose([each for each in classes if each is not None], prices)
    part = next(part for part in parts if 0 in part.rows)
    return Call(part.rows, part.cost)


def simulated(came_at: Floats, lengths: Sequence[int], policy: Policy) -> Floats:
    """Seconds from arrival to answer of each text, on a device that runs one call at a time.

    Args:
        came_at: When each comes, ascending.
        lengths: Of each.
        policy: What runs when the device is free.
    """
    done_at = np.zeros(len(came_at))
    waiting: list[int] = []
    now, coming = 0.0, 0
    while waiting or coming < len(came_at):
        if not waiting:
            now = max(now, came_at[coming])
        while coming < len(came_at) and came_at[coming] <= now:
            waiting.append(coming)
            coming += 1
        window = waiting[:WINDOW]
        served = set()
        for call in policy([lengths[text] for text in window]):
            now += call.cost_ms / 1e3
            texts = [window[place] for place in call.places]
            done_at[texts] = now
            served.update(texts)
        waiting = [text for text in window if text not in served] + waiting[WINDOW:]
    return done_at - came_at


def arrivals(texts: int, rate: float, *, seed: int = 0) -> Floats:
    """When texts come that come at random, so many a second: seconds, ascending."""
    return np.random.default_rng(seed).exponential(1 / rate, texts).cumsum()


class Figures(NamedTuple):
    """How long texts took.

    Attributes:
        p50_ms: Half of them no longer.
        p99_ms: All but one in a hundred no longer.
        good: Texts a second that were answered in time.
    """

    p50_ms: float
    p99_ms: float
    good: float

    @classmethod
    def of(cls, came_at: Floats, took_s: Floats, *, within_s: float) -> Figures:
        """The figures of texts that came and took so long."""
        p50, p99 = np.percentile(took_s, (50, 99)) * 1e3
        seconds = float((came_at + took_s).max())
        return cls(float(p50), float(p99), float((took_s <= within_s).sum()) / seconds)


def capacity(lengths: Sequence[int], policies: Policies) -> float:
    """Texts a second at the least cost, where all are there at once."""
    at_once = simulated(np.zeros(len(lengths)), lengths, policies.least_cost)
    return len(lengths) / float(at_once.max())


def table(
    lengths: Sequence[int], costs: Costs, packed: Costs, rates: Sequence[float] = RATES
) -> dict[float, dict[str, Figures]]:
    """The figures of each policy at each rate, a part of the capacity."""
    policies = Policies(costs, packed)
    most, within_s = capacity(lengths, policies), patience(costs)
    found: dict[float, dict[str, Figures]] = {}
    for rate in rates:
        came_at = arrivals(len(lengths), rate * most)
        found[rate] = {
            name: Figures.of(came_at, simulated(came_at, lengths, policy), within_s=within_s)
            for name, policy in policies.all().items()
        }
    return found


def most_within(
    lengths: Sequence[int], costs: Costs, limit_ms: float, *, policy: Policy, most: float
) -> float:
    """The highest rate, in texts a second, at which p99 stays within a limit; 0 for none.

    Args:
        lengths: Of the texts.
        costs: Of the buckets.
        limit_ms: Of p99.
        policy: What runs when the device is free.
        most: No rate above it is tried.
    """
    low, high = 0.0, most
    while high - low > most / 100:
        rate = (low + high) / 2
        took_s = simulated(arrivals(len(lengths), rate), lengths, policy)
        low, high = (rate, high) if np.percentile(took_s, 99) * 1e3 <= limit_ms else (low, rate)
    return low


def show_capacity(lengths: Sequence[int], costs: Costs) -> None:
    """Prints what a machine with such costs serves."""
    policies = Policies(costs, costs)
    most = capacity(lengths, policies)
    print(f"all at once: {most:,.0f} texts/s, {most * np.mean(lengths):,.0f} tokens/s")
    print(f"{'p99 within':>10}  {'texts/s':>8}  {FIFO:>12}  {SORTED:>22}")
    for limit_ms in CAPACITY_LIMITS_MS:
        rates = [
            most_within(lengths, costs, limit_ms, policy=policy, most=most)
            for policy in (policies.least_cost, policies.fifo, policies.sorted_windows)
        ]
        print(f"{limit_ms:7,.0f} ms  {rates[0]:8,.0f}  {rates[1]:12,.0f}  {rates[2]:22,.0f}")


def patience(costs: Costs) -> float:
    """Seconds in which an answer is good: ten times the dearest text alone."""
    return 10 * max(cost for bucket, cost in costs.items() if bucket.batch_size == 1) / 1e3


def measured(encoder: Encoder) -> Costs:
    """Milliseconds of the buckets of an encoder that is warm."""
    return {entry.bucket: entry.cost_ms or 0.0 for entry in encoder.function.registry.entries()}


def warm_encoder(*, packing: bool) -> Encoder:
    """The demo's encoder with its own grid."""
    encoder = Encoder(packing=packing)
    encoder.warmup(progress=False, workers=2)
    return encoder


class Gathering:
    """A worker thread that serves texts as a policy says, instead of a batcher.

    Args:
        encoder: What serves them.
        rows: The texts.
        policy: What runs next.
    """

    def __init__(self, encoder: Encoder, rows: Sequence[Row], policy: Policy) -> None:
        self._encoder, self._rows, self._policy = encoder, rows, policy
        self._come: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.done_at = np.zeros(len(rows))
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def submit(self, text: int) -> None:
        """Has one served."""
        self._come.put(text)

    def close(self) -> None:
        """Waits for all."""
        self._come.put(None)
        self._thread.join()

    def _work(self) -> None:
        waiting: list[int] = []
        is_over = False
        while waiting or not is_over:
            while not is_over and (not waiting or not self._come.empty()):
                text = self._come.get()
                is_over = text is None
                waiting += [] if text is None else [text]
            window = waiting[:WINDOW]
            calls = self._policy([len(self._rows[text]) for text in window]) if window else []
            for call in calls:
                texts = [window[place] for place in call.places]
                self._encoder.serve(*stack([self._rows[text] for text in texts]))
                self.done_at[texts] = time.perf_counter()
                waiting = [text for text in waiting if text not in texts]


class Batching:
    """The same by the demo's batcher."""

    def __init__(self, encoder: Encoder, rows: Sequence[Row]) -> None:
        self._items = [encoder.item(row) for row in rows]
        self._batcher = cg.Batcher(encoder.function, encoder.params, max_waiting=len(rows))
        self.done_at = np.zeros(len(rows))

    def submit(self, text: int) -> None:
        """Has one served."""

        def done(_: object) -> None:
            self.done_at[text] = time.perf_counter()

        self._batcher.submit(*self._items[text]).add_done_callback(done)

    def close(self) -> None:
        """Waits for all."""
        self._batcher.close()


def live(rows: Sequence[Row], texts: int) -> Iterator[tuple[float, dict[str, Figures]]]:
    """The figures by the clock at each rate, each policy in turn."""
    encoder = warm_encoder(packing=False)
    costs = measured(encoder)
    policies = Policies(costs, costs)
    most, within_s = capacity([len(row) for row in rows], policies), patience(costs)
    rows = rows[:texts]
    for rate in LIVE_RATES:
        came_at = arrivals(len(rows), rate * most)
        contenders: dict[str, Callable[[], Gathering | Batching]] = {
            FIFO: lambda: Gathering(encoder, rows, policies.fifo),
            SORTED: lambda: Gathering(encoder, rows, policies.sorted_windows),
            "one by one": lambda: Gathering(encoder, rows, policies.one_by_one),
            "the batcher": lambda: Batching(encoder, rows),
        }
        found = {name: served_live(make(), came_at) for name, make in contenders.items()}
        yield (
            rate,
            {name: Figures.of(came_at, took, within_s=within_s) for name, took in found.items()},
        )


def served_live(server: Gathering | Batching, came_at: Floats) -> Floats:
    """Seconds from arrival to answer of each text, by the clock."""
    start = time.perf_counter() + 0.1
    for text, at in enumerate(came_at.tolist()):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        server.submit(text)
    server.close()
    return server.done_at - start - came_at


def show(rate: float, figures: Mapping[str, Figures]) -> None:
    """Prints the figures of one rate."""
    for name, row in figures.items():
        print(f"{rate:5.0%}  {name:22} {row.p50_ms:10,.1f} {row.p99_ms:10,.1f} {row.good:9,.1f}")


def main() -> None:
    """Prints what was simulated, or measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--measured", action="store_true", help="costs of this machine")
    parser.add_argument("--live", action="store_true", help="by the clock, on the real function")
    parser.add_argument("--capacity", action="store_true", help="texts a second by limits of p99")
    parser.add_argument("--texts", type=int, help="2,000, or 200 with --live")
    options = parser.parse_args()
    draw = np.random.default_rng(1)
    rows = load_tokenizer(find_model())([passage.text for passage in numpy_passages()])
    rows = [rows[place] for place in draw.integers(len(rows), size=options.texts or 2000)]
    if options.capacity:
        show_capacity([len(row) for row in rows], measured(warm_encoder(packing=False)))
        return
    print(f"{'rate':5}  {'policy':22} {'p50, ms':>10} {'p99, ms':>10} {'good/s':>9}")
    if options.live:
        for rate, figures in live(rows, options.texts or 200):
            show(rate, figures)
        return
    if options.measured:
        costs, packed = (measured(warm_encoder(packing=packing)) for packing in (False, True))
    else:
        grids = (default_config(packing=packing).buckets() for packing in (False, True))
        costs, packed = ({bucket: INVENTED(*bucket) for bucket in grid} for grid in grids)
    for rate, figures in table([len(row) for row in rows], costs, packed).items():
        show(rate, figures)


if __name__ == "__main__":
    main()
