"""The stored executable that comes nearest to one that is absent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cudagraph_jax.store.identity import differences
from cudagraph_jax.store.outcomes import Near, Record


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
