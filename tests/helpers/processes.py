"""Programs in processes of their own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import IO

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
    asked = {
        "script": textwrap.dedent(script),
        "arguments": list(map(str, arguments)),
        "cwd": str(cwd or Path.cwd()),
        "warnings": warnings,
        "environment": {
            **{name: value for name, value in _environment().items() if name not in without},
            **environment,
        },
    }
    with (
        tempfile.TemporaryFile("w+") as given,
        open(output, "w") if output else tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
    ):
        given.write(stdin)
        given.seek(0)
        code = _forked(json.dumps(asked).encode(), [given, out, errors], timeout)
        said = "" if output else _all_of(out)
        return subprocess.CompletedProcess(script, code, said, _all_of(errors))


def said_by(program: str, **environment: str) -> str:
    """What a program prints. It fails if the program does.

    With variables that are given it is run in an interpreter of its own, which reads them.
    """
    if environment:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    else:
        done = run_script(program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _all_of(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def _forked(message: bytes, files: list[IO[str]], timeout: float) -> int:
    """The exit status of what is asked for, with these as its standard files."""
    forks = _forks()
    socket.send_fds(forks, [message], [file.fileno() for file in files])
    forks.settimeout(timeout)
    child = int(forks.recv(32))
    try:
        return int(forks.recv(32))
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        forks.recv(32)
        raise


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
