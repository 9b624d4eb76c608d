"""The store's directory: opened, found safe, and then used by its open file alone.

All names are relative to the open directory, so that what was found safe is what is used, even if
somebody renames it meanwhile.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cudagraph_jax._base.files import is_of_another, way_to
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.store.outcomes import MissReason, UnusableError

TEMPORARY = ".tmp"

_READ = os.O_RDONLY | os.O_CLOEXEC
# A link is refused, and a pipe does not block.
_READ_FILE = _READ | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class Files:
    """The system calls of a store, each by itself: what a test makes fail or stop half-way."""

    def open(self, name: str, flags: int, *, directory: int) -> int:
        """Opens a file of the directory; a new one is its owner's alone."""
        return os.open(name, flags, 0o600, dir_fd=directory)

    def write(self, file: int, data: bytes | memoryview) -> int:
        """Writes some of `data`; how much."""
        return os.write(file, data)

    def names(self, directory: int) -> list[str]:
        """The names in the directory."""
        return os.listdir(directory)

    def status(self, name: str, *, directory: int) -> os.stat_result:
        """What the system says about a name, links not followed."""
        return os.stat(name, dir_fd=directory, follow_symlinks=False)

    def sync(self, file: int) -> None:
        """Waits until a file or a directory is on the disk."""
        os.fsync(file)

    def rename(self, old: str, new: str, *, directory: int) -> None:
        """Gives a file another name, in place of a file that has it."""
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)


