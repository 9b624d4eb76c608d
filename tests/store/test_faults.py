"""What goes wrong with files and directories: nothing spoiled is loaded, and little is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import pytest

from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import Files, GraphStore, MissReason
from cudagraph_jax.store.entries import is_bad
from tests.helpers.stores import (
    FILE,
    IDENTITY,
    KEY,
    PAYLOAD,
    Failing,
    filled,
    found,
    missed,
    peak_bytes,
    snapshot,
    stretch,
)

PROGRAMS = Path(__file__).parents[1] / "helpers" / "programs"
OTHER = {"n": 1}
READ_ONLY = 'Open the store with mode="ro", or mend its permissions'
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser may give files away")
each_key = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])


class Meanwhile(Files):
    """System calls after the first reading of which something else happens."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self.happening = [happens]

    def open(self, name: str, flags: int, *, directory: int) -> int:
        file = super().open(name, flags, directory=directory)
        if self.happening:
            self.happening.pop()()
        return file


@each_key
def test_every_byte_flipped(tmp_path, key):
    """No flipped bit of any byte of a file is ever loaded; the next put puts it right."""
    store = filled(tmp_path, key=key)
    data = (tmp_path / FILE).read_bytes()
    for position in range(len(data)):
        for mask in (1, 0x80, 0xFF):
            flipped = bytearray(data)
            flipped[position] ^= mask
            (tmp_path / FILE).write_bytes(flipped)
            missed(store)
    misses = store.stats()["misses"]
    assert sum(misses.values()) == 3 * len(data)
    assert misses["absent"] == misses["unreadable"] == 0
    assert set(os.listdir(tmp_path)) <= {FILE, f"{FILE}.bad"}
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


@each_key
def test_every_truncation(tmp_path, key):
    """A file that stops at whatever length is a truncated one, moved aside."""
    store = filled(tmp_path, key=key)
    data = (tmp_path / FILE).read_bytes()
    for length in range(len(data)):
        (tmp_path / FILE).write_bytes(data[:length])
        miss = missed(store)
        assert (miss.reason, miss.moved_to) == (MissReason.TRUNCATED, f"{FILE}.bad")
    assert store.stats()["moved_aside"] == len(data)


def test_an_absurd_length_takes_no_memory(tmp_path):
    """A file that states a huge payload, and is as long, is corrupt without being read."""
    store = filled(tmp_path)
    start = (tmp_path / FILE).read_bytes()[:24] + (1 << 40).to_bytes(8, "little")
    with open(tmp_path / FILE, "wb") as file:
        file.write(start)
        file.truncate(1 << 40)
    assert missed(store).reason is MissReason.CORRUPT


@pytest.mark.parametrize(
    ("call", "code", "after", "advice"),
    [
        ("create", errno.EROFS, 0, READ_ONLY),
        ("create", errno.EACCES, 0, READ_ONLY),
        ("create", errno.EMFILE, 0, "Look after the disk, or open"),
        *(("write", errno.ENOSPC, after, "Make room$") for after in range(20)),
        ("write", errno.EDQUOT, 0, "Make room$"),
        ("sync", errno.EIO, 0, "Look after the disk, or open"),
        ("rename", errno.EROFS, 0, READ_ONLY),
        ("rename", errno.EISDIR, 0, "Remove what lies there$"),
    ],
)
def test_failing_writes(tmp_path, call, code, after, advice):
    """A put that fails at any step says why and what to do; what was there is as it was."""
    filled(tmp_path)
    store = GraphStore(tmp_path, files=Failing(call, code, after=after))
    said = rf"cannot be written: {os.strerror(code)}. {advice}"
    with pytest.raises(StoreError, match=said) as raised:
        store.put(IDENTITY, b"x" * 300)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == code
    assert os.listdir(tmp_path) == [FILE]
    assert found(store).payload == PAYLOAD
    assert store.stats()["written"] == 0


def test_a_directory_that_cannot_be_synced(tmp_path):
    """Some file systems sync no directories: the put is one nevertheless."""
    store = GraphStore(tmp_path, files=Failing("sync directory", errno.EINVAL))
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    """What another process puts in place of a spoiled file is not moved aside."""
    writer = filled(tmp_path)
    (tmp_path / FILE).write_bytes(b"spoiled")
    store = GraphStore(tmp_path, files=Meanwhile(lambda: writer.put(IDENTITY, b"new")))
    assert (missed(store).moved_to, found(store).payload) == (None, b"new")


