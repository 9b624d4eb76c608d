"""What the tests of the store share."""

from __future__ import annotations

import os
import stat
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

from cudagraph_jax._base.text import Json
from cudagraph_jax.store import Files, GraphStore, Identity, Miss, Stored
from cudagraph_jax.store.identity import file_name

KEY = b"kept outside the directory"
OTHER_KEY = b"kept outside, but another one"
IDENTITY: Identity = {
    "name": "embed",
    "bucket": [8, 128],
    "jax": "0.12.0",
    "donates": False,
    "flags": None,
}
PAYLOAD = bytes(range(64))
EXTRA: Mapping[str, Json] = {"trees": {"in": "(*, *)"}, "bytes": 3}
FILE = file_name(IDENTITY)


class Clock:
    """A clock that goes only when told."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Failing(Files):
    """System calls of which the ones named fail, from the nth on."""

    def __init__(self, call: str, code: int, *, after: int = 0) -> None:
        self.failing, self.code, self.left = call, code, after

    def _count(self, call: str) -> None:
        if call == self.failing:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code))

    def open(self, name: str, flags: int, *, directory: int) -> int:
        self._count("create" if flags & os.O_CREAT else "open")
        return super().open(name, flags, directory=directory)

    def write(self, file: int, data: bytes | memoryview) -> int:
        self._count("write")
        return super().write(file, data[:16])

    def sync(self, file: int) -> None:
        self._count("sync directory" if stat.S_ISDIR(os.fstat(file).st_mode) else "sync")
        super().sync(file)

    def names(self, directory: int) -> list[str]:
        self._count("names")
        return super().names(directory)

    def status(self, name: str, *, directory: int) -> os.stat_result:
        self._count("status")
        return super().status(name, directory=directory)

    def rename(self, old: str, new: str, *, directory: int) -> None:
        self._count("rename")
        super().rename(old, new, directory=directory)


def filled(path: Path, **options) -> GraphStore:
    """A store with one executable."""
    store = GraphStore(path, **options)
    store.put(IDENTITY, PAYLOAD, extra=EXTRA)
    return store


def found(store: GraphStore, identity=IDENTITY) -> Stored:
    """The executable, which must be there."""
    answer = store.get(identity)
    assert isinstance(answer, Stored), answer
    return answer


def missed(store: GraphStore, identity=IDENTITY) -> Miss:
    """The miss, which must be one."""
    answer = store.get(identity)
    assert isinstance(answer, Miss), answer
    return answer


def snapshot(path: Path) -> dict[str, tuple]:
    """All that a directory holds, with modes, times and contents, and itself as '.'."""
    return {
        os.path.relpath(file, path): (
            stat.S_IMODE(file.lstat().st_mode),
            file.lstat().st_mtime_ns,
            file.read_bytes() if file.is_file() else None,
        )
        for file in [path, *path.iterdir()]
    }


def stretch(file: Path, payload_bytes: int, *, tail: bytes) -> None:
    """An entry that states a longer payload and has it, as a hole that takes no disk."""
    start = file.read_bytes()[:24] + payload_bytes.to_bytes(8, "little")
    end = 32 + int.from_bytes(start[16:24], "little") + payload_bytes
    with file.open("wb") as stretched:
        stretched.write(start)
        stretched.truncate(end)
        stretched.seek(end)
        stretched.write(tail)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python takes while it works."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
