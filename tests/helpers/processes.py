"""Programs in processes of their own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

ROOT = Path(__file__).parents[2]
_FORKS = ROOT / "tests" / "helpers" / "programs" / "forks.py"


def run_script(
    script: str,
    *arguments: object,
    stdin: str = "",
    output: str | None = None,
    cwd: Path | None = None,
    warnings: str | None = None,
    timeout: float = 200,
    without: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that has imported JAX already, and used nothing of it.

    Not for scripts about what is imported, or with settings that JAX reads when it is.

    Args:
        script: As for `python -c`; it may be indented.
        *arguments: Of the command line.
        stdin: What it can read.
        output: The file that it prints to; None: what it prints is kept.
        cwd: Its directory; None: that of this process.
        warnings: What is done with warnings, such as "error", as for `python -W`.
        timeout: In seconds.
        without: Variables that its environment lacks.
        **environment: Further variables.
    """
    with (
        tempfile.TemporaryFile("w+") as given,
        open(output, "w") if output else tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
    ):
        given.write(stdin)
        given.seek(0)
        process = Forked(
            textwrap.dedent(script),
            *arguments,
            files=(given, out, errors),
            cwd=cwd,
            warnings=warnings,
            without=without,
            environment=environment,
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = "" if output else all_of(out)
        return subprocess.CompletedProcess(script, code, said, all_of(errors))


class Forked:
    """A fork of a process that has imported JAX already, and used nothing of it.

    Args:
        script: As for `python -c`, or its file.
        *arguments: Of the command line.
        files: Its standard files.
        kept: Numbers of further files, which are open in it under the same numbers.
        cwd: Its directory; None: that of this process.
        warnings: What is done with warnings, such as "error", as for `python -W`.
        without: Variables that its environment lacks.
        environment: Further variables.

    Attributes:
        pid: Its number.
        returncode: Its exit status once it was waited for, negative for a signal, as for `Popen`.
    """

    def __init__(
        self,
        script: str | Path,
        *arguments: object,
        files: Sequence[IO[str] | int],
        kept: Sequence[int] = (),
        cwd: Path | None = None,
        warnings: str | None = None,
        without: tuple[str, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        asked = {
            "script": script if isinstance(script, str) else script.read_text(encoding="utf-8"),
            "file": None if isinstance(script, str) else str(script),
            "arguments": list(map(str, arguments)),
            "kept": kept,
            "cwd": str(cwd or Path.cwd()),
            "warnings": warnings,
            "environment": {
                **{name: value for name, value in _environment().items() if name not in without},
                **environment,
            },
        }
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        self.pid = int(_answer(asked, [*numbers, *kept]))
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """Its exit status, once it has ended."""
        if self.returncode is None:
            with open(os.pidfd_open(self.pid)) as ending:
                poll = select.poll()
                poll.register(ending)
                if not poll.poll(timeout * 1e3):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(_answer({"ended": self.pid}))
        return self.returncode

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, if it has not."""
        self.send_signal(signal.SIGKILL)
        self.wait(60)


def said_by(program: str, *, flags: str | None = None) -> str:
    """What a program prints, as `run_script` runs it, with these flags of XLA. It must not fail."""
    done = run_script(program) if flags is None else run_script(program, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def all_of(file: IO[str]) -> str:
    """What stands in a file."""
    file.seek(0)
    return file.read()


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def _answer(asked: dict[str, Any], files: Sequence[int] = ()) -> bytes:
    """What the process that forks says to it."""
    forks = _forks()
    socket.send_fds(forks, [json.dumps(asked).encode()], files)
    return forks.recv(32)


@functools.cache
def _forks() -> socket.socket:
    """What asks the process that forks: it is started once."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, _FORKS, str(theirs.fileno())],
            env=_environment(),
            pass_fds=[theirs.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours
