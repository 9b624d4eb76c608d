"""`cudagraph-jax store export`: entries in one file."""

from __future__ import annotations

import os
import stat
import tarfile

import pytest

from cudagraph_jax.cli.store.archive import write_archive
from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import GraphStore
from cudagraph_jax.store.identity import file_name
from tests.helpers.stock import EMBED, EMBED_LARGE, IDENTITIES, RANK, files, spoil, stocked

KEY = b"sixteen bytes or more"
NAME = file_name(EMBED)


def names_in(archive):
    with tarfile.open(archive) as tar:
        return tar.getnames()


def test_there_and_back(store, stock, archive, tmp_path):
    """What is exported and imported is byte for byte the same, whatever tool looks into it."""
    assert store("export", stock, archive) == (
        0,
        f"3 entries, 9.5 KiB, written to {archive}\n",
        "",
    )
    assert names_in(archive) == sorted(file_name(identity) for identity in IDENTITIES)
    new = tmp_path / "new"
    assert store("import", new, archive) == (0, f"3 entries imported into {new}: 3 new\n", "")
    assert files(new) == files(stock)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in [*new.iterdir(), archive]}
    assert (modes, stat.S_IMODE(new.stat().st_mode)) == ({0o600}, 0o700)
    assert sorted(os.listdir(tmp_path)) == ["graphs", "graphs.tar", "new"]


def test_same_bytes(store, stock, archive, tmp_path):
    """The same entries give the same archive, whenever they were used and by whom."""
    store("export", stock, archive)
    store("import", tmp_path / "new", archive)
    os.utime(stock / NAME, (1, 1))
    store("export", tmp_path / "new", tmp_path / "again.tar", "--name", "embed", "--name", "rank")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    with tarfile.open(archive) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname, member.offset_data - member.offset) == ("", "", 512)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--name", "embed"], [EMBED, EMBED_LARGE]),
        (["--bucket", "8x128"], [EMBED, RANK]),
        (["--bucket", "8x128", "--bucket", "16x128"], [EMBED, EMBED_LARGE, RANK]),
        (["--fingerprint", "v3"], [EMBED, EMBED_LARGE]),
        (["--name", "embed", "--bucket", "8x128", "--fingerprint", "v3"], [EMBED]),
    ],
)
def test_choices(store, stock, archive, options, expected):
    """Only what fits every kind of choice is packed."""
    assert store("export", stock, archive, *options)[0] == 0
    assert names_in(archive) == sorted(map(file_name, expected))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--name", "embd"], "has --name embd: did you mean 'embed'? (embed, rank)"),
        (["--name", "rank", "--name", "x"], "has --name x: choose one of embed, rank"),
        (["--bucket", "16x129"], "has --bucket 16x129: did you mean '16x128'? (16x128, 8x128)"),
        (["--name", "rank", "--fingerprint", "v3"], "--fingerprint v3: none of those chosen has"),
    ],
)
def test_choices_of_nothing(store, stock, archive, options, problem):
    """A choice that fits nothing is an error: an archive never lacks what was asked for."""
    status, out, err = store("export", stock, archive, *options)
    assert (status, out) == (1, "")
    assert problem in err
    assert not archive.exists()


def test_nothing_to_export(store, tmp_path, archive):
    """An empty store gives no archive."""
    GraphStore(tmp_path / "graphs")
    status, _, err = store("export", tmp_path / "graphs", archive)
    assert (status, err) == (1, "cudagraph-jax store: there are no entries to export\n")


def test_export_of_what_is_not_whole(store, stock, archive):
    """Every entry that is not whole is named, and the archive that was there stays."""
    archive.write_bytes(b"the one before")
    spoil(stock, NAME)
    (stock / file_name(RANK)).write_bytes(b"foreign")
    status, out, err = store("export", stock, archive)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(
        "cudagraph-jax store: 2 of 3 entries would not be loaded, nothing is written: "
    )
    assert f"{NAME} is corrupt: its checksum is wrong" in err
    assert f"{file_name(RANK)} is foreign: " in err
    assert archive.read_bytes() == b"the one before"
    # The file without a header might be any entry: also when some are chosen.
    assert store("export", stock, archive, "--bucket", "16x128")[0] == 1
    (stock / file_name(RANK)).unlink()
    assert store("export", stock, archive, "--bucket", "16x128")[0] == 0
    assert sorted(os.listdir(archive.parent)) == ["graphs", "graphs.tar"]


