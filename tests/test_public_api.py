"""What `import cudagraph_jax` gives, and what it leaves alone."""

import inspect
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import cudagraph_jax

ROOT = Path(cudagraph_jax.__file__).parents[1]


def test_exports():
    """The public names are exactly these."""
    assert cudagraph_jax.__all__ == [
        "Batcher",
        "Bucket",
        "BucketOverflowError",
        "BucketPlan",
        "BucketedFunction",
        "CUDAGraphConfig",
        "CUDAGraphEntry",
        "CUDAGraphError",
        "CUDAGraphManager",
        "CUDAGraphMode",
        "CUDAGraphRegistry",
        "CUDAGraphWarning",
        "CaptureError",
        "CommandBufferScope",
        "ConfigError",
        "DeadlineError",
        "DistributedError",
        "Explanation",
        "GraphState",
        "GraphStore",
        "InputShapeError",
        "Ladder",
        "Packed",
        "Padded",
        "PaddingLeakError",
        "PlanOptions",
        "PolynomialCost",
        "QueueFullError",
        "ReplayProfile",
        "Report",
        "SealedError",
        "StoreError",
        "UnexpectedCompileError",
        "UnpicklableError",
        "WarmupReport",
        "__version__",
        "attention_cost",
        "bucket_jit",
        "measured_cost",
        "no_compiles",
        "pack",
        "plan_buckets",
        "plan_for_batcher",
    ]


@pytest.mark.parametrize("name", sorted(set(cudagraph_jax.__all__) - {"__version__"}))
def test_documented(name):
    """Every public name has a docstring of its own."""
    assert (inspect.getdoc(getattr(cudagraph_jax, name)) or "").split("\n")[0]


def test_version():
    """The version is three numbers."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", cudagraph_jax.__version__)


def test_typed():
    """Type checkers may read the annotations."""
    assert resources.files(cudagraph_jax).joinpath("py.typed").is_file()


def test_import_starts_nothing():
    """The package imports JAX with what needs it, starts no backend, and imports little besides."""
    script = """
import sys
import cudagraph_jax
print("jax" in sys.modules)
cudagraph_jax.bucket_jit, cudagraph_jax.CUDAGraphManager
optional = "hypothesis matplotlib orjson prometheus_client pydantic rich safetensors starlette"
optional += " tokenizers uvicorn"
print(sorted(set(optional.split()) & set(sys.modules)))
later = "batching cli demo graphs.inspection graphs.shelf prometheus report.report server store"
later += " testing"
print([name for name in later.split() if f"cudagraph_jax.{name}" in sys.modules])
import jax
try:
    jax.devices()
except RuntimeError:
    print("no backend")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n") == ["False", "[]", "[]", "no backend", ""]
