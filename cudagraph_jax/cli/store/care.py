"""`cudagraph-jax store verify` and `prune`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

from cudagraph_jax._base.text import text_table
from cudagraph_jax.cli.store.opening import store_of
from cudagraph_jax.cli.store.shown import (
    age_text,
    bucket_of,
    cut,
    entries_text,
    field,
    no_entries,
    size_text,
)
from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import Checked, Pruned


def verify(options: argparse.Namespace) -> int:
    """Prints the entries that would not be loaded; 1 if there are any, or only other things."""
    store = store_of(options, mode="ro")
    checked, foreign = store.verify(), store.beside().foreign
    print(verify_text(checked, foreign=foreign))
    if not checked:
        return 1 if foreign else 0
    return 0 if all(entry.is_whole for entry in checked) else 1


def prune(options: argparse.Namespace) -> int:
    """Removes what is too old or too much, and prints it; 0."""
    if options.max_bytes is None and options.older_than is None:
        options.misused("give --max-bytes or --older-than: without a limit nothing is too much")
    store = store_of(options, mode="ro" if options.dry_run else "rw")
    if not options.dry_run and not os.access(store.path, os.W_OK | os.X_OK):
        raise StoreError(f"{store.path} cannot be written: nothing was removed")
    pruned = store.prune(
        max_bytes=options.max_bytes, older_than=options.older_than, dry_run=options.dry_run
    )
    print(prune_text(pruned, now=time.time(), dry_run=options.dry_run))
    return 0


def verify_text(checked: Sequence[Checked], *, foreign: Sequence[str] = ()) -> str:
    """Those that are not whole with the reason, and how many are.

    Args:
        checked: The entries.
        foreign: Names of what else lies there.
    """
    if not checked:
        return no_entries(foreign)
    rows = [
        (
            entry.record.file,
            cut(field(entry.record, "name")),
            cut(bucket_of(entry.record)),
            str(entry.problem),
        )
        for entry in checked
        if entry.problem is not None
    ]
    if not rows:
        return f"{entries_text(len(checked))}, all whole"
    table = text_table(("file", "name", "bucket", "problem"), rows)
    return f"{table}\n\n{len(rows):,} of {entries_text(len(checked))} would not be loaded"


def prune_text(pruned: Pruned, *, now: float, dry_run: bool) -> str:
    """What went, and how much stays.

    Args:
        pruned: What the store says.
        now: The time that ages are counted to, in seconds.
        dry_run: Whether it only would have gone.
    """
    rows = [
        (
            record.file,
            cut(field(record, "name")),
            cut(bucket_of(record)),
            size_text(record.size_bytes),
            age_text(now - record.used_at),
        )
        for record in pruned.entries
    ]
    rows += [(file, "", "", "", "left over") for file in pruned.leftovers]
    verb = "would remove" if dry_run else "removed"
    stay = f"{size_text(pruned.kept_bytes)} stay"
    if not rows:
        return f"{verb} nothing; {stay}"
    gone = entries_text(len(pruned.entries))
    if pruned.leftovers:
        gone += f" and {len(pruned.leftovers):,} left over"
    line = f"{verb} {gone}, {size_text(pruned.freed_bytes)}; {stay}"
    return f"{text_table(('file', 'name', 'bucket', 'size', 'last used'), rows)}\n\n{line}"
