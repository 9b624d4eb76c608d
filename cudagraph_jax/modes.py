"""The enums: what a manager may do, what XLA may record, and how far a bucket has come."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class CUDAGraphMode(Enum):
    """What a manager may do at most, and what it does for one call.

    Set on a manager it is a limit; returned by `get_mode_for_batch` it is the decision.
    """

    NONE = "none"
    """Limit: paused, graphs are kept. Decision: run the function eagerly."""
    CAPTURE = "capture"
    """Limit: everything is allowed. Decision: capture this bucket, then run it."""
    REPLAY = "replay"
    """Limit: sealed, nothing new is captured. Decision: run a captured bucket."""
    DISABLED = "disabled"
    """Switched off: every call runs eagerly."""


class GraphState(Enum):
    """How far a captured bucket has come, by what was seen of it."""

    COMPILED = "compiled"
    """Compiled or loaded, and run less than three times."""
    WARMED = "warmed"
    """Run three times or more: XLA has recorded what it records; docs/xla.md, "Command buffers"."""
    REPLAYING = "replaying"
    """A profile showed its command buffers executed, and none recorded or updated meanwhile."""


class CommandBufferScope(Enum):
    """Which XLA operations may be recorded into command buffers (the CUDA graph)."""

    AUTO = "auto"
    """XLA's own default."""
    NONE = "none"
    """No command buffers."""
    PIECEWISE = "piecewise"
    """Fusions and matrix products; library calls such as attention stay outside."""
    FULL = "full"
    """Everything XLA can record, from one operation up; collectives excepted."""

    def compiler_options(self) -> dict[str, str]:
        """The XLA options of this scope; docs/xla.md, "Command buffers"."""
        match self:
            case CommandBufferScope.AUTO:
                return {}
            case CommandBufferScope.NONE:
                return {_COMMAND_BUFFER: ""}
            case CommandBufferScope.PIECEWISE:
                return {_COMMAND_BUFFER: "FUSION,CUBLAS,CUBLASLT"}
            case CommandBufferScope.FULL:
                return {_COMMAND_BUFFER: ",".join(_RECORDABLE), _MIN_GRAPH_SIZE: "1"}

    def in_place_of(self, options: Mapping[str, str]) -> dict[str, str]:
        """`options` with this scope instead of the one that they are of."""
        others = {
            name: value
            for name, value in options.items()
            if name not in (_COMMAND_BUFFER, _MIN_GRAPH_SIZE)
        }
        return {**others, **self.compiler_options()}


_COMMAND_BUFFER = "xla_gpu_enable_command_buffer"
_MIN_GRAPH_SIZE = "xla_gpu_graph_min_graph_size"
_OF_ONE_DEVICE = (
    "FUSION",
    "CUBLAS",
    "CUBLASLT",
    "CUDNN",
    "CUSTOM_CALL",
    "CONDITIONAL",
    "DYNAMIC_SLICE_FUSION",
)
# Known to every supported jaxlib (0.10 to 0.12); an unknown name fails each compilation.
_RECORDABLE = (*_OF_ONE_DEVICE, "WHILE", "CONVOLUTION")

DEFAULT_COMMANDS = (*_OF_ONE_DEVICE, "COLLECTIVES_KERNEL")
"""What XLA records by default in jaxlib 0.12 (docs/xla.md, "Command buffers")."""
