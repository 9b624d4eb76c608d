"""All files of a folder: described, checked, and removed when there are too many."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from cudagraph_jax.store.entries import entry_names, is_bad, is_entry, problem_of, read_record
from cudagraph_jax.store.folder import TEMPORARY, Folder
from cudagraph_jax.store.hot import MANIFEST
from cudagraph_jax.store.identity import SUFFIX, differences
from cudagraph_jax.store.locks import LOCK
from cudagraph_jax.store.outcomes import Beside, Checked, Near, Pruned, Record

STALE_S = 3600.0
"""Drafts and locks that are older were left by a process that was killed."""

_STEM = rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}"
_WRITTEN = rf"(?:{_STEM}|{re.escape(MANIFEST)})"
_LEFT = re.compile(rf"\.{_WRITTEN}\.[0-9a-f]+{re.escape(TEMPORARY)}|{_STEM}{re.escape(LOCK)}")


def records(folder: Folder) -> tuple[Record, ...]:
    """Every file of the folder that has an entry's name."""
    found = (read_record(folder, name) for name in entry_names(folder))
    return tuple(record for record in found if record is not None)


def checked(folder: Folder, *, key: bytes | None) -> tuple[Checked, ...]:
    """Every such file, read over its whole length."""
    return tuple(
        Checked(record=record, problem=problem_of(folder, record.file, key=key))
        for record in records(folder)
    )


def beside(folder: Folder) -> Beside:
    """What lies in the folder beside the entries."""
    names = [name for name in folder.names() if not is_entry(name)]
    return Beside(
        put_aside=tuple(name for name in names if is_bad(name)),
        foreign=tuple(name for name in names if not (is_bad(name) or _is_own(name))),
    )


def prune(
    folder: Folder,
    *,
    now: float,
    max_bytes: int | None,
    older_than_s: float | None,
    remove: Callable[[str], bool],
) -> Pruned:
    """Removes what is too old, then what is too much.

    A time in the future is no age: after the clock was set back, files count as new.

    Args:
        folder: Where.
        now: What the clock says, in seconds.
        max_bytes: What may stay; None: any number. Files put aside go first, then the entries that
            were used least recently.
        older_than_s: Entries and files put aside that were not used for longer go; None: none.
        remove: Removes a file by its name; whether it did.
    """
    entries = sorted(records(folder), key=lambda record: (record.used_at, record.file))
    bad = _described(folder, is_bad)
    stale = [file for file in _described(folder, _is_left) if now - file.used_at > STALE_S]
    gone = [file for file in stale if remove(file.file)]
    kept_bytes = sum(file.size_bytes for file in [*bad, *entries])
    for file in [*bad, *entries]:
        is_old = older_than_s is not None and now - file.used_at > older_than_s
        is_too_much = max_bytes is not None and kept_bytes > max_bytes
        if (is_old or is_too_much) and remove(file.file):
            gone.append(file)
            kept_bytes -= file.size_bytes
    return Pruned(
        entries=tuple(file for file in gone if is_entry(file.file)),
        leftovers=tuple(file.file for file in gone if not is_entry(file.file)),
        freed_bytes=sum(file.size_bytes for file in gone),
        kept_bytes=kept_bytes,
    )


def _is_own(name: str) -> bool:
    return _is_left(name) or name in (MANIFEST, f"{MANIFEST}{LOCK}")


def _is_left(name: str) -> bool:
    return _LEFT.fullmatch(name) is not None


def _described(folder: Folder, is_one: Callable[[str], bool]) -> list[Record]:
    """Files that are no entries, in the words for entries."""
    return [
        Record(file=name, size_bytes=found.st_size, used_at=found.st_mtime, identity={}, extra={})
        for name in folder.names()
        if is_one(name) and (found := folder.status(name)) is not None
    ]


def nearest(
    stored: Iterable[Record],
    wanted: Mapping[str, Any],
    *,
    same: Collection[str],
    besides: Collection[str] = (),
) -> Near | None:
    """Where the fewest fields differ, and of those the one that was written last.

    Args:
        stored: What there is.
        wanted: The identity that is absent.
        same: Fields that must not differ.
        besides: Fields that are not compared.
    """
    compared = ((record, differences(record.identity, wanted)) for record in stored)
    candidates = [
        Near(
            record=record,
            differences=tuple(entry for entry in found if entry.field not in besides),
        )
        for record, found in compared
        if record.problem is None
        and found
        and not any(difference.field in same for difference in found)
    ]
    return min(
        candidates,
        key=lambda near: (len(near.differences), -near.record.written_at, near.record.file),
        default=None,
    )
