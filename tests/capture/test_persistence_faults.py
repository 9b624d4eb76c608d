"""What is wrong with a store costs time and no answer."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
import time
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphManager,
    CUDAGraphWarning,
    GraphStore,
    StoreError,
    bucket_jit,
)
from cudagraph_jax.store import Stored
from cudagraph_jax.store.locks import LOCK, held
from cudagraph_jax.xla.environment import plugin_versions
from tests.helpers.functions import GRID, assert_close, double, floats
from tests.helpers.warm_servers import BUCKETS, SMALL, X, loaded, warmed

FEW = dataclasses.replace(GRID, capture_sizes=(3,))  # of two buckets


def spoil(path, how):
    """Every file of a store, damaged."""
    for file in path.glob("*.graph"):
        data = bytearray(file.read_bytes())
        if how == "flipped":
            data[len(data) // 2] ^= 1
        elif how == "truncated":
            del data[len(data) // 2 :]
        else:
            data[:] = b"something else"
        file.write_bytes(bytes(data))


@pytest.mark.parametrize("fingerprint", [None, "v1"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "foreign"])
def test_a_bad_file_is_compiled_and_replaced(tmp_path, how, fingerprint, caplog):
    """What is not whole is logged, put aside, compiled again and stored anew."""
    options: dict[str, Any] = {"config": FEW, "fingerprint": fingerprint}
    warmed(double, tmp_path, **options)
    spoil(tmp_path, how)
    with caplog.at_level(logging.WARNING):
        _, report = warmed(double, tmp_path, **options)
    assert report.captured == 2
    assert caplog.text.count("is compiled again") == len(list(tmp_path.glob("*.bad"))) == 2
    assert warmed(double, tmp_path, **options)[1].loaded == 2


def test_a_read_only_store(tmp_path):
    """A store that is only read serves what it has, and is not written for the rest."""
    warmed(double, tmp_path)
    files = sorted(tmp_path.iterdir())
    store = GraphStore(tmp_path, mode="ro")
    assert loaded(double, store)
    assert not loaded(lambda x: x + 1, store)
    assert sorted(tmp_path.iterdir()) == files


def test_a_store_that_cannot_be_written(tmp_path, monkeypatch):
    """Serving goes on with one warning for all buckets."""
    store = GraphStore(tmp_path)

    def full(*args, **options):
        raise StoreError("no space left on device")

    monkeypatch.setattr(store, "put", full)
    with pytest.warns(CUDAGraphWarning, match="no space left on device") as told:
        function, report = warmed(double, store, config=FEW)
    assert len(told) == 1
    assert report.captured == 2
    assert_close(function(X), X * 2)


def test_a_directory_that_is_deleted(tmp_path):
    """Serving goes on, with one warning; the executables live in memory."""
    function, _ = warmed(double, tmp_path / "store", config=FEW)
    for file in (tmp_path / "store").iterdir():
        file.unlink()
    (tmp_path / "store").rmdir()
    other = bucket_jit(lambda x: x + 1, in_axes=("batch seq",), manager=function.manager)
    with pytest.warns(CUDAGraphWarning, match="is served without the store") as told:
        assert other.warmup(X, progress=False).captured == 2
    assert len(told) == 1
    assert_close(function(X), X * 2)
    assert_close(other(X), X + 1)


def test_what_cannot_be_stored_is_said_once(tmp_path):
    """A function that calls the host is compiled at every start, with one warning."""

    def function(x):
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x) * 2

    with pytest.warns(CUDAGraphWarning, match="JAX cannot write it") as told:
        bucketed, report = warmed(function, tmp_path, config=FEW)
    assert (len(told), report.captured) == (1, 2)
    assert_close(bucketed(X), X * 2)
    assert len(GraphStore(tmp_path)) == 0


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_a_payload_that_does_not_load(tmp_path, fingerprint):
    """Whole files with payloads that are no executables are compiled again and replaced."""
    options: dict[str, Any] = {"config": FEW, "fingerprint": fingerprint}
    warmed(double, tmp_path, **options)
    store = GraphStore(tmp_path)
    for record in store.ls():
        store.put(record.identity, b"no pickle", extra=record.extra)
    with pytest.warns(CUDAGraphWarning, match="its pickle cannot be followed") as told:
        _, report = warmed(double, tmp_path, **options)
    assert (len(told), report.captured) == (1, 2)
    assert warmed(double, tmp_path, **options)[1].loaded == 2


def test_outputs_that_are_not_described(tmp_path):
    """A header without a sound description of the outputs costs its file, and no answer."""
    options: dict[str, Any] = {"config": GRID, "fingerprint": "v1"}
    warmed(double, tmp_path, **options)
    store = GraphStore(tmp_path)
    for number, record in enumerate(store.ls()):
        stored = store.read(record.file)
        assert isinstance(stored, Stored)
        leaf = ["the output", [1, 0], "host", 2, True]
        written: list[Any] = [
            None, {"tree": 0}, {"leaves": 3, "tree": [1]}, {"tree": 0, "leaves": [leaf]},
            {"tree": ["tuple", 0, 1], "leaves": [leaf, leaf]},
            {"tree": 0, "leaves": [["the output", [5, 0], "host", 2, True]]},
        ]  # fmt: skip
        ((grid, _),) = record.extra["outputs"]
        outputs: list[Any] = [[[grid, written[number % 6]]], {grid: None}, [grid], [[0, grid]]]
        extra = {
            "outputs": outputs[max(0, number - 5)], "memory_bytes": "x", "flops": True
        }  # fmt: skip
        store.put(record.identity, stored.payload, extra=extra)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        function, report = warmed(double, tmp_path, **options)
    assert 0 < len(told) < BUCKETS
    assert report.loaded + report.captured == BUCKETS
    assert_close(function(X), X * 2)
    assert warmed(double, tmp_path, **options)[1].loaded == BUCKETS


def test_an_interrupted_warm_up(tmp_path):
    """What was being loaded ahead is dropped, and the next warm-up is whole."""
    options: dict[str, Any] = {"config": FEW, "fingerprint": "v1", "in_axes": ("batch seq",)}
    warmed(double, tmp_path, **options)
    function = bucket_jit(double, store=tmp_path, **options)

    def interrupt(done, total, bucket):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function.warmup(X, progress=interrupt)
    report = function.warmup(X, progress=False)
    assert (report.loaded, report.captured) == (1, 0)
    assert_close(function(X), X * 2)


def lost(x):
    raise RuntimeError("NOT_FOUND: its code")


@pytest.mark.parametrize("iterations", [0, 1])
def test_an_executable_that_does_not_run(tmp_path, iterations, monkeypatch):
    """What loads and does not run is compiled again and replaced, in the request if need be."""
    config = dataclasses.replace(SMALL, warmup_iterations=iterations)
    warmed(double, tmp_path, config=config)
    struct = jax.ShapeDtypeStruct((2, 4), np.float32)
    other = jax.jit(lambda x: jax.pure_callback(lost, struct, x)).lower(struct).compile()
    with monkeypatch.context() as patched:
        patched.setattr("cudagraph_jax.xla.serialize.load", lambda *_, **__: other)
        function = bucket_jit(double, in_axes=("batch seq",), config=config, store=tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = function.warmup(X, progress=False)
            assert report.captured == iterations
            assert_close(function(X), X * 2)
            if not iterations:  # the call was the first run, and was answered eagerly
                function.manager.dispatcher.capturer.failures.clear()
                assert_close(function(X), X * 2)
        stats = function.stats()["registry"]
        assert (stats["capture_count"], stats["load_count"]) == (1, 0)
    assert loaded(double, tmp_path, config=config)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"double": 3}', '{"double": {"2x4": "x"}}'])
def test_a_bad_manifest_changes_nothing(tmp_path, text, caplog):
    """A manifest that is not what it should be is said, and the order is the usual one."""
    warmed(double, tmp_path, config=FEW)
    (tmp_path / "hot.json").write_text(text)
    _, report = warmed(double, tmp_path, config=FEW)
    assert report.loaded == 2
    assert "hot.json is not used" in caplog.text


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_waiting_for_another_process_is_said(tmp_path, fingerprint, caplog):
    """A capture that waits for another process says for what, and for how long at most."""
    pytest.importorskip("filelock")
    warmed(double, tmp_path, fingerprint=fingerprint)
    (file,) = [record.file for record in GraphStore(tmp_path).ls()]
    (tmp_path / file).unlink()
    with held(tmp_path / f"{file}{LOCK}", timeout_s=1), caplog.at_level(logging.INFO):
        store = GraphStore(tmp_path, patience_s=0.1)
        assert not loaded(double, store, fingerprint=fingerprint)
    said = "waiting for another process that compiles double 2x4, at most 0.1 s"
    assert caplog.messages.count(said) == 1


def test_closing_does_not_wait_for_others(tmp_path):
    """A manager is closed at once, also while a capture waits for another process."""
    pytest.importorskip("filelock")
    warmed(double, tmp_path)
    (file,) = [record.file for record in GraphStore(tmp_path).ls()]
    (tmp_path / file).unlink()
    config = dataclasses.replace(SMALL, on_miss="background")
    manager = CUDAGraphManager(config, store=GraphStore(tmp_path, patience_s=250))
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    with held(tmp_path / f"{file}{LOCK}", timeout_s=1) as is_held:
        assert is_held
        assert_close(function(X), X * 2)
        began = time.monotonic()
        manager.close()
        assert time.monotonic() - began < 250


@pytest.mark.parametrize(
    "stated",
    [
        {"memory_bytes": 1e308},
        {"flops": -1},
        {"outputs": [["*", {"tree": None, "leaves": []}]]},
        {"outputs": "nothing"},
    ],
)
def test_a_header_that_nobody_would_write(tmp_path, stated):
    """Whatever a whole file states, the bucket is loaded or compiled, and the answer is right."""
    options: dict[str, Any] = {"fingerprint": "v1"}
    warmed(double, tmp_path, **options)
    store = GraphStore(tmp_path)
    (record,) = store.ls()
    stored = store.get(record.identity)
    assert isinstance(stored, Stored)
    store.put(record.identity, stored.payload, extra={**stored.extra, **stated})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CUDAGraphWarning)
        function, report = warmed(double, tmp_path, **options)
    assert report.loaded + report.captured == 1
    assert_close(function(X), X * 2)


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_no_free_file_descriptor(tmp_path, fingerprint):
    """A process that can open no file serves, says once why it stores nothing, and recovers."""
    warmed(double, tmp_path)
    bucketed = bucket_jit(
        double, in_axes=("batch seq",), config=GRID, store=tmp_path, fingerprint=fingerprint
    )
    plugin_versions.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.warns(CUDAGraphWarning, match="served without the store") as told:
            answers = [(x, bucketed(x)) for x in (floats(0, batch, 3) for batch in (1, 2, 4))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(told) == 1
    for x, answer in answers:
        assert_close(answer, x * 2)
    x = floats(0, 4, 2)
    assert_close(bucketed(x), x * 2)
    assert bucketed.manager.store is not None
    assert bucketed.manager.store.stats()["written"] == 1


def test_packages_without_metadata(tmp_path, monkeypatch):
    """In a bundle, or in the middle of an upgrade, executables are stored and loaded as ever."""
    assert not loaded(double, tmp_path)
    plugin_versions.cache_clear()
    monkeypatch.setattr(sys, "path", [])
    assert loaded(double, tmp_path)


class Refusing(GraphStore):
    """A store in which everything fails as nobody would expect."""

    def get(self, *args: Any, **options: Any) -> Any:
        raise LookupError("no such thing")

    put = nearest = touch = hot = remember_hot = __contains__ = get


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_whatever_a_store_raises(tmp_path, fingerprint, caplog):
    """No error of a store reaches who asked: it is warned of, and what was asked for is served."""
    store = Refusing(tmp_path)
    with pytest.warns(CUDAGraphWarning, match="LookupError: no such thing"):
        bucketed, report = warmed(double, store, fingerprint=fingerprint)
    assert report.captured == 1
    with caplog.at_level(logging.DEBUG):
        assert_close(bucketed(X), X * 2)
        assert "the store is of no use" in str(bucketed.explain(X.astype(np.int32)))
    bucketed.manager.close()


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_entries_of_a_newer_format(tmp_path, fingerprint, caplog):
    """While servers are upgraded one by one, the old ones compile for themselves and say why."""
    assert not loaded(double, tmp_path, fingerprint=fingerprint)
    for file in tmp_path.glob("*.graph"):
        file.write_bytes(file.read_bytes()[:8] + b"\2\0\0\0" + file.read_bytes()[12:])
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.graph*")}
    with caplog.at_level(logging.WARNING):
        bucketed, report = warmed(double, tmp_path, fingerprint=fingerprint)
    assert report.captured == 1
    assert_close(bucketed(X), X * 2)
    assert caplog.text.count("format version 2 is newer than 1") == 1
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob("*.bad"))
