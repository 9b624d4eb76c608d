"""Jobs of several processes: started over gloo on this machine, ended where they hang."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

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
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(PROGRAMS.parents[2]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAMS / program), *map(str, (port, processes, index, *args))],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    # Process 0 waits for the end of its input: JAX ends the others by a signal when it goes.
    order = sorted(range(processes), key=lambda index: (index == stuck, index == 0))
    deadline = time.monotonic() + timeout_s
    try:
        ended = {index: _ended(started[index], deadline, kill=index == stuck) for index in order}
    finally:
        for process in started:
            process.kill()
    return [ended[index] for index in range(processes)]


def _ended(process: subprocess.Popen[str], deadline: float, *, kill: bool) -> Ended:
    if kill:
        process.kill()
    try:
        out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += "\nkilled, since it did not end"
    said = dict(json.loads(line) for line in out.splitlines() if line.startswith('["'))
    return Ended(process.returncode, said, err)
