"""Files that go from one directory to another as they are."""

from __future__ import annotations

import os

import pytest

from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import GraphStore, Miss, MissReason
from cudagraph_jax.store.entries import problem_in
from cudagraph_jax.store.identity import file_name
from tests.helpers.stores import (
    FILE,
    IDENTITY,
    KEY,
    OTHER_KEY,
    PAYLOAD,
    Clock,
    filled,
    found,
    snapshot,
)

OTHER_FILE = file_name({"n": 1})


@pytest.mark.parametrize("key", [None, KEY])
def test_there_and_back(tmp_path, key):
    """A file that is taken from one directory is found in another, byte for byte the same."""
    source = filled(tmp_path / "a", key=key, clock=Clock(5.0))
    data = GraphStore(source.path, mode="ro", key=key).file_bytes(FILE)
    assert data == (source.path / FILE).read_bytes()
    target = GraphStore(tmp_path / "b", key=key, clock=Clock(9.0))
    assert target.add_file(FILE, data)
    assert (target.path / FILE).read_bytes() == data
    assert (found(target).payload, target.ls()[0].written_at) == (PAYLOAD, 5.0)
    assert (target.ls()[0].used_at, target.stats()["written"]) == (9.0, 1)


def test_what_is_there_stays(tmp_path):
    """A whole file stays as it is; one that is not is replaced."""
    data = filled(tmp_path / "a").file_bytes(FILE)
    assert isinstance(data, bytes)
    target = GraphStore(tmp_path / "b", clock=Clock())
    target.put(IDENTITY, b"compiled here")
    before = snapshot(target.path)
    assert target.add_file(FILE, data) is False
    assert snapshot(target.path) == before
    (target.path / FILE).write_bytes(b"spoiled")
    assert target.add_file(FILE, data) is True
    assert found(target).payload == PAYLOAD
    assert os.listdir(target.path) == [FILE]


def test_files_that_are_not_whole(tmp_path):
    """Bytes are given only of a file that would be loaded under its name."""
    store = filled(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / OTHER_FILE).write_bytes(content)
    answers = [store.file_bytes(name) for name in (OTHER_FILE, f"../{FILE}", file_name({"n": 2}))]
    (tmp_path / FILE).write_bytes(content[:-1])
    answers.append(store.file_bytes(FILE))
    reasons = [answer.reason for answer in answers if isinstance(answer, Miss)]
    assert reasons == [
        MissReason.DIFFERS,
        MissReason.ABSENT,
        MissReason.ABSENT,
        MissReason.TRUNCATED,
    ]
    assert store.stats()["misses"] == {reason.value: 0 for reason in MissReason}


@pytest.mark.parametrize(
    ("name", "key", "flip", "reason"),
    [
        (FILE, KEY, None, None),
        (FILE, KEY, 40, MissReason.CORRUPT),
        (FILE, KEY, -1, MissReason.NOT_AUTHENTIC),
        (FILE, OTHER_KEY, None, MissReason.NOT_AUTHENTIC),
        (FILE, None, None, MissReason.NOT_AUTHENTIC),
        (OTHER_FILE, KEY, None, MissReason.DIFFERS),
        (f"../{FILE}", KEY, None, MissReason.FOREIGN),
        (f"{FILE}\n", KEY, None, MissReason.FOREIGN),
    ],
)
def test_problem_in(tmp_path, name, key, flip, reason):
    """Bytes are judged as a file with them would be, and by their name."""
    filled(tmp_path, key=KEY)
    data = bytearray((tmp_path / FILE).read_bytes())
    if flip is not None:
        data[flip] ^= 1
    problem = problem_in(name, bytes(data), key=key)
    assert (None if problem is None else problem.reason) == reason


def test_nothing_bad_is_put(tmp_path):
    """Bytes that would not be loaded are an error that says why, and nothing is written."""
    data = (filled(tmp_path / "a").path / FILE).read_bytes()
    target = GraphStore(tmp_path / "b")
    for name, content, why in (
        (FILE, data[:-1], "truncated: "),
        (OTHER_FILE, data, "differs: its name is not that of what it holds"),
        (f"../{FILE}", data, "foreign: it has no name of an entry"),
    ):
        with pytest.raises(StoreError, match=f"is not put into {target.path}: {why}"):
            target.add_file(name, content)
    assert os.listdir(target.path) == []
    with pytest.raises(StoreError, match=r"add_file was called: open it with mode=\"rw\""):
        GraphStore(target.path, mode="ro").add_file(FILE, data)


def test_a_dry_run(tmp_path):
    """It says what a prune would remove, also in mode "ro", and removes nothing."""
    clock = Clock()
    store = filled(tmp_path, clock=clock)
    (tmp_path / f"{FILE}.lock").touch()
    os.utime(tmp_path / f"{FILE}.lock", (0, 0))
    clock.now += 10
    reader = GraphStore(tmp_path, mode="ro", clock=clock)
    said = reader.prune(older_than=5, dry_run=True)
    assert [record.file for record in said.entries] == [FILE]
    assert said.leftovers == (f"{FILE}.lock",)
    assert len(os.listdir(tmp_path)) == 2
    assert store.prune(older_than=5) == said
    assert os.listdir(tmp_path) == []
