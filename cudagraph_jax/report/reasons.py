"""Why XLA leaves a step of a GPU program outside of its command buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from cudagraph_jax.report.thunks import Thunk

# XLA, `GetCommandBufferCmdType`: which entry of xla_gpu_enable_command_buffer records a kind.
_COMMANDS = MappingProxyType(
    {
        "kConditional": "CONDITIONAL",
        "kConvolution": "CONVOLUTION",
        "kCopy": "FUSION",
        "kCuDnn": "CUDNN",
        "kCublasLtMatmul": "CUBLASLT",
        "kCustomCall": "CUSTOM_CALL",
        "kCustomKernel": "FUSION",
        "kDynamicSlice": "DYNAMIC_SLICE_FUSION",
        "kDynamicSliceFusion": "DYNAMIC_SLICE_FUSION",
        "kGemm": "CUBLAS",
        "kKernel": "FUSION",
        "kMemset32BitValue": "FUSION",
        "kMemzero": "FUSION",
        "kPartitionId": "FUSION",
        "kReplicaId": "FUSION",
        "kSelectK": "CUSTOM_CALL",
        "kWhile": "WHILE",
    }
)
_ENABLE = "xla_gpu_enable_command_buffer"
_COMMAND = re.compile(rf"^\s*{_ENABLE}: (\w+)$", re.MULTILINE)
_MIN_SIZE = "xla_gpu_graph_min_graph_size"
_UNROLL = "xla_gpu_command_buffer_unroll_loops"
_VALUE = re.compile(rf"^\s*({_MIN_SIZE}|{_UNROLL}): (\w+)$", re.MULTILINE)
_ADVICE = str({_UNROLL: "True"})
# Those of jaxlib 0.12; FACTS.md, "Command buffers".
_DEFAULT_MIN_SIZE = "5"
_DEFAULT_ENABLED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION"


def effective_options(config: str) -> dict[str, str]:
    """The options that the `config.pbtxt` of a dump shows, which XLA_FLAGS may have set, too.

    Args:
        config: Its text.
    """
    found = dict(_VALUE.findall(config))
    return {**found, _ENABLE: ",".join(_COMMAND.findall(config))}


def reason(thunk: Thunk, options: Mapping[str, str], *, slices: bool = False) -> str:
    """Why `thunk` is outside, by the rules of XLA's `CommandBufferConversionPass`.

    XLA itself says it only in its log. Checked against what it makes of small programs for an H100.

    Args:
        thunk: The step.
        options: What it was compiled with; XLA's defaults for what is not in it.
        slices: Whether the program has a loop that takes slices by its counter.
    """
    command = _COMMANDS.get(thunk.kind)
    if command is None:
        return "XLA is not known to record thunks of this kind"
    enabled = options.get(_ENABLE, _DEFAULT_ENABLED)
    if command not in enabled.split(","):
        return f"{command} is not in {_ENABLE}={enabled or '(nothing)'}"
    size = options.get(_MIN_SIZE, _DEFAULT_MIN_SIZE)
    few = f"fewer than {_MIN_SIZE}={size} thunks in a row can be recorded here"
    alone = size == "1"
    if command in ("WHILE", "CONDITIONAL"):
        inside = "something inside it cannot be recorded"
        if thunk.kind == "kWhile" and slices and options.get(_UNROLL, "").lower() != "true":
            inside += (
                "; where that are slices by the loop's counter, as lax.scan takes of stacked "
                f"layers: unroll it, with lax.scan(…, unroll=True) or compiler_options={_ADVICE}"
            )
        return inside if alone else f"{inside}, or {few}"
    if command == "CUSTOM_CALL":
        library = "its library does not allow it"
        return library if alone else f"{library}, or {few}"
    if not alone:
        return few
    return _part_of(thunk) or (
        "XLA does not say; it records less with a CUDA older than 12.3, and no slices by a loop's "
        "counter with one older than 12.9"
    )


def _part_of(thunk: Thunk) -> str | None:
    if not thunk.inside:
        return None
    outer = thunk.inside[-1]
    if outer == "kWhile":
        return "it decides whether a loop that is not recorded goes on"
    return f"it is a part of a {outer} that is not recorded"
