"""Executables that are put, found and missed."""

from __future__ import annotations

import ast
import math
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cudagraph_jax.store
from cudagraph_jax.errors import ConfigError, CUDAGraphError, StoreError
from cudagraph_jax.store import Difference, GraphStore, MissReason
from cudagraph_jax.store.identity import file_name
from tests.helpers.stores import (
    EXTRA,
    FILE,
    IDENTITY,
    KEY,
    OTHER_KEY,
    PAYLOAD,
    Clock,
    filled,
    found,
    missed,
    snapshot,
)

OTHER = {**IDENTITY, "jax": "0.10.2"}


@pytest.fixture
def path(tmp_path):
    """A directory that is not there yet."""
    return tmp_path / "graphs"


@pytest.mark.parametrize("key", [None, KEY])
def test_put_and_get(path, key):
    """What was put comes back whole, also in another process's store."""
    assert filled(path, key=key, clock=Clock(5.0)).put(OTHER, b"") == file_name(OTHER)
    for mode in ("rw", "ro"):
        store = GraphStore(path, mode=mode, key=key)
        stored = found(store)
        assert (stored.identity, stored.extra, stored.payload) == (IDENTITY, EXTRA, PAYLOAD)
        assert (stored.file, stored.written_at, stored.has_key) == (FILE, 5.0, key is not None)
        assert found(store, OTHER).payload == b""


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.none()), max_size=4),
    st.binary(max_size=200),
    st.none() | st.binary(min_size=16, max_size=16),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_identity(path, identity, payload, key):
    """Any identity names a file, and any payload comes back."""
    store = GraphStore(path, key=key)
    store.put(identity, payload)
    assert found(store, identity).payload == payload
    assert identity in store


def test_modes(tmp_path):
    """The directory, those made on its way and its files are their owner's alone at any umask."""
    path = tmp_path / "made" / "too" / "graphs"
    old = os.umask(0)
    try:
        store = filled(path)
        with store.lock(IDENTITY, 0):
            pass
    finally:
        os.umask(old)
    modes = {name: mode for name, (mode, _, _) in snapshot(path).items()}
    assert modes == {".": 0o700, FILE: 0o600, f"{FILE}.lock": 0o600}
    assert {stat.S_IMODE(place.stat().st_mode) for place in list(path.parents)[:2]} == {0o700}


def test_put_replaces(path):
    """A second put is found instead of the first; nothing else is left in the directory."""
    store = filled(path)
    store.put(IDENTITY, b"new")
    assert (found(store).payload, found(store).extra) == (b"new", {})
    assert os.listdir(path) == [FILE]


def test_absent(path):
    """What is not there is absent; the words say so."""
    miss = missed(GraphStore(path))
    assert (miss.file, miss.reason, miss.moved_to) == (FILE, MissReason.ABSENT, None)
    assert str(miss) == "absent: there is no such file"


def test_differs(path):
    """A file under another one's name is a miss that names the fields; it is left there."""
    store = filled(path)
    (path / FILE).rename(path / file_name(OTHER))
    miss = missed(store, OTHER)
    assert miss.reason is MissReason.DIFFERS
    assert miss.differences == (Difference("jax", '"0.12.0"', '"0.10.2"'),)
    assert str(miss) == 'differs: it holds another executable, with jax "0.12.0", not "0.10.2"'
    assert len(store) == 1


@pytest.mark.parametrize(("first", "then"), [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
def test_another_key(path, first, then):
    """Files of another key are misses; they stay, for those who have it, until the next put."""
    filled(path, key=first)
    store = GraphStore(path, key=then)
    assert missed(store).reason is MissReason.NOT_AUTHENTIC
    assert found(GraphStore(path, key=first)).payload == PAYLOAD
    store.put(IDENTITY, b"new")
    assert found(store).payload == b"new"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", MissReason.TRUNCATED),
        (b"\x89CGJ\r\n\x1a\n\1\0\0\0", MissReason.TRUNCATED),
        (b"\x89CGJ\r\n\x1a\n\1\0\0\0" + b"\xff" * 20, MissReason.CORRUPT),
        (b"#!/bin/sh\n", MissReason.FOREIGN),
    ],
)
def test_moved_aside(path, content, reason):
    """A spoiled file is missed by name, moved aside, not met again, and replaced by the next."""
    store = filled(path)
    (path / FILE).write_bytes(content)
    miss = missed(store)
    assert (miss.reason, miss.moved_to) == (reason, f"{FILE}.bad")
    assert str(miss).endswith(f"; moved aside to {FILE}.bad")
    assert (path / f"{FILE}.bad").read_bytes() == content
    assert missed(store).reason is MissReason.ABSENT
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD
    assert store.stats()["moved_aside"] == 1


