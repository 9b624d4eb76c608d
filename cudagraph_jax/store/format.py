"""A file's bytes and what they mean. Nothing here opens a file.

    offset  size  what
    0       8     magic
    8       4     format version, little-endian like all numbers here
    12      4     1 if a key authenticates the file, else 0
    16      8     length of the header in bytes, h
    24      8     length of the payload in bytes, p
    32      h     header: a JSON object in ASCII
    32+h    p     payload
    32+h+p  32    SHA-256 of everything before
    64+h+p  32    with a key only: HMAC-SHA-256 of the SHA-256, and so of everything before

The magic has a byte that is no text and both line ends, so that a file which went through a
text-mode transfer is foreign at once, as in PNG.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from typing import IO, Any, NamedTuple, NoReturn

from cudagraph_jax.errors import StoreError
from cudagraph_jax.store.identity import text_of
from cudagraph_jax.store.outcomes import MissReason, UnusableError

MAGIC = b"\x89CGJ\r\n\x1a\n"
VERSION = 1
PREFIX_BYTES = 32
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 32

_PREFIX = struct.Struct("<8sIIQQ")
_VERSION = struct.Struct("<8sI")
_DIGEST_BYTES = 32
_CHUNK_BYTES = 1 << 20
_MOST_AT_ONCE = 1 << 26
"""A larger file is read twice: to find out whether it is whole, and then into memory."""
_PURPOSE = b"cudagraph_jax.store 1\n"


class Prefix(NamedTuple):
    """What the first 32 bytes of a file say.

    Attributes:
        header_bytes: The length of the header.
        payload_bytes: The length of the payload.
        has_key: Whether an HMAC follows the digest.
    """

    header_bytes: int
    payload_bytes: int
    has_key: bool

    @property
    def end(self) -> int:
        """Where the payload ends, and the digest starts."""
        return PREFIX_BYTES + self.header_bytes + self.payload_bytes

    @property
    def file_bytes(self) -> int:
        """The length of the whole file."""
        return self.end + _DIGEST_BYTES * (2 if self.has_key else 1)


class Header(NamedTuple):
    """What stands before the payload.

    Attributes:
        identity: What identifies the executable.
        extra: What else the caller put.
        written_at: When, in seconds of the writer's clock.
    """

    identity: dict[str, Any]
    extra: dict[str, Any]
    written_at: float


def pack(header: Header, payload: bytes, *, key: bytes | None) -> tuple[bytes, ...]:
    """A file's bytes, in pieces that follow each other.

    Raises:
        StoreError: The header or the payload is too large.
    """
    text = text_of(header._asdict()).encode()
    if len(text) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise StoreError(
            f"header of {len(text):,} bytes and payload of {len(payload):,} are more than a file "
            f"may hold, {MAX_HEADER_BYTES:,} and {MAX_PAYLOAD_BYTES:,}: put hashes in the header"
        )
    prefix = _PREFIX.pack(MAGIC, VERSION, int(key is not None), len(text), len(payload))
    digest = _digest(prefix, text, payload)
    return prefix, text, payload, digest if key is None else digest + _tag(key, digest)


def read_prefix(start: bytes, *, file_bytes: int) -> Prefix:
    """The lengths that a file states, found to fit the length that it has.

    Args:
        start: Its first `PREFIX_BYTES`, or all of it if it has fewer.
        file_bytes: Its length.

    Raises:
        UnusableError: It is foreign, outdated, truncated, or states what cannot be.
    """
    if start[:8] != MAGIC[: len(start)]:
        _refuse(MissReason.FOREIGN, "it does not start like a file of this package")
    if len(start) >= _VERSION.size:
        _, version = _VERSION.unpack_from(start)
        if version != VERSION:
            age = "newer" if version > VERSION else "older"
            what = f"format version {version} is {age} than {VERSION}, the one that is read here"
            _refuse(MissReason.OUTDATED, what)
    if len(start) < PREFIX_BYTES:
        _refuse(MissReason.TRUNCATED, f"{file_bytes} bytes are not even its beginning")
    _, _, keyed, header_bytes, payload_bytes = _PREFIX.unpack_from(start)
    if keyed > 1 or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        _refuse(MissReason.CORRUPT, f"no file has {header_bytes=}, {payload_bytes=}, {keyed=}")
    prefix = Prefix(header_bytes, payload_bytes, keyed == 1)
    if file_bytes < prefix.file_bytes:
        _refuse(MissReason.TRUNCATED, f"it has {file_bytes:,} of {prefix.file_bytes:,} bytes")
    if file_bytes > prefix.file_bytes:
        _refuse(MissReason.CORRUPT, f"it has {file_bytes - prefix.file_bytes:,} bytes too many")
    return prefix


def is_newer(start: bytes) -> bool:
    """Whether a file that starts like this is of a format that a later version writes."""
    if start[:8] != MAGIC or len(start) < _VERSION.size:
        return False
    return bool(_VERSION.unpack_from(start)[1] > VERSION)


def check_stream(file: IO[bytes], *, file_bytes: int, key: bytes | None, start: int = 0) -> None:
    """Refuses an open file that is not whole, taking no memory for the lengths that it states.

    With a key the last bytes are looked at first: without it nobody can have written them.

    Args:
        file: May be a larger one, of which this is a part.
        file_bytes: Its length.
        key: The store's.
        start: Where it begins.

    Raises:
        UnusableError: The file is not as it was written, or not written with this key.
    """
    file.seek(start)
    prefix = read_prefix(file.read(min(PREFIX_BYTES, file_bytes)), file_bytes=file_bytes)
    file.seek(start + prefix.end)
    digest = file.read(_DIGEST_BYTES)
    tag = file.read(_DIGEST_BYTES) if prefix.has_key else b""
    _authenticate(digest, tag, key)
    if file_bytes <= _MOST_AT_ONCE:
        return
    file.seek(start)
    found, left = hashlib.sha256(), prefix.end
    while left and (piece := file.read(min(left, _CHUNK_BYTES))):
        found.update(piece)
        left -= len(piece)
    _compare(found.digest(), digest)


def unpack(data: bytes, *, key: bytes | None) -> tuple[Header, bytes]:
    """The header and the payload of a whole file; see `open_header`.

    Raises:
        UnusableError: The file is not as it was written, or not written with this key.
    """
    header, start = open_header(data, key=key)
    return header, data[start : read_prefix(data[:PREFIX_BYTES], file_bytes=len(data)).end]


def open_header(data: bytes, *, key: bytes | None) -> tuple[Header, int]:
    """The header of a whole file, and where its payload starts.

    With a key the HMAC, and in any case the digest of all of it, are checked before the header is
    parsed.

    Raises:
        UnusableError: The file is not as it was written, or not written with this key.
    """
    prefix = read_prefix(data[:PREFIX_BYTES], file_bytes=len(data))
    digest = data[prefix.end : prefix.end + _DIGEST_BYTES]
    _authenticate(digest, data[prefix.end + _DIGEST_BYTES :], key)
    _compare(_digest(memoryview(data)[: prefix.end]), digest)
    start = PREFIX_BYTES + prefix.header_bytes
    return read_header(data[PREFIX_BYTES:start]), start


def read_header(text: bytes) -> Header:
    """The header that a JSON text means.

    Raises:
        UnusableError: It is no such header.
    """
    try:
        values = json.loads(text.decode("ascii"), parse_constant=_no_number)
        header = Header(**values)
        is_valid = isinstance(header.identity, dict) and isinstance(header.extra, dict)
        return header._replace(written_at=_finite(header.written_at)) if is_valid else _no_header()
    except (ValueError, TypeError, RecursionError, OverflowError):
        _no_header()


def _authenticate(digest: bytes, tag: bytes, key: bytes | None) -> None:
    if key is None and tag:
        _refuse(MissReason.NOT_AUTHENTIC, "it was written with a key, and this store has none")
    if key is not None and not tag:
        _refuse(MissReason.NOT_AUTHENTIC, "it was written without a key, and this store has one")
    if key is not None and not hmac.compare_digest(_tag(key, digest), tag):
        _refuse(MissReason.NOT_AUTHENTIC, "it was not written with this store's key")


def _compare(found: bytes, stated: bytes) -> None:
    if not hmac.compare_digest(found, stated):
        _refuse(MissReason.CORRUPT, "its checksum is wrong")


def _digest(*pieces: bytes | memoryview) -> bytes:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.digest()


def _tag(key: bytes, digest: bytes) -> bytes:
    return hmac.digest(key, _PURPOSE + digest, "sha256")


def _finite(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _no_number(constant: str) -> NoReturn:
    raise ValueError(constant)


def _no_header() -> NoReturn:
    _refuse(MissReason.CORRUPT, "its header is no header of this package")


def _refuse(reason: MissReason, message: str) -> NoReturn:
    raise UnusableError(message, reason=reason)