def test_a_file_that_is_removed_while_it_is_read(tmp_path):
    """Nor is anything done about a spoiled file that somebody else removed or moved aside."""
    filled(tmp_path)
    (tmp_path / FILE).write_bytes(b"spoiled")
    store = GraphStore(tmp_path, files=Meanwhile((tmp_path / FILE).unlink))
    assert (missed(store).moved_to, os.listdir(tmp_path)) == (None, [])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_unreadable(tmp_path, code):
    """A file that the system refuses to read is a miss with the system's words, and stays."""
    filled(tmp_path)
    store = GraphStore(tmp_path, files=Failing("open", code))
    miss = missed(store)
    assert (miss.reason, miss.moved_to) == (MissReason.UNREADABLE, None)
    assert os.strerror(code) in miss.detail
    assert store.ls()[0].problem is not None
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["status", "names"])
def test_a_directory_of_which_nothing_is_said(tmp_path, call, code):
    """Where the system refuses to list or describe files, each question is a StoreError."""
    filled(tmp_path)
    store = GraphStore(tmp_path, files=Failing(call, code))
    asked: list[Callable[[], object]] = [store.ls, store.verify]
    asked += [lambda: store.prune(max_bytes=0), lambda: store.nearest(IDENTITY)]
    asked.append((lambda: IDENTITY in store) if call == "status" else store.__len__)
    for ask in asked:
        with pytest.raises(StoreError, match=f"cannot be read: .*{os.strerror(code)}") as raised:
            ask()
        assert getattr(raised.value, "reason", None) is MissReason.UNREADABLE
    assert found(store).payload == PAYLOAD
    (tmp_path / FILE).write_bytes(b"spoiled")
    assert missed(store).reason in (MissReason.FOREIGN, MissReason.TRUNCATED)


def test_a_directory_that_is_deleted_while_it_is_listed(tmp_path):
    """It is an empty one."""
    store = GraphStore(tmp_path, files=Failing("names", errno.ENOENT))
    assert (len(store), store.ls(), store.prune(max_bytes=0).entries) == (0, (), ())


def test_a_file_that_cannot_be_moved_aside(tmp_path):
    """On a read-only mount a spoiled file is a miss every time, and nothing else happens."""
    filled(tmp_path)
    (tmp_path / FILE).write_bytes(b"spoiled")
    store = GraphStore(tmp_path, files=Failing("rename", errno.EROFS))
    for _ in range(2):
        assert (missed(store).reason, missed(store).moved_to) == (MissReason.FOREIGN, None)
    assert os.listdir(tmp_path) == [FILE]


