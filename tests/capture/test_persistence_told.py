"""What a server says of its store, and what the store tells the next start."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    ConfigError,
    CUDAGraphManager,
    CUDAGraphWarning,
    GraphStore,
    StoreError,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.store import Json, Stored
from cudagraph_jax.store.identity import file_name
from tests.helpers.functions import GRID, assert_close, double, floats
from tests.helpers.warm_servers import SMALL, X, loaded, warmed


def test_which_field_differs_is_logged(tmp_path, caplog):
    """A miss beside a stored executable of the same function names what differs."""
    warmed(double, tmp_path)
    with caplog.at_level(logging.INFO):
        warmed(double, tmp_path, X.astype(np.float16))
    assert "double 2x4 is not in the store: the nearest stored one has arguments" in caplog.text


def pretend(directory: Path, fields: dict[str, Json]) -> None:
    """Puts every executable where one that differs in `fields` would be."""
    store = GraphStore(directory)
    for record in store.ls():
        stored = store.read(record.file)
        assert isinstance(stored, Stored)
        identity = {**record.identity, **fields}
        (directory / record.file).unlink()
        store.put(identity, stored.payload, extra=record.extra)
        assert (directory / file_name(identity)).exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("jax", "0.9.0"),
        ("jaxlib", "0.9.0"),
        ("device_kind", ["TPU v4"]),
        ("platform", "tpu"),
        ("device_count", 8),
        ("cpu_features", "0123456789abcdef"),
        ("xla_flags", ["--xla_cpu_enable_fast_math=true"]),
    ],
)
@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_what_was_compiled_elsewhere(tmp_path, field, value, fingerprint, caplog):
    """An executable of another version, device or machine is a miss that names the field."""
    warmed(double, tmp_path, fingerprint=fingerprint)
    pretend(tmp_path, {field: value})
    with caplog.at_level(logging.INFO):
        assert not loaded(double, tmp_path, fingerprint=fingerprint)
    assert f"the nearest stored one has {field} " in caplog.text
    assert loaded(double, tmp_path, fingerprint=fingerprint)


@pytest.mark.parametrize("fingerprint", [None, "v1"])
@pytest.mark.parametrize("reason", ["absent", "not authentic"])
def test_a_miss_counts_once(tmp_path, fingerprint, reason, caplog):
    """An executable that is missed is logged and counted once, however it is looked up."""
    config = dataclasses.replace(GRID, capture_sizes=(3,))  # of two buckets
    if reason == "not authentic":
        other = GraphStore(tmp_path, key=b"another key, kept")
        for named in (None, fingerprint):
            warmed(double, other, config=config, fingerprint=named)
    store = GraphStore(tmp_path)
    with caplog.at_level(logging.INFO):
        warmed(double, store, config=config, fingerprint=fingerprint)
    misses = {name: count for name, count in store.stats()["misses"].items() if count}
    assert sum(misses.values()) == 2
    told = [text for text in caplog.messages if "store" in text or "compiled again" in text]
    assert len(told) == 2


def test_explain_knows_the_store(tmp_path):
    """A miss says what the store has: the executable, one that differs in a field, or nothing."""

    def told(function=double, **options):
        bucketed = bucket_jit(
            function, in_axes=("batch seq",), config=SMALL, store=tmp_path, **options
        )
        with no_compiles():
            return str(bucketed.explain(X))

    assert "; the store has nothing like it." in told()
    warmed(double, tmp_path)
    assert "; the store has it, unless the function has changed." in told()
    assert "; the store has it, unless" in told(fingerprint="v1")
    warmed(double, tmp_path, fingerprint="v1")
    assert "; the store has it." in told(fingerprint="v1")
    pretend(tmp_path, {"jaxlib": "0.9.0"})
    assert '; of the store, the nearest stored one has jaxlib "0.9.0", not ' in told()


def test_hot_buckets_are_captured_first(tmp_path):
    """The next start captures what was replayed most first, then the largest."""
    config = dataclasses.replace(GRID, store=str(tmp_path))
    with CUDAGraphManager(config) as manager:
        function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
        report = function.warmup(X, progress=False)
        sizes = [record.bucket for record in report.buckets]
        assert sizes == sorted(sizes, key=lambda bucket: bucket.elements, reverse=True)
        for bucket, calls in ((sizes[-1], 3), (sizes[2], 5)):
            for _ in range(calls):
                function(floats(0, *bucket))
    again = bucket_jit(double, in_axes=("batch seq",), config=config)
    order = [record.bucket for record in again.warmup(X, progress=False).buckets]
    assert order == [sizes[2], sizes[-1], *sizes[:2], *sizes[3:-1]]


def test_files_in_use_are_marked(tmp_path):
    """What was replayed is marked as used, so that pruning takes the others first."""
    now = [1000.0]
    store = GraphStore(tmp_path, clock=lambda: now[0])
    with CUDAGraphManager(GRID, store=store) as manager:
        function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
        report = function.warmup(X, progress=False)
        now[0] = 2000.0
        function(floats(0, *report.buckets[1].bucket))
    used = {record.identity["bucket"] for record in store.ls() if record.used_at == 2000}
    assert used == {str(report.buckets[1].bucket)}


def test_wrong_options(tmp_path):
    """Stores and fingerprints that contradict, or are none, are refused with what to do."""
    config = dataclasses.replace(SMALL, store=str(tmp_path))
    manager = CUDAGraphManager(config)
    wrong: list[dict[str, Any]] = [
        {"config": config, "store": tmp_path},
        {"manager": manager, "store": tmp_path},
        {"store": 3},
        {"fingerprint": ""},
        {"fingerprint": 3},
    ]
    for options in wrong:
        with pytest.raises(ConfigError):
            bucket_jit(double, in_axes=("batch seq",), **options)
    assert bucket_jit(double, in_axes="batch", manager=manager, store=manager.store)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        bucket_jit(double, in_axes="batch", store=tmp_path / "file")


class Model:
    """A model that holds its parameters."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, x):
        return x * self.weights