class Folder:
    """An open directory.

    Args:
        path: What errors call it.
        descriptor: Its open file.
        is_trusted: Whether its files are used whoever may change them.
        files: The system calls.
    """

    def __init__(self, path: Path, descriptor: int, *, is_trusted: bool, files: Files) -> None:
        self.path = path
        self._descriptor = descriptor
        self._is_trusted = is_trusted
        self._files = files

    def names(self) -> list[str]:
        """The names of all that is in it, sorted; none if it was deleted meanwhile.

        Raises:
            UnusableError: The system refuses to list them.
        """
        with suppress(FileNotFoundError), _readable(self.path):
            return sorted(self._files.names(self._descriptor))
        return []

    def status(self, name: str) -> os.stat_result | None:
        """What the system says about a name, links not followed; None if there is none.

        Raises:
            UnusableError: The system refuses to say anything.
        """
        with suppress(FileNotFoundError), _readable(self.path / name):
            return self._files.status(name, directory=self._descriptor)
        return None

    @contextmanager
    def reading(self, name: str) -> Iterator[tuple[BinaryIO, os.stat_result]]:
        """An ordinary file that is safe to read.

        Yields:
            The open file, and what the system says about it.

        Raises:
            UnusableError: It is absent, foreign, unsafe, or the system refuses to read it.
        """
        try:
            file = self._files.open(name, _READ_FILE, directory=self._descriptor)
        except OSError as error:
            raise _not_opened(error) from error
        status = None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise UnusableError("it is no ordinary file", reason=MissReason.FOREIGN)
            unsafe = danger(status, self.path / name, uid=os.geteuid())
            if unsafe is not None and not self._is_trusted:
                raise UnusableError(unsafe)
            with os.fdopen(file, "rb", closefd=False) as stream:
                yield stream, status
        except UnusableError as problem:
            problem.seen = status and (status.st_dev, status.st_ino)
            raise
        except OSError as error:
            raise UnusableError(
                f"it cannot be read: {error}", reason=MissReason.UNREADABLE
            ) from error
        finally:
            os.close(file)

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        """Writes a file whole, in place of one that is there; a reader never sees half of it.

        Raises:
            OSError: It cannot be written; what was there is as it was.
        """
        draft = f".{name}.{secrets.token_hex(8)}{TEMPORARY}"
        file = self._files.open(draft, _CREATE, directory=self._descriptor)
        try:
            try:
                for piece in pieces:
                    self._write(file, piece)
                self._files.sync(file)
            finally:
                os.close(file)
            self._files.rename(draft, name, directory=self._descriptor)
        except BaseException:
            self.remove(draft)
            raise
        # The file is whole without it; only a power cut could still bring the old one back.
        with suppress(OSError):
            self._files.sync(self._descriptor)

    def move(self, old: str, new: str) -> bool:
        """Gives a file another name; whether that was possible."""
        with suppress(OSError):
            self._files.rename(old, new, directory=self._descriptor)
            return True
        return False

    def remove(self, name: str) -> bool:
        """Removes a file; whether it did."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self._descriptor)
            return True
        return False

    def mark_used(self, name: str, now: float) -> bool:
        """Sets the file's time of last use; whether that was possible."""
        with suppress(OSError, OverflowError, ValueError):
            os.utime(name, (now, now), dir_fd=self._descriptor, follow_symlinks=False)
            return True
        return False

    def _write(self, file: int, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            rest = rest[self._files.write(file, rest) :]


@contextmanager
def opened(path: Path, *, is_trusted: bool, files: Files) -> Iterator[Folder]:
    """The directory at `path`, which may be a link to it.

    Raises:
        UnusableError: It is absent or unreadable, or others may change it and it is not trusted.
    """
    try:
        descriptor = os.open(path, _READ | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        why = f"{no_directory(path)}: give one that is there"
        raise UnusableError(why, reason=MissReason.ABSENT) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if not is_trusted:
            with _readable(path):
                refuse_danger(descriptor, path)
        yield Folder(path, descriptor, is_trusted=is_trusted, files=files)
    finally:
        os.close(descriptor)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, UnusableError):
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnusableError:
    what = f"{path} cannot be read: {error.strerror or error}"
    if isinstance(error, PermissionError):
        what += (
            f": it is its owner's alone; run as that user, or make it over: chown -R "
            f"{os.geteuid()} {path}"
        )
    return UnusableError(what, reason=MissReason.UNREADABLE)


def _not_opened(error: OSError) -> UnusableError:
    if error.errno == errno.ENOENT:
        return UnusableError("there is no such file", reason=MissReason.ABSENT)
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
        return UnusableError("it is a link or a socket", reason=MissReason.FOREIGN)
    return UnusableError(
        f"it cannot be read: {error.strerror or error}", reason=MissReason.UNREADABLE
    )


_ROOT = 0
OR_KEY = ", or give the store a key"
"""How the remedy of every danger ends."""


def danger(status: os.stat_result, path: Path, *, uid: int) -> str | None:
    """What makes `path` unsafe to load executables from, and how to put it right; None if safe.

    The superuser's files are as safe as one's own: it can change this process anyway. So a store
    that is part of a container image serves a process without privileges.

    Args:
        status: What the system says about it, from its open file.
        path: What the error calls it.
        uid: The user of this process.
    """
    if status.st_uid not in (uid, _ROOT):
        return (
            f"{path} belongs to uid={status.st_uid}, who could plant code that this process "
            f"(uid={uid}) runs: run chown {uid} {shlex.quote(str(path))}{OR_KEY}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return (
            f"{path} can be written by others, mode={stat.S_IMODE(status.st_mode):04o}, who could "
            f"plant code that this process runs: {_remedy(status, path)}{OR_KEY}"
        )
    return None


def refuse_danger(descriptor: int, path: Path) -> None:
    """Refuses what somebody else could change, or exchange for something else.

    Args:
        descriptor: Of an open file or directory.
        path: By which it was opened.

    Raises:
        UnusableError: Somebody could.
        OSError: The system refuses to look.
    """
    status = os.fstat(descriptor)
    unsafe = danger(status, path, uid=os.geteuid()) or danger_on_way(path, status)
    if unsafe is not None:
        raise UnusableError(unsafe)


def danger_on_way(path: Path, status: os.stat_result) -> str | None:
    """Who else could put something in the place of what `path` leads to; None if nobody could.

    As sshd (StrictModes) and sudo do, it looks at every directory and every link on the way. In a
    directory such as /tmp, whose sticky bit lets everybody rename only what is his, it is enough
    that what lies there belongs to nobody else.

    Args:
        path: A directory or a file that is not dangerous itself.
        status: What the system says about it, from its open file.

    Raises:
        OSError: The system refuses to look at the way.
    """
    last = None
    for place, last in way_to(path):
        if last is None:
            break
        if is_of_another(last):
            return (
                f"{place}, on the way to {path}, belongs to uid={last.st_uid}, who could lead it "
                "elsewhere and plant code that this process runs: give a path without it"
                f"{OR_KEY}"
            )
        if stat.S_ISDIR(last.st_mode) and _is_open(last, place):
            return (
                f"{place}, on the way to {path}, can be written by others, "
                f"mode={stat.S_IMODE(last.st_mode):04o}, who could plant code that this process "
                f"runs: run chmod go-w {shlex.quote(str(place))}{OR_KEY}"
            )
    if last is None or (last.st_dev, last.st_ino) != (status.st_dev, status.st_ino):
        return f"{path} was exchanged while it was opened: look who changes it"
    return None


def _is_open(status: os.stat_result, path: Path) -> bool:
    """Whether others can rename what lies in a directory, to have something else in its place."""
    if status.st_mode & stat.S_ISVTX:
        return False
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private(status, path)


def _is_private(status: os.stat_result, path: Path) -> bool:
    """Whether a directory's group is that of its owner alone.

    Many systems give each user a group of the same name, and let it write (umask 0002). The
    superuser's is none of these: containers put users of any number into it.
    """
    if status.st_uid == _ROOT or _ACL in os.listxattr(path, follow_symlinks=False):
        return False
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    is_own = owner.pw_gid == status.st_gid and owner.pw_name == group.gr_name
    return is_own and set(group.gr_mem) <= {owner.pw_name}


_ACL = "system.posix_acl_access"
"""Where further users may be let in, the mode shows them as the group."""


def _remedy(status: os.stat_result, path: Path) -> str:
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:  # for everybody, as /tmp is
        return f"give a directory of your own in it, such as {shlex.quote(str(path / 'graphs'))}"
    return f"run chmod go-w {shlex.quote(str(path))}"


def checked_key(key: object) -> bytes | None:
    """`key`, if it is one or None.

    Raises:
        ConfigError: It is neither, or too short to keep anybody out.
    """
    if key is None or (isinstance(key, bytes) and len(key) >= 16):
        return key
    found = f"{len(key)} bytes" if isinstance(key, bytes) else f"a {type(key).__name__}"
    raise ConfigError(
        f"key of {found} is no key: give at least 16 random bytes, as secrets.token_bytes(32) does"
    )


_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_IN_THE_WAY = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST})


def not_written(path: Path, error: OSError) -> str:
    """That a file of a store cannot be written, why, and what to do."""
    return f"{path} cannot be written: {error.strerror or error}. {_system_remedy(error.errno)}"


def is_refused(error: BaseException | None) -> bool:
    """Whether the system lets this process write nothing there, now or later."""
    return isinstance(error, OSError) and error.errno in _REFUSED


def no_directory(path: Path) -> str:
    """Why a path leads to no directory."""
    for place in (path, *path.parents):
        if os.path.isfile(place):
            return f"{place} is a file, not a directory"
    return f"there is no directory {path}"


def _system_remedy(code: int | None) -> str:
    if code in _NO_ROOM:
        return "Make room"
    if code in _REFUSED:
        return 'Open the store with mode="ro", or mend its permissions'
    if code in _IN_THE_WAY:
        return "Remove what lies there"
    return 'Look after the disk, or open the store with mode="ro"'
