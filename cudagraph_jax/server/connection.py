"""A connection that a client cannot hold without asking for something."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cudagraph_jax.server.request_error import RequestError

_MAX_HEAD_BYTES = 64 << 10
"""Of a request line and its headers; what comes in one piece with their end is not counted."""

_REFUSAL = (
    b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%s"
)


class Connection(HttpToolsProtocol):
    """Uvicorn's, with limits for what comes before a request reaches the application.

    Uvicorn alone waits for ever for headers, of any size, and for a client that reads nothing.

    Attributes:
        head_s: Seconds from the first byte of a request, or from the connection, until its headers
            are there.
        read_s: In which a client must read on what it was sent.
    """

    head_s = 10.0
    read_s = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_body = False
        self._unanswered = 0
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        self._wait(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what came, unless it is too much of headers."""
        if not self._unanswered and self._waiting is None:
            self._wait(self.head_s)
        self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_body and self._head_bytes > _MAX_HEAD_BYTES:
            most = f"the headers have more than {_MAX_HEAD_BYTES} bytes: send fewer"
            self._refuse("431 Request Header Fields Too Large", most, "headers_too_large")

    def send_400_response(self, msg: str) -> None:
        """Refuses what the parser does not understand."""
        self._refuse("400 Bad Request", f"{msg} Send HTTP/1.1", "invalid_http")

    def _refuse(self, status: str, message: str, code: str) -> None:
        """Answers what never comes to the application, and ends the connection."""
        if not self.transport.is_closing():
            body = RequestError(int(status[:3]), message, code=code).response().body
            self.transport.write(_REFUSAL % (status.encode(), len(body), body))
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The request is the application's from here on."""
        self._in_body = True
        self._unanswered += 1
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes now is the next request."""
        self._in_body, self._head_bytes = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """From here on uvicorn waits for the next request, as long as a connection may rest."""
        self._unanswered -= 1
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Begins to wait for a client that does not read."""
        super().pause_writing()
        self._wait(self.read_s)

    def resume_writing(self) -> None:
        """It reads."""
        self._stop_waiting()
        super().resume_writing()

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
