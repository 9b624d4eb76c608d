"""Eight processes on one directory; run by test_many_processes.py. Forks, and they use no JAX."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from cudagraph_jax.store import GraphStore, Identity, MissReason, Stored

PROCESSES = 8
ROUNDS = 150
BUCKETS: list[Identity] = [{"name": "embed", "bucket": [2**power, 1]} for power in range(5)]


def in_processes(works: list[Callable[[], None]]) -> None:
    """Does each work in a process of its own, all at once; all must come to the end."""
    children = []
    for work in works:
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    # Every child is waited for, so that none is left behind by the first that fails.
    ended = [os.waitpid(child, 0)[1] for child in children]
    assert ended == [0] * len(children), ended


def whole(stored: Stored) -> bool:
    """Whether a payload is one that was put, and put under this identity."""
    number = stored.payload[0]
    size = stored.extra["size"]
    return stored.payload == bytes([number]) * size and stored.extra["number"] == number


def reads_and_writes(path: Path, seed: int) -> None:
    """Puts and gets at random; whatever is found is whole."""
    draw, store = random.Random(seed), GraphStore(path)
    for _ in range(ROUNDS):
        identity = draw.choice(BUCKETS)
        if draw.random() < 0.4:
            number, size = draw.randrange(256), draw.randrange(1, 60_000)
            store.put(identity, bytes([number]) * size, extra={"number": number, "size": size})
        found = store.get(identity)
        if isinstance(found, Stored):
            assert whole(found)
            assert found.identity == identity
        else:
            assert found.reason in (MissReason.ABSENT, MissReason.TRUNCATED, MissReason.FOREIGN), (
                found
            )


def spoils(path: Path, seed: int) -> None:
    """Puts spoiled files in place of good ones."""
    draw, store = random.Random(seed), GraphStore(path)
    for _ in range(ROUNDS):
        for record in store.ls():
            spoiled = path / f"spoiled-{seed}"
            content = store.path.joinpath(record.file)
            try:
                start = content.read_bytes()[: draw.randrange(40)]
            except FileNotFoundError:
                continue
            spoiled.touch(mode=0o600)
            spoiled.write_bytes(draw.choice([start, b"#!"]))
            spoiled.rename(content)


def prunes(path: Path) -> None:
    """Removes what is there."""
    store = GraphStore(path)
    for _ in range(ROUNDS):
        store.prune(max_bytes=60_000)
        store.verify()


def share(path: Path) -> None:
    """Six readers and writers, one that spoils and one that prunes."""
    works: list[Callable[[], None]] = [lambda: spoils(path, 0), lambda: prunes(path)]
    for seed in range(1, PROCESSES - 1):
        works.append(lambda seed=seed: reads_and_writes(path, seed))  # type: ignore[misc]  # bound
    in_processes(works)
    store = GraphStore(path)
    for identity in BUCKETS:
        store.put(identity, b"x", extra={"number": 120, "size": 1})
        found = store.get(identity)
        assert isinstance(found, Stored)
        assert whole(found)
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]


def starts(path: Path, log: Path) -> None:
    """A server's start: each bucket is compiled under its lock, unless another one did it."""
    store = GraphStore(path)
    for identity in BUCKETS:
        if isinstance(store.get(identity), Stored):
            continue
        with store.lock(identity, 60) as had:
            assert had
            if isinstance(store.get(identity), Stored):
                continue
            with log.open("a") as file:
                file.write(f"{identity['bucket']}\n")
            hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)  # compiles, in about 10 ms
            store.put(identity, b"compiled")


def compile_once(path: Path) -> None:
    """Servers that start together on an empty store compile each bucket once among them."""
    log = path / "log"
    log.touch()
    in_processes([lambda: starts(path, log)] * PROCESSES)
    assert sorted(log.read_text().split("\n")) == sorted(
        ["", *(str(identity["bucket"]) for identity in BUCKETS)]
    )


def die_with_a_lock(path: Path) -> None:
    """The lock of a process that was killed is free at once."""
    store = GraphStore(path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with store.lock(BUCKETS[0], 0) as had:
            os.write(writer, b"1" if had else b"0")
            signal.pause()
    assert os.read(reader, 1) == b"1"
    with store.lock(BUCKETS[0], 0) as had:
        assert not had
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with store.lock(BUCKETS[0], 0) as had:
        assert had


if __name__ == "__main__":
    for check in (share, compile_once, die_with_a_lock):
        directory = tempfile.mkdtemp()
        check(Path(directory))
        shutil.rmtree(directory)
        print(check.__name__)
