"""What a command imports before it does anything: a user waits for it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.processes import ROOT
from tests.helpers.stock import stocked

WITHOUT_JAX = """
import sys
sys.modules["jax"] = None  # importing it fails
from cudagraph_jax.cli import main

for line in sys.stdin:
    print(line.strip(), main(line.split()), file=sys.stderr)
"""
COMMANDS = """\
--help
--version
inspect --help
plan trace.csv --column len --max-graphs 2
store ls graphs
store verify graphs
store export graphs graphs.tar
store import others graphs.tar
store prune graphs --max-bytes 0
"""


def test_commands_without_jax(tmp_path):
    """Those that read files alone do not import JAX, which takes most of a second."""
    (tmp_path / "trace.csv").write_text("len\n5\n9\n")
    stocked(tmp_path / "graphs")
    (tmp_path / "others").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX],
        input=COMMANDS,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines() == [f"{command} 0" for command in COMMANDS.splitlines()]
