"""A store under a manager: what was compiled once is loaded and does the same."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphRegistry,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.store import GraphStore, Stored
from tests.helpers.functions import GRID, PARAMS, assert_close, dense, double, floats
from tests.helpers.warm_servers import BUCKETS, SMALL, Counted, X, loaded, warmed


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_a_restarted_server_is_warm(tmp_path, fingerprint):
    """A second manager loads the whole grid, compiles nothing, and answers the same."""
    config = dataclasses.replace(GRID, store=str(tmp_path))
    options: dict[str, Any] = {
        "in_axes": (None, "batch seq ..."), "config": config, "fingerprint": fingerprint
    }  # fmt: skip
    example = (PARAMS, floats(0, 1, 1, 3))
    first, report = warmed(dense, None, *example, **options)
    assert (report.captured, report.loaded) == (BUCKETS, 0)
    second, report = warmed(dense, None, *example, **options)
    assert (report.captured, report.loaded) == (0, BUCKETS)
    assert second.registry.capture_count == 0
    assert second.stats()["registry"]["load_count"] == BUCKETS
    for shape in ((1, 1, 3), (2, 2, 3), (3, 4, 3), (4, 5, 3)):
        x = floats(1, *shape)
        with no_compiles():
            answer = second(PARAMS, x)
        assert np.array_equal(answer, first(PARAMS, x))


def test_a_fingerprint_saves_the_tracing(tmp_path):
    """With a fingerprint a loaded function is never traced; without one it is."""
    function = Counted(double)
    warmed(function, tmp_path, fingerprint="v1")
    function.calls = 0
    with no_compiles():
        bucketed, report = warmed(function, tmp_path, fingerprint="v1")
        assert_close(bucketed(X), X * 2)
    assert (report.loaded, function.calls) == (1, 0)
    assert not loaded(function, tmp_path / "other", fingerprint="v1")
    warmed(function, tmp_path / "plain")
    function.calls = 0
    assert loaded(function, tmp_path / "plain")
    assert function.calls > 0


def test_from_no_fingerprint_to_one(tmp_path):
    """What was stored without a fingerprint is loaded and from then on known by it, too."""
    function = Counted(double)
    warmed(function, tmp_path)
    assert loaded(function, tmp_path, fingerprint="from none")
    function.calls = 0
    bucketed, report = warmed(function, tmp_path, fingerprint="from none")
    assert (report.loaded, function.calls) == (1, 0)
    assert_close(bucketed(X), X * 2)


class Named(NamedTuple):
    doubled: Any
    shape: Any


def in_named(x):
    return Named(x * 2, {"rows": (x.sum(1), [None])})


@pytest.mark.parametrize("unpad", ["host", "device", "none"])
def test_outputs_of_every_kind(tmp_path, unpad):
    """Pytrees come back as they were, also ones that must be traced once to be known."""
    function, name = Counted(in_named), f"v1 {unpad}"
    first, _ = warmed(function, tmp_path, fingerprint=name, unpad=unpad)
    cold, function.calls = function.calls, 0
    second, report = warmed(function, tmp_path, fingerprint=name, unpad=unpad)
    assert report.loaded == 1
    assert function.calls <= cold  # nothing is lowered
    one, two = first(X), second(X)
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(two))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


@jax.tree_util.register_pytree_node_class
class Rows:
    """Refuses other shapes when it is made."""

    def __init__(self, rows, rest=None):
        assert len(rows.shape) == 2
        self.rows, self.rest = rows, rest

    def tree_flatten(self):
        return (self.rows, self.rest), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class Arrays(Rows):
    """Refuses what is no array."""

    def __init__(self, rows, rest=None):
        if not isinstance(rows, np.ndarray | jax.Array):
            raise TypeError(f"{rows!r} is no array")
        super().__init__(rows, rest)


class Pair(NamedTuple("Pair", [("rows", Any), ("rest", Any)])):
    """Refuses other shapes, too."""

    def __new__(cls, rows, rest=None):
        assert len(rows.shape) == 2
        return super().__new__(cls, rows, rest)


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["rest"])
@dataclasses.dataclass(frozen=True)
class Static:
    """Has one field that is no array, and refuses other shapes."""

    rows: Any
    rest: Any = "kept"

    def __post_init__(self):
        assert len(self.rows.shape) == 2


@pytest.mark.parametrize("fingerprint", [None, "v1"])
@pytest.mark.parametrize("unpad", ["host", "device", "none"])
@pytest.mark.parametrize("kind", [Rows, Arrays, Pair, Static])
def test_classes_that_check_what_they_hold(tmp_path, kind, unpad, fingerprint):
    """An output of a class that takes some arrays alone is stored, loaded, and as it was."""

    def made(x):
        return {"made": kind(x * 2), "none": None}

    for is_loaded in (False, True):
        function, report = warmed(made, tmp_path, fingerprint=fingerprint, unpad=unpad)
        assert report.loaded == is_loaded
        with no_compiles():
            answer = function(np.ones((2, 4), np.float32))
        assert type(answer["made"]) is kind
        assert answer["made"].rest == kind(X).rest
        assert_close(np.asarray(answer["made"].rows), np.full((2, 4), 2, np.float32))


@pytest.mark.parametrize("kind", [Rows, Pair, Static])
def test_arguments_that_check_what_they_hold(tmp_path, kind):
    """So is a function of one, that is bucketed or passed through."""

    def doubled(given, weights):
        return type(given)(given.rows * weights.rows.sum())

    for is_loaded in (False, True):
        function, report = warmed(
            doubled, tmp_path, kind(X), kind(jnp.ones((1, 2))), in_axes=("batch seq", None)
        )
        assert report.loaded == is_loaded
        assert_close(function(kind(X), kind(jnp.ones((1, 2)))).rows, X * 2)


def test_the_specifications_calls(tmp_path):
    """execute_or_capture and registry.capture use the store of the config, too."""
    config = dataclasses.replace(SMALL, store=str(tmp_path))
    for count in (1, 0):
        manager = CUDAGraphManager(config)
        assert_close(manager.execute_or_capture(2, 3, double, X), X * 2)
        assert manager.registry.capture_count == count
        registry = CUDAGraphRegistry(config)
        registry.capture(2, 3, lambda x: x + 1, (2, 3))
        assert registry.capture_count == count


@pytest.mark.parametrize("policy", ["capture", "background"])
def test_a_miss_is_loaded(tmp_path, policy):
    """Without a warm-up the first call of a bucket loads it."""
    warmed(double, tmp_path)
    config = dataclasses.replace(SMALL, on_miss=policy)
    with bucket_jit(double, in_axes=("batch seq",), config=config, store=tmp_path).manager as m:
        function = bucket_jit(double, in_axes=("batch seq",), manager=m)
        assert_close(function(X), X * 2)
        m.wait()
        assert_close(function(X), X * 2)
        assert (m.registry.capture_count, m.registry.load_count) == (0, 1)


def test_debug_mode_checks_what_was_loaded(tmp_path):
    """A loaded bucket is checked against the function like a compiled one."""
    config = dataclasses.replace(SMALL, debug_mode=True)
    for is_loaded in (False, True):
        assert loaded(double, tmp_path, config=config) is is_loaded


def test_donated_state(tmp_path):
    """A loaded executable takes over the buffers that the compiled one did."""
    step = lambda cache, x: (cache + x, x.sum())  # noqa: E731
    options: dict[str, Any] = {
        "in_axes": ("batch seq", "batch seq"), "donate_argnums": 0, "unpad": "none"
    }  # fmt: skip
    x = jnp.ones((2, 4))
    for is_loaded in (False, True):
        function, report = warmed(step, tmp_path, x, x, **options)
        assert bool(report.loaded) is is_loaded
        cache = jnp.zeros((2, 4))
        for _ in range(3):
            before = cache
            cache, _ = function(cache, x)
            assert before.is_deleted()
        assert_close(cache, np.full((2, 4), 3, np.float32))


def by_size(x):
    """Another pytree for the small bucket than for the large one."""
    return {"small": x * 2} if x.shape[0] <= 2 else {"large": x * 3}


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_outputs_that_depend_on_the_bucket(tmp_path, fingerprint):
    """Each bucket's pytree is its own, loaded or compiled."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(4,), warmup_iterations=0)
    options: dict[str, Any] = {
        "config": config, "fingerprint": fingerprint, "unpad": "none", "out_axes": "batch seq"
    }  # fmt: skip
    for count in (0, 2):
        function, report = warmed(by_size, tmp_path, **options)
        assert report.loaded == count
        assert [*function(X)] == ["small"]
        assert [*function(floats(0, 4, 4))] == ["large"]


