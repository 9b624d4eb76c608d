"""A compiled-function cache for serving JAX models: pad to buckets, compile each once, replay."""

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
from cudagraph_jax.modes import CommandBufferScope, CUDAGraphMode
from cudagraph_jax.report.explanation import Explanation
from cudagraph_jax.report.report import Report
from cudagraph_jax.report.warmup import WarmupReport
from cudagraph_jax.shapes.costs import PolynomialCost, attention_cost, measured_cost
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from cudagraph_jax.shapes.plan import BucketPlan
from cudagraph_jax.shapes.planner import plan_buckets
from cudagraph_jax.store import GraphStore
from cudagraph_jax.version import __version__

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
    "GraphStore",
    "InputShapeError",
    "Ladder",
    "PaddingLeakError",
    "PlanOptions",
    "PolynomialCost",
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
