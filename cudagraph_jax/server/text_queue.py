"""Texts on their way through an encoder's batcher: checked, admitted, waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cudagraph_jax._base.checks import positive_size, require_bool, waiting_time
from cudagraph_jax.batching.batcher import Batcher
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.errors import (
    BucketOverflowError,
    ConfigError,
    CUDAGraphError,
    DeadlineError,
    QueueFullError,
)
from cudagraph_jax.server.request_error import RequestError

Vector = npt.NDArray[np.float32]
Row = Sequence[int]

_INLINE_CHARS = 4096
"""So many characters are tokenized in 4 ms; more in a thread, beside other requests."""

_SPARE = 0.6
"""The part of its time that a request may be expected to wait.

Up to half as many again pass a text that shares its length with few. At ten times what a machine
could answer p99 was 1.6 times the expected wait (`benchmarks/server_stress.py --only overload`).
"""

_AT_A_TIME = 64
"""Texts of one request that wait at a time: with more calls are hardly fuller, and others wait."""

_UNKNOWN_S = 1.0
"""When to try again where nothing has run yet."""


class TextTokenizer(Protocol):
    """Gives the token ids of each text, special tokens included."""

    def __call__(self, texts: Sequence[str]) -> Sequence[Row]:
        """One row of ids for each text, `max_tokens` long at the most."""

    def with_cuts(self, texts: Sequence[str]) -> tuple[Sequence[Row], Sequence[bool]]:
        """The same, and which of them lost their end."""


class TextEncoder(Protocol):
    """What a server serves, such as `cudagraph_jax.demo.Encoder`."""

    @property
    def function(self) -> BucketedFunction[..., Any]:
        """What is captured."""

    @property
    def batcher(self) -> Batcher:
        """What serves single texts by it."""

    @property
    def tokenize(self) -> TextTokenizer:
        """The tokenizer."""

    @property
    def max_tokens(self) -> int:
        """Of a text; longer ones lose their end."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def embedding_size(self) -> int:
        """Of a vector."""

    def item(self, row: Row) -> tuple[Any, ...]:
        """The token ids of a text as an item of the batcher."""

    def vector(self, answer: Any) -> Vector:
        """The text's vector (embedding_size,) from the batcher's answer."""

    def warmup(self, *, progress: Callable[[int, int, Any], object]) -> object:
        """Captures the whole grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes; more is refused, and harms nobody else.

    Attributes:
        max_waiting: Texts that may wait for the device; no more than the encoder's batcher takes.
        timeout_s: In which a request is answered, or told that it will not be. A client may ask for
            less by the header `x-request-timeout`.
        max_inputs: Texts of a request.
        max_request_tokens: Of all texts of a request.
        max_body_bytes: Of a request.
        max_total_body_bytes: Of all requests that are read at a time.
        truncate: Whether texts beyond the model's limit lose their end, as sentence-transformers
            has it; else they are refused, as OpenAI has it.
    """

    max_waiting: int = 2048
    timeout_s: float = 30.0
    max_inputs: int = 2048
    max_request_tokens: int = 300_000
    max_body_bytes: int = 8 << 20
    max_total_body_bytes: int = 256 << 20
    truncate: bool = True

    def __post_init__(self) -> None:
        sizes = ("max_waiting", "max_inputs", "max_request_tokens")
        for name in (*sizes, "max_body_bytes", "max_total_body_bytes"):
            positive_size(getattr(self, name), name=name)
        if not waiting_time("timeout_s", self.timeout_s):
            raise ConfigError(f"timeout_s={self.timeout_s} answers nobody: give seconds above 0")
        require_bool("truncate", self.truncate)


