"""Connections between the processes of a job: what is told comes as it was, and only from them."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import ml_dtypes
import numpy as np
import pytest

from cudagraph_jax import DistributedError
from cudagraph_jax.distributed.link import Door, encoded, knock
from tests.helpers.processes import run_script


@pytest.fixture
def links():
    """Both ends of a link."""
    with closing(Door()) as door, ThreadPoolExecutor(1) as pool:
        other = pool.submit(knock, door.address, 1, timeout_s=5)
        (own,) = door.let_in(1, timeout_s=5)
        yield own, other.result()
        own.close()
        other.result().close()


@pytest.mark.parametrize(
    "dtype",
    ["int32", "float64", "bool", "complex64", ">i4", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (512, 257)])
def test_arrays_of_any_kind(links, dtype, shape):
    """Dtype, shape and content survive, several arrays in one message."""
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(links[0].send, encoded({"n": 1}, [array, array.T]))
        head, arrays = links[1].receive()
        sent.result()
    assert head == {"n": 1}
    for came, told in zip(arrays, (array, array.T), strict=True):
        assert came.dtype == told.dtype.newbyteorder("=")
        np.testing.assert_array_equal(came, told)


def test_what_was_said_last_is_read(links):
    """A process that ends is heard to the end, and then seen to be gone."""
    links[0].send(encoded({"failed": "why"}))
    links[0].end()
    assert links[1].receive().head == {"failed": "why"}
    with pytest.raises(ConnectionError, match="has ended"):
        links[1].receive()


def test_strangers_are_not_let_in():
    """Who does not know the key is turned away; who says nothing keeps nobody waiting."""
    with closing(Door()) as door, ThreadPoolExecutor(1) as pool:
        name, hosts, port, _ = json.loads(door.address)
        wrong = json.dumps([name, hosts, port, "00" * 32])
        waiting = pool.submit(door.let_in, 1, timeout_s=5)
        start = time.monotonic()
        with (
            socket.create_connection(("localhost", port)),
            socket.create_connection(("localhost", port)) as stranger,
        ):
            stranger.sendall(bytes(100))
            with pytest.raises(DistributedError, match="another program listens there"):
                knock(wrong, 1, timeout_s=5)
            link = knock(door.address, 1, timeout_s=5)
            (own,) = waiting.result()
        assert own.peer == 1
        assert time.monotonic() - start < 2
        own.close()
        link.close()


def test_processes_that_are_not_expected():
    """One of no such index, and a second one of the same, are turned away."""
    with closing(Door()) as door, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(door.let_in, 2, timeout_s=5)
        others = [knock(door.address, index, timeout_s=5) for index in (7, 0, 1, 1, 2)]
        first, second = waiting.result()
        assert (first.peer, second.peer) == (1, 2)
        for refused in (others[0], others[1], others[3]):
            with pytest.raises(ConnectionError):
                refused.receive()
        first.send(encoded({"to": 1}))
        assert others[2].receive().head == {"to": 1}
        for link in (first, second, *others):
            link.close()


def test_a_connection_that_ends_is_made_again():
    """Who finds nobody at first knocks until his time is over."""
    with closing(Door()) as door, socket.create_server(("127.0.0.1", 0)) as before:
        key = json.loads(door.address)[3]
        port = before.getsockname()[1]
        address = json.dumps(["elsewhere", ["127.0.0.1"], port, key])
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(door.let_in, 1, timeout_s=10)
            coming = pool.submit(knock, address, 1, timeout_s=10)
            before.accept()[0].close()
            visitor, _ = before.accept()
            inside = socket.create_connection(("localhost", json.loads(door.address)[2]))
            visitor.sendall(inside.recv(48))
            inside.sendall(visitor.recv(36))
            (own,) = waiting.result()
            assert own.peer == 1
            for link in (own, coming.result()):
                link.close()
            visitor.close()
            inside.close()


def test_a_pulse_waits_for_nobody(links):
    """Neither for another message, nor for who takes nothing; none is cut in two."""
    links[0]._connection.settimeout(0.2)
    with pytest.raises(TimeoutError):
        links[0].send(bytes(1 << 26))
    start = time.monotonic()
    links[0].pulse()
    assert time.monotonic() - start < 0.1


def test_a_message_that_is_cut(links):
    """What would come after it, and be taken for its rest, is not sent."""
    links[0]._connection.settimeout(0.2)
    with pytest.raises(TimeoutError):
        links[0].send(encoded({"n": 1}, [np.zeros(1 << 24, np.uint8)]))
    links[0]._connection.settimeout(5)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(links[1].receive)
        with pytest.raises(OSError, match="has not taken all"):
            links[0].send(encoded({}, [np.ones(1 << 24, np.uint8)]))
        links[0].pulse()
        links[0].end()
        with pytest.raises(ConnectionError, match="has ended"):
            received.result()


def test_nobody_comes():
    """Who waits for others is told how many came."""
    with (
        closing(Door()) as door,
        pytest.raises(DistributedError, match=r"of 1 other processes \[\]"),
    ):
        door.let_in(1, timeout_s=0.01)


def test_not_all_of_them_come():
    """Those who did are told at once, since their connections end."""
    with closing(Door()) as door, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(door.let_in, 2, timeout_s=0.3)
        link = knock(door.address, 2, timeout_s=5)
        with pytest.raises(DistributedError, match=r"of 2 other processes \[2\]"):
            waiting.result()
        with pytest.raises(ConnectionError, match="has ended"):
            link.receive()
        link.close()


def test_no_room_for_another_connection():
    """It is said at once, and nothing is tried again and again until the time is over."""
    done = run_script(
        """
        import json, os, resource, socket
        from contextlib import closing
        from cudagraph_jax import DistributedError
        from cudagraph_jax.distributed.link import Door

        with closing(Door()) as door:
            visitor = socket.create_connection(("localhost", json.loads(door.address)[2]))
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
            held = []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                os.close(held.pop())  # for the selector
            try:
                door.let_in(1, timeout_s=20)
            except DistributedError as error:
                print(error)
        """,
        timeout=15,
    )
    assert "nobody can be let in to be led: Too many open files: raise" in done.stdout, done.stderr
