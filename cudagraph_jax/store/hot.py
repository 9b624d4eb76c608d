"""Which buckets were hot: a small file beside the executables, on which only an order depends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from cudagraph_jax._base.log import logger
from cudagraph_jax.store.folder import Folder
from cudagraph_jax.store.outcomes import MissReason, UnusableError

MANIFEST = "hot.json"

Hot = Mapping[str, Mapping[str, int]]
"""How often each bucket was replayed, such as `{"embed": {"8x128": 40}}`."""

_MOST_BYTES = 2**20
_MOST_FUNCTIONS = 256
_MOST_BUCKETS = 1024
_MOST_BITS = 20


def read_manifest(folder: Folder) -> dict[str, dict[str, int]]:
    """What was written last; empty where that is not there, or not what it should be."""
    return _read(folder)[0]


def add_to_manifest(folder: Folder, hot: Hot, *, opened_at: float) -> None:
    """Adds the counts of some functions to those that are there; the caller has the lock.

    Args:
        folder: Where.
        hot: What to add. Functions that are not in it stay as they are.
        opened_at: If nothing was written since, the counts that are there are halved first.

    Raises:
        OSError: It cannot be written.
    """
    known, written_at = _read(folder)
    is_old = written_at < opened_at
    for name, more in hot.items():
        counts = Counter(known.pop(name, {}))
        if is_old:
            counts = Counter({bucket: count // 2 for bucket, count in counts.items()})
        counts.update(more)
        known[name] = _hottest(counts)  # at the end: those written last stay
    folder.write(MANIFEST, [json.dumps(_newest(known), indent=1).encode()])


def _read(folder: Folder) -> tuple[dict[str, dict[str, int]], float]:
    """The counts, and when they were written, in seconds since the epoch."""
    try:
        with folder.reading(MANIFEST) as (file, status):
            text = file.read(_MOST_BYTES) if status.st_size <= _MOST_BYTES else b""
        found = {
            str(name): {str(bucket): int(count) for bucket, count in counts.items()}
            for name, counts in json.loads(text).items()
        }
    except UnusableError as problem:
        if problem.reason is not MissReason.ABSENT:
            logger.warning("%s is not used: %s", folder.path / MANIFEST, problem)
        return {}, 0.0
    except (ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is not used: %s", folder.path / MANIFEST, error)
        return {}, 0.0
    return found, status.st_mtime


def _hottest(counts: Counter[str]) -> dict[str, int]:
    """The buckets replayed most, all halved until their sum is bounded, so that old ones fade."""
    excess = max(0, counts.total().bit_length() - _MOST_BITS)
    return {
        bucket: count >> excess
        for bucket, count in counts.most_common(_MOST_BUCKETS)
        if count >> excess > 0
    }


def _newest(functions: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The functions written last, no more than a file may hold that is to be read again."""
    kept: dict[str, dict[str, int]] = {}
    room = _MOST_BYTES
    for name, counts in reversed(list(functions.items())):
        room -= len(json.dumps({name: counts}, indent=1))
        if room < 0 or len(kept) == _MOST_FUNCTIONS:
            break
        if counts:
            kept[name] = counts
    return dict(reversed(list(kept.items())))
