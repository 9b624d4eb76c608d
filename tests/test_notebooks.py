"""The notebooks were executed as they stand, and their outputs can be shown to anybody.

They are executed by `make notebooks`; nothing is executed here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LISTED = re.findall(r"\]\((notebooks/[^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))

# Where homes, environments, checkouts and temporary files are on some machine.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|opt|private|root|tmp|Users|var|work)/|site-packages")
MOST_BYTES = 400_000

pytestmark = pytest.mark.skipif(not PATHS, reason="a source distribution has no notebooks")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request) -> Path:
    """Each notebook's file."""
    return request.param


@pytest.fixture
def notebook(path) -> dict[str, Any]:
    """What the file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that can be executed."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of all cells."""
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def test_the_readme_lists_them_all():
    """Every notebook has its line in the README, in order, and every line its notebook."""
    assert [str(path.relative_to(ROOT)) for path in PATHS] == LISTED


def test_executed_in_order(notebook):
    """Every code cell was executed once, from the first to the last, in a new kernel."""
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs(notebook):
        assert output.get("execution_count") in (None, *counts)


def test_a_cell_that_shows_something_has_its_output(notebook):
    """A cell that ends in a name or prints at its top level was not saved without its output."""
    for cell in code_cells(notebook):
        source = "".join(cell["source"])
        last = source.splitlines()[-1]
        if re.match(r"print\(|[\w.]+$", last):
            assert cell["outputs"], source


def test_no_errors_and_no_warnings(notebook):
    """No cell ended in an error, may end in one, or wrote to stderr."""
    for output in outputs(notebook):
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", output
    for cell in code_cells(notebook):
        assert "raises-exception" not in cell["metadata"].get("tags", ())


def test_nothing_of_the_machine(notebook):
    """No output has a path of the machine that it was made on."""
    for output in outputs(notebook):
        shown = {kind: data for kind, data in output.get("data", {}).items() if kind != "image/png"}
        found = MACHINE_PATH.search(json.dumps([shown, output.get("text")]))
        assert found is None, found


def test_metadata(notebook):
    """The kernel is the usual one, and nothing else is said of who executed it, or when."""
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for cell in notebook["cells"]:
        assert "execution" not in cell["metadata"]


def test_cell_ids(notebook):
    """Cells are numbered, so that executing again changes no id."""
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids == [f"cell-{number:02}" for number in range(len(ids))]


def test_links(notebook):
    """A notebook that is linked to is there."""
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    for target in re.findall(r"\]\(([\w.]+\.ipynb)\)", text):
        assert (ROOT / "notebooks" / target).is_file(), target


def test_small(path):
    """A notebook is quick to load and does not swell the repository."""
    assert path.stat().st_size < MOST_BYTES


def test_formatted():
    """Ruff would change nothing, where it is installed; `make lint` checks it everywhere."""
    pytest.importorskip("ruff")
    options = ["--check", "--quiet", "--diff"]
    command = [sys.executable, "-m", "ruff", "format", *options, *map(str, PATHS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
