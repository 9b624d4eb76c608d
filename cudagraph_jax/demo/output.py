"""The file of figures: refused before the work, written after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cudagraph_jax.demo.errors import DemoError


def check_writable(path: Path) -> None:
    """Tries the file.

    Raises:
        DemoError: It cannot be written.
    """
    try:
        # Appending nothing keeps what an earlier run wrote until there is something better.
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise DemoError(
            f"the figures cannot be written to {path}: {error.strerror}; name another file"
        ) from error


def write_figures(path: Path, figures: Mapping[str, object]) -> None:
    """Writes the figures as JSON."""
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