def test_hot_buckets_do_not_change_the_outputs_axes(tmp_path):
    """The axes of outputs are those that the largest bucket shows, whichever is loaded first."""
    function = lambda x: x if x.shape[1] <= 8 else x[:, ::2]  # noqa: E731
    small = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4, 8), warmup_iterations=0)
    large = dataclasses.replace(small, capture_seq_lens=(4, 8, 16), max_capture_seq_len=16)
    for fingerprint in (None, "v1"):
        with warmed(function, tmp_path, config=small, fingerprint=fingerprint)[0].manager as m:
            bucket_jit(function, in_axes=("batch seq",), manager=m)(floats(0, 2, 4))
        bucketed, _ = warmed(function, tmp_path, config=large, fingerprint=fingerprint)
        for seq in (4, 7, 8, 12, 16):
            x = floats(0, 2, seq)
            assert_close(bucketed(x), function(x))


def test_a_file_that_describes_its_outputs_for_several_grids(tmp_path):
    """Files of former versions are loaded, and nothing is traced for them."""
    function = Counted(double)
    warmed(function, tmp_path, fingerprint="several grids")
    store = GraphStore(tmp_path)
    for record in store.ls():
        stored = store.read(record.file)
        assert isinstance(stored, Stored)
        ((_, outputs),) = stored.extra["outputs"]
        grids = {**stored.extra, "outputs": [["0123456789abcdef", None], ["fedcba", outputs]]}
        store.put(stored.identity, stored.payload, extra=grids)
    function.calls = 0
    bucketed, report = warmed(function, tmp_path, fingerprint="several grids")
    assert (report.loaded, function.calls) == (1, 0)
    assert_close(bucketed(X), X * 2)
