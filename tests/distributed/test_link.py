"""Connections between the processes of a job: what is told comes as it was, and only from them."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from cudagraph_jax import DistributedError
from cudagraph_jax.distributed.link import knock, open_door


@pytest.fixture
def links():
    """Both ends of a link."""
    with open_door() as door, ThreadPoolExecutor(1) as pool:
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
        sent = pool.submit(links[0].send, {"n": 1}, [array, array.T])
        head, arrays = links[1].receive()
        sent.result()
    assert head == {"n": 1}
    for came, told in zip(arrays, (array, array.T), strict=True):
        assert came.dtype == told.dtype.newbyteorder("=")
        np.testing.assert_array_equal(came, told)


def test_what_was_said_last_is_read(links):
    """A process that ends is heard to the end, and then seen to be gone."""
    links[0].send({"failed": "why"})
    links[0].end()
    assert links[1].receive().head == {"failed": "why"}
    with pytest.raises(ConnectionError, match="has ended"):
        links[1].receive()


def test_a_stranger_is_not_let_in():
    """Who does not know the key is turned away, and those who do come in all the same."""
    with open_door() as door, ThreadPoolExecutor(1) as pool:
        name, hosts, port, _ = json.loads(door.address)
        wrong = json.dumps([name, hosts, port, "00" * 32])
        waiting = pool.submit(door.let_in, 1, timeout_s=5)
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(bytes(100))
        with pytest.raises(DistributedError, match="another program listens there"):
            knock(wrong, 1, timeout_s=5)
        link = knock(door.address, 2, timeout_s=5)
        (own,) = waiting.result()
        assert own.peer == 2
        own.close()
        link.close()


def test_nobody_comes():
    """Who waits for others is told how many came."""
    with open_door() as door, pytest.raises(DistributedError, match=r"of 1 other processes \[\]"):
        door.let_in(1, timeout_s=0.01)
