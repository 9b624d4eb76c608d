"""explain() names the nearest captured bucket, and the field that differs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit, no_compiles
from tests.helpers.functions import floats, stats_of

CONFIG = CUDAGraphConfig(
    capture_sizes=(1, 4, 16), capture_seq_lens=(8, 32), warmup_iterations=0, on_miss="eager"
)


def scaled(x, *, times=1):
    return x * times


def function_with(*shapes, config=CONFIG):
    """A function whose buckets of just these shapes are captured."""
    function = bucket_jit(
        scaled, in_axes=("batch seq ...",), static_argnames="times", config=config
    )
    function.warmup(jax.ShapeDtypeStruct((1, 8, 3), np.float32), progress=False)
    for entry in function.registry.entries():
        if entry.key not in shapes:
            function.registry.remove(*entry.key)
    return function


@pytest.mark.parametrize(
    ("held", "shape", "near", "differs"),
    [
        ([(4, 8)], (1, 8, 3), "4x8", "batch 4, not 1"),
        ([(4, 8)], (4, 20, 3), "4x8", "seq_len 8, not 32"),
        ([(4, 8)], (1, 9, 3), "4x8", "batch 4, not 1 and seq_len 8, not 32"),
        ([(1, 8), (16, 8)], (3, 8, 3), "1x8", "batch 1, not 4"),
        ([(16, 32), (4, 32)], (4, 5, 3), "4x32", "seq_len 32, not 8"),
        ([(1, 32), (16, 32)], (16, 8, 3), "16x32", "seq_len 32, not 8"),
    ],
)
def test_sizes(held, shape, near, differs):
    """The fewest differing sizes come first, then the nearest size."""
    function = function_with(*held)
    with no_compiles():
        reason = function.explain(floats(0, *shape)).reason
    assert reason.endswith(f"the nearest captured bucket is {near}, with {differs}")


def test_dtype():
    """Another dtype is named, with both."""
    reason = function_with((4, 8)).explain(floats(0, 4, 8, 3).astype(np.float16)).reason
    assert "4x8, with x of dtype float32, not float16" in reason


def test_trailing_dimension():
    """Another trailing dimension is named, with both."""
    reason = function_with((4, 8)).explain(floats(0, 4, 8, 5)).reason
    assert "4x8, with x of shape" in reason
    assert "3" in reason.split("of shape")[1].split("not")[0]
    assert "5" in reason.split("of shape")[1].split("not")[1]


def test_static_argument():
    """Another value of a static argument is named, with both."""
    reason = function_with((4, 8)).explain(floats(0, 4, 8, 3), times=2).reason
    assert "nearest captured bucket is 4x8" in reason
    assert "static argument" in reason
    assert "times=2" in reason


def test_fewer_differences_are_nearer():
    """A bucket of another size is nearer than one of another size and dtype."""
    function = function_with((1, 8))
    function.warmup(jax.ShapeDtypeStruct((1, 8, 3), np.float16), progress=False)
    reason = function.explain(floats(0, 4, 8, 3)).reason
    assert "with batch 1, not 4" in reason or "with x of dtype float16, not float32" in reason
    assert " and " not in reason.split(", with ")[1]


def test_a_structure_that_differs():
    """Another pytree of arguments is said to be one."""
    function = bucket_jit(
        lambda tree: jax.tree.map(lambda x: x * 2, tree), in_axes=("batch seq",), config=CONFIG
    )
    function.warmup({"a": floats(0, 4, 8)}, progress=False)
    assert "another pytree" in function.explain({"b": floats(0, 4, 8)}).reason


def test_nothing_captured_names_nothing():
    """Without a bucket of this function there is no nearest one, whatever others have."""
    function = function_with((4, 8))
    other = bucket_jit(lambda x: -x, in_axes=("batch seq ...",), manager=function.manager)
    assert "nearest" not in other.explain(floats(0, 4, 8, 3)).reason
    function.registry.clear()
    assert "nearest" not in function.explain(floats(0, 4, 8, 3)).reason
    assert stats_of(function)["calls"] == 0


def test_keyword_arguments_are_counted_among_the_leaves():
    """A keyword array that differs is named too."""
    function = bucket_jit(lambda x, *, bias: x + bias, in_axes=("batch seq",), config=CONFIG)
    function.warmup(floats(0, 4, 8), bias=np.float32(1), progress=False)
    reason = function.explain(floats(0, 4, 8), bias=np.float16(1)).reason
    assert "float32, not float16" in reason


def test_a_hit_names_no_other_bucket():
    """A call that is replayed is not told of others."""
    assert "nearest" not in function_with((4, 8)).explain(floats(0, 4, 8, 3)).reason


def test_a_sealed_call_in_a_larger_bucket():
    """A call that a larger bucket serves is told which, and what differs."""
    function = function_with((16, 32))
    function.seal()
    explanation = function.explain(floats(0, 4, 8, 3))
    assert "16x32" in str(explanation)
    assert "batch 16, not 4 and seq_len 32, not 8" in explanation.reason
