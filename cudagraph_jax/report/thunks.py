"""XLA's thunk sequences: the steps of a GPU program, and which of them a command buffer records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from cudagraph_jax.modes import DEFAULT_COMMANDS

# "<indent><id>: kKernel  <tab>details"; what is nested is indented further, under headings such
# as "condition:" (XLA, `ThunkSequence::ToString`).
_THUNK = re.compile(r"(?P<indent> *)\d+: (?P<kind>k[A-Z]\w*)")
_COMMAND_BUFFER = "kCommandBuffer"
# They only hold or join others, and XLA does not count them either (`CountCommandBufferSize`).
_UNCOUNTED = frozenset({"kAsyncDone", "kAsyncStart", "kGroup", "kSequential"})


class Thunk(NamedTuple):
    """One step of a GPU program.

    Attributes:
        kind: What it does, as XLA calls it, such as `"kGemm"`.
        is_recorded: Whether a command buffer records it.
        inside: The kinds of those that it is a part of, such as a loop, from the outermost in.
    """

    kind: str
    is_recorded: bool
    inside: tuple[str, ...] = ()


class ThunkSequence(NamedTuple):
    """What a dump of XLA shows of one program.

    Attributes:
        command_buffers: How many command buffers it has.
        thunks: Its steps, those inside of loops and branches too. What only holds or joins others
            is left out: command buffers, sequences, and both ends of what runs asynchronously.
    """

    command_buffers: int
    thunks: tuple[Thunk, ...]


def parse_thunks(text: str) -> ThunkSequence:
    """The steps that a `thunk_sequence*.txt` of XLA's dump shows."""
    command_buffers = 0
    thunks: list[Thunk] = []
    around: list[tuple[int, str]] = []
    for indent, kind in _lines(text.splitlines()):
        while around and around[-1][0] >= indent:
            around.pop()
        if kind == _COMMAND_BUFFER:
            command_buffers += 1
        elif kind not in _UNCOUNTED:
            outer = [kind for _, kind in around]
            parts = tuple(kind for kind in outer if kind != _COMMAND_BUFFER)
            thunks.append(Thunk(kind, _COMMAND_BUFFER in outer, parts))
        around.append((indent, kind))
    return ThunkSequence(command_buffers, tuple(thunks))


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for line in lines:
        found = _THUNK.match(line)
        if found is not None:
            yield len(found["indent"]), found["kind"]


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
# Those of jaxlib 0.12; docs/xla.md, "Command buffers".
_DEFAULT_MIN_SIZE = "5"
_DEFAULT_ENABLED = ",".join(DEFAULT_COMMANDS)


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
