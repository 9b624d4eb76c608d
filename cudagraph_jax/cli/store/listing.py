"""`cudagraph-jax store ls`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from cudagraph_jax.cli.store.opening import store_of
from cudagraph_jax.cli.store.shown import (
    age_text,
    bucket_of,
    cut,
    device_of,
    entries_text,
    field,
    known_by,
    order,
    short_file,
    size_text,
)
from cudagraph_jax.store import Record
from cudagraph_jax.tables import text_table

_HEADER = (
    *("file", "name", "bucket", "known by", "device", "jax"),
    *("size", "last used", "sealed", "problem"),
)


def ls(options: argparse.Namespace) -> int:
    """Prints every entry of a store; 0, since headers alone do not say what is whole."""
    store = store_of(options, mode="ro")
    records = sorted(store.ls(), key=order)
    if options.json:
        print(json.dumps(ls_dict(str(store.path), records), indent=2))
    else:
        print(ls_text(records, now=time.time()))
    return 0


def ls_text(records: Sequence[Record], *, now: float) -> str:
    """A table, and a line with the total.

    Args:
        records: The entries, in the order of the rows.
        now: The time that ages are counted to, in seconds.
    """
    unread = sum(record.problem is not None for record in records)
    total = size_text(sum(record.size_bytes for record in records))
    line = f"{entries_text(len(records))}, {total}"
    if unread:
        line += f"; {unread:,} of them cannot be read"
    if not records:
        return line
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
                "is_sealed": record.is_sealed,
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
        cut(device_of(record)),
        cut(field(record, "jax")),
        size_text(record.size_bytes),
        age_text(now - record.used_at),
        ("yes" if record.is_sealed else "no") if is_read else "",
        "" if record.problem is None else str(record.problem),
    )
