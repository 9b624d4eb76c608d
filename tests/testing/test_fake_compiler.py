"""The fake compiler: executables at once, and everything around them real."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import Bucket, BucketedFunction, CUDAGraphConfig, CUDAGraphManager, bucket_jit
from cudagraph_jax.errors import BucketOverflowError, CaptureError, CUDAGraphWarning, SealedError
from cudagraph_jax.testing import FakeCompiler
from cudagraph_jax.testing.compiler import FakeCompile
from cudagraph_jax.xla.compiles import CompileCounter
from tests.helpers.mistakes import SOUND

CONFIG = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(4, 8), warmup_iterations=1)
GRID = [Bucket(4, 8), Bucket(2, 8), Bucket(4, 4), Bucket(2, 4)]


def ones(batch: int, seq: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones((batch, seq), dtype)


def double(x):
    return {"y": x * 2, "rows": x.sum(axis=1)}


def faked(
    compiler: FakeCompiler, fn: Any = double, config: CUDAGraphConfig = CONFIG, **options: Any
) -> BucketedFunction:
    manager = CUDAGraphManager(config, compiler=compiler)
    return bucket_jit(fn, **{"in_axes": ("batch seq",), "manager": manager, **options})


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_shapes(batch, seq, runs):
    """Whatever the size, outputs have the real one's shapes and dtypes."""
    found = faked(FakeCompiler(runs=runs))(ones(batch, seq))
    assert (found["y"].shape, found["y"].dtype) == ((batch, seq), np.float32)
    assert found["rows"].shape == (batch,)
    assert (found["y"] == (2 if runs else 0)).all()


def test_xla_is_not_asked():
    """A warm-up and a call in every bucket compile nothing at all."""
    function = faked(FakeCompiler())
    with CompileCounter() as counter:
        function.warmup(ones(1, 1))
        for bucket in GRID:
            function(ones(*bucket))
    assert counter.names == []


def test_what_was_made():
    """It tells what was compiled in its order, each bucket once."""
    compiler = FakeCompiler()
    assert repr(compiler) == "FakeCompiler(0 made)"
    function = faked(compiler)
    function.warmup(ones(1, 1))
    function(ones(3, 3))
    assert compiler.made == [FakeCompile("double", bucket) for bucket in GRID]
    assert repr(compiler) == "FakeCompiler(4 made)"
    compiler.made.clear()
    assert len(compiler.made) == 4


def test_counts_limits_and_refusals_are_real():
    """Around an executable of its making everything is as it is with XLA's."""
    config = CUDAGraphConfig(
        capture_sizes=(2, 4), capture_seq_lens=(4,), max_graphs=1, on_overflow="error"
    )
    compiler = FakeCompiler()
    function = faked(compiler, config=config)
    for batch in (1, 3, 2):
        function(ones(batch, 4))
    assert [made.bucket.batch_size for made in compiler.made] == [2, 4, 2]
    assert function.registry.num_graphs == 1
    with pytest.raises(BucketOverflowError, match="batch=5"):
        function(ones(5, 4))
    function.seal()
    stats: dict[str, Any] = function.stats()
    assert stats["registry"]["capture_count"] == 3


def test_a_sealed_function_with_errors_on_a_miss():
    """A sealed function refuses what is not captured."""
    function = faked(FakeCompiler(), config=CUDAGraphConfig(capture_sizes=(2,), on_miss="error"))
    function.seal()
    with pytest.raises(SealedError):
        function(ones(1, 4))


def test_the_memory_budget():
    """Executables take as much as they are said to, and the least recently used one goes."""
    config = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(4,), memory_pool_size_mb=2)
    function = faked(FakeCompiler(memory_bytes=2**20), config=config)
    for batch in (1, 2, 4):
        function(ones(batch, 4))
    assert [entry.batch_size for entry in function.registry.entries()] == [2, 4]
    assert {entry.memory_bytes for entry in function.registry.entries()} == {2**20}


@pytest.mark.parametrize("name", ["running_sum", "masked_mean", "last_by_length", "embedded"])
def test_plain_functions_run(name):
    """With `runs` a bucket gives the plain function's answer, masks and dictionaries included."""
    (fn,) = (fn for fn in SOUND if fn.__name__ == name)
    options = {key: value for key, value in SOUND[fn].items() if key not in ("dtypes", "values")}
    ids, x, mask = ones(3, 5, np.int32), np.ones((3, 5, 2), np.float32), ones(3, 5)
    args = {
        "running_sum": (x,),
        "masked_mean": (x, mask),
        "last_by_length": (x, np.array([1, 5, 2])),
        "embedded": (ids, mask),
    }[name]
    found = faked(FakeCompiler(runs=True), fn, **options)(*args)
    jax.tree.map(lambda have, want: np.testing.assert_allclose(have, want, 1e-5), found, fn(*args))


