"""`cudagraph-jax store import`: what an archive may hold."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax.cli.store.archive import read_archive
from cudagraph_jax.cli.store.moving import import_text, verified
from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import GraphStore
from cudagraph_jax.store.format import Header, pack
from cudagraph_jax.store.identity import file_name
from tests.helpers.stock import EMBED, EMBED_LARGE, RANK, files
from tests.helpers.stores import KEY, peak_bytes

Member = tuple[str, bytes, dict[str, Any]]

NAME = file_name(EMBED)
FIRST = 8 * 512
"""Where the second member of an archive of the stock starts."""


def packed(*members: Member, form=tarfile.USTAR_FORMAT):
    """A tar of (name, bytes, changes to the member)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data, changes in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for attribute, value in changes.items():
                setattr(member, attribute, value)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def entry(number):
    """The bytes of an entry."""
    return b"".join(pack(Header({"n": number}, {}, 0.0), b"x" * 100, key=None))


def test_what_is_there_stays(store, stock, archive, tmp_path):
    """Whole entries stay as they are, others are replaced, and each is counted."""
    store("export", stock, archive)
    new = GraphStore(tmp_path / "new")
    new.put(EMBED, b"compiled here")
    (new.path / new.put(RANK, b"")).write_bytes(b"spoiled")
    kept = (new.path / NAME).read_bytes()
    assert store("import", new.path, archive)[1] == (
        f"3 entries imported into {new.path}: 1 new, 1 in place of files that were not whole, "
        "1 already there\n"
    )
    assert files(new.path) == {**files(stock), NAME: kept}
    assert "0 new, 3 already there" in store("import", new.path, archive)[1]


def test_import_text(tmp_path):
    """One entry is one."""
    assert (
        import_text(tmp_path, count=1, new=1, mended=0)
        == f"1 entry imported into {tmp_path}: 1 new"
    )


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        (f"../{NAME}", {}, f"'../{NAME}' is no name of an entry"),
        (f"/tmp/{NAME}", {}, "is no name of an entry"),
        (f"./{NAME}", {}, "is no name of an entry"),
        ("notes.txt", {}, "'notes.txt' is no name of an entry"),
        (f"{NAME}.lock", {}, "is no name of an entry"),
        ("x" * 5000, {}, f"{'x' * 80!r} is no name of an entry"),
        (NAME, LINK, f"{NAME} is no ordinary file in it"),
        (NAME, {**LINK, "type": tarfile.LNKTYPE}, "is no ordinary file in it"),
        (NAME, {"type": tarfile.DIRTYPE}, "is no ordinary file in it"),
        (NAME, {"type": tarfile.FIFOTYPE}, "is no ordinary file in it"),
        (NAME, {"type": tarfile.CONTTYPE}, "is no ordinary file in it"),
        (NAME, {"pax_headers": {"GNU.sparse.map": "0,1"}}, "is no ordinary file in it"),
        (file_name(EMBED_LARGE), {}, "differs: its name is not that of what it holds"),
        (file_name(RANK), {}, "is in it twice"),
        (NAME, {"pax_headers": {"path": "../outside"}}, "'../outside' is no name of an entry"),
    ],
)
def test_bad_members(store, stock, archive, tmp_path, name, changes, problem):
    """One bad member behind a good one, and nothing is imported."""
    content = files(stock)
    good: Member = (file_name(RANK), content[file_name(RANK)], {})
    is_file = "type" not in changes or changes["type"] == tarfile.CONTTYPE
    bad = (name, content[NAME] if is_file else b"", changes)
    archive.write_bytes(packed(good, bad, form=tarfile.PAX_FORMAT))
    status, out, err = store("import", tmp_path / "new", archive)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"cudagraph-jax store: {archive} is refused, nothing is imported: ")
    assert problem in err
    assert sorted(os.listdir(tmp_path)) == ["graphs", "graphs.tar"]


