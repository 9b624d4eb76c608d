"""Executables of several processes, each with a part of its own in the store."""

from __future__ import annotations

import pytest

from cudagraph_jax import GraphStore
from tests.helpers.jobs import ran

# Each process of a job compiles for itself.
pytestmark = pytest.mark.slow


def counts(directory, *, processes=2):
    """What each process captured and loaded, by function; all answers are right."""
    ended = ran("job_store.py", directory, processes=processes)
    for process in ended:
        assert process.status == 0, process.stderr
        assert process.said["lowered is right"]
        assert process.said["named is right"]
    return [tuple(process.said[name] for name in ("lowered", "named", "own")) for process in ended]


def test_a_restarted_job_compiles_nothing(tmp_path):
    """Each process finds its own part of every bucket, verified, and another process's never."""
    assert counts(tmp_path) == [([4, 0], [4, 0], [1, 0])] * 2
    assert len(GraphStore(tmp_path)) == 18
    assert counts(tmp_path) == [([0, 4], [0, 4], [0, 1])] * 2
    # What spans no processes serves a job of any number of them: its key has only its devices.
    assert counts(tmp_path, processes=1) == [([4, 0], [4, 0], [0, 1])]
