"""`cudagraph-jax store export` and `import`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from cudagraph_jax._base.checks import nearest
from cudagraph_jax._base.text import one_line
from cudagraph_jax.cli.store.archive import opened, read_archive, write_archive
from cudagraph_jax.cli.store.opening import key_of, store_of
from cudagraph_jax.cli.store.shown import bucket_of, entries_text, field, size_text
from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import GraphStore, Miss, Record
from cudagraph_jax.store.entries import problem_in
from cudagraph_jax.store.folder import checked_key

_MOST_NAMED = 8


def export_entries(options: argparse.Namespace) -> int:
    """Packs the chosen entries of a store into one file; 0."""
    store = store_of(options, mode="ro")
    records = chosen(store.ls(), options.name, options.bucket, options.fingerprint)
    write_archive(options.file, _whole(store, records))
    size = size_text(sum(record.size_bytes for record in records))
    print(one_line(f"{entries_text(len(records))}, {size}, written to {options.file}"))
    return 0


def import_entries(options: argparse.Namespace) -> int:
    """Puts the entries of an archive into a store, none of them if one is not whole; 0.

    A disk that gets full is an error half-way: the entries that were put until then stay.
    """
    key = checked_key(key_of(options))
    with opened(options.file, is_trusted=key is not None) as file:
        # Every entry before the first is put, and again when it is: the file may be written to.
        first = verified(file, key, said=f"{options.file} is refused, nothing is imported")
        count = sum(1 for _ in first)
        if not count:
            raise StoreError(f"{options.file} holds no entries: give what export wrote")
        store = GraphStore(options.directory, key=key)
        present = {record.file for record in store.ls()}
        again = verified(file, key, said=f"{options.file} changed while it was imported")
        put = {name for name, data in again if store.add_file(name, data)}
    text = import_text(store.path, count=count, new=len(put - present), mended=len(put & present))
    print(one_line(text))
    return 0


def import_text(path: Path, *, count: int, new: int, mended: int) -> str:
    """What became of the entries of an archive.

    Args:
        path: The store.
        count: How many there were.
        new: How many were not there before.
        mended: How many took the place of a file that was not whole.
    """
    parts = [f"{new:,} new"]
    if mended:
        parts.append(f"{mended:,} in place of files that were not whole")
    if kept := count - new - mended:
        parts.append(f"{kept:,} already there")
    return f"{entries_text(count)} imported into {path}: {', '.join(parts)}"


def chosen(
    records: Sequence[Record], names: Sequence[str], buckets: Sequence[str], fingerprint: str | None
) -> list[Record]:
    """The records to export, by the names of their files.

    One whose header cannot be read may be any of them, and so is always chosen.

    Raises:
        StoreError: There are none, or something that was asked for is in none of them.
    """
    wanted: list[tuple[str, Sequence[str], Callable[[Record], str]]] = [
        ("--name", names, lambda record: field(record, "name")),
        ("--bucket", buckets, bucket_of),
        (
            "--fingerprint",
            [] if fingerprint is None else [fingerprint],
            lambda record: field(record, "fingerprint"),
        ),
    ]
    if not records:
        raise StoreError("there are no entries to export")
    found = list(records)
    for option, values, of in wanted:
        known = sorted({of(record) for record in found} - {""})
        if values:
            found = [r for r in found if r.problem is not None or of(r) in values]
        for value in values:
            if value not in known:
                choice = nearest(value, known) if known else "none of those chosen has any"
                raise StoreError(f"no entry to export has {option} {value}: {choice}")
    return sorted(found, key=lambda record: record.file)


def _whole(store: GraphStore, records: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes; raises once it has found every entry that is not whole."""
    problems = []
    for record in records:
        data = store.file_bytes(record.file)
        if isinstance(data, Miss):
            problems.append(f"{record.file} is {data}")
        elif not problems:
            yield record.file, data
    if problems:
        more = len(problems) - _MOST_NAMED
        named = problems[:_MOST_NAMED] + ([f"and {more:,} more"] if more > 0 else [])
        raise StoreError(
            f"{len(problems):,} of {entries_text(len(records))} would not be loaded, nothing is "
            f"written: {'; '.join(named)}"
        )


def verified(file: BinaryIO, key: bytes | None, *, said: str) -> Iterator[tuple[str, bytes]]:
    """The entries of an archive; an error that starts with `said` at the first that is none."""
    try:
        for name, data in read_archive(file, key=key):
            if (problem := problem_in(name, data, key=key)) is not None:
                raise StoreError(f"{name} is {problem}")
            yield name, data
    except StoreError as error:
        raise StoreError(f"{said}: {error}") from error
