"""`cudagraph-jax store`: what lies in a directory of executables, and moving it elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cudagraph_jax.cli.options import age_s, bucket, byte_count
from cudagraph_jax.cli.store.care import prune, verify
from cudagraph_jax.cli.store.listing import ls
from cudagraph_jax.cli.store.moving import export_entries, import_entries
from cudagraph_jax.cli.store.opening import add_key

if TYPE_CHECKING:
    from cudagraph_jax.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "store",
        help="list, verify, prune, export and import stored executables",
        description=(
            "Looks after a directory that bucket_jit(store=DIR) filled. Starts no accelerator. The "
            "exit status is 1 if something was refused, or if verify or export finds an entry that "
            "is not whole; ls only shows what it finds."
        ),
    )
    parser.set_defaults(says="cudagraph-jax store")
    operations = parser.add_subparsers(title="operations", metavar="OPERATION", required=True)
    for add in (_add_ls, _add_verify, _add_prune, _add_export, _add_import):
        add(operations)


def _add_ls(operations: Commands) -> None:
    parser = _operation(
        operations,
        "ls",
        "a row for each entry, by its header; verify is what reads all of it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with whole identities")
    parser.set_defaults(run=ls)


def _add_verify(operations: Commands) -> None:
    parser = _operation(
        operations,
        "verify",
        "reads every entry over its whole length, and names those that would not be loaded",
    )
    parser.set_defaults(run=verify)


def _add_prune(operations: Commands) -> None:
    parser = _operation(
        operations,
        "prune",
        "removes the entries that were used least recently, and what killed processes left",
    )
    parser.add_argument(
        "--max-bytes",
        type=byte_count,
        metavar="SIZE",
        help="how much may stay: 1000000, 512MiB, 20GiB; K, M, G and T are KiB to TiB",
    )
    parser.add_argument(
        "--older-than",
        type=age_s,
        metavar="AGE",
        help="what was not used for longer goes: 2w, 30d, 12h, 90m, or seconds",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    # A limit that is missing is wrong usage, which only the parser can say in its words.
    parser.set_defaults(run=prune, misused=parser.error)


def _add_export(operations: Commands) -> None:
    parser = _operation(
        operations,
        "export",
        "packs entries into one file, a plain tar, unless one of them is not whole",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the archive to write")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="only entries of this function; may be given several times",
    )
    parser.add_argument(
        "--bucket",
        type=bucket,
        action="append",
        default=[],
        metavar="8x128",
        help="only entries of this bucket; may be given several times",
    )
    parser.add_argument(
        "--fingerprint", metavar="TEXT", help="only entries known by this fingerprint"
    )
    parser.set_defaults(run=export_entries)


def _add_import(operations: Commands) -> None:
    parser = _operation(
        operations,
        "import",
        "puts the entries of an archive if all of them are whole; those already there stay",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what export wrote")
    parser.set_defaults(run=import_entries)


def _operation(operations: Commands, name: str, does: str) -> argparse.ArgumentParser:
    parser = operations.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory of the store")
    add_key(parser)
    return parser
