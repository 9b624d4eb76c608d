"""`cudagraph-jax demo`: its options reach the demo."""

import pytest

from cudagraph_jax.cli import main


@pytest.mark.parametrize("option", [[], ["--plan"]])
def test_json_path(tmp_path, capsys, option):
    """With a plan or without, a file that cannot be written is told at once."""
    path = tmp_path / "missing" / "figures.json"
    assert main(["demo", *option, "--limit", "40", "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "is in a folder that does not exist" in printed.err


@pytest.mark.parametrize("option", [[], ["--plan"]])
def test_store(tmp_path, capsys, option):
    """With a plan or without, a directory that cannot be a store is told before any work."""
    path = tmp_path / "file"
    path.touch()
    assert main(["demo", *option, "--store", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(path) in printed.err


def test_one_passage(capsys):
    """A plan needs a stream that can be divided."""
    assert main(["demo", "--plan", "--limit", "1"]) == 1
    assert "raise --limit" in capsys.readouterr().err


def test_limit(capsys):
    """A limit that is no whole number above 0 is a usage error."""
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--limit", "0"])
    assert "is no whole number above 0" in capsys.readouterr().err
