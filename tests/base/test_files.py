"""Files that are there whole or not at all."""

import os
import stat

import pytest

from cudagraph_jax._base.files import ReportError, check_writable, write_json, write_whole
from cudagraph_jax.errors import ConfigError, CUDAGraphError


def test_writes(tmp_path):
    """The file has the text as UTF-8, and nothing else is left in its folder."""
    written = write_whole(tmp_path / "a.html", "é\n")
    assert written == tmp_path / "a.html"
    assert written.read_bytes() == b"\xc3\xa9\n"
    assert os.listdir(tmp_path) == ["a.html"]


def test_pictures_and_figures(tmp_path):
    """Bytes are written as they are, and values that JSON can hold as JSON."""
    assert write_whole(tmp_path / "a.png", b"\x89\r\n").read_bytes() == b"\x89\r\n"
    assert write_json(tmp_path / "a.json", {"b": [1]}).read_text() == '{\n  "b": [\n    1\n  ]\n}\n'


def test_trying_leaves_everything_as_it_was(tmp_path):
    """A file can be tried before it is written: files, links and what they lead to stay."""
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "dangling").symlink_to(tmp_path / "target")
    for name in ("old", "link", "dangling", "new"):
        check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "link", "old"]
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "old").read_text() == "old"
    write_whole(tmp_path / "dangling", "new")
    assert (tmp_path / "target").read_text() == "new"


def test_mode_is_that_of_any_new_file(tmp_path):
    """Who may read it is what the process's umask says, as for any file."""
    (tmp_path / "other").touch()
    written = write_whole(tmp_path / "a.html", "")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_replaces(tmp_path, monkeypatch):
    """A file of that name is replaced at once; who has it open reads the old one on."""
    path = tmp_path / "a.html"
    path.write_text("old")
    monkeypatch.chdir(tmp_path)
    with path.open() as reader:
        assert write_whole("a.html", "new") == path
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_follows_a_link(tmp_path):
    """A link stays a link; what it leads to is replaced."""
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    write_whole(tmp_path / "link.html", "new")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text() == "new"


def test_lone_surrogates_are_written(tmp_path):
    """A name that is no valid text does not keep a report from being written."""
    assert write_whole(tmp_path / "a.html", "a\ud800b").read_text() == "a?b"


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("missing/a.html", "is in a folder that does not exist", "make the folder first"),
        ("file/a.html", "is in a folder that does not exist", "make the folder first"),
        (".", "is no ordinary file", "give the name of a file to write"),
        ("pipe", "is no ordinary file", "give the name of a file to write"),
        ("a\0", "cannot be written", "Give a path in a folder"),
        ("n" * 300, "cannot be written: File name too long", "Give a path in a folder"),
    ],
)
def test_errors(tmp_path, name, problem, remedy):
    """What cannot be written is an error that says what to do, and nothing is left behind."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReportError, match=f"{problem}.*{remedy}"):
        check_writable(tmp_path / name)
    with pytest.raises(ReportError, match=f"{problem}.*{remedy}") as raised:
        write_whole(tmp_path / name, "new")
    assert isinstance(raised.value, OSError)
    assert isinstance(raised.value, CUDAGraphError)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_devices_are_left_alone():
    """A device is never replaced by a file."""
    with pytest.raises(ReportError, match="is no ordinary file"):
        write_whole("/dev/full", "new")


def test_failure_keeps_what_was_there(tmp_path):
    """When writing fails half-way, the old file stays and the draft goes."""
    path = tmp_path / "a.html"
    path.write_text("old")

    with pytest.raises(TypeError):
        write_whole(path, 3)  # type: ignore[arg-type]  # what fails on purpose
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.html"]


@pytest.mark.parametrize("path", [3, True, b"a.html", None])
def test_no_path(path):
    """What is no path at all is a configuration error."""
    with pytest.raises(ConfigError, match="is no path: give the name of a file"):
        write_whole(path, "new")


def test_links_in_a_circle(tmp_path):
    """Links that lead nowhere are an error, not an endless search."""
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ReportError):
        write_whole(tmp_path / "a", "new")


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser may give files away")


@as_root
@pytest.mark.parametrize("where", ["file", "folder", "behind one's own"])
def test_links_of_others_are_not_followed(tmp_path, where):
    """In a directory for everybody, a link that somebody else put there overwrites nothing."""
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    shared.mkdir()
    shared.chmod(0o1777)
    mine.mkdir()
    (mine / "a.html").write_text("kept")
    planted, path = shared / "a.html", shared / "a.html"
    if where == "folder":
        planted, path = shared / "out", shared / "out" / "a.html"
    planted.symlink_to(mine if where == "folder" else mine / "a.html")
    os.lchown(planted, 12345, 12345)
    if where == "behind one's own":
        path = tmp_path / "latest.html"
        path.symlink_to(planted)
    for write in (check_writable, lambda path: write_whole(path, "new")):
        with pytest.raises(ReportError, match=f"leads through {planted}, a link that uid=12345"):
            write(path)
    assert (mine / "a.html").read_text() == "kept"
    assert sorted(os.listdir(shared)) == [planted.name]


@as_root
def test_files_of_others_are_replaced(tmp_path):
    """What somebody else put there is replaced, never written to: another name of it stays."""
    planted, other = tmp_path / "a.html", tmp_path / "other"
    other.write_text("kept")
    os.link(other, planted)
    os.chown(planted, 12345, 12345)
    write_whole(planted, "new")
    assert (planted.read_text(), other.read_text()) == ("new", "kept")
    assert planted.stat().st_uid == 0


def test_links_through_folders(tmp_path, monkeypatch):
    """Links of one's own are followed wherever they stand, relative ones and back up, too."""
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/down")
    (tmp_path / "deep" / "name").symlink_to(tmp_path / "link" / ".." / "a.html")
    monkeypatch.chdir(tmp_path)
    assert write_whole("link/../name", "new") == tmp_path / "deep" / "a.html"
    assert (tmp_path / "deep" / "a.html").read_text() == "new"
