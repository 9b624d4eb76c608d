"""Load for an HTTP server on this machine, from one asyncio process.

    python benchmarks/http_load.py http://127.0.0.1:8000/v1/embeddings             # closed loop
    python benchmarks/http_load.py http://127.0.0.1:8000/v1/embeddings --rate 100  # open loop
    python benchmarks/http_load.py http://127.0.0.1:8000/v1/embeddings --overload 10 --seconds 60

Each request is one of NumPy's passages, as OpenAI's embeddings. In the closed loop every client
sends its next request when it has its answer, which shows what a server can do. In the open loop
requests come at random (Poisson), whatever became of earlier ones, and times are counted from when
a request was due: a server that stalls is charged for all that came meanwhile. `--overload 10`
offers ten times what a closed loop got before.

The client is light, since it takes its time from the server's: an event loop, keep-alive, and the
little of HTTP/1.1 that these servers use. What it took itself is part of the result.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Self, cast
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

RAMP_S = 1.0
"""The closed loop counts from here: at first all clients come at once."""

Floats = npt.NDArray[np.float64]


class Target(NamedTuple):
    """Where requests go."""

    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Self:
        """That of a URL like `http://127.0.0.1:8000/v1/embeddings`."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"url={url!r}: expected http://HOST:PORT/PATH")
        return cls(parts.hostname, parts.port or 80, parts.path or "/")

    def post(self, document: object) -> bytes:
        """A whole request with this document in JSON."""
        body = json.dumps(document).encode()
        lines = (
            f"POST {self.path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join((*lines, "", "")).encode() + body


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    body: bytes
    keeps_alive: bool


def parse(received: bytes) -> Answer | None:
    """The answer that these bytes are; None while some are missing.

    Raises:
        ValueError: It does not say how long it is.
    """
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.lower().split(b"\r\n")
    fields = {name: value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if b"content-length" not in fields:
        raise ValueError(f"an answer without a content-length: {head!r}")
    if len(body) < int(fields[b"content-length"]):
        return None
    return Answer(int(first.split()[1]), body, fields.get(b"connection") != b"close")


class Connection(asyncio.Protocol):
    """One connection, which has one request at a time."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None

    async def ask(self, request: bytes) -> Answer:
        """The answer to a whole request.

        Raises:
            OSError: The connection is lost.
            ValueError: What came is not understood.
        """
        if self._transport is None:
            raise ConnectionResetError("the server closed the connection")
        self._received = b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    @property
    def is_open(self) -> bool:
        """Whether it can take a request."""
        return self._transport is not None

    def close(self) -> None:
        """Ends it, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._answer is None or self._answer.done():
            return
        try:
            answer = parse(self._received)
        except ValueError as error:
            self._answer.set_exception(error)
            return
        if answer is not None:
            self._answer.set_result(answer)
            if not answer.keeps_alive:
                self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed without an answer"))


class Sample(NamedTuple):
    """One request; times in seconds by `time.perf_counter`."""

    due: float
    sent: float
    done: float
    status: str


class Load(NamedTuple):
    """What came of some requests.

    Attributes:
        seconds: In which those of `answered` were answered.
        answered: How many were, with 200.
        took_ms: What these took, each from when it was due.
        statuses: How many ended so: a status, or the name of an error.
        late_ms: How long after it was due a request was sent, in 99 of 100 cases no longer: above
            a few milliseconds the client itself cannot follow, or no connection was free.
        client_cpu: The part of a core that the client took.
    """

    seconds: float
    answered: int
    took_ms: Floats
    statuses: dict[str, int]
    late_ms: float
    client_cpu: float

    @classmethod
    def of(cls, samples: Sequence[Sample], *, start: float, end: float, client_cpu: float) -> Self:
        """The figures of requests, of which those that were done from `start` to `end` count."""
        counted = [sample for sample in samples if start <= sample.done <= end]
        good = [sample for sample in counted if sample.status == "200"]
        late = [sample.sent - sample.due for sample in counted] or [0.0]
        return cls(
            seconds=end - start,
            answered=len(good),
            took_ms=np.array([sample.done - sample.due for sample in good]) * 1e3,
            statuses=dict(Counter(sample.status for sample in counted).most_common()),
            late_ms=float(np.percentile(late, 99)) * 1e3,
            client_cpu=client_cpu,
        )

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

    def percentile(self, percent: float) -> float:
        """Milliseconds that so many of those answered took at the most; NaN where none was."""
        return float(np.percentile(self.took_ms, percent)) if self.answered else float("nan")

    def figures(self) -> dict[str, object]:
        """All of it in a few numbers, for JSON."""
        return {
            "answered/s": self.throughput,
            "p50_ms": self.percentile(50),
            "p99_ms": self.percentile(99),
            "statuses": self.statuses,
            "late_ms": self.late_ms,
            "client_cpu": self.client_cpu,
        }

    def __str__(self) -> str:
        return (
            f"{self.throughput:.1f} answered/s, p50 {self.percentile(50):.1f} ms, "
            f"p99 {self.percentile(99):.1f} ms, {self.statuses}; client: "
            f"{self.client_cpu:.0%} of a core, sends {self.late_ms:.1f} ms late (p99)"
        )


class Client:
    """Sends requests to one server, and keeps its connections.

    Args:
        target: The server.
        timeout_s: What is not answered so long after it was due counts as a time-out.
        connections: As many at a time at the most; further requests wait for one.
    """

    def __init__(self, target: Target, *, timeout_s: float = 30.0, connections: int = 2048) -> None:
        self._target, self._timeout_s = target, timeout_s
        self._free: list[Connection] = []
        self._places = asyncio.Semaphore(connections)

    async def send(self, request: bytes, due: float | None = None) -> Sample:
        """What came of a request, which was due then or is now; never an error."""
        sent = time.perf_counter()
        due = sent if due is None else due
        try:
            async with asyncio.timeout(due + self._timeout_s - sent), self._connection() as held:
                sent = time.perf_counter()
                status = str((await held.ask(request)).status)
        except TimeoutError:
            status = "time-out"
        except (OSError, ValueError) as error:
            status = type(error).__name__
        return Sample(due, sent, time.perf_counter(), status)

    async def ask(self, request: bytes) -> Answer:
        """The answer to one request."""
        async with self._connection() as connection:
            return await connection.ask(request)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """The connection that was used last, or a new one."""
        async with self._places:
            while self._free and not self._free[-1].is_open:
                self._free.pop()
            connection = self._free.pop() if self._free else await self._connect()
            try:
                yield connection
            except BaseException:  # also where it was given up: an answer may still come
                connection.close()
                raise
            self._free.append(connection)

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, self._target.host, self._target.port
        )
        return connection

    def close(self) -> None:
        """Closes the connections."""
        while self._free:
            self._free.pop().close()


async def closed_loop(
    client: Client, requests: Iterable[bytes], *, clients: int, seconds: float, ramp_s: float
) -> Load:
    """So many clients, of which each sends its next request when it has its answer.

    Args:
        client: Sends them.
        requests: Each is sent once, by whoever is next; those should last.
        clients: How many there are.
        seconds: For so long answers count.
        ramp_s: Before that.
    """
    start = time.perf_counter() + ramp_s
    end, coming, samples = start + seconds, iter(requests), list[Sample]()
    cpu = _CpuBetween(start, end)

    async def work() -> None:
        while time.perf_counter() < end and (request := next(coming, None)) is not None:
            samples.append(await client.send(request))

    await asyncio.gather(cpu.measure(), *(work() for _ in range(clients)))
    return Load.of(samples, start=start, end=end, client_cpu=cpu.part)


async def open_loop(
    client: Client, requests: Iterable[bytes], *, rate: float, seconds: float, seed: int = 0
) -> Load:
    """Requests that come at random, whatever became of those before.

    Args:
        client: Sends them.
        requests: Each is sent once; those should last.
        rate: So many come in a second.
        seconds: For so long some come; all are waited for.
        seed: Of the times at which they come.
    """
    start = time.perf_counter()
    cpu = _CpuBetween(start, start + seconds)
    measuring = asyncio.create_task(cpu.measure())
    tasks = []
    for request, at in zip(requests, arrivals(rate, seconds, seed=seed), strict=False):
        await asyncio.sleep(start + at - time.perf_counter())
        tasks.append(asyncio.create_task(client.send(request, start + at)))
    samples = await asyncio.gather(*tasks)
    await measuring
    end = max([start + seconds, *(sample.done for sample in samples)])
    return Load.of(samples, start=start, end=end, client_cpu=cpu.part)


def arrivals(rate: float, seconds: float, *, seed: int = 0) -> list[float]:
    """When requests come within so many seconds: a Poisson process, ascending."""
    draw = np.random.default_rng(seed)
    # As many as come in twice that time are more than enough.
    at: Floats = draw.exponential(1 / rate, int(2 * rate * seconds) + 20).cumsum()
    return list(map(float, at[at < seconds]))


class _CpuBetween:
    """The part of a core that this process takes between two times."""

    def __init__(self, start: float, end: float) -> None:
        self._start, self._end = start, end
        self.part = 0.0

    async def measure(self) -> None:
        await asyncio.sleep(self._start - time.perf_counter())
        begin, used = time.perf_counter(), time.process_time()
        await asyncio.sleep(self._end - time.perf_counter())
        self.part = (time.process_time() - used) / (time.perf_counter() - begin)


def embedding_requests(
    target: Target, texts: Sequence[str], *, model: str, seed: int = 0
) -> Iterator[bytes]:
    """A request for one text at a time, without end, the texts in random order."""
    whole = [
        target.post({"model": model, "input": text, "encoding_format": "base64"}) for text in texts
    ]
    order = np.random.default_rng(seed).permutation(len(whole))
    return itertools.cycle([whole[place] for place in order])


async def measure(url: str, texts: Sequence[str], options: argparse.Namespace) -> list[Load]:
    """The closed loop, the open one, or one behind the other, as the options say."""
    target, found = Target.of(url), list[Load]()
    client = Client(target, timeout_s=options.timeout, connections=options.connections)
    requests = embedding_requests(target, texts, model=options.model)
    rate = options.rate
    if rate is None:
        found.append(
            await closed_loop(
                client, requests, clients=options.clients, seconds=options.seconds, ramp_s=RAMP_S
            )
        )
        rate = options.overload and options.overload * found[0].throughput
    if rate:
        found.append(await open_loop(client, requests, rate=rate, seconds=options.seconds))
    client.close()
    return found


def main() -> None:
    """Prints what was measured."""
    from cudagraph_jax.demo.corpus import numpy_passages

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("url")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each loop")
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop")
    parser.add_argument("--rate", type=float, help="requests a second: the open loop alone")
    parser.add_argument("--overload", type=float, help="after the closed loop, times its rate")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds")
    parser.add_argument("--connections", type=int, default=2048, help="at a time at the most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = [passage.text for passage in numpy_passages()]
    found = asyncio.run(measure(options.url, texts, options))
    if options.json:
        print(json.dumps([load.figures() for load in found]))
    else:
        print("\n".join(map(str, found)))


if __name__ == "__main__":
    main()
