"""A server's traffic: ragged micro-batches, run one after the other and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cudagraph_jax.demo.bert.tokens import IntArray, Row, stack
from cudagraph_jax.demo.encoder import Embeddings
from cudagraph_jax.xla.compiles import CompileCounter

Serve = Callable[[IntArray, IntArray], Embeddings]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What a server has collected when it calls the model.

    Attributes:
        places: Where each row belongs in the whole.
        ids: Token ids, int32 (batch, seq).
        mask: 1 where a token is real, int32 (batch, seq).
    """

    places: tuple[int, ...]
    ids: IntArray
    mask: IntArray

    @property
    def shape(self) -> tuple[int, int]:
        """Its (batch, seq)."""
        return self.ids.shape[0], self.ids.shape[1]


def micro_batches(rows: Sequence[Row], *, max_size: int, seed: int = 0) -> list[MicroBatch]:
    """All rows in a random order, in groups of 1 to `max_size`, the same for the same seed.

    Args:
        rows: Token ids of each text.
        max_size: Rows in the largest group.
        seed: Of the random generator.
    """
    random = np.random.default_rng(seed)
    order = [int(place) for place in random.permutation(len(rows))]
    batches = []
    while order:
        size = int(random.integers(1, max_size, endpoint=True))
        places, order = tuple(order[:size]), order[size:]
        ids, mask = stack([rows[place] for place in places])
        batches.append(MicroBatch(places=places, ids=ids, mask=mask))
    return batches


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBatch:
    """One micro-batch's answer.

    Attributes:
        batch: What was asked.
        vectors: float32 (batch, 384).
        latency_ms: From the call to the answer in host memory.
        compiles: XLA compiles meanwhile.
    """

    batch: MicroBatch
    vectors: Embeddings
    latency_ms: float
    compiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A stream that was served, in order."""

    served: tuple[ServedBatch, ...]

    def __getitem__(self, part: slice) -> Traffic:
        return Traffic(served=self.served[part])

    @property
    def passages(self) -> int:
        """Texts in all micro-batches."""
        return sum(len(one.batch.places) for one in self.served)

    @property
    def compiles(self) -> int:
        """XLA compiles while the stream was served."""
        return sum(one.compiles for one in self.served)

    @property
    def seconds(self) -> float:
        """Time in calls."""
        return sum(one.latency_ms for one in self.served) / 1e3

    def percentile_ms(self, percent: float) -> float:
        """The latency that `percent` of the micro-batches do not exceed."""
        latencies = [one.latency_ms for one in self.served]
        return float(np.percentile(latencies, percent, method="inverted_cdf"))

    def vectors(self, count: int) -> Embeddings:
        """The answers in the order of the texts; zeros where a text was not served.

        Args:
            count: Texts in all.
        """
        width = self.served[0].vectors.shape[1]
        result = np.zeros((count, width), np.float32)
        for one in self.served:
            result[list(one.batch.places)] = one.vectors
        return result


def drive(
    serve: Serve,
    batches: Sequence[MicroBatch],
    *,
    step: Callable[[object], None] = lambda item: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Traffic:
    """Serves the micro-batches one after the other and says how that went.

    Args:
        serve: The model; its answer is in host memory when it returns.
        batches: The stream.
        step: Called with each micro-batch's shape when it is served.
        clock: Seconds.
    """
    (traffic,) = drive_in_turn([serve], batches, step=step, clock=clock)
    return traffic


def drive_in_turn(
    serves: Sequence[Serve],
    batches: Sequence[MicroBatch],
    *,
    step: Callable[[object], None] = lambda item: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Traffic]:
    """Serves each micro-batch by every model before the next one; a stream for each model.

    So a machine that is slower for a while is slower for all of them. Who is first changes from
    one micro-batch to the next.

    Args:
        serves: The models.
        batches: The stream.
        step: Called with each micro-batch's shape when all have served it.
        clock: Seconds.
    """
    served: list[list[ServedBatch]] = [[] for _ in serves]
    with CompileCounter() as counter:
        for turn, batch in enumerate(batches):
            for place in range(len(serves)):
                model = (turn + place) % len(serves)
                served[model].append(_serve_one(serves[model], batch, counter, clock))
            step("{}x{}".format(*batch.shape))
    return [Traffic(served=tuple(stream)) for stream in served]


def _serve_one(
    serve: Serve, batch: MicroBatch, counter: CompileCounter, clock: Callable[[], float]
) -> ServedBatch:
    before, start = counter.compiles, clock()
    vectors = serve(batch.ids, batch.mask)
    latency_ms = (clock() - start) * 1e3
    return ServedBatch(
        batch=batch, vectors=vectors, latency_ms=latency_ms, compiles=counter.compiles - before
    )