def test_odd_paths(store, stock, tmp_path):
    """A path that is no text is written, and printed without what a terminal cannot show."""
    archive = tmp_path / "a\udc80\x1b.tar"
    for operation in ("export", "import"):
        status, out, err = store(operation, stock, archive)
        assert (status, err, "\x1b" in out) == (0, "", False)
    assert store("export", stock, tmp_path / "a\0b")[0] == 1
    assert store("import", stock, tmp_path / "a\0b")[0] == 1


def test_many_that_are_not_whole(store, tmp_path, archive):
    """Of many entries that are not whole the first are named."""
    graphs = GraphStore(tmp_path / "graphs")
    for number in range(11):
        (graphs.path / graphs.put({"n": number}, b"")).write_bytes(b"x")
    _, _, err = store("export", graphs.path, archive)
    assert err.count("foreign: ") == 8
    assert err.endswith("; and 3 more\n")


@pytest.mark.parametrize("name", ["missing/graphs.tar", "graphs"])
def test_unwritable(store, stock, tmp_path, name):
    """A file that cannot be written is one line on stderr."""
    status, out, err = store("export", stock, tmp_path / name)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("cudagraph-jax store: path=")


def test_keys(store, archive, tmp_path):
    """Sealed entries go with their key alone; with it the archive may lie anywhere."""
    path = stocked(tmp_path / "graphs", key=KEY).path
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "other").write_bytes(KEY * 2)
    for options in ([], ["--key-file", tmp_path / "other"]):
        status, _, err = store("export", path, archive, *options)
        assert (status, err.count("not authentic: ")) == (1, 3)
    assert store("export", path, archive, "--key-file", tmp_path / "key")[0] == 0
    archive.chmod(0o666)
    with_other = ["--key-file", tmp_path / "other"]
    for options, problem in (
        ([], f"{archive} can be written by others, mode=0666"),
        (with_other, "is not authentic: it was not written with this store's key"),
    ):
        status, _, err = store("import", tmp_path / "new", archive, *options)
        assert status == 1
        assert problem in err
        assert not (tmp_path / "new").exists()
    new = tmp_path / "new"
    assert store("import", new, archive, "--key-file", tmp_path / "key")[0] == 0
    assert files(new) == files(path)


def test_writing_fails(stock, archive):
    """Where an entry cannot be had, neither the archive nor a draft is there."""

    def entries():
        yield NAME, b"x"
        raise StoreError("gone")

    with pytest.raises(StoreError, match="gone"):
        write_archive(archive, entries())
    assert os.listdir(archive.parent) == ["graphs"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser may give files away")
def test_a_link_of_somebody_else(store, stock, tmp_path):
    """What another user's link leads to is not overwritten: one line on stderr."""
    shared, target = tmp_path / "shared", tmp_path / "mine.tar"
    shared.mkdir()
    shared.chmod(0o1777)
    target.write_text("kept")
    (shared / "graphs.tar").symlink_to(target)
    os.lchown(shared / "graphs.tar", 12345, -1)
    status, out, err = store("export", stock, shared / "graphs.tar")
    assert (status, out, err.count("\n"), target.read_text()) == (1, "", 1, "kept")
    assert "a link that uid=12345 made" in err


def test_ways_that_others_can_change(store, stock, archive, tmp_path):
    """Neither an archive without a key nor a key is read from where others can exchange it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    assert store("export", stock, shared / "graphs.tar")[0] == 0
    (shared / "key").write_bytes(KEY)
    shared.chmod(0o777)
    for arguments in (
        ("import", tmp_path / "other", shared / "graphs.tar"),
        ("verify", stock, "--key-file", shared / "key"),
    ):
        status, out, err = store(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"{shared}, on the way to {shared}/" in err
        assert f"run chmod go-w {shared}" in err
    assert not (tmp_path / "other").exists()
    shared.chmod(0o1777)
    assert store("import", tmp_path / "other", shared / "graphs.tar")[0] == 0
    assert store("verify", stock, "--key-file", shared / "key")[0] == 1  # sealed by no key
