"""Upkeep: hot buckets and files in use are written down while a server serves."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time

from cudagraph_jax import CUDAGraphManager, GraphStore, StoreError, bucket_jit
from cudagraph_jax.graphs.upkeep import Upkeep
from tests.graphs.functions import GRID, double, floats

BUCKET = str(GRID.bucket_for(2, 3))


def serving(store):
    """A manager in `store`, and a warm function of it."""
    manager = CUDAGraphManager(GRID, store=store)
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    function.warmup(floats(0, 1, 1), progress=False)
    return manager, function


def upkeep_of(manager, **options):
    """Another upkeep of the manager."""
    return Upkeep(manager.registry.shelf, manager.registry, **options)


def test_it_writes_while_the_server_serves(tmp_path):
    """The counts are in the store soon after the calls, without an end."""
    manager, function = serving(GraphStore(tmp_path))
    upkeep = upkeep_of(manager, interval_s=0.01)
    upkeep.begin()
    upkeep.begin()
    for _ in range(3):
        function(floats(0, 2, 3))
    deadline = time.monotonic() + 60
    while manager.store.hot().get("double", {}).get(BUCKET) != 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert manager.store.hot()["double"][BUCKET] == 3
    upkeep.end()


def test_other_functions_stay(tmp_path):
    """What another server wrote of its functions is kept."""
    store = GraphStore(tmp_path)
    store.remember_hot({"other": {"1x1": 7}, "double": {"9x9": 1}})
    manager, function = serving(store)
    function(floats(0, 2, 3))
    manager.close()
    hot = store.hot()
    assert hot["other"] == {"1x1": 7}
    assert hot["double"][BUCKET] == 1
    assert "9x9" not in hot["double"]


def test_nothing_is_written_without_calls(tmp_path):
    """A warm-up alone, or a store that is only read, changes no counts."""
    manager, _ = serving(GraphStore(tmp_path))
    manager.close()
    assert not (tmp_path / "hot.json").exists()
    manager, function = serving(GraphStore(tmp_path, mode="ro"))
    function(floats(0, 2, 3))
    manager.close()
    assert not (tmp_path / "hot.json").exists()


def test_it_ends_with_its_manager(tmp_path):
    """A manager that nobody holds is collected, and its thread ends."""
    before = threading.active_count()
    manager, function = serving(GraphStore(tmp_path))
    upkeep_of(manager, interval_s=0.01).begin()
    manager.close()
    del manager, function
    gc.collect()
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_what_cannot_be_written_is_logged(tmp_path, monkeypatch, caplog):
    """A full disk costs the counts, and no request."""
    store = GraphStore(tmp_path)
    manager, function = serving(store)
    function(floats(0, 2, 3))

    def full(hot):
        raise StoreError("no space left on device")

    monkeypatch.setattr(store, "remember_hot", full)
    with caplog.at_level(logging.WARNING):
        manager.close()
    assert "the hot buckets are not written down: no space left on device" in caplog.text


def test_a_manager_that_is_switched_off(tmp_path):
    """A disabled manager with a store closes without writing."""
    config = dataclasses.replace(GRID, enabled=False)
    with CUDAGraphManager(config, store=GraphStore(tmp_path)) as manager:
        assert manager.store is not None
    assert not (tmp_path / "hot.json").exists()
