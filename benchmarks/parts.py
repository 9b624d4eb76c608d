"""What a part of gpu.py is told: sizes, rounds, its time, and processes of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoding import Lab

Row = list[object]
Rows = Iterator[Row]

HERE = Path(__file__).parent
# What a child may take beyond the time of all: its start and its compiling are spent by then.
GRACE_S = 30
# The lines of Python and of XLA's `CHECK` that say what went wrong, wherever they stand.
_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception)\b.*|F\d{4} .*|.* is not installed: .*)", re.M)


class LeftOutError(Exception):
    """The rest of a part is not measured, for a reason that is no failure."""


class ChildError(Exception):
    """A process gave no figures; the message is one short line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One part's share of a run.

    Attributes:
        labs: The sizes that are measured.
        rounds: How often contenders take turns.
        deadline: When nothing more begins, as `time.perf_counter` counts.
        facts: What a part found besides its rows, for the file.
    """

    labs: Sequence[Lab]
    rounds: int
    deadline: float
    facts: dict[str, Any] = field(default_factory=dict)

    def begin(self, what: str) -> None:
        """Comes before each thing that takes a while.

        Raises:
            LeftOutError: The time is over.
        """
        if time.perf_counter() > self.deadline:
            raise LeftOutError(f"{what} and what follows: the time is over")

    def child(self, script: str, *args: str, timeout_s: float, xla_flags: str = "") -> Any:
        """What a script of this folder prints as JSON, in a process of its own.

        Raises:
            LeftOutError: The time is over.
            ChildError: It failed, or took too long.
        """
        self.begin(" ".join((script, *args)))
        timeout_s = min(timeout_s, self.deadline - time.perf_counter() + GRACE_S)
        env = dict(os.environ)
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.15"  # the parent holds most of the memory
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {xla_flags}".strip()
        command = [sys.executable, str(HERE / script), *args]
        try:
            done = subprocess.run(
                command, check=False, env=env, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise ChildError(f"took more than {timeout_s:.0f} s") from None
        if done.returncode:
            raise ChildError(_reason(done.returncode, done.stderr))
        return json.loads(done.stdout)


def nvidia_smi(asked: str) -> str | None:
    """What it says of the first GPU; None where there is no such program or no answer."""
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _reason(status: int, stderr: str) -> str:
    """The last line that names an error, or else the last one."""
    lines = _ERROR.findall(stderr) or stderr.strip().splitlines() or ["it said nothing"]
    ended = f"signal {-status}: " if status < 0 else ""
    return f"{ended}{lines[-1].strip()[:120]}"