def closing_over_a_model(weights):
    def function(x):
        return x * weights

    return function


@pytest.mark.parametrize("make", [Model, closing_over_a_model])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_arrays_that_a_fingerprint_does_not_see(tmp_path, make, shape):
    """Arrays of a function that is known by its fingerprint are warned of, once and in bytes."""
    function = make(jnp.ones(shape, np.float32))
    config = dataclasses.replace(GRID, capture_sizes=(3,))  # of two buckets
    options: dict[str, Any] = {"config": config, "name": "model"}
    version = f"{make.__name__} of {len(shape)} axes"  # each of these functions has its own
    said = (
        f"closes over 4 bytes of arrays.* while fingerprint='{version}' stays the same.* argument"
    )
    with pytest.warns(CUDAGraphWarning, match=said) as told:
        _, report = warmed(function, tmp_path, fingerprint=version, **options)
    assert (report.captured, len(told)) == (2, 1)
    warmed(function, tmp_path, fingerprint=version, **options)  # nothing is traced
    warmed(function, tmp_path / "other", **options)  # known by what it lowers to


def test_arrays_that_are_told_apart(tmp_path):
    """NumPy's arrays in a closure are part of its name, and arguments are no part of it."""
    weights = np.ones(1, np.float32)
    warmed(closing_over_a_model(weights), tmp_path, fingerprint="v1")
    assert loaded(closing_over_a_model(weights), tmp_path, fingerprint="v1")
    assert not loaded(closing_over_a_model(weights + 1), tmp_path, fingerprint="v1")

    def function(weights, x):
        return x * weights

    options: dict[str, Any] = {"in_axes": (None, "batch seq"), "fingerprint": "v1"}
    for value in (1, 2):
        args = (jnp.full(1, value, np.float32), X)
        bucketed, report = warmed(function, tmp_path, *args, **options)
        assert_close(bucketed(*args), X * value)
    assert report.loaded == 1
