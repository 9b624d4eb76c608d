"""Files that are there whole or not at all, and the way that leads to one."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cudagraph_jax.errors import ConfigError, CUDAGraphError


class ReportError(CUDAGraphError, OSError):
    """A report, a figure or its numbers could not be written."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Finds out before long work whether a file could be written; leaves everything as it was.

    Raises:
        ConfigError: `path` is no path.
        ReportError: The file could not be written.
    """
    with _draft_for(path, 0o600):
        pass


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file, in place of one that is there; a reader never sees half of it.

    Args:
        path: The file. Its folder must exist.
        content: What it will hold; a text is written as UTF-8.

    Returns:
        The file's absolute path.

    Raises:
        ConfigError: `path` is no path.
        ReportError: The file cannot be written; what was there is as it was.
    """
    with replacement_of(path) as (file, target):
        file.write(content.encode(errors="replace") if isinstance(content, str) else content)
    return target


def write_json(path: str | os.PathLike[str], content: Mapping[str, object]) -> Path:
    """Writes the content as JSON; in all else it is `write_whole`."""
    return write_whole(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def replacement_of(
    path: str | os.PathLike[str], *, mode: int = 0o666
) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file that takes the place of `path` when the block ends, and goes if that fails.

    Args:
        path: The file. Its folder must exist. A link of one's own, or of the superuser, stays one,
            and what it leads to is replaced; that of somebody else leads where he likes.
        mode: Who may use the file, less the process's umask.

    Yields:
        The new file, and the absolute path that it will have.

    Raises:
        ConfigError: `path` is no path.
        ReportError: The file cannot be written; what was there is as it was.
    """
    with _draft_for(path, mode) as (draft, target):
        yield draft, target
        draft.flush()
        os.fsync(draft.fileno())
        os.replace(draft.name, target)


@contextmanager
def _draft_for(path: str | os.PathLike[str], mode: int) -> Iterator[tuple[BinaryIO, Path]]:
    """An empty file beside the one that it may replace, which goes again if it did not."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={path!r:.80} is no path: give the name of a file to write")
    try:
        target = _target(Path(path))
        name = target.with_name(f".{secrets.token_hex(8)}.tmp")
        with open(name, "xb", opener=lambda file, flags: os.open(file, flags, mode)) as draft:
            try:
                yield draft, target
            finally:
                with suppress(OSError):
                    name.unlink(missing_ok=True)
    except CUDAGraphError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # also NUL in a name
        raise ReportError(
            f"path={str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}. "
            "Give a path in a folder that you may write to, on a disk with room"
        ) from error


def _target(path: Path) -> Path:
    """The file that a path leads to, with no link on the way, if it may be replaced."""
    target = path
    for target, status in way_to(path):
        if status is not None and stat.S_ISLNK(status.st_mode) and is_of_another(status):
            raise ReportError(
                f"path={str(path)!r} leads through {target}, a link that uid={status.st_uid} made, "
                "who chooses what would be overwritten: give a path without it"
            )
    if not target.parent.is_dir():
        raise ReportError(
            f"path={str(target)!r} is in a folder that does not exist, {target.parent}: "
            "make the folder first, or give another path"
        )
    if path.exists() and not path.is_file():
        raise ReportError(
            f"path={str(target)!r} is no ordinary file: give the name of a file to write"
        )
    return target


_MOST_LINKS = 40
"""As many as Linux follows."""
_ROOT = 0


class Step(NamedTuple):
    """A directory, a link or a file on the way to a path.

    Attributes:
        path: Where it is; on the way to it there is no link.
        status: What the system says of itself; None if it is not there.
    """

    path: Path
    status: os.stat_result | None


def way_to(path: Path) -> Iterator[Step]:
    """All that leads to a path, from the root on, links followed one by one; at last itself.

    Where all steps up to one can be changed by nobody else, neither can what it leads to: so the
    way is the same when the path is used.

    Raises:
        OSError: The system refuses to look, or there are too many links.
    """
    path = path.absolute()
    here, names = Path(path.anchor), deque(path.parts[1:])
    yield Step(here, os.lstat(here))
    links = 0
    while names:
        name = names.popleft()
        here = here.parent if name == ".." else here / name
        status = _status(here)
        yield Step(here, status)
        if status is not None and stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = Path(os.readlink(here))
            names.extendleft(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            here = Path(target.anchor) if target.is_absolute() else here.parent
        elif names and (status is None or not stat.S_ISDIR(status.st_mode)):
            yield Step(here.joinpath(*names), None)
            return


def is_of_another(status: os.stat_result) -> bool:
    """Whether a file or a directory belongs to neither this process's user nor the superuser.

    Nor to the owner of the root directory, who rules the system, too: in a user namespace that may
    not be uid 0.
    """
    owner = status.st_uid
    return owner not in (os.geteuid(), _ROOT) and owner != os.lstat(os.sep).st_uid


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
