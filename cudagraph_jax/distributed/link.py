"""Connections from process 0 to the others: messages with arrays, in order, and a pulse.

The coordinator's key-value store would do, too. A connection of our own tells a call in a fraction
of the time, and ends in the moment in which a process does.
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cudagraph_jax._base.text import error_line
from cudagraph_jax.errors import DistributedError
from cudagraph_jax.shapes.padding import Array

_HEAD = struct.Struct("!IQ")
_NONCE, _PROOF = 16, 32
_HANDSHAKE_S = 5.0
_PAUSE_S = 0.05
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# That takes no file descriptor, of which a busy server may have none left.
_Poll = getattr(selectors, "PollSelector", selectors.SelectSelector)


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
        self._is_cut = False
        self.peer = peer

    def send(self, data: bytes) -> None:
        """Tells the other process what `encoded` made; it need not have read it by then.

        Raises:
            OSError: It is gone, or has taken nothing for too long.
        """
        with self._sending:
            if self._is_cut:  # in the middle of a message, whose rest this would be taken for
                raise OSError("it has not taken all of what it was told before")
            self._is_cut = True
            self._connection.sendall(data)
            self._is_cut = False

    def pulse(self) -> None:
        """Shows that this process lives, unless something else does, or there is no room for it.

        It never waits: while one process takes nothing, the others are to hear this one.

        Raises:
            OSError: The other process is gone.
        """
        if not self._sending.acquire(blocking=False):
            return
        try:
            with _Poll() as ready:
                ready.register(self._connection, selectors.EVENT_WRITE)
                if ready.select(0) and not self._is_cut:
                    self._connection.sendall(_PULSE)
        finally:
            self._sending.release()

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

    def leave(self) -> None:
        """Has this process have no part in it any more; another one that it was forked from has."""
        self._connection.close()

    def close(self) -> None:
        """Ends the connection."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def encoded(head: Mapping[str, Any], arrays: Sequence[Array] = ()) -> bytes:
    """A message, once for all processes that it is told to."""
    # The other one reads a dtype's name, which does not say the order of its bytes.
    arrays = [array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays]
    parts = [array.tobytes() for array in arrays]
    shapes = [[array.dtype.name, array.shape] for array in arrays]
    text = json.dumps([head, shapes]).encode()
    return b"".join([_HEAD.pack(len(text), sum(map(len, parts))), text, *parts])


_PULSE = encoded({})


class Door:
    """Where process 0 lets the others in.

    Attributes:
        address: What they need to know, as text; whoever knows it may come in.

    Raises:
        OSError: There is no room for another connection.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(_PROOF)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listening = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self._listening.setblocking(False)
        port = self._listening.getsockname()[1]
        self.address = json.dumps([socket.gethostname(), _own_hosts(), port, self._key.hex()])

    def let_in(self, number: int, *, timeout_s: float) -> list[Link]:
        """The links to the processes 1 to `number`, in their order.

        Raises:
            DistributedError: They did not all come in time.
        """
        deadline = time.monotonic() + timeout_s
        links: dict[int, Link] = {}
        # All at once: a stranger who says nothing keeps nobody waiting.
        with ExitStack() as visitors, selectors.DefaultSelector() as ready:
            ready.register(self._listening, selectors.EVENT_READ)
            try:
                while len(links) < number:
                    if (left_s := deadline - time.monotonic()) <= 0:
                        raise DistributedError(_missing(links, number, timeout_s))
                    for key, _ in ready.select(left_s):
                        if key.data is None:
                            self._greet(ready, visitors)
                            continue
                        peer = self._peer(ready, key.data)
                        if peer in links or not 0 < peer <= number:
                            continue  # whose connection ends with this
                        # Which does not end with this: it is another object's from now on.
                        connection = socket.socket(fileno=key.data.connection.detach())
                        links[peer] = Link(connection, peer, timeout_s=timeout_s)
            except BaseException:
                for link in links.values():
                    link.close()
                raise
        return [links[peer] for peer in sorted(links)]

    def _greet(self, ready: selectors.BaseSelector, visitors: ExitStack) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise DistributedError(
                    f"nobody can be let in to be led: {error.strerror}: raise what limits this "
                    "process, such as ulimit -n"
                ) from error
            return  # of one who is gone already
        visitor = _Visitor(visitors.enter_context(connection))
        connection.setblocking(False)
        with suppress(OSError):  # who is gone meanwhile
            connection.send(visitor.nonce + _proof(self._key, b"leader", visitor.nonce))
            ready.register(connection, selectors.EVENT_READ, visitor)

    def _peer(self, ready: selectors.BaseSelector, visitor: _Visitor) -> int:
        """Which process has shown that it belongs to the job; 0: none, or not yet."""
        answer = visitor.read()
        if answer is None:
            return 0
        ready.unregister(visitor.connection)
        proof = _proof(self._key, b"follower", visitor.nonce + answer[:4])
        is_known = hmac.compare_digest(answer[4:], proof)
        return int.from_bytes(answer[:4], "big") if is_known else 0

    def close(self) -> None:
        """Lets nobody in any more."""
        self._listening.close()


class _Visitor:
    """Somebody at the door, who has to show that he belongs to the job."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.nonce = secrets.token_bytes(_NONCE)
        self._said = b""

    def read(self) -> bytes | None:
        """What he has said when that is all of it, or when he is gone; None: there is more."""
        missing = 4 + _PROOF - len(self._said)
        try:
            data = self.connection.recv(missing)
        except BlockingIOError:
            return None
        except OSError:
            return self._said
        self._said += data
        return self._said if not data or len(data) == missing else None


def _missing(links: Mapping[int, Link], number: int, timeout_s: float) -> str:
    return (
        f"of {number} other processes {sorted(links)} have come to be led within {timeout_s:g} s: "
        "see what became of the others, or give a larger timeout_s"
    )


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
    # On one machine by the loopback, which no firewall cuts off.
    untried = ["localhost", *hosts] if name == socket.gethostname() else [*hosts, name]
    deadline, failures = time.monotonic() + timeout_s, {}
    while untried:
        for host in list(untried):
            left_s = min(_HANDSHAKE_S, max(0.001, deadline - time.monotonic()))
            try:
                connection = _entered(host, port, bytes.fromhex(key), index, timeout_s=left_s)
                return Link(connection, 0, timeout_s=timeout_s)
            except _StrangerError as error:
                untried.remove(host)
                failures[host] = error_line(error)
            except OSError as error:
                failures[host] = error_line(error)
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE_S)
    reasons = "; ".join(f"{host}: {reason}" for host, reason in failures.items())
    raise DistributedError(
        f"process 0 cannot be reached at port {port} ({reasons}): let processes of the job connect "
        "to each other, as their collectives need it, too"
    )


class _StrangerError(ConnectionError):
    """Where process 0 should be is somebody else, as will be the next time."""


def _entered(host: str, port: int, key: bytes, index: int, *, timeout_s: float) -> socket.socket:
    """A connection whose ends have shown each other that they belong to one job.

    Raises:
        OSError: It could not be made.
    """
    connection = socket.create_connection((host, port), timeout=timeout_s)
    try:
        greeting = bytes(_received(connection, _NONCE + _PROOF))
        nonce, own = greeting[:_NONCE], index.to_bytes(4, "big")
        if not hmac.compare_digest(greeting[_NONCE:], _proof(key, b"leader", nonce)):
            raise _StrangerError("another program listens there")
        connection.sendall(own + _proof(key, b"follower", nonce + own))
    except BaseException:
        connection.close()
        raise
    return connection


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
