"""Files that a command writes: refused before its work, written after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cudagraph_jax.errors import ConfigError


def check_writable(path: Path) -> None:
    """Tries the file, and leaves everything as it was.

    Raises:
        ConfigError: It cannot be written.
    """
    existed = path.exists()
    try:
        # Appending nothing keeps what an earlier run wrote until there is something better.
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise not_writable(path, error) from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes the content as JSON.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise not_writable(path, error) from error


def not_writable(path: Path, error: OSError) -> ConfigError:
    """The error for a file that cannot be written."""
    reason = error.strerror or type(error).__name__
    return ConfigError(f"{path} cannot be written: {reason}; name another file")
