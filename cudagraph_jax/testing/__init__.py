"""What tests of bucketed functions need: strategies for hypothesis, assertions, a fake compiler.

    pip install 'cudagraph-jax[testing]'

The one test that the author of a model should have:

    def test_buckets_do_not_change_the_answer():
        assert_bucketing_preserves(
            embed, in_axes=(None, "batch seq", "batch seq"), example=(params, ids, mask)
        )

It draws sizes and values, compares the answer in a bucket with the plain function's, and names the
size, the output and the worst element where they differ.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "cudagraph_jax.testing needs hypothesis: pip install 'cudagraph-jax[testing]'",
        name=error.name,
    ) from error

from cudagraph_jax.testing.batches import assert_batching_preserves
from cudagraph_jax.testing.compile_assertions import assert_compiles, assert_no_compiles
from cudagraph_jax.testing.compiler import FakeCompiler
from cudagraph_jax.testing.grids import configs, ladders, sizes
from cudagraph_jax.testing.inputs import inputs
from cudagraph_jax.testing.leaks import assert_padding_does_not_leak
from cudagraph_jax.testing.packs import assert_packing_preserves
from cudagraph_jax.testing.preserves import assert_bucketing_preserves

__all__ = [
    "FakeCompiler",
    "assert_batching_preserves",
    "assert_bucketing_preserves",
    "assert_compiles",
    "assert_no_compiles",
    "assert_packing_preserves",
    "assert_padding_does_not_leak",
    "configs",
    "inputs",
    "ladders",
    "sizes",
]
