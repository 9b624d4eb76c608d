"""A store on a full disk and on a read-only one; needs mounts of its own. Run by test_faults.py."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import GraphStore, Stored


def mount(*arguments: str) -> None:
    """Mounts something in this process's own view."""
    subprocess.run(["mount", *arguments], check=True)


def refusal(operation: Callable[[], object]) -> str:
    """What the error of an operation says; empty if there is none."""
    try:
        operation()
    except StoreError as error:
        return str(error)
    return ""


def fill(store: GraphStore) -> int:
    """Puts executables until the disk is full; how many it took."""
    for number in range(1000):
        if said := refusal(partial(store.put, {"n": number}, os.urandom(10_000))):
            assert "No space left on device" in said, said
            return number
    raise AssertionError("the disk is never full")


def full(path: Path) -> None:
    """Every executable that was put is there, drafts are not, and room is used again."""
    store = GraphStore(path)
    count = fill(store)
    assert 2 < count < 10
    assert sorted(os.listdir(path)) == [record.file for record in store.ls()]
    assert len(store) == count
    assert all(checked.is_whole for checked in store.verify())
    for number in range(count):
        assert isinstance(store.get({"n": number}), Stored)
    store.prune(max_bytes=20_500)
    assert len(store) == 2
    assert fill(store) > 0


def read_only(path: Path) -> None:
    """What is there is found; a put says why it fails; spoiled files stay where they are."""
    store = GraphStore(path)
    store.put({"n": 0}, b"whole")
    (path / store.put({"n": 1}, b"spoiled")).write_bytes(b"x")
    before = {file: file.read_bytes() for file in path.iterdir()}
    mount("-o", "remount,ro,bind", str(path))
    assert "cannot be written: Read-only" in refusal(lambda: store.put({"n": 2}, b""))
    for reader in (store, GraphStore(path), GraphStore(path, mode="ro")):
        assert isinstance(reader.get({"n": 0}), Stored)
        assert str(reader.get({"n": 1})) == "foreign: it does not start like a file of this package"
        assert not reader.touch({"n": 0})
        with reader.lock({"n": 0}, 60) as had:
            assert not had
    assert store.prune(max_bytes=0).entries == ()
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    assert "cannot be made: Read-only" in refusal(lambda: GraphStore(path / "deeper"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        mount("-t", "tmpfs", "-o", "size=64k,mode=0700", "none", str(place))
        full(place)
        print("right on a full disk")
        subprocess.run(["umount", str(place)], check=True)
        mount("--bind", str(place), str(place))
        read_only(place)
        print("right on a read-only one")
        subprocess.run(["umount", str(place)], check=True)
