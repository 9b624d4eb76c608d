"""A file's bytes and what they mean."""

import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.errors import StoreError
from cudagraph_jax.store.format import (
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Header,
    pack,
    read_header,
    read_prefix,
    unpack,
)
from cudagraph_jax.store.identity import differences
from cudagraph_jax.store.outcomes import MissReason, UnusableError
from tests.helpers.stores import EXTRA, IDENTITY, KEY, OTHER_KEY, PAYLOAD

HEADER = Header(dict(IDENTITY), dict(EXTRA), 12.5)
PLAIN = b"".join(pack(HEADER, PAYLOAD, key=None))
SEALED = b"".join(pack(HEADER, PAYLOAD, key=KEY))

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.text() | numbers
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=8)
identities = st.dictionaries(st.text(), values, max_size=6)
keys = st.none() | st.binary(min_size=16, max_size=80)


def refusal(data, *, key=None):
    with pytest.raises(UnusableError) as raised:
        unpack(data, key=key)
    return raised.value.reason


@given(identities, identities, st.binary(max_size=500), keys)
def test_round_trip(identity, extra, payload, key):
    """Every identity and payload comes back as it was put, with a key and without."""
    data = b"".join(pack(Header(identity, extra, 3.0), payload, key=key))
    header, back = unpack(data, key=key)
    assert (header, back) == (Header(identity, extra, 3.0), payload)
    assert differences(header.identity, identity) == ()


@given(st.binary(max_size=300), keys)
def test_any_bytes(data, key):
    """Bytes that are no file are refused by name, whatever they are."""
    assert refusal(data, key=key) in (MissReason.FOREIGN, MissReason.TRUNCATED)
    assert isinstance(refusal(MAGIC + data, key=key), MissReason)
    assert isinstance(refusal(PLAIN[:16] + data, key=key), MissReason)


def test_layout():
    """The bytes are laid out as the module says: other programs may read them."""
    magic, version, sealed, header_bytes, payload_bytes = struct.unpack_from("<8sIIQQ", PLAIN)
    assert (magic, version, sealed, payload_bytes) == (b"\x89CGJ\r\n\x1a\n", 1, 0, len(PAYLOAD))
    end = 32 + header_bytes + payload_bytes
    header = json.loads(PLAIN[32 : 32 + header_bytes])
    assert header == {"identity": IDENTITY, "extra": EXTRA, "written_at": 12.5}
    assert PLAIN[32 + header_bytes : end] == PAYLOAD
    assert PLAIN[end:] == hashlib.sha256(PLAIN[:end]).digest()
    assert len(SEALED) == len(PLAIN) + 32


@pytest.mark.parametrize(("data", "key"), [(PLAIN, None), (SEALED, KEY)], ids=["plain", "sealed"])
def test_every_flipped_bit(data, key):
    """No file with one flipped bit is taken, wherever the bit is."""
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert isinstance(refusal(bytes(flipped), key=key), MissReason)


@pytest.mark.parametrize(("data", "key"), [(PLAIN, None), (SEALED, KEY)], ids=["plain", "sealed"])
def test_every_truncation(data, key):
    """A file that lacks its end is truncated, at whatever length it stops."""
    reasons = {refusal(data[:length], key=key) for length in range(len(data))}
    assert reasons == {MissReason.TRUNCATED}
    assert refusal(data + b"\0", key=key) is MissReason.CORRUPT


@pytest.mark.parametrize(
    ("data", "key", "words"),
    [
        (SEALED, OTHER_KEY, "it was not written with this store's key"),
        (SEALED, None, "it was written with a key, and this store has none"),
        (PLAIN, KEY, "it was written without a key, and this store has one"),
    ],
)
def test_keys(data, key, words):
    """With the wrong key, without one, or with one too many, nothing is taken."""
    with pytest.raises(UnusableError, match=f"^{words}$") as raised:
        unpack(data, key=key)
    assert raised.value.reason is MissReason.NOT_AUTHENTIC


def test_a_forged_file():
    """Who lacks the key can make the checksum right, and is refused nevertheless."""
    end = len(SEALED) - 64
    forged = SEALED[: end - 1] + bytes([SEALED[end - 1] ^ 1])
    forged += hashlib.sha256(forged).digest() + SEALED[-32:]
    assert refusal(forged, key=KEY) is MissReason.NOT_AUTHENTIC


@pytest.mark.parametrize("version", [0, 2, 1 << 31])
def test_other_versions(version):
    """Another format version is named before anything else of the file is looked at."""
    other = MAGIC + struct.pack("<I", version)
    assert refusal(other) is MissReason.OUTDATED
    assert refusal(other + PLAIN[12:]) is MissReason.OUTDATED


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"),
    [(1 << 63, 0), (MAX_HEADER_BYTES + 1, 0), (0, (1 << 64) - 1), (0, MAX_PAYLOAD_BYTES + 1)],
)
def test_absurd_lengths(header_bytes, payload_bytes):
    """Lengths that no file has are refused by the first 32 bytes alone, however long it is."""
    start = struct.pack("<8sIIQQ", MAGIC, 1, 0, header_bytes, payload_bytes)
    with pytest.raises(UnusableError, match="no file has header_bytes=") as raised:
        read_prefix(start, file_bytes=1 << 65)
    assert raised.value.reason is MissReason.CORRUPT


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        b'{"identity": [], "extra": {}, "written_at": 0}',
        b'{"identity": {}, "extra": 3, "written_at": 0}',
        b'{"identity": {}, "extra": {}, "written_at": "0"}',
        b'{"identity": {}, "extra": {}, "written_at": NaN}',
        b'{"identity": {}, "extra": {}, "written_at": 1e999}',
        b'{"identity": {}, "extra": {}, "written_at": ' + b"1" * 5000 + b"}",
        b'{"identity": {}, "extra": {}, "written_at": 1' + b"0" * 400 + b"}",
        b'{"identity": {}, "extra": {}, "written_at": 0, "more": 1}',
        b"[" * 100_000,
    ],
)
def test_headers_that_are_none(text):
    """A header that is not this package's is corrupt, whatever else it is."""
    with pytest.raises(UnusableError, match="its header is no header") as raised:
        read_header(text)
    assert raised.value.reason is MissReason.CORRUPT


def test_too_large():
    """A header beyond the limit is an error of who puts it."""
    header = Header({"hlo": "x" * MAX_HEADER_BYTES}, {}, 0.0)
    with pytest.raises(StoreError, match=r"header of 1,048,\d+ bytes .* put hashes in the header"):
        pack(header, b"", key=None)
