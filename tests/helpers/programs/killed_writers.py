"""Writers that are killed at every step, and at any moment; run by test_many_processes.py.

Each is a fork of this process, which uses no JAX.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cudagraph_jax.store import Files, GraphStore, Identity, Miss, MissReason, Stored

IDENTITY: Identity = {"name": "embed", "bucket": [8, 128]}
KEYS = (None, b"kept outside the directory")
OLD, NEW = b"old" * 30, b"new" * 40
RANDOM_KILLS = 150


class Dies(Files):
    """System calls before the nth of which the process is killed; writes are of a few bytes."""

    def __init__(self, step: int) -> None:
        self.left = step

    def _count(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def open(self, name: str, flags: int, *, directory: int) -> int:
        self._count()
        return super().open(name, flags, directory=directory)

    def write(self, file: int, data: bytes | memoryview) -> int:
        self._count()
        return super().write(file, data[:4])

    def sync(self, file: int) -> None:
        self._count()
        super().sync(file)

    def rename(self, old: str, new: str, *, directory: int) -> None:
        self._count()
        super().rename(old, new, directory=directory)


def killed_by(work: Callable[[], object]) -> int:
    """The signal that ended a fork that did `work`; 0 if it came to the end."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@contextmanager
def directory() -> Iterator[Path]:
    """A new directory for a store."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def drafts(path: Path) -> list[str]:
    """The names that a killed writer leaves."""
    return [name for name in os.listdir(path) if name.endswith(".tmp")]


def dies_at(step: int, path: Path, key: bytes | None, *, is_replaced: bool) -> bool:
    """Kills a writer before a step, and checks what it leaves; whether there was such a step."""
    store = GraphStore(path, key=key)
    if is_replaced:
        store.put(IDENTITY, OLD)
    writer = GraphStore(path, key=key, files=Dies(step))
    was_killed = killed_by(lambda: writer.put(IDENTITY, NEW)) == signal.SIGKILL
    found = store.get(IDENTITY)
    if isinstance(found, Stored):
        assert found.payload == NEW or (is_replaced and was_killed and found.payload == OLD)
    else:
        assert found.reason is MissReason.ABSENT
        assert was_killed
        assert not is_replaced
    assert all(checked.is_whole for checked in store.verify())
    assert len(store) == isinstance(found, Stored)
    left = drafts(path)
    assert len(left) <= 1
    assert store.prune(max_bytes=2**40).leftovers == ()
    assert GraphStore(path, key=key, clock=lambda: 4e9).prune(max_bytes=2**40).leftovers == tuple(
        left
    )
    assert len(os.listdir(path)) == len(store)
    return was_killed


def at_every_step() -> int:
    """Kills writers before each system call, with an old file there and without; how many."""
    kills = 0
    for key in KEYS:
        for is_replaced in (False, True):
            step = 0
            while True:
                with directory() as path:
                    if not dies_at(step, path, key, is_replaced=is_replaced):
                        break
                step += 1
            kills += step
    return kills


def at_any_moment() -> int:
    """Kills writers by a timer while they replace one file over and over; how many."""
    draw = random.Random(0)
    payloads = {bytes([number]) * 100_000 for number in range(4)}

    def write() -> None:
        # The signal's default is to end the process at once, as SIGKILL does.
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0002, 0.004))
        while True:
            for payload in payloads:
                store.put(IDENTITY, payload)

    with directory() as path:
        store = GraphStore(path)
        found: Stored | Miss = store.get(IDENTITY)
        for _ in range(RANDOM_KILLS):
            was_there = isinstance(found, Stored)
            draw.random()  # so that the next fork draws another time
            assert killed_by(write) == signal.SIGALRM
            found = store.get(IDENTITY)
            assert isinstance(found, Stored) or (
                not was_there and found.reason is MissReason.ABSENT
            )
            assert not isinstance(found, Stored) or found.payload in payloads
        assert isinstance(found, Stored)
        left = drafts(path)
        assert 0 < len(left) <= RANDOM_KILLS
        later = GraphStore(path, clock=lambda: 4e9)
        assert sorted(later.prune(max_bytes=2**40).leftovers) == sorted(left)
        assert len(os.listdir(path)) == len(store) == 1
    return RANDOM_KILLS


if __name__ == "__main__":
    print(at_every_step(), at_any_moment())
