"""`cudagraph-jax doctor`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cudagraph_jax._base.files import check_writable, write_json
from cudagraph_jax._base.text import text_pairs, text_table
from cudagraph_jax.cli.checkup import Finding, Snapshot, findings
from cudagraph_jax.cli.store.shown import no_entries, size_text
from cudagraph_jax.errors import StoreError
from cudagraph_jax.store import Checked, Difference, GraphStore, Identity, MissReason
from cudagraph_jax.store.identity import differences, in_words

if TYPE_CHECKING:
    from cudagraph_jax.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "doctor",
        help="versions, devices, what this jaxlib accepts, and what looks wrong",
        description=(
            "Starts JAX, asks this jaxlib which command-buffer options it accepts, and says what "
            "looks wrong and what to do. The exit status is 0 if nothing does, else 1."
        ),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    parser.add_argument("--store", type=Path, metavar="DIR", help="also look at this store")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Only here: it needs parts of JAX and of the demo that other commands do without.
    from cudagraph_jax.cli.probe import gather, machine_fields

    if options.json is not None:
        check_writable(options.json)
    snapshot = gather()
    machine = machine_fields(backend_starts=snapshot.backend is not None)
    store = look_at(options.store, machine=machine)
    found = [*findings(snapshot), *store.found]
    print(doctor_text(snapshot, found, store=store.summary))
    if options.json is not None:
        write_json(options.json, doctor_dict(snapshot, found, store=store.summary))
    return 1 if found else 0


def doctor_dict(snapshot: Snapshot, found: Sequence[Finding], *, store: str) -> dict[str, object]:
    """The same as values that JSON can hold."""
    return {
        **dataclasses.asdict(snapshot),
        "store": store,
        "findings": [finding._asdict() for finding in found],
    }


def doctor_text(snapshot: Snapshot, found: Sequence[Finding], *, store: str) -> str:
    """Everything as tables, what looks wrong at the end."""
    parts = {
        "Versions": text_pairs(list(snapshot.versions.items())),
        "Machine": text_pairs([*_machine(snapshot), ("store", store)]),
        "Command-buffer options": _options(snapshot),
        "JAX": text_pairs(_settings(snapshot)),
        "Extras": text_pairs(
            [
                (extra.name, f"{', '.join(extra.missing)} missing: {extra.install}")
                if extra.missing
                else (extra.name, "installed")
                for extra in snapshot.extras
            ]
        ),
    }
    sections = [f"{title}\n{body}" for title, body in parts.items() if body]
    return "\n\n".join([*sections, _verdict(found)])


def _machine(snapshot: Snapshot) -> list[tuple[str, str]]:
    pairs = [("backend", snapshot.backend or "none: JAX cannot start")]
    for devices in snapshot.devices:
        memory = devices.memory_bytes
        size = "" if memory is None else f", {memory / 2**30:.1f} GiB for XLA on each"
        pairs.append(("devices", f"{devices.count} x {devices.kind}{size}"))
    pairs.append(("NVIDIA GPUs", ", ".join(snapshot.gpus) or "none seen by the system"))
    pairs.append(("CPU cores", str(snapshot.cpu_count)))
    pairs += snapshot.environment.items()
    return pairs


def _options(snapshot: Snapshot) -> str:
    rows = [
        (name, *_answer(refused))
        for group, label in ((snapshot.scopes, "scope "), (snapshot.commands, ""))
        for name, refused in ((f"{label}{name}", words) for name, words in group.items())
    ]
    return text_table(("option", "this jaxlib", "its words"), rows) if rows else ""


def _answer(refused: str | None) -> tuple[str, str]:
    """Whether an option is accepted, and the words against it where they say more than that."""
    if refused is None:
        return "accepted", ""
    return ("unknown", "") if "is not a valid enum value" in refused else ("refused", refused)


def _settings(snapshot: Snapshot) -> list[tuple[str, str]]:
    reported = {True: "yes", False: "no", None: "unknown"}[snapshot.compiles_reported]
    pairs = [(name, str(value)) for name, value in snapshot.settings.items()]
    return [*pairs, ("compiles are reported", reported)]


def _verdict(found: Sequence[Finding]) -> str:
    if not found:
        return "Nothing looks wrong."
    return "\n".join(["What looks wrong", *(f"- {finding}" for finding in found)])


class StoreLook(NamedTuple):
    """What a store looks like.

    Attributes:
        summary: What is in it, on one line.
        found: What looks wrong.
    """

    summary: str
    found: tuple[Finding, ...] = ()


def look_at(path: Path | None, *, machine: Identity) -> StoreLook:
    """What the store at `path` looks like; nothing in it is changed.

    Args:
        path: Its directory; None: none was given.
        machine: What must be the same for an executable to be loaded here.
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
        return StoreLook(f"{path}: {no_entries(foreign)}", (other,) if foreign else ())
    size = size_text(sum(file.record.size_bytes for file in files))
    lacks = [_differences(file, machine) for file in files if _is_readable(file)]
    here = sum(not lack for lack in lacks)
    summary = f"{path}: {len(files)} executables, {size}, {here} for this machine"
    return StoreLook(summary, tuple(_findings(path, files, lacks)))


def _findings(
    path: Path, files: Sequence[Checked], lacks: Sequence[tuple[Difference, ...]]
) -> Iterator[Finding]:
    bad = [file for file in files if file.problem and file.problem.reason not in _OF_OTHERS]
    if bad:
        yield Finding(
            f"{len(bad)} of {len(files)} files in the store are not whole, and compiled again",
            f"cudagraph-jax store verify {path} says why",
        )
    if lacks and all(lacks):
        least = min(lacks, key=len)
        yield Finding(
            f"none of the {len(files)} executables in the store is loaded here; the nearest has "
            + in_words(least),
            "start a server once here, or build the store on a machine of this kind",
        )


_OF_OTHERS = (MissReason.NOT_AUTHENTIC, MissReason.OUTDATED)
"""What cannot be checked here: without its key, or by this version."""


def _is_readable(file: Checked) -> bool:
    """Whether it says what it is; with a key that was not given it does."""
    return file.problem is None or file.problem.reason is MissReason.NOT_AUTHENTIC


def _differences(file: Checked, machine: Identity) -> tuple[Difference, ...]:
    """In what the machine of an executable was another one."""
    identity = file.record.identity
    return differences({name: identity[name] for name in machine if name in identity}, machine)