@pytest.mark.parametrize("runs", [False, True])
def test_donation(runs):
    """Donated arguments are used up, parameters are not."""
    function = faked(
        FakeCompiler(runs=runs),
        lambda state, x: (state + x, x),
        in_axes=("batch seq", "batch seq"),
        donate_argnums=0,
        unpad="none",
    )
    state, x = jnp.ones((4, 8)), jnp.ones((4, 8))
    moved, _ = function(state, x)
    assert state.is_deleted()
    assert not x.is_deleted()
    assert not moved.is_deleted()
    assert function(np.ones((4, 8), np.float32), x)[0].shape == (4, 8)


def test_keys():
    """PRNG keys need the plain function: zeros are none."""
    options: dict[str, Any] = {"in_axes": (None, "batch seq"), "unpad": "none"}
    args = (jax.random.key(0), ones(4, 8))

    def split(key, x):
        return jax.random.split(key)[0], x

    with pytest.warns(
        CUDAGraphWarning, match=r"zeros are no PRNG keys: use FakeCompiler\(runs=True"
    ):
        faked(FakeCompiler(), split, **options).warmup(*args)
    key, _ = faked(FakeCompiler(runs=True), split, **options)(*args)
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def entry_of(function: BucketedFunction, *args: Any) -> Any:
    """The executable that served a call."""
    function(*args)
    (entry,) = function.registry.entries()
    return entry.executable.call


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((ones(2, 4),), r"an argument is float32\[2, 4\], compiled for float32\[4, 8\]"),
        ((ones(4, 8, np.int32),), r"an argument is int32\[4, 8\], compiled for float32\[4, 8\]"),
        ((ones(4, 8), ones(4, 8)), "another pytree than what was compiled"),
        (({"x": ones(4, 8)},), "another pytree than what was compiled"),
    ],
)
def test_executables_are_strict(args, message):
    """An executable takes what it was compiled for, and nothing else."""
    call = entry_of(faked(FakeCompiler()), ones(4, 8))
    with pytest.raises(TypeError, match=message):
        call(*args)
    with pytest.raises(TypeError, match="takes no tracers"):
        jax.eval_shape(call, ones(4, 8))


def test_before_may_wait():
    """A compile that waits is one that others wait for: the bucket is compiled once."""
    entered, go = threading.Event(), threading.Event()

    def slow(made: FakeCompile) -> None:
        entered.set()
        assert go.wait(60)

    compiler = FakeCompiler(before=slow)
    function = faked(compiler)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(function, ones(4, 8)) for _ in range(4)]
        assert entered.wait(60)
        assert compiler.made == []
        go.set()
        assert {call.result(60)["rows"].shape for call in calls} == {(4,)}
    assert compiler.made == [FakeCompile("double", Bucket(4, 8))]


def test_before_may_raise():
    """A compile that fails is remembered as one, and names what was compiled."""
    asked: list[FakeCompile] = []

    def broken(made: FakeCompile) -> None:
        asked.append(made)
        raise OSError("no space left")

    function = faked(FakeCompiler(before=broken))
    with pytest.raises(CaptureError, match="cannot compile double 4x8: OSError: no space") as error:
        function.manager.dispatcher.capturer.capture(function.describe(ones(4, 8)), Bucket(4, 8))
    assert error.value.stage == "compile"
    assert isinstance(error.value.__cause__, OSError)
    assert asked == [FakeCompile("double", Bucket(4, 8))]
    assert function.registry.num_graphs == 0


def test_before_may_raise_what_the_package_raises():
    """An error of the package's own goes through as it is."""
    own = CaptureError("out of memory", stage="compile")

    def broken(made: FakeCompile) -> None:
        raise own

    compiler = FakeCompiler(before=broken)
    function = faked(compiler)
    with pytest.raises(CaptureError) as caught:
        function.manager.dispatcher.capturer.capture(function.describe(ones(4, 8)), Bucket(4, 8))
    assert caught.value is own
    assert compiler.made == []


def test_capture_times():
    """A capture takes as long as the clock says that `before` did."""
    now = [100.0]

    def slow(made: FakeCompile) -> None:
        now[0] += 2.5

    manager = CUDAGraphManager(CONFIG, clock=lambda: now[0], compiler=FakeCompiler(before=slow))
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    function(ones(4, 8))
    (entry,) = manager.registry.entries()
    assert entry.capture_time_ms == 2500
