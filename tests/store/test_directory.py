"""The directory as a whole: listed, verified, searched and pruned."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.store import Difference, GraphStore, Miss, MissReason, Stored
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

HOUR = 3600.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    """Five executables, used an hour apart, number 0 first."""
    store = GraphStore(tmp_path / "graphs", clock=clock)
    for number in range(5):
        store.put({"n": number}, PAYLOAD)
        clock.now += HOUR
    return store


def numbers(records):
    return [record.identity["n"] for record in records]


def leave(store, name, *, used_at, content=b"left"):
    (store.path / name).write_bytes(content)
    os.utime(store.path / name, (used_at, used_at))
    return name


def test_ls(tmp_path):
    """Each file is described by its header; what is no entry is not listed."""
    store = filled(tmp_path, clock=Clock(7.0))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f"{FILE}.lock").touch()
    (record,) = store.ls()
    assert (record.file, record.identity, record.extra) == (FILE, IDENTITY, EXTRA)
    assert (record.written_at, record.used_at, record.problem) == (7.0, 7.0, None)
    assert record.size_bytes == (tmp_path / FILE).stat().st_size
    assert (record.payload_bytes, record.has_key, len(store)) == (len(PAYLOAD), False, 1)


def test_ls_reads_no_payload(tmp_path):
    """A payload that is spoiled is listed as it is; `verify` is what finds it."""
    store = filled(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-40] ^= 1
    (tmp_path / FILE).write_bytes(content)
    assert store.ls()[0].problem is None
    assert store.verify()[0].problem == Miss(
        file=FILE, reason=MissReason.CORRUPT, detail="its checksum is wrong"
    )


def test_ls_names_what_cannot_be_read(tmp_path):
    """A file without a header is listed with the reason."""
    store = filled(tmp_path)
    (tmp_path / FILE).write_bytes(b"spoiled")
    (record,) = store.ls()
    assert record.problem is not None
    assert (record.problem.reason, record.identity, record.size_bytes) == (
        MissReason.FOREIGN,
        {},
        7,
    )


def test_verify(store):
    """Every file is read whole and named if it is spoiled or misnamed; nothing is moved."""
    names = [file_name({"n": number}) for number in range(5)]
    (store.path / names[1]).write_bytes((store.path / names[1]).read_bytes()[:-1])
    os.replace(store.path / names[2], store.path / names[3])
    before = snapshot(store.path)
    problems = {checked.record.file: checked.problem for checked in store.verify()}
    assert {name: problem and problem.reason for name, problem in problems.items()} == {
        names[0]: None,
        names[1]: MissReason.TRUNCATED,
        names[3]: MissReason.DIFFERS,
        names[4]: None,
    }
    assert [checked.is_whole for checked in store.verify()].count(True) == 2
    assert (snapshot(store.path), store.stats()["misses"]["truncated"]) == (before, 0)


def test_verify_with_another_key(tmp_path):
    """Files of another key are named."""
    filled(tmp_path, key=KEY)
    (checked,) = GraphStore(tmp_path, key=OTHER_KEY).verify()
    assert checked.problem is not None
    assert checked.problem.reason is MissReason.NOT_AUTHENTIC


def test_read(store):
    """A file is read by its name in `ls`, verified, uncounted; other names lead nowhere."""
    stored = store.read(file_name({"n": 3}))
    assert isinstance(stored, Stored)
    assert (stored.identity, stored.payload) == ({"n": 3}, PAYLOAD)
    assert store.stats()["hits"] == 0
    (store.path.parent / FILE).write_bytes((store.path / stored.file).read_bytes())
    for name in (f"../{FILE}", FILE, "", "/etc/passwd"):
        answer = store.read(name)
        assert isinstance(answer, Miss)
        assert answer.reason is MissReason.ABSENT


def test_nearest(tmp_path):
    """The nearest executable has the same name and bucket and differs in the fewest fields."""
    clock = Clock()
    store = filled(tmp_path, clock=clock)
    assert store.nearest(IDENTITY) is None
    wanted = {**IDENTITY, "jax": "0.13.0"}
    for identity in (
        {**IDENTITY, "jax": "0.11.0"},
        {**IDENTITY, "jax": "0.10.0", "flags": "x"},
        {**wanted, "bucket": [16, 128]},
        {**wanted, "name": "rank"},
    ):
        clock.now += 1
        store.put(identity, PAYLOAD)
    near = store.nearest(wanted)
    assert near is not None
    assert near.differences == (Difference("jax", '"0.11.0"', '"0.13.0"'),)
    assert near.record.identity["jax"] == "0.11.0"
    assert str(near) == 'the nearest stored one has jax "0.11.0", not "0.13.0"'
    assert store.nearest({**wanted, "name": "classify"}) is None
    anything = store.nearest({**wanted, "name": "classify"}, same=())
    assert anything is not None
    assert len(anything.differences) == 1


def test_prune_by_age(store, clock):
    """Those that were not used for longer go; the age counts from the last use."""
    found(store, {"n": 0})
    pruned = store.prune(older_than=2.5 * HOUR)
    assert numbers(pruned.entries) == [1, 2]
    assert sorted(numbers(store.ls())) == [0, 3, 4]
    assert pruned.freed_bytes == sum(record.size_bytes for record in pruned.entries)
    assert pruned.kept_bytes == sum(record.size_bytes for record in store.ls())
    clock.now += 24 * HOUR
    assert numbers(store.prune(older_than=timedelta(days=1)).entries) == [3, 4]


def test_prune_by_size(store):
    """Those used least recently go until the rest fits, and none that fits."""
    found(store, {"n": 0})
    size = store.ls()[0].size_bytes
    assert store.prune(max_bytes=5 * size).entries == ()
    assert numbers(store.prune(max_bytes=3 * size + 1).entries) == [1, 2]
    assert numbers(store.prune(max_bytes=size).entries) == [3, 4]
    assert numbers(store.prune(max_bytes=0).entries) == [0]
    assert len(store) == 0


def test_prune_of_what_is_aside(store):
    """Files that were moved aside count, go first when there is too much, and grow old."""
    (store.path / file_name({"n": 4})).write_bytes(b"spoiled")
    missed(store, {"n": 4})
    sizes = sum(record.size_bytes for record in store.ls())
    assert store.prune(max_bytes=sizes + 7).leftovers == ()
    pruned = store.prune(max_bytes=sizes)
    assert (pruned.entries, pruned.leftovers) == ((), (f"{file_name({'n': 4})}.bad",))
    assert (pruned.freed_bytes, pruned.kept_bytes) == (7, sizes)
    leave(store, f"{FILE}.bad", used_at=0)
    assert store.prune(older_than=100 * HOUR).leftovers == (f"{FILE}.bad",)


def test_prune_of_leftovers(store, clock):
    """Drafts and locks of killed processes go after an hour; fresh ones and strangers stay."""
    old, fresh = clock.now - HOUR - 1, clock.now - HOUR + 1
    gone = [
        leave(store, f".{FILE}.0123456789abcdef.tmp", used_at=old),
        leave(store, f"{FILE}.lock", used_at=old),
    ]
    for name in (f".{FILE}.fedcba9876543210.tmp", f"{file_name({'n': 1})}.lock"):
        leave(store, name, used_at=fresh)
    for name in ("mine.tmp", ".mine.graph.00.tmp", "a.lock", "a.bad", "jit_f-cache"):
        leave(store, name, used_at=0)
    before = set(os.listdir(store.path))
    pruned = store.prune(max_bytes=2**40)
    assert (sorted(pruned.leftovers), pruned.freed_bytes) == (sorted(gone), 8)
    assert before - set(os.listdir(store.path)) == set(gone)
    assert len(store.prune(max_bytes=0).entries) == 5
    assert len(os.listdir(store.path)) == 7


def test_a_clock_that_was_set_back(store, clock):
    """Files from the future count as new: neither drafts nor entries go, and nothing fails."""
    leave(store, f".{FILE}.0123456789abcdef.tmp", used_at=clock.now)
    clock.now -= 1000 * HOUR
    before = snapshot(store.path)
    pruned = store.prune(older_than=0)
    assert (pruned.entries, pruned.leftovers) == ((), ())
    assert snapshot(store.path) == before
    assert numbers(store.prune(max_bytes=store.ls()[0].size_bytes * 4).entries) == [0]
    found(store, {"n": 3})
    assert numbers(store.prune(max_bytes=store.ls()[0].size_bytes * 3).entries) == [3]


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({}, "prune has no limit: give max_bytes or older_than"),
        ({"dry_run": True}, "prune has no limit"),
        ({"max_bytes": -1}, "max_bytes=-1 is below 0"),
        ({"max_bytes": 1.5}, "max_bytes=1.5 is not an integer"),
        ({"older_than": -1}, "older_than=-1 is no age: give seconds, 0 or more, or a timedelta"),
        ({"older_than": float("nan")}, "older_than=nan is no age"),
        ({"older_than": "7d"}, "older_than='7d' is no age"),
        ({"older_than": timedelta(-1)}, "is no age"),
    ],
)
def test_limits(store, limits, problem):
    """A limit that is none is a configuration error, and nothing goes."""
    with pytest.raises(ConfigError, match=problem):
        store.prune(**limits)
    assert len(store) == 5
