"""Entries in words: what a row of a table says about one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from cudagraph_jax.store import Record

_SHORT_FILE = 12
_SHORT_CODE = 8
_LONGEST = 40
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_AGES = ((86400.0, 2, "days"), (3600.0, 1, "h"), (60.0, 1, "min"))


def no_entries(foreign: Sequence[str]) -> str:
    """What is said of a directory without entries, by the names of what else is in it."""
    if not foreign:
        return "no entries here: is it a store?"
    others = f"{foreign[0]} and {len(foreign) - 1:,} more" if foreign[1:] else foreign[0]
    return f"no entries here, but {cut(others)}: give the directory of a store"


def field(record: Record, name: str) -> str:
    """A field of the identity as text, whatever a file holds there; empty if it is missing."""
    value = record.identity.get(name)
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def bucket_of(record: Record) -> str:
    """The bucket as `8x128`, however it is written."""
    value = record.identity.get("bucket")
    return "x".join(map(str, value)) if isinstance(value, list) else field(record, "bucket")


def known_by(record: Record) -> str:
    """`stablehlo`, or `fingerprint` with what its author called it."""
    return f"{field(record, 'known_by')} {field(record, 'fingerprint')}".strip()


def code_of(record: Record) -> str:
    """The beginning of the hash of its code: two edits of one function differ in it."""
    return (field(record, "code") or field(record, "stablehlo"))[:_SHORT_CODE]


def device_of(record: Record) -> str:
    """The platform, and the kind of device where that says more."""
    platform, kinds = field(record, "platform"), record.identity.get("device_kind")
    kind = ", ".join(map(str, kinds)) if isinstance(kinds, list) else field(record, "device_kind")
    return platform if kind == platform else f"{platform} {kind}".strip()


def short_file(record: Record) -> str:
    """As much of the file's name as tells it apart."""
    return record.file[:_SHORT_FILE]


def cut(text: str) -> str:
    """The text, with its end left out where it is too long for a table."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def size_text(count: int) -> str:
    """A number of bytes in the largest unit of which there is one."""
    for unit, factor in _UNITS:
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"


def age_text(age_s: float) -> str:
    """An age in words; a time in the future, of another clock, is none."""
    for unit_s, least, unit in _AGES:
        if age_s >= least * unit_s:
            return f"{int(age_s // unit_s):,} {unit} ago"
    return "just now"


def entries_text(count: int) -> str:
    """A number of entries in words."""
    return f"{count:,} {'entry' if count == 1 else 'entries'}"


def order(record: Record) -> tuple[str, list[int], str, str]:
    """By function, then by the size of the bucket; a sort key."""
    sizes = [int(digits) for digits in re.findall(r"[0-9]{1,15}", bucket_of(record))]
    return field(record, "name"), sizes, known_by(record), record.file
