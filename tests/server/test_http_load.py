"""`benchmarks/http_load.py`: what it counts, against a server in the same event loop."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

if not (Path(__file__).parents[2] / "benchmarks").is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

from benchmarks.http_load import (
    Answer,
    Client,
    Load,
    Sample,
    Target,
    arrivals,
    closed_loop,
    open_loop,
    parse,
)

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def serving(answer: Callable[[int], Awaitable[bytes | None]]):
    """A server that gives the n-th request this answer; closes if it is empty, is mute if None."""
    came = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
                came += 1
                content = await answer(came - 1)
                if content is None:
                    await reader.read()
                    break
                writer.write(content)
                if not content or content == BUSY:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield Target(host, port, "/v1/embeddings")


def test_the_figures_of_samples():
    """Times count from when requests were due, and only what is done in time is counted."""
    samples = [Sample(i, i + 0.5, i + 2, "200") for i in range(10)]
    samples += [Sample(3, 3, 4, "429"), Sample(3, 3, 4, "time-out"), Sample(9, 9, 99, "200")]
    load = Load.of(samples, start=3, end=8, client_cpu=0.1)
    assert load.statuses == {"200": 6, "429": 1, "time-out": 1}
    assert load.throughput == 6 / 5
    assert (load.percentile(50), load.percentile(99)) == (2000, 2000)
    assert load.late_ms == 500
    nothing = Load.of([], start=0, end=1, client_cpu=0.0)
    assert nothing.throughput == 0
    assert np.isnan(nothing.percentile(99))


def test_an_answer_is_read_when_all_of_it_is_there():
    """However it is cut, an answer is its status and its body; one without a length is refused."""
    assert all(parse(GOOD[:end]) is None for end in range(len(GOOD)))
    assert parse(GOOD) == Answer(200, b"ok", True)
    assert parse(BUSY) == Answer(429, b"", False)
    with pytest.raises(ValueError, match="without a content-length"):
        parse(b"HTTP/1.1 200 OK\r\n\r\n")


def test_times_from_when_requests_were_due():
    """A server that stalls until the last request has come is charged for each from the first."""
    due = arrivals(300, 0.2)

    async def run() -> Load:
        all_came = asyncio.Event()

        async def answer(number: int) -> bytes:
            if number == len(due) - 1:
                all_came.set()
            await all_came.wait()
            return GOOD

        async with serving(answer) as target:
            client = Client(target)
            requests = [target.post({})] * len(due)
            load = await open_loop(client, requests, rate=300, seconds=0.2)
            client.close()
            return load

    load = asyncio.run(run())
    assert load.statuses == {"200": len(due)}
    least = (due[-1] - np.array(due)) * 1e3
    assert (np.sort(load.took_ms) >= np.sort(least)).all()


def test_statuses_and_errors():
    """What became of a request is its status, or the name of what went wrong; the next goes on."""

    async def run() -> list[str]:
        async def answer(number: int) -> bytes | None:
            return (GOOD, BUSY, b"", None)[number % 4]

        async with serving(answer) as target:
            client = Client(target, timeout_s=0.05)
            samples = [await client.send(target.post({})) for _ in range(8)]
            client.close()
        refused = await client.send(target.post({}))
        return [sample.status for sample in (*samples, refused)]

    once = ["200", "429", "ConnectionResetError", "time-out"]
    assert asyncio.run(run()) == [*once, *once, "ConnectionRefusedError"]


def test_the_closed_loop():
    """Each client has one request at a time, and all of them are answered."""

    async def run() -> tuple[Load, int]:
        waiting = most = 0

        async def answer(number: int) -> bytes:
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            await asyncio.sleep(0)
            waiting -= 1
            return GOOD

        async with serving(answer) as target:
            client = Client(target)
            requests = itertools.repeat(target.post({}))
            load = await closed_loop(client, requests, clients=3, seconds=0.1, ramp_s=0.0)
            client.close()
        return load, most

    load, most = asyncio.run(run())
    assert most <= 3
    assert load.statuses == {"200": load.answered}
    assert load.throughput == pytest.approx(load.answered / 0.1)
    assert load.client_cpu > 0


def test_who_waits_for_a_connection_is_late():
    """Where connections are too few the wait counts, and the client says that it was late."""

    async def run() -> tuple[Sample, ...]:
        async def answer(number: int) -> bytes:
            return GOOD

        async with serving(answer) as target:
            client = Client(target, connections=1)
            asking = (client.send(target.post({})) for _ in range(2))
            samples = await asyncio.gather(*asking)
            client.close()
        return tuple(samples)

    first, second = asyncio.run(run())
    assert second.due < first.done <= second.sent
    assert {first.status, second.status} == {"200"}
