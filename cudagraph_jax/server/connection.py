"""A connection that a client cannot hold without asking for something."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cudagraph_jax.server.request_error import RequestError

_MAX_HEAD_BYTES = 64 << 10
"""Of a request line and its headers; of what frames a body twice as much as that has besides."""

_MOST_PIPELINED = 16
"""Requests of a connection without an answer; 64 KiB hold a thousand."""

_REFUSAL = (
    b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%s"
)


_FRAMING = (b"content-length", b"transfer-encoding")


class _Parser(httptools.HttpRequestParser):
    """Reads on where a client offers another protocol, as Java's does; it is answered in HTTP/1.1.

    The parser alone takes the body for one of that protocol.

    Args:
        connection: What is told of requests.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        self._connection = connection

    def feed_data(self, data: Any) -> None:
        """Parses what came."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if framing := self._connection.framing:
                super().feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]))
            self.feed_data(data[offer.args[0] :])


class Connection(HttpToolsProtocol):
    """Uvicorn's, with limits for what comes before a request reaches the application.

    Uvicorn alone waits for ever for headers, of any size, and for a client that reads nothing.

    Attributes:
        head_s: Seconds from the first byte of a request, or from the connection, until its headers
            are there.
        read_s: In which a client must read on what it was sent.
        framing: The headers that say where the body ends, while the parser has to be told again.
    """

    head_s = 10.0
    read_s = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)
        self.framing: list[bytes] = []
        self._spare_bytes = _MAX_HEAD_BYTES
        self._in_body = False
        self._unanswered = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        self._wait_for_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all waiting."""
        _stop(self._head_timer)
        self._head_timer = None
        _stop(self._read_timer)
        self._read_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what came, unless too much of it is no body."""
        if not self._unanswered and self._head_timer is None:
            self._wait_for_a_head()
        self._spare_bytes -= len(data)
        super().data_received(data)
        if self._spare_bytes < 0:
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
            self._wait_for_a_reader()

    def on_message_begin(self) -> None:
        """Takes a request, unless too many before it have no answer yet."""
        if self.framing:
            return
        if self._unanswered >= _MOST_PIPELINED:
            raise ValueError("too many requests without an answer")  # the parser ends with it
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Takes a part of the address."""
        if not self.framing:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header, and lets go what comes behind a body: nobody looks at that."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request is the application's from here on."""
        if self.framing:
            self.framing = []
            return
        self._in_body = True
        self._unanswered += 1
        _stop(self._head_timer)
        self._head_timer = None
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.framing = [b"%s: %s" % line for line in self.headers if line[0] in _FRAMING]

    def on_body(self, body: bytes) -> None:
        """Takes a part of a body, and spares as much for what frames it."""
        self._spare_bytes += 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What comes now is the next request."""
        if self.framing:
            return
        self._in_body, self._spare_bytes = False, _MAX_HEAD_BYTES
        _stop(self._head_timer)
        self._head_timer = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """From here on uvicorn waits for the next request, as long as a connection may rest."""
        self._unanswered -= 1
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._wait_for_a_reader()

    def pause_writing(self) -> None:
        """Begins to wait for a client that does not read."""
        super().pause_writing()
        self._wait_for_a_reader()

    def resume_writing(self) -> None:
        """It reads."""
        _stop(self._read_timer)
        self._read_timer = None
        super().resume_writing()

    def _wait_for_a_head(self) -> None:
        _stop(self._head_timer)
        self._head_timer = None
        self._head_timer = self.loop.call_later(self.head_s, self.transport.abort)

    def _wait_for_a_reader(self) -> None:
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.read_s, self._end_unread)

    def _end_unread(self) -> None:
        self._read_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
