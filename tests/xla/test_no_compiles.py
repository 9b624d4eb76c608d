"""no_compiles(): catches every compile, and lets everything else pass."""

from __future__ import annotations

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphManager,
    CUDAGraphRegistry,
    UnexpectedCompileError,
    bucket_jit,
    no_compiles,
)
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

unseen = itertools.count(1000)
"""A size that nothing was compiled for before."""


def pad(x):
    return jnp.pad(x, (0, next(unseen)))


def trim(x):
    return x[: next(unseen)]


def fresh_jit(x):
    return jax.jit(lambda x: x + 1)(x)


def eager_operation(x):
    return jnp.zeros(next(unseen))


def capture(x):
    return bucket_jit(double, in_axes=("batch",), config=GRID)(np.ones(2, np.float32))


def specification_capture(x):
    CUDAGraphRegistry(GRID).capture(3, 2, double, (3, 2))


def execute(x):
    CUDAGraphManager(GRID).execute_or_capture(2, 2, double, np.ones((2, 2), np.float32))


def warm_up(x):
    bucket_jit(double, in_axes=("batch",), config=GRID).warmup(np.ones(2, np.float32))


def overflow(x):
    return bucket_jit(lambda x: jnp.sort(x) * 3, in_axes=("batch",), config=GRID)(
        np.ones(next(unseen), np.float32)
    )


@pytest.mark.parametrize(
    "compiling",
    [
        pad,
        trim,
        fresh_jit,
        eager_operation,
        capture,
        specification_capture,
        execute,
        warm_up,
        overflow,
    ],
)
def test_it_catches(compiling):
    """Padding, trimming, a new jit and our own captures are all caught."""
    x = jnp.arange(5000.0)
    said = r"no_compiles\(\): warm the bucket up first"
    with pytest.raises(UnexpectedCompileError, match=said), no_compiles():
        compiling(x)


def test_it_names_what_had_to_be_compiled():
    """The error begins with the bucket, or with the function that runs eagerly."""
    bucketed = bucket_jit(double, in_axes="batch", config=GRID)
    with pytest.raises(UnexpectedCompileError, match=r"^double_3x1 had to be comp"), no_compiles():
        bucketed(np.ones(2, np.float32))
    with pytest.raises(UnexpectedCompileError, match=r"^double_4x1 had to be comp"), no_compiles():
        bucketed.warmup(np.ones(2, np.float32), progress=False)
    with pytest.raises(UnexpectedCompileError, match=r"^an operation of lambda, wh"), no_compiles():
        overflow(None)


def test_it_catches_the_compile_of_a_lowered_program():
    """Compiling what was lowered before needs no trace, and is caught all the same."""
    lowered = jax.jit(lambda x: x * 3 + 1).lower(floats(0, 7))
    with pytest.raises(UnexpectedCompileError, match="had to be compiled"), no_compiles():
        lowered.compile()
    lowered.compile()


@pytest.mark.parametrize("catching", [capture, execute, specification_capture, overflow])
def test_calls_of_ours_raise_at_once(catching):
    """A call of this package raises the package's error where it happens."""
    with no_compiles(), pytest.raises(UnexpectedCompileError):
        catching(None)


def test_a_caught_capture_leaves_nothing_behind():
    """After a caught capture nothing is half-made: the next call captures and is right."""
    function = bucket_jit(double, in_axes=("batch",), config=GRID)
    x = np.ones(2, np.float32)
    with pytest.raises(UnexpectedCompileError), no_compiles():
        function(x)
    assert function.registry.num_graphs == 0
    assert stats_of(function)["failed_buckets"] == 0
    assert_close(function(x), x * 2)
    assert function.registry.num_graphs == 1


def test_what_passes():
    """Cached jits, NumPy, transfers and bucket hits pass."""
    cached = jax.jit(lambda x: x + 1)
    compiled = jax.jit(lambda x: x - 1).lower(floats(0, 4)).compile()
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    cached(floats(0, 4))
    with no_compiles():
        cached(floats(1, 4))
        compiled(floats(1, 4))
        on_device = jax.device_put(floats(0, 2, 3))
        np.pad(np.asarray(on_device), 1)[1:]
        function(floats(0, 2, 3))
        function(on_device)
        stats_of(function)
        function.explain(on_device)


def test_it_ends_with_its_block():
    """Outside the block, after success or failure, everything compiles as before."""
    with no_compiles():
        pass
    fresh_jit(floats(0, 3))
    with pytest.raises(ValueError, match="the user's"), no_compiles():
        raise ValueError("the user's own")
    fresh_jit(floats(0, 3))
    with pytest.raises(RuntimeError, match="the user's"), no_compiles():
        raise RuntimeError("the user's own")
    jax.jit(lambda x: x * 5).lower(floats(0, 3)).compile()


def test_it_nests():
    """Leaving an inner block does not end the outer one."""
    with no_compiles():
        with no_compiles():
            pass
        with pytest.raises(RuntimeError, match="no_tracing"):
            fresh_jit(floats(0, 3))


def test_other_threads_compile():
    """It holds for its own thread: a warm-up elsewhere goes on."""
    done = []

    def elsewhere():
        done.append(fresh_jit(floats(0, 3)))
        done.append(jax.jit(lambda x: x * 7).lower(floats(0, 3)).compile())

    with no_compiles():
        worker = threading.Thread(target=elsewhere)
        worker.start()
        worker.join()
    assert len(done) == 2
