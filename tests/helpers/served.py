"""A server in a process of its own, and requests to it byte by byte."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import httpx

from tests.helpers.processes import Forked, all_of

_PROGRAM = Path(__file__).parent / "programs" / "serve_tiny.py"
_COMMAND = "import sys; from cudagraph_jax.cli import main; sys.exit(main())"


class Served:
    """A server that listens, in a fork of a process that has imported JAX.

    Args:
        *arguments: Of the program.
        command: What `cudagraph-jax` gets before them and the number of a listening socket, or a
            port; None: the program serves the tiny encoder.
        address: Where it listens by itself.

    Attributes:
        url: Where.
        address: The same, for a socket.
        process: Its process.
    """

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] | None = None,
        address: tuple[str, int] | None = None,
    ) -> None:
        self._said = TemporaryFile("w+")  # noqa: SIM115  # closed by `close`
        given, self._input = os.pipe()
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
            self.address: tuple[str, int] = address or listener.getsockname()
            self.process = Forked(
                _PROGRAM if command is None else _COMMAND,
                *(command or ()),
                self.address[1] if address else listener.fileno(),
                *arguments,
                files=(given, self._said, 2),
                kept=() if address else (listener.fileno(),),
            )
        os.close(given)
        self.url = "http://{}:{}".format(*self.address)

    def wait_until_ready(self) -> None:
        """Waits for `/ready`."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process.poll() is None, "the server ended"
            # A connection made before the server accepts is answered when it does.
            try:
                response = self.get("/ready")
            except httpx.ConnectError:
                time.sleep(0.02)
                continue
            if response.status_code == 200:
                return
            time.sleep(float(response.headers["retry-after"]) / 20)
        raise AssertionError("the server is not ready")

    def wait_until_accepted(self, texts: int) -> None:
        """Waits until so many texts wait, or are answered."""
        until, accepted = time.monotonic() + 60, 0
        while accepted < texts:
            assert time.monotonic() < until, f"{accepted} of {texts} texts are accepted"
            said = self.get("/stats").json()["batcher"]
            accepted = said["waiting"] + sum(said["items"].values())

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it printed, once it has ended."""
        return self.process.wait(60), all_of(self._said)

    def send(self, content: bytes) -> socket.socket:
        """A new connection on which something was sent."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(content)
        return connection

    def embed(self, **options: Any) -> httpx.Response:
        body = {"model": "tiny", "input": "a b c"}
        return self._ask("POST", "/v1/embeddings", json=body, **options)

    def get(self, path: str) -> httpx.Response:
        return self._ask("GET", path)

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer on a new connection; loading the certificates for it would take 20 ms."""
        return httpx.request(method, self.url + path, timeout=60, verify=False, **options)

    def close(self) -> None:
        """Ends it, if it has not."""
        self.process.kill()
        self._said.close()
        os.close(self._input)


@contextmanager
def served(*arguments: str, **options: Any) -> Iterator[Served]:
    """A server that is ready, and gone afterwards."""
    server = Served(*arguments, **options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def everything_from(connection: socket.socket) -> bytes:
    """What comes until the other side closes, however it does."""
    chunks = []
    with connection, suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            chunks.append(chunk)
    return b"".join(chunks)


def post(body: bytes, *, length: int | None = None) -> bytes:
    """A request for embeddings, byte by byte."""
    length = len(body) if length is None else length
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
    return head.encode() + body
