"""What to do about an error of the system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_IN_THE_WAY = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST})


def not_written(path: Path, error: OSError) -> str:
    """That a file of a store cannot be written, why, and what to do."""
    return f"{path} cannot be written: {error.strerror or error}. {_remedy(error.errno)}"


def is_refused(error: BaseException | None) -> bool:
    """Whether the system lets this process write nothing there, now or later."""
    return isinstance(error, OSError) and error.errno in _REFUSED


def no_directory(path: Path) -> str:
    """Why a path leads to no directory."""
    for place in (path, *path.parents):
        if os.path.isfile(place):
            return f"{place} is a file, not a directory"
    return f"there is no directory {path}"


def _remedy(code: int | None) -> str:
    if code in _NO_ROOM:
        return "Make room"
    if code in _REFUSED:
        return 'Open the store with mode="ro", or mend its permissions'
    if code in _IN_THE_WAY:
        return "Remove what lies there"
    return 'Look after the disk, or open the store with mode="ro"'
