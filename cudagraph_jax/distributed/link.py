"""Connections from process 0 to the others: messages with arrays, in order, and a pulse.

The coordinator's key-value store would do, too. A connection of our own tells a call in a fraction
of the time, and ends in the moment in which a process does.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cudagraph_jax._base.text import error_line
from cudagraph_jax.errors import DistributedError
from cudagraph_jax.shapes.padding import Array

_HEAD = struct.Struct("!IQ")
_NONCE, _PROOF = 16, 32
_HANDSHAKE_S = 5.0


class Message(NamedTuple):
    """What one process tells another.

    Attributes:
        head: What JSON can hold; empty: it is alive.
        arrays: What goes with it.
    """

    head: dict[str, Any]
    arrays: list[Array]


class Link:
    """A connection to another process of the job.

    Args:
        connection: Whose other end has shown that it belongs to the job.
        peer: The other process.
        timeout_s: How long it may be silent, or not take what it is told.

    Attributes:
        peer: As given.
    """

    def __init__(self, connection: socket.socket, peer: int, *, timeout_s: float) -> None:
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._sending = threading.Lock()
        self.peer = peer

    def send(self, head: Mapping[str, Any], arrays: Sequence[Array] = ()) -> None:
        """Tells the other process; it need not have read it by then.

        Raises:
            OSError: It is gone, or has taken nothing for too long.
        """
        # The other one reads a dtype's name, which does not say the order of its bytes.
        arrays = [array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays]
        parts = [array.tobytes() for array in arrays]
        shapes = [[array.dtype.name, array.shape] for array in arrays]
        text = json.dumps([head, shapes]).encode()
        data = b"".join([_HEAD.pack(len(text), sum(map(len, parts))), text, *parts])
        with self._sending:
            self._connection.sendall(data)

    def receive(self) -> Message:
        """What the other process tells next.

        Raises:
            OSError: It is gone, or has been silent for too long.
        """
        text_bytes, array_bytes = _HEAD.unpack(_received(self._connection, _HEAD.size))
        head, shapes = json.loads(_received(self._connection, text_bytes))
        data, arrays, start = _received(self._connection, array_bytes), [], 0
        for name, shape in shapes:
            dtype = jnp.dtype(name)
            count = int(np.prod(shape, dtype=np.int64))
            arrays.append(np.frombuffer(data, dtype, count, start).reshape(shape))
            start += count * dtype.itemsize
        return Message(head, arrays)

    def end(self) -> None:
        """Says nothing more; the other process reads that after what was said."""
        self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the connection."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Door:
    """Where process 0 lets the others in.

    Attributes:
        address: What they need to know, as text; whoever knows it may come in.
    """

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listening = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self._key = secrets.token_bytes(_PROOF)
        self.address = json.dumps(
            [socket.gethostname(), _own_hosts(), self._listening.getsockname()[1], self._key.hex()]
        )

    def let_in(self, number: int, *, timeout_s: float) -> list[Link]:
        """The links to so many other processes, by their index.

        Raises:
            DistributedError: They did not all come in time.
        """
        links: dict[int, Link] = {}
        deadline = time.monotonic() + timeout_s
        while len(links) < number:
            self._listening.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = self._listening.accept()
            except TimeoutError:
                there = sorted(links)
                raise DistributedError(
                    f"of {number} other processes {there} have come to be led within "
                    f"{timeout_s:g} s: see what became of the others, or give a larger timeout_s"
                ) from None
            try:
                peer = self._proved(connection)
            except OSError:  # of somebody who cannot show that he belongs to the job
                connection.close()
            else:
                links[peer] = Link(connection, peer, timeout_s=timeout_s)
        return [links[peer] for peer in sorted(links)]

    def _proved(self, connection: socket.socket) -> int:
        connection.settimeout(_HANDSHAKE_S)
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(nonce + _proof(self._key, b"leader", nonce))
        answer = bytes(_received(connection, 4 + _PROOF))
        if not hmac.compare_digest(answer[4:], _proof(self._key, b"follower", nonce + answer[:4])):
            raise ConnectionError("it does not know the key")
        return int.from_bytes(answer[:4], "big")

    def close(self) -> None:
        """Lets nobody in any more."""
        self._listening.close()


@contextmanager
def open_door() -> Iterator[Door]:
    """A door for the length of a block."""
    door = Door()
    try:
        yield door
    finally:
        door.close()


def knock(address: str, index: int, *, timeout_s: float) -> Link:
    """The link to the process whose `Door.address` this is.

    Args:
        address: As it was told.
        index: This process.
        timeout_s: As for `Link`.

    Raises:
        DistributedError: It cannot be reached.
    """
    name, hosts, port, key = json.loads(address)
    failures = []
    # On one machine by the loopback, which no firewall cuts off.
    for host in ["localhost", *hosts] if name == socket.gethostname() else [*hosts, name]:
        try:
            connection = socket.create_connection((host, port), timeout=_HANDSHAKE_S)
            _prove(connection, bytes.fromhex(key), index)
            return Link(connection, 0, timeout_s=timeout_s)
        except OSError as error:
            failures.append(f"{host}: {error_line(error)}")
    raise DistributedError(
        f"process 0 cannot be reached at port {port} ({'; '.join(failures)}): let processes of the "
        "job connect to each other, as their collectives need it, too"
    )


def _prove(connection: socket.socket, key: bytes, index: int) -> None:
    greeting = bytes(_received(connection, _NONCE + _PROOF))
    nonce, own = greeting[:_NONCE], index.to_bytes(4, "big")
    if not hmac.compare_digest(greeting[_NONCE:], _proof(key, b"leader", nonce)):
        connection.close()
        raise ConnectionError("another program listens there")
    connection.sendall(own + _proof(key, b"follower", nonce + own))


def _proof(key: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(key, role + said, "sha256")


def _own_hosts() -> list[str]:
    """Addresses of this machine, the one first that leads to others."""
    hosts = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of no machine; nothing is sent
        hosts.append(probe.getsockname()[0])
    with suppress(OSError):
        hosts += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys(hosts))


def _received(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, start = memoryview(data), 0
    while start < size:
        count = connection.recv_into(view[start:])
        if not count:
            raise ConnectionError("its connection has ended")
        start += count
    return data
