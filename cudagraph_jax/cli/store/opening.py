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


def add_store(parser: argparse.ArgumentParser, *, use: str) -> None:
    """Adds the options of a command that keeps executables; `use`: what a directory of them is for.

    `kept_store` reads them.
    """
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help=f"keep executables in DIR: {use}",
    )
    parser.add_argument(
        "--store-mode",
        choices=("rw", "ro"),
        default="rw",
        help="ro: load what is there and write nothing, as from a read-only disk (default: rw)",
    )
    add_key(parser)


def add_key(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `key_of` reads."""
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="the store's key: all bytes of this file as they are, a line end included",
    )


def kept_store(options: argparse.Namespace) -> GraphStore | None:
    """Where a command keeps executables, which is made if it is not there; None without a store.

    Raises:
        ConfigError: The key is none, or a mode or a key is given without a store.
        StoreError: The directory cannot be made, is not there to be read, or others can change it.
    """
    if options.store is None:
        if options.store_mode != "rw" or options.key_file is not None:
            raise ConfigError(
                "--store-mode and --key-file are about a store, and there is none: add --store DIR"
            )
        return None
    return GraphStore(options.store, mode=options.store_mode, key=key_of(options))


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
