"""Single files of a folder: read whole, described by their headers, or put aside."""

from __future__ import annotations

import re
import secrets
import stat
from contextlib import suppress
from typing import IO

from cudagraph_jax.store.folder import Folder
from cudagraph_jax.store.format import (
    PREFIX_BYTES,
    check_stream,
    is_newer,
    open_header,
    read_header,
    read_prefix,
    unpack,
)
from cudagraph_jax.store.identity import SUFFIX, file_name
from cudagraph_jax.store.outcomes import SPOILED, Miss, MissReason, Record, Stored, UnusableError

BAD = ".bad"
MOST_BAD = 16
"""How many files stay aside; the oldest go first."""

_BAD = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}(?:\.[0-9a-f]+)?{re.escape(BAD)}")
_ENTRY = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")


def is_entry(name: str) -> bool:
    """Whether a file of this name is an entry."""
    return _ENTRY.fullmatch(name) is not None


def is_bad(name: str) -> bool:
    """Whether a file of this name was put aside."""
    return _BAD.fullmatch(name) is not None


def entry_names(folder: Folder) -> list[str]:
    """The names in a folder that are names of entries; everything else is left alone."""
    return [name for name in folder.names() if is_entry(name)]


def read_entry(folder: Folder, name: str, *, key: bytes | None) -> Stored:
    """A file with its payload, checked over its whole length before anything of it is used.

    Raises:
        UnusableError: It is no whole file of this package, or its name is another entry's.
    """
    with folder.reading(name) as (file, status):
        header, payload = unpack(read_data(file, status.st_size, key=key), key=key)
    return Stored(
        file=name,
        identity=header.identity,
        extra=header.extra,
        payload=payload,
        written_at=header.written_at,
        has_key=key is not None,
    )


def read_file(folder: Folder, name: str, *, key: bytes | None) -> bytes | Miss:
    """A file's own bytes, if it would be loaded as the entry of its name; else why not."""
    try:
        with folder.reading(name) as (file, status):
            data = read_data(file, status.st_size, key=key)
    except UnusableError as problem:
        return as_miss(name, problem)
    return problem_in(name, data, key=key) or data


def read_data(file: IO[bytes], file_bytes: int, *, key: bytes | None, start: int = 0) -> bytes:
    """All bytes of an open file, which are still to be verified: somebody may change it meanwhile.

    Args:
        file: May be a larger one, of which this is a part.
        file_bytes: Its length.
        key: The store's.
        start: Where it begins.

    Raises:
        UnusableError: It is foreign, outdated, truncated or corrupt, or not written with the key.
    """
    check_stream(file, file_bytes=file_bytes, key=key, start=start)
    file.seek(start)
    return file.read(file_bytes)


def is_of_newer_format(folder: Folder, name: str) -> bool:
    """Whether a file is one that a later version of this package wrote, and reads."""
    with suppress(UnusableError), folder.reading(name) as (file, _):
        return is_newer(file.read(PREFIX_BYTES))
    return False


def read_record(folder: Folder, name: str) -> Record | None:
    """A file as its header describes it, with no checksum verified; None if it is gone."""
    status = folder.status(name)
    if status is None:
        return None
    try:
        with folder.reading(name) as (file, found):
            prefix = read_prefix(file.read(PREFIX_BYTES), file_bytes=found.st_size)
            header = read_header(file.read(prefix.header_bytes))
    except UnusableError as problem:
        return Record(
            file=name,
            size_bytes=status.st_size,
            used_at=status.st_mtime,
            identity={},
            extra={},
            problem=as_miss(name, problem),
        )
    return Record(
        file=name,
        size_bytes=found.st_size,
        used_at=found.st_mtime,
        identity=header.identity,
        extra=header.extra,
        payload_bytes=prefix.payload_bytes,
        written_at=header.written_at,
        has_key=prefix.has_key,
    )


def problem_of(folder: Folder, name: str, *, key: bytes | None) -> Miss | None:
    """Why a file would not be loaded; None if it would."""
    found = read_file(folder, name, key=key)
    return found if isinstance(found, Miss) else None


def problem_in(name: str, data: bytes, *, key: bytes | None) -> Miss | None:
    """Why bytes would not be loaded as the entry of a name; None if they would."""
    try:
        if not is_entry(name):
            raise UnusableError("it has no name of an entry", reason=MissReason.FOREIGN)
        header, _ = open_header(data, key=key)
    except UnusableError as problem:
        return as_miss(name, problem)
    if file_name(header.identity) == name:
        return None
    detail = "its name is not that of what it holds"
    return Miss(file=name, reason=MissReason.DIFFERS, detail=detail)


def as_miss(name: str, problem: UnusableError, *, moved_to: str | None = None) -> Miss:
    """A problem with a file as the answer to who asked for it."""
    return Miss(
        file=name,
        reason=problem.reason,
        detail=str(problem),
        differences=problem.differences,
        moved_to=moved_to,
    )


def put_aside(folder: Folder, name: str, problem: UnusableError) -> str | None:
    """Moves a spoiled file out of the way, so that it is not read again; its new name, if any."""
    if problem.reason not in SPOILED or not _is_still(folder, name, problem.seen):
        return None
    # A directory takes no file's place, and gets none.
    names = (f"{name}{BAD}", f"{name}.{secrets.token_hex(4)}{BAD}")
    aside = next((aside for aside in names if folder.move(name, aside)), None)
    _remove_oldest(folder)
    return aside


def _is_still(folder: Folder, name: str, seen: tuple[int, int] | None) -> bool:
    """Whether a name is still that of the file that was read: a writer may have replaced it."""
    with suppress(OSError):
        status = folder.status(name)
        if status is None:
            return False
        if seen is None:
            return not stat.S_ISREG(status.st_mode)
        return seen == (status.st_dev, status.st_ino)
    return False


def _remove_oldest(folder: Folder) -> None:
    with suppress(OSError):
        bad = [name for name in folder.names() if is_bad(name)]
        moved = {name: folder.status(name) for name in bad}
        bad.sort(key=lambda name: status.st_ctime if (status := moved[name]) else 0.0)
        for name in bad[:-MOST_BAD]:
            folder.remove(name)
