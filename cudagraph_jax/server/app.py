"""The routes of the server."""

from __future__ import annotations

import asyncio
import base64
import hmac
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cudagraph_jax._base.checks import names_nearest
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.prometheus.metrics import is_multiprocess
from cudagraph_jax.prometheus.registration import register
from cudagraph_jax.server.access import AccessLog, ServerMetrics
from cudagraph_jax.server.body import BodyReader, EmbeddingRequest, understood
from cudagraph_jax.server.live_page import HEADERS as PAGE_HEADERS
from cudagraph_jax.server.live_page import live_page
from cudagraph_jax.server.readiness import Progress, Readiness
from cudagraph_jax.server.request_error import (
    RequestError,
    answer_http_error,
    answer_request_error,
)
from cudagraph_jax.server.text_queue import (
    ClientGoneError,
    Embedded,
    Limits,
    TextEncoder,
    TextQueue,
    Vector,
)

Answer = Callable[[Request], Awaitable[Response]]

_OF_AN_ENCODER = sorted(name for name in vars(TextEncoder) if not name.startswith("_"))


@names_nearest
def embeddings_app(
    encoder: TextEncoder,
    *,
    model: str,
    api_key: str | None = None,
    max_waiting: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Starlette:
    """An ASGI application that answers as OpenAI's `POST /v1/embeddings` does.

    Each text of a request goes to `encoder.batcher` on its own. Where the encoder is not sealed
    yet, the application warms it up as it starts, and refuses requests with 503 until then.

    - `POST /v1/embeddings`: vectors, as floats or base64
    - `GET /v1/models`, `/v1/models/{model}`: the one model
    - `/health`: 200 while the process lives
    - `/ready`: 200 when it is warm; 503 before, and while it drains
    - `/metrics`: for Prometheus
    - `/stats`: counts and times as JSON
    - `/`: the same as a page that renews itself

    Args:
        encoder: What answers, such as `demo.Encoder()`.
        model: The name by which clients ask for it.
        api_key: What they must send as `Authorization: Bearer ...` for paths below `/v1`; None:
            nothing. The other paths ask for no key.
        max_waiting: How many texts may wait; None: as `limits` has it.
        limits: What a request may ask for; `Limits()` if None.
        progress: Told of the warm-up: how many steps are done, of how many, and which.

    Returns:
        The application. `app.state.readiness.obstacle()` is why `/ready` says 503, or None.

    Raises:
        ConfigError: An argument is not valid.
    """
    if not isinstance(model, str) or not model:
        raise ConfigError(f"model={model!r:.80} is no name: give the one that clients ask for")
    if api_key is not None and (not isinstance(api_key, str) or not api_key):
        raise ConfigError("api_key is empty or no text: give a key, or None for none")
    lacking = [name for name in _OF_AN_ENCODER if not hasattr(encoder, name)]
    if lacking:
        raise ConfigError(
            f"encoder={encoder!r:.60} has no {', '.join(lacking)}: give a demo.Encoder, or what "
            "has all that TextEncoder names"
        )
    limits = Limits() if limits is None else limits
    if not isinstance(limits, Limits):
        raise ConfigError(f"limits={limits!r:.60} are no Limits: give Limits(...), or None")
    if max_waiting is not None:
        limits = replace(limits, max_waiting=max_waiting)
    return _Endpoints(encoder, model, api_key, limits, progress).app()


class _Endpoints:
    """An encoder's answers to requests.

    Args:
        encoder: Which.
        model: As of `embeddings_app`, and so are the others.
        api_key: The key.
        limits: The limits.
        progress: Told of the warm-up.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        model: str,
        api_key: str | None,
        limits: Limits,
        progress: Progress | None,
    ) -> None:
        self._encoder, self._model, self._limits = encoder, model, limits
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._created = int(time.time())
        self._queue = TextQueue(encoder, limits)
        self._bodies = BodyReader(
            max_bytes=limits.max_body_bytes, max_total_bytes=limits.max_total_body_bytes
        )
        self._readiness = Readiness(encoder, progress=progress)
        self._registry = CollectorRegistry()
        self._metrics = ServerMetrics(None if is_multiprocess() else self._registry)
        register(encoder.function.manager, name=model, registry=self._registry)
        register(encoder.batcher, name=model, registry=self._registry)

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/v1/embeddings", self._guarded(self.embeddings), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{model:path}", self._guarded(self.model)),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/stats", self.stats),
            Route("/", self.page),
        ]
        paths = frozenset(route.path for route in routes)
        app = Starlette(
            routes=routes,
            middleware=[Middleware(AccessLog, metrics=self._metrics, paths=paths)],
            exception_handlers={
                RequestError: answer_request_error,
                HTTPException: answer_http_error,
            },
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False
        app.state.readiness = self._readiness
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._readiness.begin()
        warming = asyncio.create_task(self._readiness.warm_up())
        try:
            yield
        finally:  # the server has waited for all answers
            self._readiness.is_draining = True
            await warming

    def _guarded(self, answer: Answer) -> Answer:
        async def check_and_answer(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode("latin-1")
            expected = self._authorization
            if expected is not None and not hmac.compare_digest(given, expected):
                raise RequestError(
                    401,
                    "the API key is missing or wrong: send it as Authorization: Bearer ...",
                    code="invalid_api_key",
                )
            return await answer(request)

        return check_and_answer

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`."""
        until = time.monotonic() + self._timeout_s(request)
        self._readiness.check()
        self._queue.check_room(until - time.monotonic())  # before it costs more than that
        try:
            async with self._bodies.reading(request) as body:
                asked = understood(body)
                self._check_model(asked.model)
                dimensions = self._dimensions(asked)
                embedded = await self._queue.embed(
                    asked.inputs, place=asked.place, until=until, gone=_gone(request)
                )
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        self._note(request, embedded)
        vectors = embedded.vectors[:, :dimensions]
        if dimensions < self._encoder.embedding_size:
            vectors = _unit(vectors)
        return self._answer(vectors, asked, embedded)

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise RequestError(
                404,
                f"model={name!r:.80} is not served here: ask for {self._model!r}",
                param="model",
                code="model_not_found",
            )

    def _dimensions(self, asked: EmbeddingRequest) -> int:
        size = self._encoder.embedding_size
        if asked.dimensions is not None and asked.dimensions > size:
            raise RequestError(
                422,
                f"dimensions={asked.dimensions} are more than the model has, {size}: ask for fewer",
                param="dimensions",
                code="too_many_dimensions",
            )
        return asked.dimensions or size

    def _timeout_s(self, request: Request) -> float:
        """In which the request is to be answered; the server's own limit at the most."""
        given = request.headers.get("x-request-timeout")
        if given is None:
            return self._limits.timeout_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise RequestError(
                400,
                f"x-request-timeout={given!r:.40} is no number of seconds above 0: send one",
                param="x-request-timeout",
                code="invalid_timeout",
            )
        return min(seconds, self._limits.timeout_s)

    def _note(self, request: Request, embedded: Embedded) -> None:
        texts, tokens, cut = len(embedded.vectors), embedded.tokens, embedded.cut
        self._metrics.add_texts(texts=texts, tokens=tokens, cut=cut)
        request.state.notes.update(texts=texts, tokens=tokens, truncated=cut)

    def _answer(self, vectors: Vector, asked: EmbeddingRequest, embedded: Embedded) -> Response:
        data = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(
                map(_base64, vectors) if asked.encoding_format == "base64" else vectors
            )
        ]
        usage = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
        content = {"object": "list", "data": data, "model": self._model, "usage": usage}
        response = _json(content)
        if embedded.cut:
            response.headers["x-truncated-texts"] = str(embedded.cut)
        if self._readiness.is_leaving:
            response.headers["connection"] = "close"
        return response

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        self._check_model(request.path_params["model"])
        return _json(self._described())

    def _described(self) -> dict[str, object]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "cudagraph-jax",
        }

    async def health(self, request: Request) -> Response:
        """`GET /health`."""
        return _json({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """`GET /ready`."""
        obstacle = self._readiness.obstacle()
        if obstacle is None:
            return _json({"status": "ready"})
        response = _json({"status": "not ready", "reason": obstacle}, status=503)
        response.headers["retry-after"] = "1"
        return response

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`, of all processes where there are several."""
        registry = self._registry
        if is_multiprocess():
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def stats(self, request: Request) -> Response:
        """`GET /stats`."""
        return _json(await asyncio.to_thread(self._stats))

    def _stats(self) -> dict[str, Any]:
        return {
            "model": self._model,
            "obstacle": self._readiness.obstacle(),
            "batcher": self._encoder.batcher.stats(),
            "function": self._encoder.function.stats(),
        }

    async def page(self, request: Request) -> Response:
        """`GET /`."""
        content = await asyncio.to_thread(
            live_page, self._model, self._encoder, self._readiness.obstacle()
        )
        return Response(content, headers=PAGE_HEADERS, media_type="text/html")


def _gone(request: Request) -> Callable[[], Awaitable[None]]:
    """What returns when the client goes away; the body must have been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return gone


def _json(content: object, *, status: int = 200) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type="application/json")


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _unit(vectors: Vector) -> Vector:
    """Vectors that were shortened, at unit length again, as OpenAI's are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    shortened: Vector = np.ascontiguousarray(vectors / np.maximum(lengths, 1e-12))
    return shortened