def test_a_limit_on_file_sizes(tmp_path):
    """A payload that the system stops half-way is an error; smaller ones go on being stored."""
    store = filled(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match="cannot be written: File too large"):
            store.put(OTHER, b"x" * 8192)
        store.put({"n": 2}, PAYLOAD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert missed(store, OTHER).reason is MissReason.ABSENT
    assert found(store, {"n": 2}).payload == found(store).payload == PAYLOAD
    assert len(os.listdir(tmp_path)) == 2


def test_mounts():
    """A full disk and a read-only one, as mounts of their own: puts fail, what is there loads."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False).returncode
    ):
        pytest.skip("mounts nothing here")
    done = subprocess.run(
        [*command, sys.executable, "-W", "error", str(PROGRAMS / "on_mounts.py")],
        env={**os.environ, "PYTHONPATH": str(PROGRAMS.parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "right on a full disk\nright on a read-only one\n"


def test_a_directory_that_is_deleted(tmp_path):
    """Without its directory a store misses everything, writes nothing, and says why."""
    store = filled(tmp_path / "graphs")
    shutil.rmtree(store.path)
    why = f"there is no directory {store.path}: give one that is there"
    assert str(missed(store)) == f"absent: {why}"
    with pytest.raises(StoreError, match=f"there is no directory {store.path}"):
        store.put(IDENTITY, PAYLOAD)
    assert (len(store), store.ls(), store.verify(), IDENTITY in store) == (0, (), (), False)
    assert (store.touch(IDENTITY), store.nearest(IDENTITY)) == (False, None)
    assert store.prune(max_bytes=0).entries == ()
    assert not store.path.exists()
    store.path.mkdir(mode=0o700)
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


def test_a_directory_that_becomes_a_file(tmp_path):
    """So it is when a file takes the directory's place."""
    store = filled(tmp_path / "graphs")
    shutil.rmtree(store.path)
    store.path.touch()
    assert missed(store).reason is MissReason.ABSENT


def test_a_link_to_the_directory(tmp_path):
    """The directory may be a link to a safe one, and is refused if that is unsafe."""
    filled(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = GraphStore(tmp_path / "link")
    assert found(store).payload == PAYLOAD
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(StoreError, match="run chmod go-w"):
        store.get(IDENTITY)


def test_links_in_a_circle(tmp_path):
    """A directory that links lead to in a circle is an error, and a miss once the store is open."""
    store = filled(tmp_path / "graphs")
    store.path.rename(tmp_path / "real")
    store.path.symlink_to(tmp_path / "graphs")
    assert missed(store).reason is MissReason.UNREADABLE
    for operation in (store.ls, lambda: GraphStore(store.path, mode="ro")):
        with pytest.raises(StoreError, match=r"cannot be read: .*symbolic links"):
            operation()


@each_key
def test_a_link_for_a_file(tmp_path, key):
    """A link is foreign even if it leads to a whole file; the link is moved, its target not."""
    store = filled(tmp_path / "graphs", key=key)
    target = tmp_path / "target"
    (store.path / FILE).rename(target)
    (store.path / FILE).symlink_to(target)
    assert store.ls()[0].problem is not None
    miss = missed(store)
    assert (miss.reason, miss.moved_to) == (MissReason.FOREIGN, f"{FILE}.bad")
    (store.path / FILE).symlink_to(target)
    before = target.read_bytes()
    store.put(IDENTITY, b"new")
    assert (found(store).payload, target.read_bytes()) == (b"new", before)
    assert not (store.path / FILE).is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket"])
def test_no_ordinary_file(tmp_path, monkeypatch, kind):
    """What is no file is foreign and moved aside; nothing waits for a pipe's writer."""
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    store = GraphStore(tmp_path)
    if kind == "pipe":
        os.mkfifo(FILE, 0o600)
    elif kind == "directory":
        os.mkdir(FILE, 0o700)
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(FILE)
    assert store.verify()[0].problem is not None
    assert (missed(store).reason, os.listdir(tmp_path)) == (MissReason.FOREIGN, [f"{FILE}.bad"])
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


@pytest.mark.parametrize("aside", ["nothing", "file", "directory"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_whatever_lies_aside_already(tmp_path, kind, aside):
    """What is in an entry's place is moved aside, also where something lies aside already."""
    store = GraphStore(tmp_path)
    for path, what in ((tmp_path / f"{FILE}.bad", aside), (tmp_path / FILE, kind)):
        if what == "directory":
            path.mkdir()
            (path / "mine").write_text("kept")
        elif what == "file":
            path.write_text("something else")
    kept = [path.read_text() for path in tmp_path.glob("*/mine")]
    miss = missed(store)
    assert miss.reason is MissReason.FOREIGN
    assert miss.moved_to is not None
    assert is_bad(miss.moved_to)
    assert (tmp_path / miss.moved_to).exists()
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD
    assert [path.read_text() for path in tmp_path.glob("*/mine")] == kept
    store.prune(max_bytes=0)
    assert [path.read_text() for path in tmp_path.glob("*/mine")] == kept


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_directory_that_others_can_write(tmp_path, mode):
    """It is refused at once and at every use, with the command that ends it; a key ends it too."""
    store = filled(tmp_path / "graphs")
    store.path.chmod(mode)
    for operation in (
        lambda: GraphStore(store.path),
        lambda: GraphStore(store.path, mode="ro"),
        lambda: store.get(IDENTITY),
        lambda: store.put(IDENTITY, PAYLOAD),
        store.ls,
        store.verify,
        lambda: store.prune(max_bytes=0),
    ):
        with pytest.raises(StoreError, match=f"mode=0{mode:o}.*run chmod go-w {store.path}, or"):
            operation()
    assert store.stats()["misses"]["unsafe"] == 1
    assert found(filled(store.path, key=KEY)).payload == PAYLOAD
    subprocess.run(["chmod", "go-w", str(store.path)], check=True)
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


@pytest.mark.parametrize("mode", [0o660, 0o602])
def test_a_file_that_others_can_write(tmp_path, mode):
    """It is refused with the command that ends it; others are found; the next put replaces it."""
    store = filled(tmp_path)
    store.put(OTHER, PAYLOAD)
    (tmp_path / FILE).chmod(mode)
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match=f"run chmod go-w {tmp_path / FILE}, or give"):
        store.get(IDENTITY)
    assert [c.problem and c.problem.reason for c in store.verify()].count(MissReason.UNSAFE) == 1
    assert snapshot(tmp_path) == before
    assert found(store, OTHER).payload == PAYLOAD
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


@as_root
@pytest.mark.parametrize("name", [".", FILE])
def test_another_owner(tmp_path, name):
    """What another user owns is refused with the command that ends it; a key ends it too."""
    store = filled(tmp_path)
    os.chown(tmp_path / name, 12345, -1)
    with pytest.raises(StoreError, match=r"belongs to uid=12345, .* run chown 0 .*, or give"):
        store.get(IDENTITY)
    sealed = filled(tmp_path, key=KEY)
    os.chown(tmp_path / name, 12345, -1)
    assert found(sealed).payload == PAYLOAD
    os.chown(tmp_path / name, 0, -1)
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


@pytest.mark.parametrize("mode", [0o777, 0o773, 0o770, 0o2775, 0o702])
@pytest.mark.parametrize("below", [".", "of one's own"])
def test_a_way_that_others_can_change(tmp_path, mode, below):
    """Where others can put something in a safe directory's place it is refused at every use."""
    shared = tmp_path / "shared"
    store = filled(shared / below / "graphs")
    shared.chmod(mode)
    for operation in (
        lambda: GraphStore(store.path),
        lambda: GraphStore(store.path, mode="ro"),
        lambda: store.get(IDENTITY),
        lambda: store.put(IDENTITY, PAYLOAD),
        store.ls,
    ):
        with pytest.raises(StoreError, match=f"on the way to .*mode={mode:04o}.*go-w {shared}, or"):
            operation()
    subprocess.run(["chmod", "go-w", str(shared)], check=True)
    assert found(store).payload == PAYLOAD
    shared.chmod(mode)
    assert found(filled(store.path, key=KEY)).payload == PAYLOAD


def test_a_directory_in_one_for_everybody(tmp_path):
    """One's own directory in a sticky one, as /tmp is, is safe, and so is a link to it."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    store = filled(tmp_path / "shared" / "graphs")
    (tmp_path / "shared" / "link").symlink_to("graphs")
    assert found(GraphStore(tmp_path / "shared" / "link")).payload == found(store).payload


@as_root
@pytest.mark.parametrize("planted", ["link", "directory"])
def test_what_others_plant_on_the_way(tmp_path, planted):
    """A link or a directory of another user leads to no store, whatever it leads to."""
    crafted = filled(tmp_path / "mine" / "graphs")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    if planted == "link":
        (shared / "planted").symlink_to(tmp_path / "mine")
    else:
        (shared / "planted").mkdir()
        crafted.path.rename(shared / "planted" / "graphs")
    os.lchown(shared / "planted", 12345, 12345)
    for path in (shared / "planted" / "graphs", tmp_path / "way" / "graphs"):
        (tmp_path / "way").unlink(missing_ok=True)
        (tmp_path / "way").symlink_to(shared / "planted")
        with pytest.raises(StoreError, match=f"{shared}/planted, on the way.* to uid=12345"):
            GraphStore(path)


@as_root
@pytest.mark.parametrize(("user", "group", "is_safe"), [(1, 1, True), (1, 2, False), (0, 0, False)])
def test_a_group_of_ones_own(user, group, is_safe):
    """A directory on the way may be written by its owner's private group, and by no other one."""
    way = Path(mkdtemp())  # not below the tests' own directory, which the superuser alone may pass
    try:
        way.chmod(0o775)
        os.chown(way, user, group)
        os.seteuid(user)
        path = way / "graphs"
        if is_safe:
            filled(path)
        else:
            with pytest.raises(StoreError, match=f"{way}, on the way to .* mode=0775"):
                filled(path)
    finally:
        os.seteuid(0)
        shutil.rmtree(way)


@pytest.mark.parametrize("tail", ["of a stranger", "copied"])
def test_a_stated_length_takes_no_memory(tmp_path, tail):
    """Where others may write, a huge file that no key's owner wrote is missed without being kept.

    Who copies the end of an authentic file makes it be read, in pieces.
    """
    store = filled(tmp_path, key=KEY)
    is_copied = tail == "copied"
    end = (tmp_path / FILE).read_bytes()[-64:] if is_copied else bytes(64)
    stretch(tmp_path / FILE, (1 << 28) if is_copied else 3 << 30, tail=end)
    assert peak_bytes(lambda: missed(store)) < 8 << 20
    assert store.stats()["misses"]["corrupt" if is_copied else "not authentic"] == 1
    store.put(IDENTITY, PAYLOAD)
    assert found(store).payload == PAYLOAD


def test_large_entries(tmp_path):
    """An executable that is too large to be read at once is found whole, and a flaw in it."""
    store = GraphStore(tmp_path, key=KEY)
    payload = bytes(1 << 26)
    store.put(IDENTITY, payload)
    assert found(store).payload == payload
    with (tmp_path / FILE).open("r+b") as file:
        file.seek(1 << 25)
        file.write(b"\1")
    assert missed(store).reason is MissReason.CORRUPT
