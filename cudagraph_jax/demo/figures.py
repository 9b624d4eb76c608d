"""What the demo measured, as plain values that JSON can hold."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np

import cudagraph_jax
from cudagraph_jax.demo.corpus import Passage
from cudagraph_jax.demo.encoder import Embeddings, Match, search
from cudagraph_jax.demo.streams import Stream
from cudagraph_jax.demo.traffic import Traffic
from cudagraph_jax.demo.warmup_figures import WarmupFigures
from cudagraph_jax.xla.environment import jaxlib_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where it ran."""

    versions: Mapping[str, str]
    backend: str
    device: str
    cpu_cores: int | None

    @classmethod
    def current(cls) -> Environment:
        """This process's; starts the JAX backend."""
        return cls(
            versions={
                "cudagraph_jax": cudagraph_jax.__version__,
                "jax": jax.__version__,
                "jaxlib": jaxlib_version(),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            backend=jax.default_backend(),
            device=jax.devices()[0].device_kind,
            cpu_cores=os.cpu_count(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficFigures:
    """A stream; what depends on counted compiles is None where JAX does not report them.

    Attributes:
        micro_batches: Calls.
        passages: Texts in them.
        seconds: Time in calls.
        passages_per_second: The throughput.
        p50_ms: The median latency of a micro-batch.
        p99_ms: Its 99th percentile.
        max_ms: The slowest.
        compiles: XLA compiles in calls.
    """

    micro_batches: int
    passages: int
    seconds: float
    passages_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    compiles: int | None

    @classmethod
    def of(cls, traffic: Traffic, *, compiles_reported: bool) -> TrafficFigures:
        """The figures of a stream that was served."""
        return cls(
            micro_batches=len(traffic.served),
            passages=traffic.passages,
            seconds=traffic.seconds,
            passages_per_second=traffic.passages / traffic.seconds,
            p50_ms=traffic.percentile_ms(50),
            p99_ms=traffic.percentile_ms(99),
            max_ms=traffic.percentile_ms(100),
            compiles=traffic.compiles if compiles_reported else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Elements are batch times seq_len of what the model is called with.

    Attributes:
        hit_rate: The part of the calls that replayed a captured bucket, from 0 to 1.
        real_elements: Elements of the micro-batches, each as long as its longest text.
        padded_elements: Elements that the buckets added.
        waste: The part of all computed elements that the buckets added, from 0 to 1.
        tokens: Tokens of the texts themselves: micro-batches are ragged inside, too.
    """

    hit_rate: float
    real_elements: int
    padded_elements: int
    waste: float
    tokens: int

    @classmethod
    def between(
        cls, before: Mapping[str, object], after: Mapping[str, object], *, calls: int, tokens: int
    ) -> Padding:
        """What happened between two `stats()` of a function.

        Args:
            before: The earlier ones.
            after: The later ones.
            calls: Calls meanwhile.
            tokens: Tokens of the texts in them.
        """
        hits, real, padded = (
            cast(int, after[key]) - cast(int, before[key])
            for key in ("hits", "real_elements", "padded_elements")
        )
        return cls(
            hit_rate=hits / calls,
            real_elements=real,
            padded_elements=padded,
            waste=padded / (real + padded) if real else 0.0,
            tokens=tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """Single texts that were served; compiles are None where JAX does not report them.

    Attributes:
        passages: Texts.
        calls: Of the model.
        shapes: Distinct sizes of those.
        seconds: From the first arrival to the last answer.
        passages_per_second: The throughput.
        p50_ms: The median latency of a text, from its arrival to its answer.
        p99_ms: Its 99th percentile.
        max_ms: The slowest.
        real_elements: Tokens of the texts.
        computed_elements: Those of the calls, with their padding.
        real_ratio: The part of the computed elements that is real.
        compiles: XLA compiles meanwhile.
        stalled_seconds: Time in calls that compiled.
    """

    passages: int
    calls: int
    shapes: int
    seconds: float
    passages_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    real_elements: int
    computed_elements: int
    real_ratio: float
    compiles: int | None
    stalled_seconds: float | None

    @classmethod
    def of(cls, stream: Stream, *, compiles_reported: bool) -> TextFigures:
        """The figures of a stream that was served."""
        p50_ms, p99_ms, max_ms = np.percentile(
            stream.latencies_ms, (50, 99, 100), method="inverted_cdf"
        )
        texts = len(stream.latencies_ms)
        return cls(
            passages=texts,
            calls=stream.calls,
            shapes=stream.shapes,
            seconds=stream.seconds,
            passages_per_second=texts / stream.seconds,
            p50_ms=float(p50_ms),
            p99_ms=float(p99_ms),
            max_ms=float(max_ms),
            real_elements=stream.real_elements,
            computed_elements=stream.computed_elements,
            real_ratio=stream.real_elements / stream.computed_elements,
            compiles=stream.compiles if compiles_reported else None,
            stalled_seconds=stream.stalled_seconds if compiles_reported else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first texts of the stream, served in several ways.

    Attributes:
        batcher: Put together by what each captured bucket costs.
        fifo: In the order in which they came, by the same captured buckets.
        jit: The same batches by plain `jax.jit` at their exact sizes, nothing compiled before.
        jit_again: The same again, every size compiled: exact sizes compute no padding but that of
            the shorter texts.
        fifo_size: Texts in a batch of the last three.
        sentence_transformers: Texts a second of that library, which is given all of them at once
            and sorts them; None where it is not installed.
        max_difference: Between the embeddings of any two ways.
    """

    batcher: TextFigures
    fifo: TextFigures
    jit: TextFigures
    jit_again: TextFigures
    fifo_size: int
    sentence_transformers: float | None
    max_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A query and its best passages."""

    query: str
    matches: tuple[Match, ...]

    @classmethod
    def to_each(
        cls,
        queries: Sequence[str],
        asked: Embeddings,
        vectors: Embeddings,
        passages: Sequence[Passage],
    ) -> tuple[Answer, ...]:
        """The answers to queries.

        Args:
            queries: Their texts.
            asked: Their vectors (queries, 384).
            vectors: The passages' vectors (passages, 384).
            passages: What is searched.
        """
        return tuple(
            cls(query=query, matches=tuple(search(vector, vectors, passages)))
            for query, vector in zip(queries, asked, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """All that the demo prints."""

    environment: Environment
    passages: int
    warmup: WarmupFigures
    traffic: TextFigures
    answers: tuple[Answer, ...]
    comparison: Comparison
    total_seconds: float

    def to_dict(self) -> dict[str, object]:
        """The same in dicts, tuples and numbers."""
        return dataclasses.asdict(self)
