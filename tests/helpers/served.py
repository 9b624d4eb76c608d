"""A server in a process of its own, and requests to it byte by byte."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

_PROGRAM = Path(__file__).parent / "programs" / "serve_tiny.py"


class Served:
    """A server that listens.

    Args:
        *arguments: Of the program.
        command: The program; the number of a listening socket is its first argument, or a port.
        address: Where it listens by itself.

    Attributes:
        url: Where.
        address: The same, for a socket.
        process: Its process.
    """

    def __init__(
        self,
        *arguments: str,
        command: list[str] | None = None,
        address: tuple[str, int] | None = None,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
            self.address: tuple[str, int] = address or listener.getsockname()
            number = self.address[1] if address else listener.fileno()
            self.process = subprocess.Popen(
                [*(command or [sys.executable, str(_PROGRAM)]), str(number), *arguments],
                pass_fds=() if address else (number,),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        self.url = "http://{}:{}".format(*self.address)

    def wait_until_ready(self) -> None:
        """Waits for `/ready`."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process.poll() is None, "the server ended"
            # A connection made before the server accepts is answered when it does.
            try:
                response = httpx.get(f"{self.url}/ready", timeout=60)
            except httpx.ConnectError:
                time.sleep(0.02)
                continue
            if response.status_code == 200:
                return
            time.sleep(float(response.headers["retry-after"]) / 20)
        raise AssertionError("the server is not ready")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it printed, once it has ended."""
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def send(self, content: bytes) -> socket.socket:
        """A new connection on which something was sent."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(content)
        return connection

    def embed(self, **options: Any) -> httpx.Response:
        body = {"model": "tiny", "input": "a b c"}
        return httpx.post(f"{self.url}/v1/embeddings", json=body, timeout=60, **options)


@contextmanager
def served(*arguments: str, **options: Any) -> Iterator[Served]:
    """A server that is ready, and gone afterwards."""
    server = Served(*arguments, **options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


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
