"""`cudagraph-jax store ls`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from cudagraph_jax._base.text import text_table
from cudagraph_jax.cli.store.opening import store_of
from cudagraph_jax.cli.store.shown import (
    age_text,
    bucket_of,
    code_of,
    cut,
    device_of,
    entries_text,
    field,
    known_by,
    no_entries,
    order,
    short_file,
    size_text,
)
from cudagraph_jax.store import Record

_HEADER = (
    "file",
    "name",
    "bucket",
    "known by",
    "code",
    "device",
    "jax",
    "jaxlib",
    "size",
    "last used",
    "key",
    "problem",
)


def ls(options: argparse.Namespace) -> int:
    """Prints every entry of a store; 0, since headers alone do not say what is whole."""
    store = store_of(options, mode="ro")
    records = sorted(store.ls(), key=order)
    if options.json:
        print(json.dumps(ls_dict(str(store.path), records), indent=2))
    else:
        beside, now = store.beside(), time.time()
        aside = len(beside.put_aside)
        print(ls_text(records, now=now, put_aside=aside, foreign=beside.foreign))
    return 0


def ls_text(
    records: Sequence[Record], *, now: float, put_aside: int = 0, foreign: Sequence[str] = ()
) -> str:
    """A table, and a line with the total.

    Args:
        records: The entries, in the order of the rows.
        now: The time that ages are counted to, in seconds.
        put_aside: How many files had to make way for entries.
        foreign: Names of what else lies there.
    """
    unread = sum(record.problem is not None for record in records)
    total = size_text(sum(record.size_bytes for record in records))
    line = f"{entries_text(len(records))}, {total}"
    if unread:
        line += f"; {unread:,} of them cannot be read"
    if put_aside:
        line += f"; {put_aside:,} put aside"
    if not records:
        line = no_entries(foreign)
        return f"{line} ({put_aside:,} put aside)" if put_aside else line
    return f"{text_table(_HEADER, [_row(record, now) for record in records])}\n\n{line}"


def ls_dict(path: str, records: Sequence[Record]) -> dict[str, Any]:
    """The same as values that JSON can hold, with whole identities and names."""
    return {
        "path": path,
        "entries": [
            {
                "file": record.file,
                "size_bytes": record.size_bytes,
                "payload_bytes": record.payload_bytes,
                "written_at": record.written_at,
                "used_at": record.used_at,
                "has_key": record.has_key,
                "identity": record.identity,
                "problem": None if record.problem is None else str(record.problem),
            }
            for record in records
        ],
        "total_bytes": sum(record.size_bytes for record in records),
    }


def _row(record: Record, now: float) -> tuple[str, ...]:
    is_read = record.problem is None
    return (
        short_file(record),
        cut(field(record, "name")),
        cut(bucket_of(record)),
        cut(known_by(record)),
        code_of(record),
        cut(device_of(record)),
        cut(field(record, "jax")),
        cut(field(record, "jaxlib")),
        size_text(record.size_bytes),
        age_text(now - record.used_at),
        ("yes" if record.has_key else "no") if is_read else "",
        "" if record.problem is None else str(record.problem),
    )
