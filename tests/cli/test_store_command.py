"""`cudagraph-jax store`: listing, verifying and pruning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from cudagraph_jax.cli import main
from cudagraph_jax.cli.doctor_command import look_at
from cudagraph_jax.cli.store.care import prune_text
from cudagraph_jax.cli.store.listing import ls_text
from cudagraph_jax.cli.store.shown import age_text, order, size_text
from cudagraph_jax.store import GraphStore, Pruned
from cudagraph_jax.store.identity import file_name
from tests.helpers.stock import EMBED, EMBED_LARGE, NOW, RANK, files, spoil, stocked

KEY = b"sixteen bytes or more"
LS = """\
file          name   bucket  known by        code      device           jax     jaxlib     size  last used   key
{embed}  embed  8x128   fingerprint v3  0123456a  gpu NVIDIA H100  0.12.0  0.12.1  3.2 KiB  3 days ago  no
{large}  embed  16x128  fingerprint v3  0123456a  gpu NVIDIA H100  0.12.0  0.12.1  3.2 KiB  47 h ago    no
{rank}  rank   8x128   stablehlo       fedcba98  cpu              0.12.0  0.12.1  3.1 KiB  59 min ago  no

3 entries, 9.5 KiB"""  # noqa: E501


def test_ls_text(tmp_path):
    """A row says what an entry is, by function and size; numbers stand to the right."""
    path = stocked(tmp_path).path
    for identity, age_s in ((EMBED, 3 * 86400), (EMBED_LARGE, 47.9 * 3600), (RANK, 3599)):
        os.utime(path / file_name(identity), (0, NOW - age_s))
    records = sorted(GraphStore(path).ls(), key=order)
    short = {
        name: file_name(identity)[:12]
        for name, identity in (("embed", EMBED), ("large", EMBED_LARGE), ("rank", RANK))
    }
    assert ls_text(records, now=NOW) == LS.format(**short)
    assert ls_text(records, now=NOW, put_aside=2) == f"{LS.format(**short)}; 2 put aside"
    assert ls_text((), now=NOW) == "no entries here: is it a store?"
    assert ls_text((), now=NOW, put_aside=2) == "no entries here: is it a store? (2 put aside)"


def test_ls(store, stock):
    """It prints the table, and shows why a header cannot be read."""
    status, out, err = store("ls", stock)
    assert (status, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()[1:4]] == ["embed", "embed", "rank"]
    (stock / file_name(RANK)).write_bytes(b"#!/bin/sh")
    status, out, _ = store("ls", stock)
    assert status == 0
    assert "foreign: it does not start like a file of this package" in out
    assert out.endswith("; 1 of them cannot be read\n")


def test_ls_of_odd_identities(store, tmp_path):
    """Whatever a header holds, it is a row that cannot act on the terminal."""
    store_ = GraphStore(tmp_path / "graphs")
    store_.put({"name": "\x1b[2J" + "x" * 300, "bucket": [8, 128], "device_kind": None}, b"")
    store_.put({"name": 3, "bucket": "9" * 5000 + "x1", "known_by": ["a"], "platform": True}, b"")
    status, out, _ = store("ls", tmp_path / "graphs")
    assert status == 0
    assert "\x1b" not in out
    assert "8x128" in out
    assert max(map(len, out.splitlines())) < 250


def test_ls_json(store, stock):
    """JSON holds whole names, identities and sizes."""
    spoil(stock, file_name(RANK), at=0)
    status, out, _ = store("ls", stock, "--json")
    written = json.loads(out)
    assert (status, written["path"]) == (0, str(stock))
    by_file = {entry["file"]: entry for entry in written["entries"]}
    assert by_file[file_name(EMBED)]["identity"] == EMBED
    assert by_file[file_name(EMBED)]["problem"] is None
    assert by_file[file_name(RANK)]["problem"].startswith("foreign: ")
    assert written["total_bytes"] == sum(map(len, files(stock).values()))


def test_verify(store, stock):
    """It ends with 0 while all are whole, and else with 1 and each problem."""
    assert store("verify", stock) == (0, "3 entries, all whole\n", "")
    spoil(stock, file_name(EMBED))
    (stock / file_name(RANK)).write_bytes((stock / file_name(RANK)).read_bytes()[:-1])
    os.replace(stock / file_name(EMBED_LARGE), stock / file_name({"n": 1}))
    before = files(stock)
    status, out, err = store("verify", stock)
    assert (status, err) == (1, "")
    for identity, problem in (
        (EMBED, "corrupt: its checksum is wrong"),
        (RANK, "truncated: "),
        ({"n": 1}, "differs: its name is not that of what it holds"),
    ):
        (line,) = [line for line in out.splitlines() if file_name(identity) in line]
        assert problem in line
    assert out.endswith("\n3 of 3 entries would not be loaded\n")
    assert files(stock) == before


def test_edits_are_told_apart(store, tmp_path):
    """Entries that differ only by an edit of the function have rows that differ."""
    graphs = GraphStore(tmp_path / "graphs")
    for code in ("a" * 16, "b" * 16):
        graphs.put({**EMBED, "code": code}, b"")
    rows = store("ls", graphs.path)[1].splitlines()[1:3]
    assert sorted(row.split()[5] for row in rows) == ["a" * 8, "b" * 8]


def test_what_was_put_aside(store, stock):
    """A listing counts what had to make way for entries."""
    (stock / f"{file_name(RANK)}.bad").write_text("x")
    (stock / f"{file_name(RANK)}.01234567.bad").mkdir()
    assert store("ls", stock)[1].endswith("; 2 put aside\n")


NO_ENTRIES = "no entries here: is it a store?"
OTHERS = "no entries here, but model.safetensors: give the directory of a store"


@pytest.mark.parametrize(
    ("names", "status"),
    [
        ([], 0),
        (["hot.json", "hot.json.lock", f"{file_name(RANK)}.lock", f"{file_name(RANK)}.bad"], 0),
        (["hot.json", "model.safetensors"], 1),
    ],
)
def test_no_entries(store, tmp_path, names, status):
    """A directory without entries is said to have none; other things in it are an error."""
    said = OTHERS if status else NO_ENTRIES
    path = tmp_path / "graphs"
    path.mkdir(mode=0o700)
    for name in names:
        (path / name).write_text("{}")
    assert store("verify", path) == (status, f"{said}\n", "")
    assert store("ls", path)[1].startswith(said)
    look = look_at(path, machine={})
    assert (look.summary, len(look.found)) == (f"{path}: {said}", status)


def test_keys(store, tmp_path):
    """With the key of a file sealed entries are whole; with another or none they are not."""
    path = stocked(tmp_path / "graphs", key=KEY).path
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "other").write_bytes(KEY + b"\n")
    assert store("verify", path, "--key-file", tmp_path / "key")[0] == 0
    assert "yes" in store("ls", path)[1].splitlines()[1].split()
    status, out, _ = store("verify", path, "--key-file", tmp_path / "other")
    assert (status, out.count("not authentic: it was not written with this")) == (1, 3)
    status, out, _ = store("verify", path)
    assert (status, out.count("not authentic: it was written with a key")) == (1, 3)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "key cannot be read: No such file or directory"),
        (b"short", "key of 5 bytes is no key: give at least 16 random bytes"),
        (b"x" * 4097, "key has more than 4,096 bytes: give the file of a key"),
    ],
)
def test_no_keys(store, stock, tmp_path, content, problem):
    """A file that is no key is one line on stderr."""
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    for operation in (["ls", stock], ["import", tmp_path / "new", tmp_path / "key"]):
        status, out, err = store(*operation, "--key-file", tmp_path / "key")
        assert (status, out) == (1, "")
        assert err.startswith("cudagraph-jax store: ")
        assert problem in err


def test_prune_by_size(store, stock):
    """Those used least recently go; a dry run says so first and removes nothing."""
    before = files(stock)
    limit = len(before[file_name(RANK)]) + 10
    status, out, err = store("prune", stock, "--max-bytes", limit, "--dry-run")
    assert (status, err) == (0, "")
    assert out.endswith("\nwould remove 2 entries, 6.3 KiB; 3.1 KiB stay\n")
    assert files(stock) == before
    status, out, _ = store("prune", stock, "--max-bytes", limit)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:3]] == [
        file_name(EMBED),
        file_name(EMBED_LARGE),
    ]
    assert out.endswith("\nremoved 2 entries, 6.3 KiB; 3.1 KiB stay\n")
    assert set(files(stock)) == {file_name(RANK)}


def test_prune_by_age(store, tmp_path):
    """What was not used for longer goes, with what killed processes left."""
    path = stocked(tmp_path / "graphs", now=time.time() - 2.5 * 3600).path
    (path / f"{file_name(EMBED)}.lock").touch()
    os.utime(path / f"{file_name(EMBED)}.lock", (0, 0))
    assert store("prune", path, "--older-than", "1d")[1].endswith(
        "removed 0 entries and 1 left over, 0 B; 9.5 KiB stay\n"
    )
    assert store("prune", path, "--older-than", "1d")[1] == "removed nothing; 9.5 KiB stay\n"
    assert store("prune", path, "--older-than", "2h")[0] == 0
    assert set(files(path)) == {file_name(EMBED_LARGE), file_name(RANK)}
    assert store("prune", path, "--older-than", "5400")[0] == 0
    assert set(files(path)) == {file_name(RANK)}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can write anywhere")
def test_prune_of_a_directory_that_is_only_read(store, stock):
    """Where nothing can be removed, that is an error."""
    stock.chmod(0o500)
    try:
        status, out, err = store("prune", stock, "--max-bytes", "0")
    finally:
        stock.chmod(0o700)
    assert (status, out) == (1, "")
    assert err == f"cudagraph-jax store: {stock} cannot be written: nothing was removed\n"


def test_prune_text():
    """Files that are no entries are named, too."""
    pruned = Pruned(entries=(), leftovers=("a.lock",), freed_bytes=7, kept_bytes=0)
    assert prune_text(pruned, now=NOW, dry_run=False) == (
        "file    last used\na.lock  left over\n\nremoved 0 entries and 1 left over, 7 B; 0 B stay"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["prune", "DIR"], "prune: error: give --max-bytes or --older-than"),
        (["prune", "DIR", "--max-bytes", "1GB"], "'1GB' is no number of bytes"),
        (["prune", "DIR", "--older-than", "old"], "'old' is no age"),
        (["export", "DIR", "FILE", "--bucket", "8"], "'8' is no bucket"),
        (["export", "DIR"], "the following arguments are required: FILE"),
        (["ls"], "the following arguments are required: DIR"),
        (["list", "DIR"], "invalid choice: 'list'"),
        ([], "the following arguments are required: OPERATION"),
    ],
)
def test_wrong_usage(capsys, arguments, problem):
    """It ends with 2 and says what is wrong."""
    with pytest.raises(SystemExit, match="2"):
        main(["store", *arguments])
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "operation",
    [
        ["ls", "DIR"],
        ["verify", "DIR"],
        ["prune", "DIR", "--max-bytes", "0"],
        ["prune", "DIR", "--older-than", "0", "--dry-run"],
        ["export", "DIR", "graphs.tar"],
    ],
)
def test_directories(store, stock, tmp_path, monkeypatch, operation):
    """A missing directory is an error and stays missing; one that others can write is an error."""
    monkeypatch.chdir(tmp_path)
    stock.chmod(0o770)
    before = files(stock)
    for path, problem in (
        (tmp_path / "missing", f"there is no directory {tmp_path / 'missing'}"),
        (stock, f"{stock} can be written by others, mode=0770, who could plant code"),
    ):
        arguments = [str(path) if part == "DIR" else part for part in operation]
        status, out, err = store(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith(f"cudagraph-jax store: {problem}")
        assert err.count("\n") == 1
    assert files(stock) == before
    assert os.listdir(tmp_path) == ["graphs"]


def test_others_can_write_with_a_key(store, tmp_path):
    """With a key a directory may lie where others can write."""
    path = stocked(tmp_path / "graphs", key=KEY).path
    path.chmod(0o770)
    (tmp_path / "key").write_bytes(KEY)
    assert store("verify", path, "--key-file", tmp_path / "key")[0] == 0
    assert store("ls", path)[0] == 1


def test_starts_no_backend(stock):
    """JAX is not started: a platform that does not exist is no obstacle."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "cudagraph_jax", "store", "ls", str(stock)],
        env={**os.environ, "JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 entries" in done.stdout


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 40, "5,120.0 GiB"),
    ],
)
def test_sizes(count, text):
    """A size is in the largest unit of which there is one."""
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("age_s", "text"),
    [
        (-100, "just now"),
        (59, "just now"),
        (60, "1 min ago"),
        (3600, "1 h ago"),
        (172_799, "47 h ago"),
        (172_800, "2 days ago"),
        (1e9, "11,574 days ago"),
    ],
)
def test_ages(age_s, text):
    """An age is in words; the future, of another clock, is now."""
    assert age_text(age_s) == text
