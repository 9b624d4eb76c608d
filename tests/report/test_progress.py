"""Progress of a long step."""

import logging
import os
import pty
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cudagraph_jax
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.report.progress import Progress
from cudagraph_jax.shapes.ladder import Bucket


@contextmanager
def terminal():
    """Standard error on a terminal; gives a list that has, in the end, what was shown."""
    shown: list[str] = []
    reader, writer = pty.openpty()
    try:
        with os.fdopen(writer, "w") as stream, redirect_stderr(stream):
            yield shown
        with suppress(OSError):  # the end, once nobody can write any more
            while True:
                shown.append(os.read(reader, 65536).decode())
    finally:
        os.close(reader)


def test_no_way_to_show_it():
    """What is no function, None or bool is refused."""
    with pytest.raises(ConfigError, match="progress='yes' is no way to show it: give None, False"):
        Progress("yes")  # type: ignore[arg-type]


def run(shown, items, total=None):
    with Progress(shown).over(len(items) if total is None else total, "capturing f") as step:
        for item in items:
            step(item)


@given(st.lists(st.integers()), st.integers(0, 9))
def test_callback(items, total):
    """A function is called once for each step, with (done, total, item)."""
    calls = []
    run(lambda *call: calls.append(call), items, total)
    assert calls == [(done, total, item) for done, item in enumerate(items, 1)]


def test_callback_counts_each_sequence_anew():
    """One progress may show several sequences of steps, each from its beginning."""
    calls = []
    progress = Progress(lambda done, total, item: calls.append((done, total, item)))
    for total in (2, 1):
        with progress.over(total, "f") as step:
            for item in range(total):
                step(item)
    assert calls == [(1, 2, 0), (2, 2, 1), (1, 1, 0)]


@pytest.mark.parametrize("shown", [None, True])
def test_log_lines(shown, caplog, capsys):
    """Where nobody watches, each step is a line at INFO."""
    with caplog.at_level(logging.INFO, logger="cudagraph_jax"):
        run(shown, [Bucket(8, 64), Bucket(4, 64)])
    assert caplog.record_tuples == [
        ("cudagraph_jax", logging.INFO, "capturing f: 8x64 (1 of 2)"),
        ("cudagraph_jax", logging.INFO, "capturing f: 4x64 (2 of 2)"),
    ]
    assert capsys.readouterr() == ("", "")


def test_nothing(caplog, capsys):
    """False shows nothing, not even a log line."""
    with caplog.at_level(logging.DEBUG):
        run(False, [Bucket(8, 64)])
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


def test_bar(caplog):
    """On a terminal with rich there is a bar instead of log lines."""
    pytest.importorskip("rich")
    with caplog.at_level(logging.INFO), terminal() as shown:
        run(None, [Bucket(8, 64), Bucket(4, 64)])
    text = "".join(shown)
    assert "capturing f" in text
    assert "2/2" in text
    assert "4x64" in text
    assert caplog.records == []


def test_bar_shows_brackets_as_they_are():
    """A function's name is text to the bar, whatever brackets are in it."""
    pytest.importorskip("rich")
    with terminal() as shown, Progress().over(1, "capturing f[/int32]") as step:
        step("[red]item")
    text = "".join(shown)
    assert "f[/int32]" in text
    assert "[red]item" in text


def test_terminal_without_rich():
    """On a terminal without rich the steps are log lines."""
    script = """
import logging, sys
sys.modules["rich"] = None
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.report.progress import Progress
assert sys.stderr.isatty()
with Progress().over(1, "capturing f") as step:
    step("8x64")
"""
    with terminal():
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(cudagraph_jax.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
            check=True,
        )
    assert done.stdout == "capturing f: 8x64 (1 of 1)\n"


def test_a_note_is_no_step():
    """What is said of a step under way counts nothing, and is for functions of buckets alone."""
    calls: list[tuple[int, int, str]] = []
    progress = Progress(lambda done, total, item: calls.append((done, total, str(item))))
    for phase in ("", "run"):
        with progress.over(1, "f", phase=phase) as step:
            step.note(Bucket(8, 64), "for 10 s so far")
            step(Bucket(8, 64))
    assert calls == [(1, 1, "8x64"), (0, 1, "run 8x64 for 10 s so far"), (1, 1, "run 8x64")]


NOTEBOOK = """
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.report.progress import Progress
from cudagraph_jax.shapes.ladder import Bucket
with Progress().over(2, "capturing f<g>") as step:
    step(Bucket(8, 64))
    step.note(Bucket(4, 64), "for 10 s so far")
    step(Bucket(4, 64))
"""


def test_in_a_notebook_there_is_one_bar():
    """In Jupyter a bar is redrawn in its place, with no package but IPython's own."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    here = {"metadata": {"path": str(Path(cudagraph_jax.__file__).parents[1])}}
    nbclient.NotebookClient(notebook, timeout=120, resources=here).execute()
    (output,) = notebook.cells[0].outputs
    assert output.data == {
        "text/plain": "capturing f<g>: 2 of 2 4x64",
        "text/html": '<progress value="2" max="2"></progress> capturing f&lt;g&gt;: 2 of 2 4x64',
    }
