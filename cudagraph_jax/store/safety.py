"""Who may change a store: an executable is native code, and runs whoever wrote it."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from pathlib import Path

from cudagraph_jax.errors import ConfigError

_ROOT = 0


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
            f"(uid={uid}) runs: run chown {uid} {shlex.quote(str(path))}, or give the store a key"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return (
            f"{path} can be written by others, mode={stat.S_IMODE(status.st_mode):04o}, who could "
            f"plant code that this process runs: {_remedy(status, path)}, or give the store a key"
        )
    return None


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
