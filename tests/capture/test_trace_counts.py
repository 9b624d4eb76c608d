"""How often Python runs the function for a bucket that is missed: what `jit` pays once, too."""

import gc
import logging
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphManager,
    InputShapeError,
    bucket_jit,
)
from tests.helpers.warm_servers import Counted

GRID = CUDAGraphConfig(
    capture_sizes=(1, 2, 4, 8), capture_seq_lens=(8, 16, 32), warmup_iterations=0
)
MISSES = [(3, 5), (3, 9), (7, 5), (1, 30)]


def pooled(x):
    return {"tokens": x * 2, "rows": x.sum(1), "all": jnp.sum(x)}


DECLARED = {"tokens": "batch seq", "rows": "batch", "all": None}


def traces(function, call):
    """How often each miss runs the function."""
    found = []
    for batch, seq in MISSES:
        before = function.calls
        call(np.ones((batch, seq), np.float32))
        found.append(function.calls - before)
    return found


@pytest.mark.parametrize(
    ("options", "first"),
    [({}, 3), ({"out_axes": DECLARED}, 2), ({"unpad": "none"}, 1), ({"unpad": "device"}, 3)],
)
def test_misses_of_one_function(options, first):
    """What one bucket has shown of the outputs serves the next; declared axes are checked once."""
    function = Counted(pooled)
    call = bucket_jit(function, in_axes="batch seq", config=GRID, **options)
    assert traces(function, call) == [first, 1, 1, 1]


def test_misses_of_outputs_that_follow():
    """One trace more for each new size, also where it is 1 along any axis."""
    function = Counted(lambda x: x[:, ::2])
    call = bucket_jit(function, in_axes="batch seq", config=GRID)
    call(np.ones((8, 32), np.float32))
    for shape, traces in [((1, 5), 2), ((1, 6), 1), ((3, 1), 2), ((3, 5), 1), ((3, 5), 0)]:
        before = function.calls
        call(np.ones(shape, np.float32))
        assert function.calls - before == traces, shape


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_first_miss_of_outputs_that_follow_a_length_padded_in_front(outputs):
    """Three traces more than behind it, for all outputs together, say whether they are in steps."""
    found = []
    for side in ("right", "left"):
        function = Counted(lambda x: [x[:, :-1]] * outputs)
        call: Any = bucket_jit(function, in_axes="batch seq", pad_side=side, config=GRID)
        call(np.ones((3, 5), np.float32))
        found.append(function.calls)
    assert found[1] <= found[0] + 3


def test_misses_of_a_function_of_equal_axes():
    """Whether single elements are spread is asked once for all calls of them."""
    function = Counted(lambda x, y: x * y)
    config = CUDAGraphConfig(
        capture_sizes=(2, 4, 8), capture_axes={"src": (8, 16), "tgt": (8, 16)}, warmup_iterations=0
    )
    call = bucket_jit(
        function, in_axes=("batch src", "batch tgt"), out_axes="batch src", config=config
    )
    found = []
    for rows, length in [(8, 16), (1, 5), (1, 6), (1, 9), (1, 10), (3, 5)]:
        before = function.calls
        call(np.ones((rows, length), np.float32), np.ones((rows, length), np.float32))
        found.append(function.calls - before)
    assert found[1:] == [3, 1, 2, 1, 2]


def test_misses_of_the_specifications_calls():
    """The same for functions whose axes are found by their sizes."""
    function, manager = Counted(pooled), CUDAGraphManager(GRID)

    def call(x):
        batch, seq = x.shape
        return manager.execute_or_capture(batch, seq, function, x)

    assert traces(function, call) == [3, 1, 1, 1]


def test_a_warm_up():
    """A trace for each bucket, and two for the axes of the outputs."""
    function = Counted(pooled)
    bucket_jit(function, in_axes="batch seq", config=GRID).warmup(
        np.ones((2, 3), np.float32), progress=False
    )
    assert function.calls == len(GRID.buckets()) + 2


def test_another_variant_is_another_program():
    """Other dtypes are searched anew."""
    function = Counted(pooled)
    call: Any = bucket_jit(function, in_axes="batch seq", config=GRID)
    for dtype in (np.float32, np.int32):
        before = function.calls
        call(np.ones((3, 5), dtype))
        assert function.calls == before + 3


def test_outputs_that_one_bucket_has_otherwise():
    """A pytree that depends on the size is noticed, and each bucket has its own."""

    def by_size(x):
        return (x * 2, x.sum(1)) if x.shape[0] > 2 else (x * 2,)

    call: Any = bucket_jit(
        by_size, in_axes="batch seq", out_axes="batch ...", unpad="none", config=GRID
    )
    assert [len(call(np.ones((rows, 8), np.float32))) for rows in (4, 2, 8, 1)] == [2, 1, 2, 1]


def test_a_dimension_that_is_constant_at_the_first_bucket():
    """The lesser of both sizes is refused, also where the batch is 1 and it looks constant."""

    def lesser(x):
        return x[0, : min(x.shape), None]

    call: Any = bucket_jit(lesser, in_axes="batch seq", config=GRID)
    for rows in (1, 3):
        with pytest.raises(InputShapeError, match="cannot be trimmed"):
            call(np.ones((rows, 8), np.float32))


def test_a_function_that_calls_itself_while_it_is_traced():
    """Its search of outputs waits for no search of its own."""

    def nested(x):
        return x * 2 if x.shape[0] == 1 else x + call(np.ones((1, x.shape[1]), np.float32))

    call: Any = bucket_jit(nested, in_axes="batch seq", config=GRID)
    assert call(np.ones((3, 8), np.float32)).tolist() == [[3.0] * 8] * 3


def test_equal_static_values_that_differ():
    """A call that runs eagerly has its own static value, also where another equals it."""
    config = CUDAGraphConfig(capture_sizes=(2,), on_miss="eager")
    call: Any = bucket_jit(
        lambda x, scale: x * scale, in_axes="batch seq", static_argnames="scale", config=config
    )
    x = np.ones((2, 3), np.float32)
    assert not np.signbit(call(x, 0.0)).any()
    assert np.signbit(call(x, -0.0)).all()


def test_a_program_keeps_what_a_later_call_does_not_give():
    """A warm-up by shapes leaves keys and numbers of former calls to the captured buckets."""
    function = bucket_jit(lambda x, n: x * n, in_axes=("batch seq", None), config=GRID)
    x = np.ones((3, 5), np.float32)
    function(x, np.int32(3))
    function.warmup(x, jax.ShapeDtypeStruct((), np.int32), progress=False)
    (entry, *_) = function.registry.entries()
    assert entry.program.example.leaves[1] == 3


def test_a_failed_run_keeps_no_array():
    """The arguments of a call that failed are free when its error is."""
    failures = [RuntimeError("the wire is broken")]

    def once_broken(x):
        if failures:
            raise failures.pop()
        return x

    def through_host(x):
        return jax.pure_callback(once_broken, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    call: Any = bucket_jit(through_host, in_axes="batch seq", config=GRID)
    x = jnp.ones((4, 8))
    kept = weakref.ref(x)
    gc.disable()
    logging.disable()  # pytest keeps what is logged, and JAX logs the error
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="the wire is broken"):
            call(x)
        del x
        assert kept() is None
        assert call.registry.num_graphs == 1
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()
