"""The examples in docstrings give what stands below them."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import cudagraph_jax
from tests.docs import pages

# Started as a program, it runs the command line.
PROGRAM = "cudagraph_jax.__main__"
NAMES = sorted(
    module.name
    for module in pkgutil.walk_packages(cudagraph_jax.__path__, "cudagraph_jax.")
    if module.name != PROGRAM
)


def examples(name):
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", ["cudagraph_jax", *NAMES])
def test_examples(name):
    """Every example of a module runs, and prints what it says."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples(name):
        said: list[str] = []
        with pages.few_examples():
            failed = runner.run(test, out=said.append).failed
        assert failed == 0, "".join(said)


def test_there_are_examples():
    """What a user meets first has an example."""
    documented = {test.name for name in NAMES for test in examples(name)}
    assert {
        "cudagraph_jax.config.CUDAGraphConfig",
        "cudagraph_jax.dispatch.bucket_jit.bucket_jit",
        "cudagraph_jax.xla.compiles.no_compiles",
        "cudagraph_jax.dispatch.manager.CUDAGraphManager",
        "cudagraph_jax.dispatch.function.BucketedFunction.explain",
        "cudagraph_jax.dispatch.function.BucketedFunction.warmup",
        "cudagraph_jax.capture.registry.CUDAGraphRegistry",
        "cudagraph_jax.shapes.ladder.Ladder",
        "cudagraph_jax.planning.planner.plan_buckets",
        "cudagraph_jax.store.store.GraphStore",
        "cudagraph_jax.testing.preserves.assert_bucketing_preserves",
    } <= documented
