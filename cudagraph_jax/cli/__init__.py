"""The command `cudagraph-jax`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cudagraph_jax._base.text import one_line
from cudagraph_jax.cli.demo_command import add_to as add_demo
from cudagraph_jax.cli.doctor_command import add_to as add_doctor
from cudagraph_jax.cli.inspect_command import add_to as add_inspect
from cudagraph_jax.cli.plan_command import add_to as add_plan
from cudagraph_jax.cli.store import add_to as add_store
from cudagraph_jax.errors import CUDAGraphError
from cudagraph_jax.version import __version__

# Shells report 128 + SIGINT for a command that was interrupted.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status.

    Args:
        argv: The arguments behind the command's name; those of the process if None.

    Returns:
        0 if it worked, 1 if it did not (the reason is on stderr), a doctor found something wrong
        or a store holds what is not whole, 130 if it was interrupted.
        Arguments that cannot be understood leave the process with 2, as argparse does.
    """
    options = _parser().parse_args(argv)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except CUDAGraphError as error:
        print(one_line(f"{options.says}: {error}"), file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has enough: `cudagraph-jax plan ... | head`. Python would flush
        # into the closed pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    parser.set_defaults(says="cudagraph-jax")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_to in (add_demo, add_plan, add_doctor, add_inspect, add_store):
        add_to(commands)
    return parser
