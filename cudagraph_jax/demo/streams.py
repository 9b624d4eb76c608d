"""Single texts as a server gets them: clients that each wait for their answer, in several ways."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from cudagraph_jax.demo.bert.model_folder import find_model
from cudagraph_jax.demo.bert.tokens import Row, stack
from cudagraph_jax.demo.encoder import Embeddings, Encoder
from cudagraph_jax.demo.traffic import MicroBatch, Serve, drive
from cudagraph_jax.xla.compiles import CompileCounter

CLIENTS = 64
"""Texts that wait at a time: as many clients, each of which sends one when it has its answer."""

FIFO_SIZE = 16

Step = Callable[[object], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Single texts that were served.

    Attributes:
        vectors: float32 (texts, 384).
        latencies_ms: Of each text, from its arrival to its answer.
        seconds: From the first arrival to the last answer.
        calls: Of the model.
        shapes: Distinct sizes of those.
        real_elements: Tokens of the texts.
        computed_elements: Those of the calls, with their padding.
        compiles: XLA compiles meanwhile.
        stalled_seconds: Time in calls that compiled.
    """

    vectors: Embeddings
    latencies_ms: tuple[float, ...]
    seconds: float
    calls: int
    shapes: int
    real_elements: int
    computed_elements: int
    compiles: int
    stalled_seconds: float


def through_batcher(
    encoder: Encoder,
    rows: Sequence[Row],
    *,
    clients: int = CLIENTS,
    step: Step = lambda item: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Stream:
    """Serves texts through an encoder's batcher, which decides what shares a call.

    Args:
        encoder: Warmed up, and not packing.
        rows: Token ids of each text.
        clients: So many texts wait at a time.
        step: Called with each text's number when it is answered, by the batcher's thread.
        clock: Seconds.
    """
    before = encoder.batcher.stats()
    came_at, done_at = [0.0] * len(rows), [0.0] * len(rows)
    waiting = threading.Semaphore(clients)
    futures: list[Future[Embeddings]] = []

    def answered(place: int, _: Future[Embeddings]) -> None:
        done_at[place] = clock()
        waiting.release()
        step(place)

    with CompileCounter() as counter:
        for place, row in enumerate(rows):
            waiting.acquire()
            came_at[place] = clock()
            future = encoder.batcher.submit(*encoder.item(row))
            future.add_done_callback(partial(answered, place))
            futures.append(future)
        vectors = np.stack([future.result() for future in futures])
    for _ in range(clients):  # whoever waits for a future may be told before its callback runs
        waiting.acquire()
    after = encoder.batcher.stats()
    seconds = max(done_at) - came_at[0]
    calls = {name: n - before["calls"].get(name, 0) for name, n in after["calls"].items()}
    return Stream(
        vectors=vectors,
        latencies_ms=tuple((done_at[n] - came_at[n]) * 1e3 for n in range(len(rows))),
        seconds=seconds,
        calls=sum(calls.values()),
        shapes=sum(map(bool, calls.values())),
        real_elements=after["real_elements"] - before["real_elements"],
        computed_elements=after["computed_elements"] - before["computed_elements"],
        compiles=counter.compiles,
        # A compile is not to be: if there is one nobody knows which call had to wait for it.
        stalled_seconds=seconds if counter.compiles else 0.0,
    )


def in_fifo_batches(
    serve: Serve,
    rows: Sequence[Row],
    *,
    size: int = FIFO_SIZE,
    elements: Callable[[int, int], int],
    clients: int = CLIENTS,
    step: Step = lambda item: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Stream:
    """Serves texts as most queues before a model do: those that came first, some at a time.

    Args:
        serve: The model; its answer is in host memory when it returns.
        rows: Token ids of each text.
        size: Texts in a call.
        elements: What a call of (batch, seq) computes.
        clients: So many texts wait at a time, `size` at least.
        step: Called with each call's shape when it is answered.
        clock: Seconds.
    """
    groups = [range(len(rows))[first : first + size] for first in range(0, len(rows), size)]
    traffic = drive(
        serve, [_micro_batch(rows, places) for places in groups], step=step, clock=clock
    )
    ended_ms = np.cumsum([one.latency_ms for one in traffic.served]).tolist()
    # Each client sends its next text when it has an answer, and at first all of them do.
    came_ms = [0.0] * clients + [ended_ms[place // size] for place in range(len(rows))]
    shapes = [one.batch.shape for one in traffic.served]
    return Stream(
        vectors=traffic.vectors(len(rows)),
        latencies_ms=tuple(ended_ms[n // size] - came_ms[n] for n in range(len(rows))),
        seconds=traffic.seconds,
        calls=len(shapes),
        shapes=len(set(shapes)),
        real_elements=sum(map(len, rows)),
        computed_elements=sum(elements(*shape) for shape in shapes),
        compiles=traffic.compiles,
        stalled_seconds=sum(one.latency_ms for one in traffic.served if one.compiles) / 1e3,
    )


def _micro_batch(rows: Sequence[Row], places: range) -> MicroBatch:
    ids, mask = stack([rows[place] for place in places])
    return MicroBatch(places=tuple(places), ids=ids, mask=mask)


class AllAtOnce(NamedTuple):
    """Texts that were all there when their library was asked."""

    vectors: Embeddings
    seconds: float


def by_sentence_transformers(texts: Sequence[str]) -> AllAtOnce | None:
    """The same model by sentence-transformers, warm; None where that is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        return None
    model = SentenceTransformer(str(find_model().weights.parent), device="cpu")
    model.encode(list(texts[:FIFO_SIZE]))
    start = time.perf_counter()
    vectors = model.encode(list(texts), normalize_embeddings=True)
    return AllAtOnce(np.asarray(vectors), time.perf_counter() - start)