class Embedded(NamedTuple):
    """The texts of a request, answered.

    Attributes:
        vectors: (texts, embedding_size).
        tokens: Of all texts.
        cut: How many lost their end.
    """

    vectors: Vector
    tokens: int
    cut: int


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class TextQueue:
    """Answers texts by an encoder.

    Args:
        encoder: What answers.
        limits: What is refused.
    """

    def __init__(self, encoder: TextEncoder, limits: Limits) -> None:
        self._encoder, self._limits = encoder, limits

    async def embed(
        self,
        inputs: Sequence[str] | Sequence[Row],
        *,
        place: Callable[[int], str],
        until: float,
        gone: Callable[[], Awaitable[object]],
    ) -> Embedded:
        """The vectors of some texts.

        Args:
            inputs: The texts, or the token ids of each.
            place: Names an input in errors.
            until: When they must be answered, by `time.monotonic`.
            gone: Returns when the client is.

        Raises:
            RequestError: They are not answered: the reason.
            ClientGoneError: The client went away; what had not run is dropped.
        """
        self._check_count(len(inputs))
        try:
            async with asyncio.timeout(until - time.monotonic()):
                return await self._embed(inputs, place=place, until=until, gone=gone)
        except TimeoutError:
            raise _late() from None

    async def _embed(
        self,
        inputs: Sequence[str] | Sequence[Row],
        *,
        place: Callable[[int], str],
        until: float,
        gone: Callable[[], Awaitable[object]],
    ) -> Embedded:
        rows, cut = await self._rows(inputs, place)
        tokens = sum(map(len, rows))
        if tokens > self._limits.max_request_tokens:
            raise RequestError(
                413,
                f"input has {tokens} tokens, and the limit of a request is "
                f"{self._limits.max_request_tokens}: send fewer texts",
                param="input",
                code="request_too_large",
            )
        at_once = min(len(rows), _AT_A_TIME, self._limits.max_waiting)
        self.check_room(until - time.monotonic(), count=at_once)
        answers = await _unless_gone(self._answers(rows, until), gone)
        return Embedded(self._vectors(answers), tokens, cut)

    def _vectors(self, answers: Sequence[Any]) -> Vector:
        vectors = np.stack([self._encoder.vector(answer) for answer in answers])
        expected = len(answers), self._encoder.embedding_size
        if vectors.shape != expected:
            raise ConfigError(f"the encoder gave vectors of {vectors.shape}, expected {expected}")
        if not np.isfinite(vectors).all():
            raise ConfigError("the encoder gave a vector that holds NaN or an infinity")
        return vectors

    async def _answers(self, rows: Sequence[Row], until: float) -> list[Any]:
        """The answer to each row; of many only some wait at a time, and leave room for others."""
        answers: dict[int, Any] = {}
        running: dict[asyncio.Future[Any], tuple[int, Future[Any]]] = {}

        async def collect() -> None:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index, _ = running.pop(future)
                answers[index] = future.result()

        try:
            for index, row in enumerate(rows):
                while len(running) >= _AT_A_TIME or not self._submit(row, until, index, running):
                    await collect()
            while running:
                await collect()
        finally:
            for future, (_, item) in running.items():
                item.cancel()
                future.add_done_callback(_looked_at)
        return [answers[index] for index in range(len(rows))]

    def _submit(
        self,
        row: Row,
        until: float,
        index: int,
        running: dict[asyncio.Future[Any], tuple[int, Future[Any]]],
    ) -> bool:
        """Has one row wait; False where it has to wait for those before it to make room."""
        left_s = max(0.0, until - time.monotonic())
        try:
            item = self._encoder.batcher.submit(*self._encoder.item(row), deadline=left_s)
        except QueueFullError:
            if running:
                return False
            raise
        running[asyncio.wrap_future(item)] = index, item
        return True

    def check_room(self, left_s: float, *, count: int = 1) -> None:
        """Refuses what would have no room or no time, so that what waits is answered.

        Args:
            left_s: In which it must be answered.
            count: How many texts.

        Raises:
            RequestError: 429, and when to try again.
        """
        batcher = self._encoder.batcher
        waiting, expected_s = batcher.waiting, batcher.expected_s(count)
        if waiting + count > self._limits.max_waiting:
            raise _full(f"{waiting} texts wait", expected_s or _UNKNOWN_S)
        if left_s <= 0:
            raise _late()
        if expected_s > _SPARE * left_s:
            what = f"what waits takes {expected_s:.2g} s, and this request has {max(left_s, 0):.2g}"
            raise _full(what, expected_s - _SPARE * left_s)

    def _check_count(self, count: int) -> None:
        most = self._limits.max_inputs
        if count > most:
            raise RequestError(
                413,
                f"input has {count} texts, and the limit of a request is {most}: send several",
                param="input",
                code="request_too_large",
            )

    async def _rows(
        self, inputs: Sequence[str] | Sequence[Row], place: Callable[[int], str]
    ) -> tuple[Sequence[Row], int]:
        """The token ids of each input, and how many lost their end."""
        if isinstance(inputs[0], str):
            return await self._tokenized(inputs, place)  # type: ignore[arg-type]  # all are texts
        for index, row in enumerate(inputs):
            self._check_ids(row, place(index))  # type: ignore[arg-type]  # all are rows
        return inputs, 0  # type: ignore[return-value]

    async def _tokenized(
        self, texts: Sequence[str], place: Callable[[int], str]
    ) -> tuple[Sequence[Row], int]:
        with_cuts = self._encoder.tokenize.with_cuts
        if sum(map(len, texts)) <= _INLINE_CHARS:
            rows, cuts = with_cuts(texts)
        else:
            rows, cuts = await asyncio.to_thread(with_cuts, texts)
        if True in cuts and not self._limits.truncate:
            limit = self._encoder.max_tokens
            raise RequestError(
                400,
                f"{place(cuts.index(True))} has more tokens than the model's limit, {limit}: "
                "shorten it",
                param=place(cuts.index(True)),
                code="context_length_exceeded",
            )
        return rows, sum(cuts)

    def _check_ids(self, row: Row, place: str) -> None:
        vocab_size, limit = self._encoder.vocab_size, self._encoder.max_tokens
        if len(row) > limit:
            raise RequestError(
                400,
                f"{place} has {len(row)} tokens, and the model's limit is {limit}: shorten it",
                param=place,
                code="context_length_exceeded",
            )
        if min(row) < 0 or max(row) >= vocab_size:
            index = next(i for i, token in enumerate(row) if not 0 <= token < vocab_size)
            raise RequestError(
                422,
                f"{place}[{index}]={row[index]} is no token id of the model, whose vocabulary has "
                f"{vocab_size}: tokenize with its own tokenizer",
                param=f"{place}[{index}]",
                code="unknown_token",
            )


