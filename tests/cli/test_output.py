"""What every command does where it cannot print, read, or go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cudagraph_jax.cli import main
from tests.helpers.processes import ROOT, run_script
from tests.helpers.stock import stocked

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")

COMMANDS = {
    "plan": ["plan", "trace.csv", "--column", "len", "--max-graphs", "2"],
    "ls": ["store", "ls", "graphs"],
    "prune": ["store", "prune", "graphs", "--max-bytes", "0", "--dry-run"],
    "export": ["store", "export", "graphs", "graphs.tar"],
    "doctor": ["doctor", "--json", "doctor.json"],
    "help": ["--help"],
    "version": ["--version"],
}


@pytest.fixture
def folder(tmp_path):
    """A directory with a trace and a store."""
    (tmp_path / "trace.csv").write_text("len\n5\n9\n")
    stocked(tmp_path / "graphs")
    return tmp_path


@pytest.fixture
def run(folder):
    """Runs the command in the shell, with redirections: its status and what stderr got."""

    def run(arguments, redirections):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "cudagraph_jax",
             *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    return run


FULL = """
import sys
from cudagraph_jax.cli import main

sys.stdout.reconfigure(write_through=sys.argv[1] == "unbuffered")
sys.exit(main(sys.argv[2:]))
"""


@needs_full
@pytest.mark.parametrize("buffering", ["buffered", "unbuffered"])
@pytest.mark.parametrize("command", ["plan", "ls", "prune", "export", "doctor", "help"])
def test_a_full_disk_for_the_output(folder, command, buffering):
    """Where nothing can be printed, that is one line on stderr, and the status is 1.

    So it is where each line is written at once.
    """
    done = run_script(FULL, buffering, *COMMANDS[command], output="/dev/full", cwd=folder)
    said = "cudagraph-jax: the output cannot be written: No space left on device. Send it elsewhere"
    assert (done.returncode, done.stderr) == (1, f"{said}\n")


@pytest.mark.parametrize("command", ["prune", "version"])
def test_a_closed_output(run, tmp_path, command):
    """Where there is no output at all, nothing is done, and that is said."""
    said = "cudagraph-jax: the standard output is closed: send it to a file or /dev/null\n"
    assert run(COMMANDS[command], ">&-") == (1, said)


def test_nobody_who_listens(run):
    """Where errors cannot be printed either, the status says that it failed."""
    assert run(["store", "ls", "nowhere"], "2>&-") == (1, "")
    if os.path.exists("/dev/full"):
        assert run(["store", "ls", "nowhere"], "2>/dev/full") == (1, "")
        assert run(COMMANDS["plan"], "> /dev/full 2>&1") == (1, "")


def test_a_closed_input(run):
    """A trace that is to come from a closed standard input is one line."""
    status, said = run([*COMMANDS["plan"][:1], "-", *COMMANDS["plan"][2:]], "<&-")
    assert (status, said) == (
        1,
        "cudagraph-jax: the standard input: it is closed: send the trace there, or name a file\n",
    )


def test_a_trace_without_an_end(tmp_path, monkeypatch, capsys):
    """A file of one endless line is refused before it takes all memory."""
    monkeypatch.chdir(tmp_path)
    for name in ("endless.csv", "endless.jsonl"):
        Path(name).symlink_to("/dev/zero")
        status = main(["plan", name, *COMMANDS["plan"][2:]])
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (1, 1)
        assert "a line is longer than 67,108,864 bytes: this is no trace" in said


def test_no_memory(tmp_path, monkeypatch, capsys):
    """Where memory runs out, that is one line, too."""
    (tmp_path / "hungry.py").write_text(
        "from cudagraph_jax import bucket_jit\n\n"
        "function = bucket_jit(lambda x: x, in_axes='batch _')\n\n\n"
        "def example():\n    raise MemoryError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["inspect", "hungry:function", "--example", "example"]) == 1
    assert capsys.readouterr().err == "cudagraph-jax: there is not enough memory for this\n"
