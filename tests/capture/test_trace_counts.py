"""How often Python runs the function for a bucket that is missed: what `jit` pays once, too."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, InputShapeError, bucket_jit
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
    [({}, 3), ({"out_axes": DECLARED}, 1), ({"unpad": "none"}, 1), ({"unpad": "device"}, 3)],
)
def test_misses_of_one_function(options, first):
    """What one bucket has shown of the outputs serves the next; nothing is searched in vain."""
    function = Counted(pooled)
    call = bucket_jit(function, in_axes="batch seq", config=GRID, **options)
    assert traces(function, call) == [first, 1, 1, 1]


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
    """The lesser of both sizes looks constant where the batch is 1, and is refused elsewhere."""

    def lesser(x):
        return x[0, : min(x.shape), None]

    call: Any = bucket_jit(lesser, in_axes="batch seq", config=GRID)
    assert call(np.ones((1, 8), np.float32)).shape == (1, 1)
    with pytest.raises(InputShapeError, match="cannot be trimmed"):
        call(np.ones((3, 8), np.float32))
