"""The store that a command line names."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path
from typing import Literal

from cudagraph_jax.errors import ConfigError, StoreError
from cudagraph_jax.store import GraphStore
from cudagraph_jax.store.folder import OR_KEY, refuse_danger

LARGEST_KEY_BYTES = 4096
"""No key is longer: such a file is another one, by mistake."""


def key_of(options: argparse.Namespace) -> bytes | None:
    """The key in `--key-file`; None without one.

    Raises:
        ConfigError: The file cannot be read, others can change it, or it is too large to be a key.
    """
    path: Path | None = options.key_file
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            # Who chooses the key says what is authentic. A pipe comes from who started this.
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                refuse_danger(file.fileno(), path)
            key = file.read(LARGEST_KEY_BYTES + 1)
    except StoreError as error:
        danger = str(error).removesuffix(OR_KEY)
        raise ConfigError(f"--key-file {path} is not safe: {danger}") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--key-file {path} cannot be read: {why}") from error
    if len(key) > LARGEST_KEY_BYTES:
        raise ConfigError(
            f"--key-file {path} has more than {LARGEST_KEY_BYTES:,} bytes: give the file of a key"
        )
    return key


def store_of(options: argparse.Namespace, *, mode: Literal["rw", "ro"]) -> GraphStore:
    """The store in a directory that is there.

    Raises:
        ConfigError: The key is none.
        StoreError: There is no such directory, or others can change it and there is no key.
    """
    key = key_of(options)
    # A name that was mistyped makes no directory.
    store = GraphStore(options.directory, mode="ro", key=key)
    return store if mode == "ro" else GraphStore(options.directory, key=key)
