"""The body of a request: read within limits, understood, or refused with the field named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)
from starlette.requests import Request

from cudagraph_jax.server.request_error import RequestError

_BODY_TIMEOUT_S = 30.0
_BUSY_RETRY_S = 1.0
_MOST_ELEMENTS = 1 << 16
"""Of a list, whatever the limits: to look at 65,536 elements takes 0.1 s of the event loop."""


class BodyReader:
    """Reads bodies, each and all of them together within limits.

    Args:
        max_bytes: Of one body.
        max_total_bytes: Of all that are read at a time.
        timeout_s: In which a body must have come.
    """

    def __init__(
        self, *, max_bytes: int, max_total_bytes: int, timeout_s: float = _BODY_TIMEOUT_S
    ) -> None:
        self.max_bytes, self._max_total_bytes = max_bytes, max_total_bytes
        self._timeout_s = timeout_s
        self._held_bytes = 0

    @asynccontextmanager
    async def reading(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the context ends.

        Raises:
            RequestError: 413 where it is too large, 408 where it is too slow, 429 where others take
                all the room.
            ClientDisconnect: The client went away.
        """
        announced = request.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced) > self.max_bytes:
            raise self._too_large(f"{announced} bytes")
        body = bytearray()
        length = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    length += len(chunk)
                    self._held_bytes += len(chunk)
                    self._check(length)
        except TimeoutError:
            self._held_bytes -= length
            raise RequestError(
                408,
                f"the body did not come within {self._timeout_s:g} s: send it at once",
                code="request_timeout",
            ) from None
        except BaseException:
            self._held_bytes -= length
            raise
        try:
            yield bytes(body)
        finally:
            self._held_bytes -= length

    def _check(self, length: int) -> None:
        if length > self.max_bytes:
            raise self._too_large(f"more than {self.max_bytes} bytes")
        if self._held_bytes > self._max_total_bytes:
            raise RequestError(
                429,
                "other requests are being read, and there is no room for this one: try again",
                code="rate_limit_exceeded",
                retry_after_s=_BUSY_RETRY_S,
            )

    def _too_large(self, size: str) -> RequestError:
        return RequestError(
            413,
            f"the body has {size}, and the limit is {self.max_bytes}: send fewer texts",
            code="request_too_large",
        )


def _kind_of_input(value: object) -> str | None:
    """Which of the four forms an input has, as its first element shows."""
    if isinstance(value, str):
        return "a text"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, str):
        return "a list of texts"
    return "a list of token ids" if isinstance(first, int) else "a list of lists of token ids"


_Text = Annotated[str, Field(min_length=1)]
# The first fault is told, and none of a million others is looked for.
_Ids = Annotated[list[int], Field(fail_fast=True, min_length=1, max_length=_MOST_ELEMENTS)]
_Texts = Annotated[list[_Text], Field(fail_fast=True, max_length=_MOST_ELEMENTS)]
_ListsOfIds = Annotated[list[_Ids], Field(fail_fast=True, max_length=_MOST_ELEMENTS)]
_FORMS = ("a text", "a list of texts", "a list of token ids", "a list of lists of token ids")


class EmbeddingRequest(BaseModel):
    """The body of `POST /v1/embeddings`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    input: Annotated[
        Annotated[_Text, Tag("a text")]
        | Annotated[_Texts, Tag("a list of texts")]
        | Annotated[_Ids, Tag("a list of token ids")]
        | Annotated[_ListsOfIds, Tag("a list of lists of token ids")],
        Discriminator(
            _kind_of_input,
            custom_error_type="input_form",
            custom_error_message=f"expected {', '.join(_FORMS[:-1])} or {_FORMS[-1]}, none empty",
        ),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(gt=0)] | None = None
    user: str | None = None

    @property
    def inputs(self) -> Sequence[str] | Sequence[Sequence[int]]:
        """The texts, or the token ids of each."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return self.input

    def place(self, index: int) -> str:
        """Where an input stands in the request, for an error."""
        is_alone = isinstance(self.input, str) or isinstance(self.input[0], int)
        return "input" if is_alone else f"input[{index}]"


def understood(body: bytes) -> EmbeddingRequest:
    """What a body asks for.

    Raises:
        RequestError: 400, with the field that is wrong, what was expected, and what was found.
    """
    try:
        return EmbeddingRequest.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: ValidationError) -> RequestError:
    found = error.errors(include_url=False, include_context=False)[0]
    kind, message = found["type"], found["msg"]
    if kind == "json_invalid":
        return RequestError(
            400, f"the body is not what it should be: {message}", code="invalid_json"
        )
    param = _path(found["loc"])
    if kind == "too_long":
        what = f"{param} has more than {_MOST_ELEMENTS} elements: send fewer"
        return RequestError(413, what, param=param, code="request_too_large")
    if kind == "missing":
        what = f"{param} is missing"
    elif kind == "extra_forbidden":
        known = ", ".join(EmbeddingRequest.model_fields)
        what = f"{param} is no argument that is known here: give {known}"
    else:
        what = f"{param or 'the body'}: {message}{_shown(found['input'])}"
    return RequestError(400, what, param=param or None, code=kind)


def _path(location: tuple[int | str, ...]) -> str:
    """`input[3][0]` of a location, without the name of the form that pydantic puts into it."""
    parts = location[:1] + tuple(part for part in location[1:] if part not in _FORMS)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)[1:]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return f", not {value!r:.60}"
    return ""
