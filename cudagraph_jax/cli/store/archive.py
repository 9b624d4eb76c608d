"""Entries in one file: a plain tar, so that an image can be built from it by other tools, too.

Only what `write_archive` writes is read: ordinary files with the names of entries, then zeros.
Nothing is ever unpacked to a path that an archive names.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cudagraph_jax._base.files import replacement_of
from cudagraph_jax.errors import CUDAGraphError, StoreError
from cudagraph_jax.store.entries import as_miss, is_entry, read_data
from cudagraph_jax.store.folder import refuse_danger
from cudagraph_jax.store.outcomes import UnusableError

# An image whose builder unpacks it by itself (ADD of a Dockerfile) may serve as another user.
_MODE = 0o644
_FILE = (tarfile.REGTYPE, tarfile.AREGTYPE)
_BLOCK = tarfile.BLOCKSIZE
_END_BYTES = 2 * _BLOCK
_MOST_BEHIND_BYTES = 1 << 20
"""A tar ends with a multiple of some block of zeros, which is never that large."""
_LONGEST_NAME = 80


def write_archive(path: Path, entries: Iterable[tuple[str, bytes]]) -> None:
    """Writes entries as one file, in place of one that is there; equal entries give equal bytes.

    Args:
        path: The file, made as its owner's alone. Its folder must exist.
        entries: Names and bytes in the order of the archive. If getting one of them fails, nothing
            is written.

    Raises:
        ReportError: It cannot be written; what was there is as it was.
    """
    with (
        replacement_of(path, mode=0o600) as (draft, _),
        tarfile.open(fileobj=draft, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), _MODE
            tar.addfile(member, io.BytesIO(data))


@contextmanager
def opened(path: Path, *, is_trusted: bool) -> Iterator[BinaryIO]:
    """An archive that is safe to read, as the store's own files must be.

    Args:
        path: The file, or a link to it.
        is_trusted: Whether a key authenticates its entries, so that anybody may have written it.

    Raises:
        StoreError: It cannot be read, or others can change it.
    """
    try:
        # A pipe does not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"{path} cannot be read: {why}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StoreError(f"{path} is no ordinary file: give what export wrote")
        if not is_trusted:
            refuse_danger(descriptor, path)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_archive(file: BinaryIO, *, key: bytes | None = None) -> Iterator[tuple[str, bytes]]:
    """The name and the bytes of each member, which the caller still has to verify.

    Args:
        file: The archive.
        key: What authenticates its entries, so that no memory is taken for one of a stranger.

    Raises:
        StoreError: It holds anything but what `write_archive` writes, or its end is missing.
    """
    archive_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    end, seen = 0, set[str]()
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            for member in tar:
                _check(member, seen)
                seen.add(member.name)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if end > archive_bytes:
                    raise StoreError("it is no whole tar: its end is missing")
                yield member.name, _data(file, member, key)
        _check_end(file, end)
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise StoreError("it is no whole, uncompressed tar") from error
    except CUDAGraphError:
        raise
    except OSError as error:
        raise StoreError(f"it cannot be read: {error.strerror or error}") from error


class _Headers(io.BufferedIOBase):
    """An archive as tarfile reads it, which takes what a header states for the length of the next.

    Those that `write_archive` writes are of one block each.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        """That many bytes, if they are no more than headers may be."""
        if size is None or not 0 <= size <= _MOST_BEHIND_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Goes to a place of the archive."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place in the archive."""
        return self._file.tell()


def _check(member: tarfile.TarInfo, seen: set[str]) -> None:
    name = member.name
    if not is_entry(name):
        raise StoreError(f"{name[:_LONGEST_NAME]!r} is no name of an entry")
    # Of a sparse file a few bytes may stand for any number of zeros.
    if member.type not in _FILE or member.issparse():
        raise StoreError(f"{name} is no ordinary file in it")
    if name in seen:
        raise StoreError(f"{name} is in it twice")


def _data(file: BinaryIO, member: tarfile.TarInfo, key: bytes | None) -> bytes:
    try:
        return read_data(file, member.size, key=key, start=member.offset_data)
    except UnusableError as problem:
        raise StoreError(f"{member.name} is {as_miss(member.name, problem)}") from problem


def _check_end(file: BinaryIO, end: int) -> None:
    """Finds zeros behind the last member: tarfile takes a damaged header for the end."""
    file.seek(end)
    zeros = file.read(_MOST_BEHIND_BYTES + 1)
    if zeros.strip(b"\0") or len(zeros) > _MOST_BEHIND_BYTES:
        raise StoreError("it is no whole tar: something else stands behind its members")
    if len(zeros) < _END_BYTES:
        raise StoreError("it is no whole tar: its end is missing")
