"""`cudagraph-jax demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


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
        "--limit", type=_positive, metavar="N", help="embed at most N passages (default: 600)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to FILE as JSON"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Only this command needs JAX to be started and the demo's own dependencies.
    from cudagraph_jax.demo import run

    run(options.query, limit=options.limit, json_path=options.json)
    return 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number
