"""The package `cudagraph_jax.testing` as a whole."""

from __future__ import annotations

import subprocess
import sys

from cudagraph_jax import testing

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
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HYPOTHESIS], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
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
