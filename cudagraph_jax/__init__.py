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
    DeadlineError,
    DistributedError,
    InputShapeError,
    PaddingLeakError,
    QueueFullError,
    SealedError,
    StoreError,
    UnexpectedCompileError,
    UnpicklableError,
)
from cudagraph_jax.modes import CommandBufferScope, CUDAGraphMode, GraphState
from cudagraph_jax.shapes.ladder import Bucket, Ladder
from cudagraph_jax.version import __version__

if TYPE_CHECKING:
    from cudagraph_jax.batching.batch_plan import plan_for_batcher
    from cudagraph_jax.batching.batcher import Batcher
    from cudagraph_jax.batching.packing import Packed, pack
    from cudagraph_jax.capture.registry import CUDAGraphRegistry
    from cudagraph_jax.dispatch.bucket_jit import bucket_jit
    from cudagraph_jax.dispatch.function import BucketedFunction
    from cudagraph_jax.dispatch.manager import CUDAGraphManager, PlanOptions
    from cudagraph_jax.graphs.entry import CUDAGraphEntry
    from cudagraph_jax.planning.costs import PolynomialCost, attention_cost, measured_cost
    from cudagraph_jax.planning.plan import BucketPlan
    from cudagraph_jax.planning.planner import plan_buckets
    from cudagraph_jax.program.padded import Padded
    from cudagraph_jax.report.explanation import Explanation
    from cudagraph_jax.report.replay_profile import ReplayProfile
    from cudagraph_jax.report.report import Report
    from cudagraph_jax.report.warmup_report import WarmupReport
    from cudagraph_jax.store import GraphStore
    from cudagraph_jax.xla.compiles import no_compiles
else:

    def __getattr__(name: str) -> object:
        """Imports at its first use what needs JAX, or what not every program needs."""
        if name == "distributed":
            return import_module(f"{__name__}.distributed")
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        value = globals()[name] = getattr(import_module(_LATER[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})


_LATER = {
    "Batcher": "cudagraph_jax.batching.batcher",
    "BucketPlan": "cudagraph_jax.planning.plan",
    "BucketedFunction": "cudagraph_jax.dispatch.function",
    "CUDAGraphEntry": "cudagraph_jax.graphs.entry",
    "CUDAGraphManager": "cudagraph_jax.dispatch.manager",
    "CUDAGraphRegistry": "cudagraph_jax.capture.registry",
    "Explanation": "cudagraph_jax.report.explanation",
    "GraphStore": "cudagraph_jax.store",
    "Packed": "cudagraph_jax.batching.packing",
    "Padded": "cudagraph_jax.program.padded",
    "PlanOptions": "cudagraph_jax.dispatch.manager",
    "PolynomialCost": "cudagraph_jax.planning.costs",
    "ReplayProfile": "cudagraph_jax.report.replay_profile",
    "Report": "cudagraph_jax.report.report",
    "WarmupReport": "cudagraph_jax.report.warmup_report",
    "attention_cost": "cudagraph_jax.planning.costs",
    "bucket_jit": "cudagraph_jax.dispatch.bucket_jit",
    "measured_cost": "cudagraph_jax.planning.costs",
    "no_compiles": "cudagraph_jax.xla.compiles",
    "pack": "cudagraph_jax.batching.packing",
    "plan_buckets": "cudagraph_jax.planning.planner",
    "plan_for_batcher": "cudagraph_jax.batching.batch_plan",
}

__all__ = [
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
