"""The command `cudagraph-jax`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TextIO, cast

from cudagraph_jax._base.text import error_text, one_line
from cudagraph_jax.cli.demo_command import add_to as add_demo
from cudagraph_jax.cli.doctor_command import add_to as add_doctor
from cudagraph_jax.cli.inspect_command import add_to as add_inspect
from cudagraph_jax.cli.plan_command import add_to as add_plan
from cudagraph_jax.cli.serve_command import add_to as add_serve
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
        0 if it worked, 1 if it did not (the reason is on stderr), its output could not be written,
        a doctor found something wrong or a store holds what is not whole, 130 if it was
        interrupted.
        Arguments that cannot be understood leave the process with 2, as argparse does.
    """
    if sys.stdout is None:
        return _fail("cudagraph-jax: the standard output is closed: send it to a file or /dev/null")
    output = _Output(sys.stdout)
    try:
        with redirect_stdout(cast(TextIO, output)):
            status = _status(argv)
    except OSError as error:
        if error is not output.error:
            raise
        status = 1
    except MemoryError:
        status = _fail("cudagraph-jax: there is not enough memory for this")
    except KeyboardInterrupt:
        _fail("cudagraph-jax: interrupted")
        status = _INTERRUPTED
    return status if output.error is None else output.give_up()


def _status(argv: Sequence[str] | None) -> int:
    """Runs one command; its exit status, once all that it printed is written.

    Raises:
        OSError: That cannot be written.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:
        sys.stdout.flush()
        if end.code:
            raise
        return 0
    options.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status: int = options.run(options)
    except CUDAGraphError as error:
        status = _fail(f"{options.says}: {error_text(error)}")
    sys.stdout.flush()
    return status


def _fail(text: str) -> int:
    """Says on stderr why the command failed, if anybody listens; the status."""
    if sys.stderr is not None:
        try:
            print(one_line(text), file=sys.stderr, flush=True)
        except OSError:
            _discard(sys.stderr)
    return 1


def _discard(stream: TextIO) -> None:
    """Has Python not try once more, at its exit, to write what could not be written."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class _Output:
    """The standard output, which remembers that it could not be written.

    Args:
        stream: Where it goes.

    Attributes:
        error: Why it could not be written; None if it could.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes a text; some of it may wait for `flush`."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Writes what waits."""
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def give_up(self) -> int:
        """Says why nothing more is written, unless whoever read it has enough; the status."""
        _discard(self._stream)
        # `cudagraph-jax plan ... | head`
        if self.error is None or isinstance(self.error, BrokenPipeError):
            return 1
        why = self.error.strerror or self.error
        return _fail(f"cudagraph-jax: the output cannot be written: {why}. Send it elsewhere")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cudagraph-jax", description="A compiled-function cache for serving JAX models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(says="cudagraph-jax")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_to in (add_demo, add_serve, add_plan, add_doctor, add_inspect, add_store):
        add_to(commands)
    return parser
