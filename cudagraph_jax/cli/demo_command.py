"""`cudagraph-jax demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cudagraph_jax.cli.options import positive
from cudagraph_jax.cli.store.opening import add_store, kept_store

if TYPE_CHECKING:
    from cudagraph_jax.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "demo",
        help="semantic search over NumPy's documentation, on a real model",
        description=(
            "Embeds the passages of NumPy's docstrings with all-MiniLM-L6-v2, in ragged "
            "micro-batches as a server would see them, searches them, and shows what was "
            "captured, replayed and compiled, beside plain jax.jit."
        ),
    )
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to search for; may be given several times",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="embed at most N passages (default: 600; with --plan: 1200)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help=(
            "plan the buckets from the first tenth of the stream, and serve the rest by them and "
            "by powers of two, side by side"
        ),
    )
    add_store(parser, use="the warm-up of a second run loads them and compiles nothing")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to FILE as JSON"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Only this command needs JAX to be started and the demo's own dependencies.
    from cudagraph_jax.demo import run, run_planned

    start = run_planned if options.plan else run
    store = kept_store(options)
    start(options.query, limit=options.limit, json_path=options.json, store=store)
    return 0
