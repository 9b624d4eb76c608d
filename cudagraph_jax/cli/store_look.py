"""A store as the doctor sees it: what is in it, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cudagraph_jax.cli.checkup import Finding
from cudagraph_jax.cli.store.shown import NO_ENTRIES
from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import Checked, GraphStore, Reason


class StoreLook(NamedTuple):
    """What a store looks like.

    Attributes:
        summary: What is in it, on one line.
        found: What looks wrong.
    """

    summary: str
    found: tuple[Finding, ...] = ()


def look_at(path: Path | None, *, versions: Mapping[str, str]) -> StoreLook:
    """What the store at `path` looks like; nothing in it is changed.

    Args:
        path: Its directory; None: none was given.
        versions: Of jax and jaxlib, as they are installed.
    """
    if path is None:
        return StoreLook("none looked at: --store DIR")
    try:
        store = GraphStore(path, mode="ro")
        files, foreign = store.verify(), store.beside().foreign
    except StoreError as error:
        what, separator, remedy = str(error).rpartition(": ")
        finding = Finding(what, remedy) if separator else Finding(remedy, "give another directory")
        return StoreLook(f"{path}: cannot be used", (finding,))
    if not files:
        other = Finding(f"{path} has other things than executables", "give the store's directory")
        return StoreLook(f"{path}: {NO_ENTRIES}", (other,) if foreign else ())
    size_mib = sum(file.record.size_bytes for file in files) / 2**20
    summary = f"{path}: {len(files)} executables, {size_mib:.1f} MiB"
    return StoreLook(summary, tuple(_findings(path, files, versions)))


def _findings(
    path: Path, files: Sequence[Checked], versions: Mapping[str, str]
) -> Iterator[Finding]:
    # Those that a key authenticates cannot be checked without it.
    bad = [
        file for file in files if file.problem and file.problem.reason is not Reason.NOT_AUTHENTIC
    ]
    old = [file for file in files if file.is_whole and _is_of_others(file, versions)]
    if bad:
        yield Finding(
            f"{len(bad)} of {len(files)} files in the store are not whole, and compiled again",
            f"cudagraph-jax store verify {path} says why",
        )
    if old and len(old) == len(files):
        yield Finding(
            f"all {len(old)} executables in the store are of other versions of jax or jaxlib",
            f"start a server once, then cudagraph-jax store prune {path} --older-than 1d",
        )


def _is_of_others(file: Checked, versions: Mapping[str, str]) -> bool:
    identity = file.record.identity
    return any(identity.get(name) != versions.get(name) for name in ("jax", "jaxlib"))
