"""The command `cudagraph-jax`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cudagraph_jax.cli import demo
from cudagraph_jax.errors import CUDAGraphError
from cudagraph_jax.version import __version__

# Shells report 128 + SIGINT for a command that was interrupted.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status.

    Args:
        argv: The arguments behind the command's name; those of the process if None.

    Returns:
        0 if it worked, 1 if it did not (the reason is on stderr), 130 if it was interrupted.
        Arguments that cannot be understood leave the process with 2, as argparse does.
    """
    options = _parser().parse_args(argv)
    try:
        status: int = options.run(options)
    except CUDAGraphError as error:
        print(f"cudagraph-jax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cudagraph-jax: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cudagraph-jax", description="A compiled-function cache for serving JAX models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_to(commands)
    return parser