def test_few_are_kept_aside(path):
    """However many files are spoiled, few stay aside."""
    store = GraphStore(path)
    for number in range(40):
        (path / store.put({"n": number}, PAYLOAD)).write_bytes(b"spoiled")
        missed(store, {"n": number})
    assert (len(os.listdir(path)), len(store), store.stats()["moved_aside"]) == (16, 0, 40)


def test_counts(path):
    """Every answer is counted once, misses by reason."""
    store = filled(path)
    found(store)
    missed(store, OTHER)
    missed(store, OTHER)
    assert store.stats() == {
        "hits": 1,
        "misses": {**{reason.value: 0 for reason in MissReason}, "absent": 2},
        "moved_aside": 0,
        "written": 1,
    }


def test_last_use(path):
    """A hit and a touch set the time of last use; in mode "ro" neither does."""
    clock = Clock()
    store = filled(path, clock=clock)
    reader = GraphStore(path, mode="ro", clock=clock)

    def used_at():
        return store.ls()[0].used_at

    assert used_at() == clock.now
    clock.now += 10
    found(reader)
    assert (reader.touch(IDENTITY), used_at()) == (False, clock.now - 10)
    found(store)
    assert used_at() == clock.now
    clock.now += 10
    assert (store.touch(IDENTITY), used_at()) == (True, clock.now)
    assert store.touch(OTHER) is False


@pytest.mark.parametrize("now", [-1e18, 1e300, -5.0])
def test_an_absurd_clock(path, now):
    """A clock that says what no file can have costs nothing but the time of last use."""
    store = filled(path, clock=Clock(now))
    assert found(store).written_at == now
    assert store.prune(max_bytes=10_000).entries == ()


def test_reading_changes_nothing(path):
    """With mode "ro" the directory stays byte for byte as it was, spoiled files included."""
    writer = filled(path)
    (path / writer.put(OTHER, PAYLOAD)).write_bytes(b"spoiled")
    os.utime(path, (0, 0))
    before = snapshot(path)
    store = GraphStore(path, mode="ro")
    found(store)
    assert missed(store, OTHER).moved_to is None
    missed(store, {"n": 1})
    with store.lock(IDENTITY, 0) as had:
        assert not had
    store.ls(), store.verify(), store.nearest(OTHER), store.touch(IDENTITY), len(store), repr(store)
    for operation in (lambda: store.put(OTHER, PAYLOAD), lambda: store.prune(max_bytes=0)):
        with pytest.raises(StoreError, match=r'is only read, but .* open it with mode="rw"'):
            operation()
    assert snapshot(path) == before


def test_reading_makes_nothing(path):
    """With mode "ro" a directory that is not there is an error: it may be a wrong name."""
    with pytest.raises(StoreError, match=f"there is no directory {path}"):
        GraphStore(path, mode="ro")
    assert not path.exists()


def test_repr(path):
    """One line without the key."""
    assert repr(GraphStore(path)) == f"GraphStore({str(path)!r}, mode='rw')"
    assert repr(GraphStore(path, mode="ro", key=KEY)) == (
        f"GraphStore({str(path)!r}, mode='ro', key=<26 bytes>)"
    )
    assert "payload" not in repr(found(filled(path)))


