"""What a request is answered with when it cannot be served, in the form that OpenAI's API has."""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """Ends a request with an error.

    Args:
        status: Of the response.
        message: What happened, what was expected, what to do.
        param: The field or header it is about.
        code: By which programs know it.
        retry_after_s: When to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def response(self) -> Response:
        """The error as JSON: `{"error": {"message", "type", "param", "code"}}`."""
        error = {
            "message": self.message,
            "type": _type_of(self.status),
            "param": self.param,
            "code": self.code,
        }
        headers = {} if self.retry_after_s is None else _retry_headers(self.retry_after_s)
        if self.status == 504:  # to ask again makes what waits no shorter
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        # What is left of a body that is too large, or too slow, is not waited for.
        if self.status in (408, 413):
            headers["connection"] = "close"
        # A text that holds half of a surrogate pair may be quoted.
        content = orjson.dumps({"error": error | {"message": _writable(self.message)}})
        return Response(content, self.status, headers, media_type="application/json")


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _writable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _retry_headers(seconds: float) -> dict[str, str]:
    """For all clients in whole seconds, and for OpenAI's in milliseconds."""
    return {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1e3))),
    }


async def answer_request_error(request: Request, error: Exception) -> Response:
    """The response to a `RequestError`."""
    assert isinstance(error, RequestError)
    return error.response()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """The response to what Starlette refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    what = f"{request.method} {request.url.path}: {error.detail}"
    headers: Mapping[str, str] = error.headers or {}
    allowed = {name.lower(): value for name, value in headers.items()}.get("allow")
    if error.status_code == 404:
        what += "; there are POST /v1/embeddings and GET /v1/models"
    elif allowed:
        what += f"; it takes {allowed}"
    response = RequestError(error.status_code, what, code=code).response()
    response.headers.update(headers)
    return response


def bug_response() -> Response:
    """The answer where something failed that nobody foresaw: the log says what, and nobody else."""
    return RequestError(
        500, "the server failed to answer: its log says why", code="internal_error"
    ).response()


def cut_off_response() -> Response:
    """The answer to what a server that ends has no time for."""
    return RequestError(
        503, "the server ended before its answer: try another", code="draining", retry_after_s=1.0
    ).response()