@pytest.mark.parametrize(
    ("spoiled", "problem"),
    [
        (lambda data: data[:-1], f"{NAME} is truncated: "),
        (lambda data: data + b"\0", f"{NAME} is corrupt: it has 1 bytes too many"),
        (lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:], "its checksum is wrong"),
        (lambda data: b"", f"{NAME} is truncated: "),
        (lambda data: data[:16] + b"\xff" * 16, f"{NAME} is corrupt: no file has header_bytes="),
        (lambda data: b"#!" + data, f"{NAME} is foreign: "),
    ],
)
def test_members_that_are_not_whole(store, stock, archive, tmp_path, spoiled, problem):
    """A member is verified as an entry of the directory would be."""
    content = files(stock)
    good: Member = (file_name(RANK), content[file_name(RANK)], {})
    archive.write_bytes(packed(good, (NAME, spoiled(content[NAME]), {})))
    status, out, err = store("import", tmp_path / "new", archive)
    assert (status, out) == (1, "")
    assert problem in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda data: b"",
        lambda data: b"no tar",
        gzip.compress,
        lambda data: data[:600],
        lambda data: data[:5000],
        lambda data: data.rstrip(b"\0"),
        lambda data: data[:FIRST],
        lambda data: data[: FIRST + 512],
        lambda data: data[: FIRST + 100],
        lambda data: data[:FIRST] + b"\xff" * 512 + data[FIRST + 512 :],
        lambda data: data + b"more",
        lambda data: data[:FIRST] + bytes(1024) + data[FIRST:],
    ],
)
def test_archives_that_are_not_whole(store, stock, archive, tmp_path, spoiled):
    """What is no tar, or no whole one, is refused, also where it ends between two members."""
    store("export", stock, archive)
    with tarfile.open(archive) as tar:
        assert tar.getmembers()[1].offset == FIRST
    archive.write_bytes(spoiled(archive.read_bytes()))
    status, out, err = store("import", tmp_path / "new", archive)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "is refused, nothing is imported: it is no whole" in err
    assert not (tmp_path / "new").exists()


def test_an_empty_archive(store, archive, tmp_path):
    """A tar without members is an error: it is none that export wrote."""
    archive.write_bytes(packed())
    status, _, err = store("import", tmp_path / "new", archive)
    assert (status, err) == (
        1,
        f"cudagraph-jax store: {archive} holds no entries: give what export wrote\n",
    )
    assert not (tmp_path / "new").exists()


def test_files_that_are_no_archives(store, stock, tmp_path):
    """A missing file, a directory and a pipe are told at once."""
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (
        ("missing", "cannot be read: No such file or directory"),
        ("graphs", "is no ordinary file: give what export wrote"),
        ("pipe", "is no ordinary file: give what export wrote"),
    ):
        status, out, err = store("import", tmp_path / "new", tmp_path / name)
        assert (status, out) == (1, "")
        assert err == f"cudagraph-jax store: {tmp_path / name} {problem}\n"
    assert not (tmp_path / "new").exists()


def test_import_where_others_can_write(store, stock, archive):
    """The directory must be as safe as for any other use."""
    store("export", stock, archive)
    stock.chmod(0o770)
    status, out, err = store("import", stock, archive)
    assert (status, out) == (1, "")
    assert f"{stock} can be written by others" in err


def test_other_tools(store, stock, archive, tmp_path):
    """Entries that GNU tar or Python packed by their names are taken, too."""
    content = files(stock)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [(name, data, {"mtime": 1.5}) for name, data in content.items()]
        archive.write_bytes(packed(*members, form=form))
        assert store("import", tmp_path / str(form), archive)[0] == 0
        assert files(tmp_path / str(form)) == content


@given(
    st.integers(0, 3000),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.binary(),
)
@settings(max_examples=300)
def test_any_bytes(end, changes, form, more):
    """Whatever bytes an archive has, it gives entries as they were packed, or one error."""
    entries = [(file_name({"n": n}), entry(n)) for n in range(2)]
    whole = packed(*((*pair, {"mtime": 1.5}) for pair in entries), form=form)
    data = bytearray(whole[:end] + more)
    for place, value in changes:
        data[place : place + 1] = bytes([value])
    for content in (bytes(data), more):
        with suppress(StoreError):
            read = list(verified(io.BytesIO(content), None, said="refused"))
            assert all(pair in entries for pair in read)


def test_extended_headers(tmp_path):
    """A long chain of extended headers, which tarfile follows one inside the other, is refused."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    chain = (header.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 3000
    with pytest.raises(StoreError, match="it is no whole, uncompressed tar"):
        list(read_archive(io.BytesIO(chain)))


@pytest.mark.parametrize("what", ["an entry", "an extended header", "an end"])
def test_sizes_take_no_memory(store, stock, archive, tmp_path, what):
    """What a strangers' archive states to be huge, and is in holes of it, is refused cheaply."""
    (tmp_path / "key").write_bytes(KEY)
    start, huge = files(stock)[NAME][:32], 3 << 30
    member = tarfile.TarInfo(NAME)
    if what == "an entry":
        header_bytes = int.from_bytes(start[16:24], "little")
        member.size = 32 + header_bytes + huge + 64
        start = start[:12] + b"\1\0\0\0" + start[16:24] + huge.to_bytes(8, "little")
    else:
        member.type, member.size = tarfile.XHDTYPE, huge
    content = b"" if what == "an end" else member.tobuf(tarfile.USTAR_FORMAT) + start
    with archive.open("wb") as file:
        file.write(content)
        file.truncate(4 << 30)
    found = []

    def run():
        found.append(store("import", tmp_path / "new", archive, "--key-file", tmp_path / "key"))

    assert peak_bytes(run) < 8 << 20
    status, out, err = found[0]
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "is refused, nothing is imported: " in err
