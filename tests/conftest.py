"""Settings of all tests."""

import os

import jax
import pytest
from hypothesis import settings

# The first example of a property may trace or compile, which no deadline foresees.
settings.register_profile("cudagraph_jax", deadline=None)
settings.load_profile("cudagraph_jax")

# Several workers, and the processes that they start, share a GPU: none takes most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(scope="session", autouse=True)
def float32_products():
    """Products of float32 matrices have its digits; GPUs leave them half of those by default."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # of the processes that tests start
