"""Programs on several devices, or in 64 bits: what a process decides before it uses JAX."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.helpers.processes import run_script

PROGRAMS = Path(__file__).parent / "programs"


def run_program(name: str, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Runs one of `PROGRAMS` in a process with settings of `jax.config`; a warning is an error."""
    return run_script(
        f"""
        import runpy
        import jax

        for setting in {settings}.items():
            jax.config.update(*setting)
        runpy.run_path({str(PROGRAMS / name)!r}, run_name="__main__")
        """,
        *arguments,
        warnings="error",
        timeout=280,
    )
