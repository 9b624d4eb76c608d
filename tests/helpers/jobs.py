"""Jobs of several processes: started over gloo on this machine, ended where they hang."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from tests.helpers.processes import Forked, all_of

PROGRAMS = Path(__file__).parent / "programs"


class Ended(NamedTuple):
    """What became of a process: its exit status, what it said by name, and its standard error."""

    status: int
    said: dict[str, Any]
    stderr: str


def ran(
    program: str,
    *args: object,
    processes: int = 2,
    devices: int = 1,
    stuck: int | None = None,
    timeout_s: float = 100,
) -> list[Ended]:
    """What became of each process of a job; those that hang are killed, and fail the test.

    Args:
        program: In helpers/programs.
        *args: What it gets behind the port, the number of processes and its index.
        processes: How many there are.
        devices: How many each of them has.
        stuck: The one that does not end, and is killed when the others have.
        timeout_s: For all of them.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        members = [
            stack.enter_context(Member(program, port, processes, index, *args, devices=devices))
            for index in range(processes)
        ]
        # Process 0 waits for the end of its input: JAX ends the others by a signal when it goes.
        order = sorted(range(processes), key=lambda index: (index == stuck, index == 0))
        deadline = time.monotonic() + timeout_s
        for index in order:
            members[index].end(deadline, kill=index == stuck)
        return [member.ended() for member in members]


class Member:
    """One process of a job, gone when its block is left.

    Args:
        program: In helpers/programs.
        *args: What it gets.
        devices: How many it has.
    """

    def __init__(self, program: str, *args: object, devices: int) -> None:
        self._out, self._errors = TemporaryFile("w+"), TemporaryFile("w+")  # noqa: SIM115
        given, self._input = os.pipe()
        files = (given, self._out, self._errors)
        self._process = Forked(
            PROGRAMS / program, *args, files=files, environment={"DEVICES": str(devices)}
        )
        os.close(given)

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        for file in (self._out, self._errors):
            file.close()

    def end(self, deadline: float, *, kill: bool) -> None:
        """Waits for its end, which comes by a signal if it does not come by itself."""
        if kill:
            self._process.kill()
        os.close(self._input)
        try:
            self._process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._errors.write("\nkilled, since it did not end")

    def ended(self) -> Ended:
        """What became of it."""
        lines = all_of(self._out).splitlines()
        said = dict(json.loads(line) for line in lines if line.startswith('["'))
        return Ended(self._process.wait(0), said, all_of(self._errors))
