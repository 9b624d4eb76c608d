"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from cudagraph_jax.errors import ConfigError, CUDAGraphError


class ReportError(CUDAGraphError, OSError):
    """A report could not be written."""


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file, in place of one that is there; a reader never sees half of it.

    Args:
        path: The file. Its folder must exist.
        text: The content, written as UTF-8.

    Returns:
        The file's absolute path.

    Raises:
        ConfigError: `path` is no path.
        ReportError: The file cannot be written; what was there is as it was.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={path!r} is no path: give the name of a file to write")
    try:
        # A link stays one: what it leads to is replaced.
        return _write(Path(path).resolve(), text)
    except ReportError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # also links in a circle, NUL in a name
        raise ReportError(
            f"path={str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}. "
            "Give a path in a folder that you may write to, on a disk with room"
        ) from error


def _write(target: Path, text: str) -> Path:
    if not target.parent.is_dir():
        raise ReportError(
            f"path={str(target)!r} is in a folder that does not exist, {target.parent}: "
            "make the folder first, or give another path"
        )
    if os.path.exists(target) and not target.is_file():
        raise ReportError(
            f"path={str(target)!r} is no ordinary file: give the name of a file to write"
        )
    draft = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with draft.open("x", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
        draft.replace(target)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return target
