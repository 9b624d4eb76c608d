"""A compiled-function cache for serving JAX models: pad to buckets, compile each once, replay."""

from importlib import import_module
from typing import TYPE_CHECKING

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import (
    BucketOverflowError,
    CaptureError,
    ConfigError,
    CUDAGraphError,
    CUDAGraphWarning,
    InputShapeError,
    PaddingLeakError,
    SealedError,
    StoreError,
    UnexpectedCompileError,
)
from cudagraph_jax.graphs.bucket_jit import bucket_jit
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.function import BucketedFunction
from cudagraph_jax.graphs.guard import no_compiles
from cudagraph_jax.graphs.manager import CUDAGraphManager
from cudagraph_jax.graphs.planned import PlanOptions
from cudagraph_jax.graphs.registry import CUDAGraphRegistry
from cudagraph_jax.modes import CommandBufferScope, CUDAGraphMode, GraphState
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from cudagraph_jax.version import __version__

if TYPE_CHECKING:
    from cudagraph_jax.report.explanation import Explanation
    from cudagraph_jax.report.replays import ReplayProfile
    from cudagraph_jax.report.report import Report
    from cudagraph_jax.report.warmup import WarmupReport
    from cudagraph_jax.shapes.costs import PolynomialCost, attention_cost, measured_cost
    from cudagraph_jax.shapes.plan import BucketPlan
    from cudagraph_jax.shapes.planner import plan_buckets
    from cudagraph_jax.store import GraphStore
else:

    def __getattr__(name: str) -> object:
        """Imports at their first use what not every program needs: planning, store, reports."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        value = globals()[name] = getattr(import_module(_LATER[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})


_LATER = {
    "BucketPlan": "cudagraph_jax.shapes.plan",
    "Explanation": "cudagraph_jax.report.explanation",
    "GraphStore": "cudagraph_jax.store",
    "PolynomialCost": "cudagraph_jax.shapes.costs",
    "ReplayProfile": "cudagraph_jax.report.replays",
    "Report": "cudagraph_jax.report.report",
    "WarmupReport": "cudagraph_jax.report.warmup",
    "attention_cost": "cudagraph_jax.shapes.costs",
    "measured_cost": "cudagraph_jax.shapes.costs",
    "plan_buckets": "cudagraph_jax.shapes.planner",
}

__all__ = [
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
    "Explanation",
    "GraphState",
    "GraphStore",
    "InputShapeError",
    "Ladder",
    "PaddingLeakError",
    "PlanOptions",
    "PolynomialCost",
    "ReplayProfile",
    "Report",
    "SealedError",
    "StoreError",
    "UnexpectedCompileError",
    "WarmupReport",
    "__version__",
    "attention_cost",
    "bucket_jit",
    "measured_cost",
    "no_compiles",
    "plan_buckets",
]
