"""What tests of `cudagraph-jax store` share."""

from __future__ import annotations

import pytest

from cudagraph_jax.cli import main
from tests.helpers.stock import stocked


@pytest.fixture
def store(capsys):
    """Runs the command: its exit status, what it printed, and its errors."""

    def run(*arguments):
        status = main(["store", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def stock(tmp_path):
    """The directory of a store with three entries."""
    return stocked(tmp_path / "graphs").path


@pytest.fixture
def archive(tmp_path):
    return tmp_path / "graphs.tar"
