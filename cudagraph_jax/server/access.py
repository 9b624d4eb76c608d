"""What happened to each request: a line of JSON in the log, and metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cudagraph_jax.server.request_error import bug_response, cut_off_response

logger = logging.getLogger("cudagraph_jax.server")
access_logger = logging.getLogger("cudagraph_jax.access")

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds; what is worth a line is that one fails."""

_CLIENT_GONE = 499
"""As nginx logs a request whose client went away before the answer."""


class ServerMetrics:
    """Counts of requests, beside those of the manager and the batcher.

    Args:
        registry: Where Prometheus looks for them; None in its multi-process mode.
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        prefix = "cudagraph_jax_server_"
        self._requests = Counter(
            prefix + "requests",
            "Requests by path and status.",
            ("path", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            prefix + "request_seconds",
            "Seconds from a request's headers to its answer.",
            ("path",),
            registry=registry,
            buckets=_BOUNDS,
        )
        self._texts = Counter(prefix + "texts", "Texts that were answered.", registry=registry)
        self._tokens = Counter(prefix + "tokens", "Their tokens.", registry=registry)
        self._cut = Counter(
            prefix + "truncated_texts", "Those that lost their end.", registry=registry
        )
        self._open = Gauge(
            prefix + "open_requests",
            "Requests without an answer yet.",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def begin(self) -> None:
        """Counts one that came."""
        self._open.inc()

    def end(self, path: str, status: int, seconds: float) -> None:
        """Counts one that was answered."""
        self._open.dec()
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def add_texts(self, *, texts: int, tokens: int, cut: int) -> None:
        """Counts the texts of one."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        self._cut.inc(cut)


class AccessLog:
    """An ASGI app that logs and counts the requests of another, and answers where that fails.

    Args:
        app: Which.
        metrics: Where they are counted.
        paths: Those that are counted by name; others are one.
    """

    def __init__(self, app: ASGIApp, *, metrics: ServerMetrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = _CLIENT_GONE
        request_id = _request_id(scope)
        notes: dict[str, Any] = {}
        scope.setdefault("state", {})["notes"] = notes

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._metrics.begin()
        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:  # the server ends, and waits no longer
            if status != _CLIENT_GONE:
                raise
            await cut_off_response()(scope, receive, send_and_note)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status != _CLIENT_GONE:  # the answer has begun
                raise
            await bug_response()(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - began
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.end(path, status, seconds)
            level = logging.DEBUG if path in _PROBES and status == 200 else logging.INFO
            if access_logger.isEnabledFor(level):
                access_logger.log(level, _line(scope, status, seconds, request_id, notes))


def _request_id(scope: Scope) -> str:
    """The client's own, where it can be written anywhere; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(given := value.decode("latin-1")):
            return str(given)
    return uuid.uuid4().hex


def _line(scope: Scope, status: int, seconds: float, request_id: str, notes: dict[str, Any]) -> str:
    client = scope.get("client")
    return orjson.dumps(
        {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1e3, 3),
            **notes,
        }
    ).decode()