async def _unless_gone(
    answering: Coroutine[Any, Any, list[Any]], gone: Callable[[], Awaitable[object]]
) -> list[Any]:
    """The answers, unless the client goes away before."""
    answers = asyncio.ensure_future(answering)
    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answers, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise ClientGoneError
        return answers.result()
    except (CUDAGraphError, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise _reason(error) from error
    finally:
        leaving.cancel()
        if not answers.done():
            answers.cancel()
            await asyncio.wait((answers,))


def _looked_at(answers: asyncio.Future[Any]) -> None:
    """Has nobody complain of an error that was not asked for: the client is gone."""
    if not answers.cancelled():
        answers.exception()


def _late() -> RequestError:
    return RequestError(
        504, "the request's time is over: allow more, or send fewer texts", code="deadline_exceeded"
    )


def _full(what: str, retry_after_s: float) -> RequestError:
    return RequestError(
        429,
        f"{what}: try again in {retry_after_s:.2g} s",
        code="rate_limit_exceeded",
        retry_after_s=retry_after_s,
    )


def _reason(error: BaseException) -> BaseException:
    """What a client is told of an item that was not answered."""
    if isinstance(error, QueueFullError):
        return _full("as many texts wait as may", error.retry_after_s)
    if isinstance(error, DeadlineError):
        return RequestError(504, str(error), code="deadline_exceeded")
    if isinstance(error, BucketOverflowError):
        return RequestError(413, str(error), param="input", code="request_too_large")
    if isinstance(error, asyncio.CancelledError):
        return RequestError(503, "the server ends: try another", code="draining", retry_after_s=1.0)
    return error
