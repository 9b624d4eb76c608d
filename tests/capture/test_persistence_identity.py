"""What is not the same program is never loaded in its place."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphWarning,
    GraphStore,
    bucket_jit,
)
from cudagraph_jax.capture.cache_key import loading_keeps_options
from tests.helpers.functions import assert_close, floats, tokens
from tests.helpers.warm_servers import SMALL, Counted, X, closing_over, loaded, warmed


def first_of(x, y):
    return x


def second_of(x, y):
    return y


def tanh_of(x):
    return jnp.tanh(x)


def first_four(x):
    return x[:4]


first_of.__name__ = second_of.__name__ = "either"


def test_which_argument_is_dropped(tmp_path):
    """Functions that lower alike, but take different arguments, are told apart."""
    options: dict[str, Any] = {"in_axes": "batch seq"}
    y = X + 1
    first, _ = warmed(first_of, tmp_path, X, y, **options)
    second, report = warmed(second_of, tmp_path, X, y, **options)
    assert report.loaded == 0
    assert_close(first(X, y), X)
    assert_close(second(X, y), y)
    again, report = warmed(second_of, tmp_path, X, y, **options)
    assert report.loaded == 1
    assert_close(again(X, y), y)


def scaling(constant):
    """A function with a constant of its own."""

    def scaled(x):
        return x * constant

    return scaled


@pytest.mark.parametrize(
    "other",
    [
        {"function": scaling(np.float32(3))},
        {"function": scaling(np.full((1, 1), 2, np.float32))},
        {"args": (X.astype(np.float16),)},
        {"args": (tokens(0, 2, 3),)},
        {"name": "another"},
        {"donate_argnums": 0, "unpad": "none"},
        {"mask_argname": "mask", "function": lambda x, mask: x * 2.0 * mask},
        {"config": dataclasses.replace(SMALL, capture_seq_lens=(8,), max_capture_seq_len=8)},
    ],
)
def test_what_is_not_the_same_is_compiled(tmp_path, other):
    """Another constant, dtype, name, donation, mask or bucket is another executable."""
    function = scaling(np.float32(2))
    warmed(function, tmp_path)
    assert loaded(function, tmp_path)
    options = {"function": function, "args": (X,), **other}
    function, args = options.pop("function"), options.pop("args")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # donated buffers that no output can take over
        assert not loaded(function, tmp_path, *args, **options)
        assert loaded(function, tmp_path, *args, **options)


def test_compiler_options_count(tmp_path):
    """With other options it is another executable; old jaxlibs may lose them off the CPU."""
    options = {"xla_cpu_enable_fast_math": "True"}
    other = dataclasses.replace(SMALL, compiler_options=options)
    warmed(tanh_of, tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not loaded(tanh_of, tmp_path, config=other)
        is_kept = loaded(tanh_of, tmp_path, config=other)
    assert is_kept == (jax.default_backend() == "cpu" or loading_keeps_options())
    assert is_kept != any("may lose its compiler options" in str(each.message) for each in told)
    assert loaded(tanh_of, tmp_path)


@pytest.mark.parametrize(
    ("jaxlib", "kept"), [("0.10.2", False), ("0.11.2", False), ("0.12.0.1", True), ("1.0", True)]
)
def test_which_jaxlib_keeps_options(jaxlib, kept):
    """From 0.12 on what is loaded has its compiler options, on a GPU too."""
    assert loading_keeps_options(jaxlib) == kept


def test_a_setting_of_jax_counts(tmp_path):
    """What was compiled under other settings of JAX is not loaded."""
    args = (floats(0, 2, 2),)
    options: dict[str, Any] = {
        "in_axes": ("batch _",), "fingerprint": "v1",
        "config": CUDAGraphConfig(capture_sizes=(2,), warmup_iterations=0),
    }  # fmt: skip
    function = lambda x: x @ jnp.ones((2, 2), x.dtype)  # noqa: E731
    assert not loaded(function, tmp_path, *args, **options)
    with jax.default_matmul_precision("float32"):
        assert not loaded(function, tmp_path, *args, **options)
        assert loaded(function, tmp_path, *args, **options)
    assert loaded(function, tmp_path, *args, **options)


def test_an_edit_under_the_same_fingerprint_is_noticed(tmp_path):
    """The function's own bytecode is part of what it is known by; so is the fingerprint."""
    space: dict[str, Any] = {}
    for factor in (2, 3):
        exec(f"def f(x): return x * {factor}", space)
        bucketed, report = warmed(space["f"], tmp_path, fingerprint="v1")
        assert report.loaded == 0
        assert_close(bucketed(X), X * factor)
    assert not loaded(space["f"], tmp_path, fingerprint="v2")
    assert loaded(space["f"], tmp_path, fingerprint="v2")


def test_an_edit_of_a_global_is_noticed(tmp_path):
    """A constant of the function's module, and what a callee there does, are part of it, too."""
    for factor, shift in ((2, 0), (3, 0), (3, 1)):
        space: dict[str, Any] = {}
        exec(f"W = {factor}\ndef g(x): return x + {shift}\ndef f(x): return g(x) * W", space)
        bucketed, report = warmed(space["f"], tmp_path, fingerprint="v1")
        assert report.loaded == 0
        assert_close(bucketed(X), (X + shift) * factor)
        assert loaded(space["f"], tmp_path, fingerprint="v1")


@dataclasses.dataclass(frozen=True)
class Size:
    factor: int


class Opaque:
    """A static argument that another process could not name."""

    def __init__(self, factor):
        self.factor = factor

    def __hash__(self):
        return hash(self.factor)

    def __eq__(self, other):
        return isinstance(other, Opaque) and other.factor == self.factor


