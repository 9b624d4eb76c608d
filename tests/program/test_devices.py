"""Arrays on another device than the default one, and 64-bit arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[1] / "helpers" / "programs"


@pytest.mark.parametrize(
    ("script", "environment", "said"),
    [
        (
            "on_two_devices.py",
            {"JAX_NUM_CPU_DEVICES": "2"},
            "right on both devices",
        ),
        (
            "on_default_devices.py",
            {"JAX_NUM_CPU_DEVICES": "2"},
            "each on its own device",
        ),
        (
            "padded_on_two_devices.py",
            {"JAX_NUM_CPU_DEVICES": "2"},
            "padded on both devices",
        ),
        ("with_x64.py", {"JAX_ENABLE_X64": "1"}, "right in 64 bits"),
    ],
)
def test_in_a_process_of_its_own(script, environment, said):
    """Answers are right on a second device, and in 64 bits where x64 is on."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAMS / script)],
        env={
            **os.environ,
            **environment,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(PROGRAMS.parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
