"""Servers that start on one store, each in a process of its own, and what may happen to them."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from cudagraph_jax import GraphStore
from cudagraph_jax.store.locks import LOCK, held
from tests.helpers.processes import ROOT
from tests.helpers.programs.server import BUCKETS, start, start_together

WITH_FINGERPRINT = ["--fingerprint=v1"]

# Each server is a process that starts JAX.
pytestmark = pytest.mark.slow


def counts(found):
    """Captured and loaded buckets of a server whose answer was right, without a warning."""
    assert (found["failed"], found["is_right"], found["warnings"]) == (0, True, [])
    return found["captured"], found["loaded"]


@pytest.mark.parametrize(("function", "options"), [("scaled", []), ("inverted", WITH_FINGERPRINT)])
def test_a_restart(tmp_path, function, options):
    """A fresh process loads all buckets and answers right, also of a function with LAPACK calls."""
    options = [f"--function={function}", *options]
    assert counts(start(tmp_path, *options)) == (BUCKETS, 0)
    assert counts(start(tmp_path, *options)) == (0, BUCKETS)
    assert GraphStore(tmp_path).hot() == {function: {"4x8": 1}}  # written at exit


@pytest.mark.parametrize(("number", "options"), [(3, []), (2, WITH_FINGERPRINT)])
def test_servers_on_an_empty_store(tmp_path, number, options):
    """Servers that start together compile each bucket once among them."""
    pytest.importorskip("filelock")
    found = [counts(one) for one in start_together(number, tmp_path, *options)]
    assert len(found) == number
    assert sum(captured for captured, _ in found) == BUCKETS
    assert sum(loaded for _, loaded in found) == (number - 1) * BUCKETS


def test_jaxs_own_cache_beside_it(tmp_path):
    """What JAX's persistent cache gave is compiled once for the store, and loads from there."""
    cache = f"--jax-cache={tmp_path / 'jax'}"
    assert counts(start(tmp_path / "store", cache, "--no-store")) == (BUCKETS, 0)
    directory, *options = tmp_path / "served", cache, "--fingerprint=v1"
    assert counts(start(directory, *options)) == (BUCKETS, 0)
    assert counts(start(directory, *options)) == (0, BUCKETS)
    assert counts(start(directory, *options[1:])) == (0, BUCKETS)


def test_a_server_that_hangs_is_not_waited_for(tmp_path):
    """Nobody waits longer than `patience_s`, once, for a lock that is never let go."""
    pytest.importorskip("filelock")
    start(tmp_path)
    files = [record.file for record in GraphStore(tmp_path).ls()]
    for file in files:
        (tmp_path / file).unlink()
    with ExitStack() as stack:
        for file in files:
            assert stack.enter_context(held(tmp_path / f"{file}{LOCK}", timeout_s=1))
        found = start(tmp_path, "--patience=1.5")
    assert counts(found) == (BUCKETS, 0)
    # Once for the first bucket, and not again for the others.
    assert 1.5e3 <= found["total_ms"] < BUCKETS * 1.5e3


def test_killed_at_any_moment(tmp_path):
    """A server that is killed while it warms up leaves a store from which the next one is right.

    Every step of one write is tried where no process has to start, in
    `store/test_many_processes.py`.
    """
    for step in (0, 7):
        found = start(tmp_path, f"--dies-at={step}", check=False)
        assert found["status"] == -signal.SIGKILL
    assert all(checked.is_whole for checked in GraphStore(tmp_path).verify())
    captured, loaded = counts(start(tmp_path))
    assert captured + loaded == BUCKETS
    assert 0 < loaded < BUCKETS
    assert counts(start(tmp_path)) == (0, BUCKETS)


def test_no_room_on_the_disk(tmp_path):
    """A server that cannot write serves all the same, with one warning, and leaves nothing."""
    found = start(tmp_path, "--limit-bytes=2000")
    (warning,) = found["warnings"]
    assert "cannot be written: File too large" in warning
    assert (found["captured"], found["is_right"]) == (BUCKETS, True)
    assert list(tmp_path.glob("*.graph")) == []


def test_another_version_of_jax(tmp_path):
    """What another installed JAX compiled is a miss that names the versions."""
    others = [
        path
        for path in sorted(ROOT.glob(".venv*/bin/python"))
        if path.resolve().parents[1] != Path(sys.executable).resolve().parents[1]
    ]
    if not others:
        pytest.skip("there is no second environment")
    start(tmp_path, executable=str(others[0]))
    found = start(tmp_path)
    assert counts(found) == (BUCKETS, 0)
    assert "the nearest stored one has" in found["stderr"]
    assert "jaxlib" in found["stderr"]
    assert counts(start(tmp_path, executable=str(others[0]))) == (0, BUCKETS)