@pytest.mark.parametrize("kind", [Size, Opaque])
def test_static_arguments(tmp_path, kind):
    """Each static value is an executable of its own, by its name or by what it lowers to."""

    def function(x, size):
        return x * size.factor

    options: dict[str, Any] = {"static_argnames": "size", "fingerprint": "v1"}
    for factor in (2, 3):
        bucketed, report = warmed(function, tmp_path, X, kind(factor), **options)
        assert report.loaded == 0
        assert_close(bucketed(X, kind(factor)), X * factor)
    bucketed, report = warmed(function, tmp_path, X, kind(3), **options)
    assert report.loaded == 1
    assert_close(bucketed(X, kind(3)), X * 3)


def test_written_calls_are_told_apart(tmp_path):
    """Arguments given by name in another order are not mistaken for each other."""

    def function(x, a, b):
        return x * a - b

    options: dict[str, Any] = {"in_axes": ("batch seq", None, None), "fingerprint": "v1"}
    a, b = np.float32(2), np.float32(3)
    for _ in range(2):
        bucketed = bucket_jit(function, config=SMALL, store=tmp_path, **options)
        assert_close(bucketed(X, a, b), X * 2 - 3)
        assert_close(bucketed(X, b=b, a=a), X * 2 - 3)
        assert_close(bucketed(X, a, b=b), X * 2 - 3)
    assert bucketed.stats()["registry"]["capture_count"] == 0


class Scaled:
    """A callable with data of its own."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


def test_one_fingerprint_for_several_functions(tmp_path):
    """Constants that can be written tell them apart; otherwise the second one is lowered."""
    written_out = [closing_over(2.0), closing_over(3.0)]
    by_default = [lambda x, k=2.0: x * k, lambda x, k=3.0: x * k]
    for functions in (written_out, by_default):
        for factor, function in zip((2, 3), functions, strict=True):
            answer = warmed(function, tmp_path, fingerprint="v1", name="f")[0](X)
            assert_close(answer, X * factor)
    first, second = Scaled(2.0), Scaled(3.0)
    for _ in range(2):
        answer = warmed(first, tmp_path, fingerprint="scaled", name="f")[0](X)
        assert_close(answer, X * 2)
        with pytest.warns(CUDAGraphWarning, match="is that of another function, too"):
            answer = warmed(second, tmp_path, fingerprint="scaled", name="f")[0](X)
        assert_close(answer, X * 3)


def test_another_grid(tmp_path):
    """Buckets that several grids share are loaded, and later untraced with the new grid, too."""
    function = Counted(tanh_of)
    wider = dataclasses.replace(SMALL, capture_sizes=(2, 3), max_capture_batch_size=None)
    warmed(function, tmp_path, fingerprint="another grid")
    shared = set(SMALL.buckets()) & set(wider.buckets())
    _, report = warmed(function, tmp_path, config=wider, fingerprint="another grid")
    assert {record.bucket for record in report.buckets if record.status == "loaded"} == shared
    traced = function.calls
    bucketed, report = warmed(function, tmp_path, config=wider, fingerprint="another grid")
    assert report.loaded == len(wider.buckets())
    assert function.calls == traced
    assert_close(bucketed(X), tanh_of(X))


WIDER = dataclasses.replace(SMALL, capture_sizes=(2, 3), max_capture_batch_size=None)


def test_grids_that_take_turns(tmp_path):
    """Once each grid was seen, none is traced for and nothing is written, whoever comes next."""
    function = Counted(tanh_of)

    def start(config, *, warms=True):
        """What a server wrote, and how often it traced."""
        before = function.calls
        store = GraphStore(tmp_path)
        options: dict[str, Any] = {"in_axes": ("batch seq",), "fingerprint": "turns"}
        bucketed = bucket_jit(function, manager=CUDAGraphManager(config, store=store), **options)
        if warms:
            bucketed.warmup(X, progress=False)
        assert_close(bucketed(X), tanh_of(X))
        return store.stats()["written"], function.calls - before

    servers: list[Any] = [(SMALL, True), (WIDER, True), (SMALL, False), (WIDER, False)]
    for config, warms in servers:
        start(config, warms=warms)
    for _ in range(2):
        assert [start(config, warms=warms) for config, warms in servers] == [(0, 0)] * 4


def test_axes_that_another_grid_did_not_see(tmp_path):
    """What a larger bucket shows of a function is found there, and no answer gets wrong."""
    small = CUDAGraphConfig(capture_sizes=(1, 2), capture_seq_lens=(4,), warmup_iterations=0)
    large = dataclasses.replace(small, capture_sizes=(2, 16), max_capture_batch_size=None)
    warmed(first_four, tmp_path, X[:2], config=small, fingerprint="v1")
    bucketed = bucket_jit(
        first_four, in_axes=("batch seq",), config=large, store=tmp_path, fingerprint="v1"
    )
    assert_close(bucketed(X[:2]), X[:2])
    assert_close(bucketed(floats(0, 9, 4)), floats(0, 9, 4)[:4])


def test_a_package_that_is_upgraded_under_a_server(tmp_path, monkeypatch):
    """What is stored has the version of the code that runs, not of what was installed since."""
    double_of_the_old, double_of_the_new = (lambda x: x * 2), (lambda x: x + x)
    assert not loaded(double_of_the_old, tmp_path / "graphs")
    newer = tmp_path / "jaxlib-99.0.dist-info"
    newer.mkdir()
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: jaxlib\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("jaxlib") == "99.0"
    assert not loaded(double_of_the_new, tmp_path / "graphs")
    versions = {record.identity["jaxlib"] for record in GraphStore(tmp_path / "graphs").ls()}
    assert versions == {jaxlib.version.__version__}
    assert loaded(double_of_the_old, tmp_path / "graphs")
