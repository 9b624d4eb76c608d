"""The package `cudagraph_jax.testing` as a whole."""

from __future__ import annotations

from cudagraph_jax import testing
from tests.helpers.processes import said_by

WITHOUT_HYPOTHESIS = """
import sys
sys.modules["hypothesis"] = None  # what Python does for a package that is not installed
import cudagraph_jax
try:
    import cudagraph_jax.testing
except ModuleNotFoundError as error:
    print(error.name, error, sep="\\n")
"""


def test_hypothesis_is_missing():
    """Without hypothesis the package is imported, and the kit says what to install."""
    assert said_by(WITHOUT_HYPOTHESIS).splitlines() == [
        "hypothesis",
        "cudagraph_jax.testing needs hypothesis: pip install 'cudagraph-jax[testing]'",
    ]


def test_what_is_exported():
    """The names that users import, and each is there."""
    assert testing.__all__ == [
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
    assert all(hasattr(testing, name) for name in testing.__all__)
