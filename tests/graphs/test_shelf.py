"""A store under a manager: what was compiled once is loaded, and only what is the same."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphRegistry,
    CUDAGraphWarning,
    GraphStore,
    InputShapeError,
    StoreError,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.store import Json, Stored
from cudagraph_jax.store.identity import file_name
from tests.graphs.functions import GRID, PARAMS, assert_close, dense, double, floats, tokens

BUCKETS = len(GRID.buckets())
SMALL = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4,), warmup_iterations=1)
X = floats(0, 2, 3)


class Counted:
    """A function that counts how often it is traced or called."""

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.__name__ = function.__name__

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def warmed(function, store, *args, config=SMALL, in_axes=("batch seq",), **options: Any):
    """A warm function of a new manager in `store`, and its warm-up's report."""
    bucketed = bucket_jit(function, in_axes=in_axes, config=config, store=store, **options)
    report = bucketed.warmup(*(args or (X,)), progress=False)
    assert report.failed == ()
    return bucketed, report


def loaded(function, store, *args, **options: Any) -> bool:
    """Whether a new manager loads the only bucket of `function` instead of compiling it."""
    _, report = warmed(function, store, *args, **options)
    assert report.loaded + report.captured == 1
    return bool(report.loaded)


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


def first_of(x, y):
    return x


def second_of(x, y):
    return y


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
        {
            "config": dataclasses.replace(
                SMALL, compiler_options={"xla_cpu_enable_fast_math": "True"}
            )
        },
    ],
)
def test_what_is_not_the_same_is_compiled(tmp_path, other):
    """Another constant, dtype, name, donation, mask, bucket or option is another executable."""
    function = scaling(np.float32(2))
    warmed(function, tmp_path)
    assert loaded(function, tmp_path)
    options = {"function": function, "args": (X,), **other}
    function, args = options.pop("function"), options.pop("args")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # donated buffers that no output can take over
        assert not loaded(function, tmp_path, *args, **options)
        assert loaded(function, tmp_path, *args, **options)


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
    assert function.calls < cold
    one, two = first(X), second(X)
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(two))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


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
    options: dict[str, Any] = {"config": GRID, "fingerprint": fingerprint}
    warmed(double, tmp_path, **options)
    spoil(tmp_path, how)
    with caplog.at_level(logging.WARNING):
        _, report = warmed(double, tmp_path, **options)
    assert report.captured == BUCKETS
    assert caplog.text.count("is compiled again") == len(list(tmp_path.glob("*.bad"))) == BUCKETS
    assert warmed(double, tmp_path, **options)[1].loaded == BUCKETS


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
        function, report = warmed(double, store, config=GRID)
    assert len(told) == 1
    assert report.captured == BUCKETS
    assert_close(function(X), X * 2)


def test_a_directory_that_is_deleted(tmp_path):
    """Serving goes on, with one warning; the executables live in memory."""
    function, _ = warmed(double, tmp_path / "store", config=GRID)
    for file in (tmp_path / "store").iterdir():
        file.unlink()
    (tmp_path / "store").rmdir()
    other = bucket_jit(lambda x: x + 1, in_axes=("batch seq",), manager=function.manager)
    with pytest.warns(CUDAGraphWarning, match="is served without the store") as told:
        assert other.warmup(X, progress=False).captured == BUCKETS
    assert len(told) == 1
    assert_close(function(X), X * 2)
    assert_close(other(X), X + 1)


def test_what_cannot_be_stored_is_said_once(tmp_path):
    """A function that calls the host is compiled at every start, with one warning."""

    def function(x):
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x) * 2

    with pytest.warns(CUDAGraphWarning, match="JAX cannot write it") as told:
        bucketed, report = warmed(function, tmp_path, config=GRID)
    assert (len(told), report.captured) == (1, BUCKETS)
    assert_close(bucketed(X), X * 2)
    assert len(GraphStore(tmp_path)) == 0


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_a_payload_that_does_not_load(tmp_path, fingerprint):
    """Whole files with payloads that are no executables are compiled again and replaced."""
    options: dict[str, Any] = {"config": GRID, "fingerprint": fingerprint}
    warmed(double, tmp_path, **options)
    store = GraphStore(tmp_path)
    for record in store.ls():
        store.put(record.identity, b"no pickle", extra=record.extra)
    with pytest.warns(CUDAGraphWarning, match="its pickle cannot be followed") as told:
        _, report = warmed(double, tmp_path, **options)
    assert (len(told), report.captured) == (1, BUCKETS)
    assert warmed(double, tmp_path, **options)[1].loaded == BUCKETS


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
        extra = {"outputs": written[number % 6], "memory_bytes": "x", "flops": True}
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
    options: dict[str, Any] = {"config": GRID, "fingerprint": "v1", "in_axes": ("batch seq",)}
    warmed(double, tmp_path, **options)
    function = bucket_jit(double, store=tmp_path, **options)

    def interrupt(done, total, bucket):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function.warmup(X, progress=interrupt)
    report = function.warmup(X, progress=False)
    assert (report.loaded, report.captured) == (BUCKETS - 1, 0)
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
        patched.setattr("cudagraph_jax.graphs.serial.load", lambda *_, **__: other)
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
        ("device_kind", ["NVIDIA H100 80GB HBM3"]),
        ("platform", "gpu"),
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
        with pytest.raises(InputShapeError):
            warmed(function, tmp_path, config=large, fingerprint=fingerprint)


def closing_over(value):
    def closed(x):
        return x * value

    return closed


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


@pytest.mark.parametrize("text", ["", "[]", "{", '{"double": 3}', '{"double": {"2x4": "x"}}'])
def test_a_bad_manifest_changes_nothing(tmp_path, text, caplog):
    """A manifest that is not what it should be is said, and the order is the usual one."""
    warmed(double, tmp_path, config=GRID)
    (tmp_path / "hot.json").write_text(text)
    _, report = warmed(double, tmp_path, config=GRID)
    assert report.loaded == BUCKETS
    assert "hot.json is not used" in caplog.text


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
