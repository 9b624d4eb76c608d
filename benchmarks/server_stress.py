"""Attacks on the embeddings server: slow clients, broken requests, huge ones, too many, an end.

    python benchmarks/server_stress.py [--seconds 60] [--requests 100000] [--connections 10000]
    python benchmarks/server_stress.py --only malformed,overload

Starts `cudagraph-jax serve` in a process of its own, attacks it, and prints for each attack what
came back, how long it took, the server's resident memory before and after, and whether it answers
a good request afterwards. Exit status 0 means: no crash, no traceback, and no answer but those that
an attack allows. Name an attack twice to see whether memory grows again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TIMEOUT_S = 4.0
MAX_WAITING = 512
OVERLOAD = 10
MOST_CLIENTS = 1000
"""At a time: beyond that this program, which shares the cores, would measure its own delays."""
ATTACKERS = 64
SLOW_CLIENTS = 500
GIGABYTE, MEGABYTE = 1 << 30, 1 << 20
GOOD = b'{"model":"all-MiniLM-L6-v2","input":"Return the sum of an array over an axis."}'
CLOSED = "closed"


def post(body: bytes, headers: bytes = b"") -> bytes:
    """A request for embeddings."""
    return b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%s\r\n%s" % (
        len(body),
        headers,
        body,
    )


CORPUS = [
    post(GOOD),
    post(b'{"model":"all-MiniLM-L6-v2","input":["a","b"],"encoding_format":"base64"}'),
    post(b'{"model":"all-MiniLM-L6-v2","input":[[101,102],[101,7592,102]],"dimensions":8}'),
    post(GOOD, b"x-request-timeout: 3\r\nauthorization: Bearer key\r\n"),
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /stats HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    b'4\r\n{"in\r\n0\r\n\r\n',
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]
FRAGMENTS = [
    *(b"\x00", b"\xff\xfe", b"\r\n\r\n", b"{", b"]", b'"', b"1e999", b"-1", b"null", b"NaN"),
    *(b"[" * 200, b"%s%n", b"\\ud800", b"../" * 20, b"HTTP/9.9", b"a" * 5000),
    b"content-length: 99999999999999999999\r\n",
    b"transfer-encoding: chunked\r\n",
]


def malformed(draw: random.Random) -> bytes:
    """A request of the corpus with a few things wrong."""
    content = bytearray(draw.choice(CORPUS))
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        match draw.randrange(4):
            case 0:
                content[place : place + draw.randint(1, 30)] = b""
            case 1:
                content[place:place] = draw.choice(FRAGMENTS)
            case 2:
                content[place : place + 1] = draw.randbytes(1)
            case 3:
                content[place:place] = content[: draw.randint(0, 60)]
        content = content or bytearray(b"x")
    return bytes(content)


@dataclass
class Server:
    """The server, and how it does.

    Attributes:
        process: Its process.
        port: Where it listens.
        log: What it printed.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def resident_mb(self) -> float:
        """What it holds in memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize() / MEGABYTE


def start(store: Path, log: Path) -> Server:
    """Starts a server, and waits until it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cudagraph_jax", "serve", "--port", str(port)]
    command += ["--store", str(store), "--timeout", str(TIMEOUT_S)]
    command += ["--max-waiting", str(MAX_WAITING)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    server = Server(process, port, log)
    while asyncio.run(exchange(server, b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")) != "200":
        if process.poll() is not None:
            sys.exit(f"the server ended:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
    return server


async def connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A new connection."""
    return await asyncio.open_connection("127.0.0.1", server.port)


async def status_of(reader: asyncio.StreamReader) -> str:
    """The status of the next answer; what else happened where there is none."""
    line = await reader.readline()
    return line.split(b" ")[1].decode() if line.startswith(b"HTTP/") else CLOSED


async def exchange(server: Server, content: bytes, *, ends: bool = False) -> str:
    """Sends something on a connection of its own; the status of what comes back."""
    writer = None
    try:
        reader, writer = await connect(server)
        writer.write(content)
        if ends:
            writer.write_eof()
        async with asyncio.timeout(TIMEOUT_S * 5):
            return await status_of(reader)
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "no answer"
    except OSError:
        return CLOSED
    finally:
        if writer is not None:
            writer.close()


class Pool:
    """Connections that are used again, as clients of a server do."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def exchange(self, content: bytes) -> str:
        """As the function of this name."""
        try:
            reader, writer = self._idle.pop() if self._idle else await connect(self._server)
            writer.write(content)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return CLOSED
        self._idle.append((reader, writer))
        return head.split(b" ", 2)[1].decode()

    def close(self) -> None:
        """Ends all."""
        for _, writer in self._idle:
            writer.close()


async def at_a_time(count: int, ask: Callable[[int], Awaitable[str]]) -> Counter[str]:
    """Asks so often, by as many attackers as there are; what came of it."""
    came: Counter[str] = Counter()
    numbers = iter(range(count))

    async def attack() -> None:
        for number in numbers:
            came[await ask(number)] += 1

    await asyncio.gather(*(attack() for _ in range(ATTACKERS)))
    return came


async def broken(server: Server, options: argparse.Namespace) -> Counter[str]:
    """Requests with something wrong."""
    draw = random.Random(0)
    contents = [malformed(draw) for _ in range(options.requests)]
    return await at_a_time(
        options.requests, lambda number: exchange(server, contents[number], ends=True)
    )


async def slow(server: Server, options: argparse.Namespace) -> Counter[str]:
    """Clients that send a byte of their headers each second (slowloris)."""
    head = post(GOOD)

    async def ask() -> str:
        try:
            reader, writer = await connect(server)
            async with asyncio.timeout(60):
                answer = asyncio.ensure_future(status_of(reader))
                for place in range(len(head)):
                    writer.write(head[place : place + 1])
                    await asyncio.wait((answer,), timeout=1)
                    if answer.done():
                        break
                return await answer
        except TimeoutError:
            return "held for 60 s"
        except OSError:
            return CLOSED
        finally:
            writer.close()

    return Counter(await asyncio.gather(*(ask() for _ in range(SLOW_CLIENTS))))


async def huge_bodies(server: Server, options: argparse.Namespace) -> Counter[str]:
    """Bodies of 1 GB, announced and in chunks."""
    announced = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % GIGABYTE
    chunked = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (MEGABYTE, b" " * MEGABYTE)
    return Counter(
        [
            await pour(server, announced, b" " * MEGABYTE),
            await pour(server, chunked, piece),
            *await asyncio.gather(*(pour(server, chunked, piece) for _ in range(16))),
        ]
    )


async def costly_texts(server: Server, options: argparse.Namespace) -> Counter[str]:
    """Bodies within the limit that are dear to understand: long texts, faulty and many lists."""
    begin = b'{"model":"all-MiniLM-L6-v2","input":'
    size = 7 * MEGABYTE
    bodies = [
        begin + b'"' + b"word " * (size // 5) + b'"}',
        begin + b'"' + "\u4e00".encode() * (size // 3) + b'"}',
        begin + b'["a"' + b",3" * (size // 2) + b"]}",
        begin + b"[[1]" + b",[1]" * (size // 4) + b"]}",
        begin + b"[" * size + b"]}",
    ]
    return Counter([await exchange(server, post(body)) for body in bodies])


async def huge_headers(server: Server, options: argparse.Namespace) -> Counter[str]:
    """Headers of 1 MB: one, and many."""
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    one = head + b"x-a: " + b"a" * MEGABYTE + b"\r\n\r\n"
    many = head + b"".join(b"x-%d: %s\r\n" % (i, b"a" * 1000) for i in range(1024)) + b"\r\n"
    path = b"GET /" + b"a" * MEGABYTE + b" HTTP/1.1\r\nhost: x\r\n\r\n"
    return await at_a_time(96, lambda number: exchange(server, (one, many, path)[number % 3]))


async def pour(server: Server, head: bytes, piece: bytes) -> str:
    """Sends pieces until 1 GB is sent, or an answer comes."""
    reader, writer = await connect(server)
    answer = asyncio.ensure_future(status_of(reader))
    try:
        writer.write(head)
        for _ in range(GIGABYTE // MEGABYTE):
            if answer.done():
                break
            writer.write(piece)
            await writer.drain()
        return await answer
    except OSError:
        if answer.done() and not answer.exception():
            return answer.result()
        return CLOSED
    finally:
        answer.cancel()
        writer.close()


async def many_connections(server: Server, options: argparse.Namespace) -> Counter[str]:
    """Connections that only stand there; a good request is answered among them."""
    came: Counter[str] = Counter()
    open_ones = []
    for _ in range(options.connections):
        try:
            open_ones.append(await connect(server))
        except OSError:
            came["refused"] += 1
    came["open"] = len(open_ones)
    for _ in range(20):
        came[await exchange(server, post(GOOD))] += 1
    for _, writer in open_ones:
        writer.close()
    return came


async def overload(server: Server, options: argparse.Namespace) -> Counter[str]:
    """Ten times as many single texts as it can answer, or as many as 1,000 clients can ask for."""
    bodies = [post(body) for body in texts()]
    pool = Pool(server)
    rate = await throughput(pool, bodies, seconds=10)
    came: Counter[str] = Counter()
    took: list[float] = []
    sent = 0

    async def ask(content: bytes) -> None:
        began = time.perf_counter()
        status = await pool.exchange(content)
        came[status] += 1
        if status == "200":
            took.append(time.perf_counter() - began)

    began = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    while (now := time.perf_counter() - began) < options.seconds:
        while sent < OVERLOAD * rate * now and len(tasks) < MOST_CLIENTS:
            task = asyncio.ensure_future(ask(bodies[sent % len(bodies)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    pool.close()
    p50, p99 = np.percentile(took, [50, 99])
    print(
        f"  saturated {rate:.0f} texts/s; offered {sent / options.seconds:.0f}/s, answered "
        f"{came['200'] / options.seconds:.0f}/s; accepted p50 {p50:.2f} s, p99 {p99:.2f} s of the "
        f"deadline's {TIMEOUT_S:g} s"
    )
    if p99 > TIMEOUT_S:
        came["p99 above the deadline"] += 1
    return came


async def throughput(pool: Pool, bodies: Sequence[bytes], *, seconds: float) -> float:
    """Texts each second with 64 clients that wait for their answers."""
    answered = 0
    until = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            status = await pool.exchange(bodies[(answered + number) % len(bodies)])
            answered += status == "200"

    await asyncio.gather(*(client(number) for number in range(64)))
    return answered / seconds


def texts() -> list[bytes]:
    """NumPy's passages, a request each."""
    from cudagraph_jax.demo.corpus import numpy_passages

    return [
        json.dumps({"model": "all-MiniLM-L6-v2", "input": passage.text}).encode()
        for passage in numpy_passages(limit=600)
    ]


ATTACKS: dict[str, tuple[Callable[[Server, argparse.Namespace], Awaitable[Counter[str]]], set[str]]]
ATTACKS = {
    # 200 and 404: what is wrong may be something that nobody looks at.
    "malformed": (
        broken,
        {"200", "400", "401", "404", "405", "408", "413", "422", "429", "431", CLOSED},
    ),
    "slowloris": (slow, {CLOSED, "408", "400"}),
    "1 GB bodies": (huge_bodies, {"413", "429", CLOSED}),
    "8 MB of JSON": (costly_texts, {"200", "400", "413", "429"}),
    "1 MB headers": (huge_headers, {"431", "400", CLOSED}),
    "connections": (many_connections, {"open", "200"}),
    "overload": (overload, {"200", "429"}),
}


def attack(server: Server, name: str, options: argparse.Namespace) -> bool:
    """One attack; whether the server held."""
    run, allowed = ATTACKS[name]
    before = server.resident_mb()
    began = time.perf_counter()
    came = asyncio.run(run(server, options))
    seconds = time.perf_counter() - began
    if server.process.poll() is not None:
        print(f"{name}: the server died with status {server.process.returncode}")
        return False
    after = server.resident_mb()
    answers = asyncio.run(exchange(server, post(GOOD))) == "200"
    statuses = ", ".join(f"{status}: {count:,}" for status, count in sorted(came.items()))
    print(
        f"{name:<14} {seconds:6.1f} s   memory {before:.0f} to {after:.0f} MB   {statuses}"
        f"{'' if answers else '   DOES NOT ANSWER'}",
        flush=True,
    )
    return answers and set(came) <= allowed


def end(server: Server) -> bool:
    """SIGTERM under load: what was accepted is answered; whether it was, and the exit status 0."""

    async def run() -> Counter[str]:
        bodies = [post(body) for body in texts()]
        asked = [asyncio.ensure_future(exchange(server, bodies[i])) for i in range(200)]
        while (await stats(server))["batcher"]["waiting"] < 100:
            pass
        server.process.send_signal(signal.SIGTERM)
        return Counter(await asyncio.gather(*asked))

    began = time.perf_counter()
    came = asyncio.run(run())
    status = server.process.wait(timeout=60)
    statuses = ", ".join(f"{name}: {count:,}" for name, count in sorted(came.items()))
    print(
        f"{'SIGTERM':<14} {time.perf_counter() - began:6.1f} s   exit status {status}   {statuses}"
    )
    return status == 0 and set(came) == {"200"}


async def stats(server: Server) -> dict[str, dict[str, int]]:
    """What `/stats` says."""
    reader, writer = await connect(server)
    writer.write(b"GET /stats HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    content = await reader.read()
    writer.close()
    found: dict[str, dict[str, int]] = json.loads(content.split(b"\r\n\r\n", 1)[1])
    return found


def main() -> int:
    """Runs the attacks, each as often as memory needs to settle; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--requests", type=int, default=100_000, help="malformed ones")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--only", default=",".join(ATTACKS))
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        server = start(store, Path(folder) / "log")
        print(f"the server is ready, {server.resident_mb():.0f} MB", flush=True)
        try:
            held = [attack(server, name, options) for name in options.only.split(",")]
            held.append(end(server))
            log = server.log.read_text(errors="replace")
            tracebacks = log.count("Traceback")
            print(f"tracebacks in the server's log: {tracebacks}")
            if tracebacks:
                print(log[log.index("Traceback") :][:3000])
            began = time.perf_counter()
            server = start(store, Path(folder) / "log2")
            print(f"restarted with the store: ready after {time.perf_counter() - began:.1f} s")
        finally:
            server.process.kill()
            server.process.wait()
    return int(not all(held) or tracebacks > 0)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
