"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cudagraph_jax.errors import ConfigError, CUDAGraphError


class ReportError(CUDAGraphError, OSError):
    """A report, a figure or its numbers could not be written."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Finds out before long work whether a file could be written; leaves everything as it was.

    Raises:
        ConfigError: `path` is no path.
        ReportError: The file could not be written.
    """
    with _draft_for(path):
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
    with _draft_for(path) as draft:
        draft.path.write_bytes(
            content.encode(errors="replace") if isinstance(content, str) else content
        )
        draft.path.replace(draft.target)
    return draft.target


def write_json(path: str | os.PathLike[str], content: Mapping[str, object]) -> Path:
    """Writes the content as JSON; in all else it is `write_whole`."""
    return write_whole(path, json.dumps(content, indent=2) + "\n")


class _Draft(NamedTuple):
    """A new file beside the one that it is to replace."""

    path: Path
    target: Path


@contextmanager
def _draft_for(path: str | os.PathLike[str]) -> Iterator[_Draft]:
    """An empty draft, which goes again unless it was moved to its target."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={path!r} is no path: give the name of a file to write")
    try:
        # A link stays one: what it leads to is replaced.
        target = Path(path).resolve()
        _check_target(target)
        draft = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            draft.touch(exist_ok=False)
            yield _Draft(draft, target)
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
    except ReportError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # also links in a circle, NUL in a name
        raise ReportError(
            f"path={str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}. "
            "Give a path in a folder that you may write to, on a disk with room"
        ) from error


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise ReportError(
            f"path={str(target)!r} is in a folder that does not exist, {target.parent}: "
            "make the folder first, or give another path"
        )
    try:
        is_file = stat.S_ISREG(target.stat().st_mode)
    except FileNotFoundError:
        return
    if not is_file:
        raise ReportError(
            f"path={str(target)!r} is no ordinary file: give the name of a file to write"
        )
