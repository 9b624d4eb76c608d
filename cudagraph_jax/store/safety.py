"""Who may change a store: an executable is native code, and runs whoever wrote it."""

from __future__ import annotations

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