def test_path(tmp_path, monkeypatch):
    """The path is made absolute at once, with the home for ~ and missing parents made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert GraphStore("here").path == tmp_path / "here"
    assert GraphStore("~/deep/er").path == tmp_path / "home/deep/er"
    assert stat.S_IMODE((tmp_path / "home/deep/er").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"path": 3}, "path=3 is no path: give the directory of the store"),
        ({"path": b"x"}, "path=b'x' is no path"),
        ({"path": ""}, "path='' is no path"),
        ({"path": "a\0b"}, r"path='a\\x00b' has a NUL, which no path may have: leave it out"),
        ({"path": "~no such user/graphs"}, "has no home to stand for ~: write it out"),
        ({"mode": "r"}, r"mode='r' is unknown: .*rw"),
        ({"key": "text"}, "is no key"),
    ],
)
def test_arguments(tmp_path, arguments, problem):
    """An argument of another kind is a configuration error."""
    with pytest.raises(ConfigError, match=problem):
        GraphStore(**{"path": tmp_path, **arguments})


def test_payload(path):
    """A payload that is not bytes is a configuration error."""
    with pytest.raises(ConfigError, match="payload of str is not bytes: convert it"):
        GraphStore(path).put(IDENTITY, "text")  # type: ignore[arg-type]  # what fails on purpose


def test_a_file_in_the_way(tmp_path):
    """A path that is a file, or below one, cannot be a store; the error says what to give."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "graphs"):
        said = f"{tmp_path / 'file'} is a file, not a directory"
        with pytest.raises(StoreError, match=f"{said}: give another, or move it away") as raised:
            GraphStore(path)
        assert isinstance(raised.value, CUDAGraphError)
        with pytest.raises(StoreError, match=said):
            GraphStore(path, mode="ro")


def test_a_store_is_true(path):
    """An empty store is no missing store."""
    assert GraphStore(path)
    assert len(GraphStore(path)) == 0


def test_knows_no_jax():
    """No module of the store imports JAX or pickle, and only one imports filelock."""
    imported: dict[str, set[str]] = {}
    for module in Path(cudagraph_jax.store.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                imported.setdefault(name.split(".")[0], set()).add(module.stem)
    assert not {"jax", "jaxlib", "numpy", "pickle", "marshal", "shelve"} & set(imported)
    assert imported["filelock"] == {"locks"}


def of_version(data, version):
    return data[:8] + version.to_bytes(4, "little") + data[12:]


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_a_newer_format(path, key):
    """What a later version wrote is a miss that says so, and stays as it is: it reads it still."""
    store = filled(path, key=key)
    data = of_version((path / FILE).read_bytes(), 2)
    (path / FILE).write_bytes(data)
    miss = missed(store)
    assert (miss.reason, miss.moved_to) == (MissReason.OUTDATED, None)
    assert "format version 2 is newer than 1" in str(miss)
    with pytest.raises(StoreError, match=r"is of a newer format .* upgrade this one, or remove"):
        store.put(IDENTITY, PAYLOAD)
    other = filled(path.parent / "other", key=key)
    whole = other.file_bytes(FILE)
    assert isinstance(whole, bytes)
    assert not store.add_file(FILE, whole)
    assert (os.listdir(path), (path / FILE).read_bytes()) == ([FILE], data)
    assert (store.stats()["moved_aside"], IDENTITY in store) == (0, True)


def test_an_older_format(path):
    """What an earlier version wrote is left to its servers until this one writes its own."""
    store = filled(path)
    (path / FILE).write_bytes(of_version((path / FILE).read_bytes(), 0))
    miss = missed(store)
    assert (miss.reason, miss.moved_to) == (MissReason.OUTDATED, None)
    assert "format version 0 is older than 1" in str(miss)
    store.put(IDENTITY, PAYLOAD)
    assert (found(store).payload, os.listdir(path)) == (PAYLOAD, [FILE])


@pytest.mark.parametrize("clock", [math.nan, 3.0, None, "now"])
def test_no_clock(path, clock):
    """What is no function is told at once, and no directory is made for it."""
    with pytest.raises(ConfigError, match=r"^clock=.* cannot be called: give a function"):
        GraphStore(path, clock=clock)
    assert not path.exists()


@pytest.mark.parametrize("now", [math.nan, math.inf, None, "12", True, 10**400])
def test_a_clock_that_gives_no_time(path, now):
    """An answer that is no finite number is told at each use, and nothing is written by it."""
    answers = [1.0]
    store = filled(path, clock=lambda: answers[0])
    answers[0] = now
    for use in (
        lambda: store.put(IDENTITY, PAYLOAD),
        lambda: store.prune(older_than=1),
        lambda: store.touch(IDENTITY),
    ):
        with pytest.raises(ConfigError, match=r"^clock gives .*: give seconds since the epoch"):
            use()
    answers[0] = 2.0
    assert found(store).payload == PAYLOAD
