"""Processes that are killed, and processes that share a directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[1] / "helpers" / "programs"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks nothing here")


def said_by(script: str) -> str:
    """What a script prints; it must come to its end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAMS / script)],
        env={**os.environ, "PYTHONPATH": str(PROGRAMS.parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow  # hundreds of processes
def test_killed_writers():
    """However a writer is killed, the file is the old one or the new one, whole."""
    at_every_step, at_any_moment = map(int, said_by("killed_writers.py").split())
    assert at_every_step > 250
    assert at_any_moment == 150


def test_shared_directory():
    """Eight processes read whole files or none, and compile each bucket once among them.

    Beside readers and writers one spoils files and one prunes; a killed process holds no lock.
    """
    assert said_by("crowd.py").split() == ["share", "compile_once", "die_with_a_lock"]
