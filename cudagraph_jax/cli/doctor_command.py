"""`cudagraph-jax doctor`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cudagraph_jax._base.files import check_writable, write_json
from cudagraph_jax._base.text import text_pairs, text_table
from cudagraph_jax.cli.checkup import Finding, Snapshot, findings
from cudagraph_jax.cli.store_look import look_at

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
    from cudagraph_jax.cli.probe import gather

    if options.json is not None:
        check_writable(options.json)
    snapshot = gather()
    store = look_at(options.store, versions=snapshot.versions)
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
        (name, "accepted" if refused is None else "refused", refused or "")
        for group, label in ((snapshot.scopes, "scope "), (snapshot.commands, ""))
        for name, refused in ((f"{label}{name}", words) for name, words in group.items())
    ]
    return text_table(("option", "this jaxlib", "its words"), rows) if rows else ""


def _settings(snapshot: Snapshot) -> list[tuple[str, str]]:
    reported = {True: "yes", False: "no", None: "unknown"}[snapshot.compiles_reported]
    pairs = [(name, str(value)) for name, value in snapshot.settings.items()]
    return [*pairs, ("compiles are reported", reported)]


def _verdict(found: Sequence[Finding]) -> str:
    if not found:
        return "Nothing looks wrong."
    return "\n".join(["What looks wrong", *(f"- {finding}" for finding in found)])
