"""Which buckets were hot: a small file beside the executables, on which only an order depends."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cudagraph_jax.log import logger
from cudagraph_jax.store.folder import Folder
from cudagraph_jax.store.outcomes import Reason, UnusableError

MANIFEST = "hot.json"

Hot = Mapping[str, Mapping[str, int]]
"""How often each bucket was replayed, such as `{"embed": {"8x128": 40}}`."""

_MOST_BYTES = 2**20
_MOST_FUNCTIONS = 256


def read_manifest(folder: Folder) -> dict[str, dict[str, int]]:
    """What was written last; empty where that is not there, or not what it should be."""
    try:
        with folder.reading(MANIFEST) as (file, status):
            text = file.read(_MOST_BYTES) if status.st_size <= _MOST_BYTES else b""
        found = json.loads(text)
        return {
            str(name): {str(bucket): int(count) for bucket, count in counts.items()}
            for name, counts in found.items()
        }
    except UnusableError as problem:
        if problem.reason is not Reason.ABSENT:
            logger.warning("%s is not used: %s", folder.path / MANIFEST, problem)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is not used: %s", folder.path / MANIFEST, error)
    return {}


def write_manifest(folder: Folder, hot: Hot) -> None:
    """Writes the counts of some functions; those of others stay, up to a number of them.

    Raises:
        OSError: It cannot be written.
    """
    others = {name: known for name, known in read_manifest(folder).items() if name not in hot}
    newest_last = list({**others, **hot}.items())
    text = json.dumps(dict(newest_last[-_MOST_FUNCTIONS:]), indent=1)
    folder.write(MANIFEST, [text.encode()])
