"""Why a step is outside follows from its kind, its place and the options."""

import pytest

from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.report.thunks import Thunk, effective_options, reason

FULL = CommandBufferScope.FULL.compiler_options()
NONE = CommandBufferScope.NONE.compiler_options()
UNROLLED = {**FULL, "xla_gpu_command_buffer_unroll_loops": "True"}
FEW = "fewer than xla_gpu_graph_min_graph_size=5 thunks in a row"


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("kWhile", {}, "WHILE is not in xla_gpu_enable_command_buffer=FUSION,CUBLAS,"),
        ("kWhile", FULL, "something inside it cannot be recorded"),
        ("kConditional", {}, f"something inside it cannot be recorded, or {FEW}"),
        ("kKernel", NONE, "command_buffer=(nothing)"),
        ("kKernel", {}, FEW),
        ("kKernel", FULL, "with a CUDA older than 12.3"),
        ("kCustomCall", {}, f"its library does not allow it, or {FEW}"),
        ("kCustomCall", FULL, "its library does not allow it"),
        ("kFft", FULL, "not known to record"),
    ],
)
def test_kinds_and_options(kind, options, expected):
    """Each rule of XLA's has its words."""
    assert expected in reason(Thunk(kind, is_recorded=False), options)


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (("kWhile",), "whether a loop that is not recorded goes on"),
        (("kWhile", "kDynamicSliceFusion"), "a part of a kDynamicSliceFusion"),
        (("kAsyncStart",), "a part of a kAsyncStart"),
    ],
)
def test_parts(inside, expected):
    """What is a part of something that is not recorded stays outside with it."""
    assert expected in reason(Thunk("kCopy", False, inside), FULL)


def test_slices_by_a_counter():
    """A loop over stacked layers can be unrolled, and then has no such excuse."""
    loop = Thunk("kWhile", is_recorded=False)
    assert "lax.scan(…, unroll=True)" in reason(loop, FULL, slices=True)
    assert "'xla_gpu_command_buffer_unroll_loops': 'True'" in reason(loop, FULL, slices=True)
    assert reason(loop, UNROLLED, slices=True) == "something inside it cannot be recorded"


def test_options_in_effect():
    """What XLA wrote of its options counts: the list is what it has, be it nothing."""
    config = "a {\n  xla_gpu_graph_min_graph_size: 1\n  xla_gpu_enable_command_buffer: CUBLAS\n"
    config += "  xla_gpu_enable_command_buffer: FUSION\n}\n"
    assert effective_options(config) == {
        "xla_gpu_graph_min_graph_size": "1",
        "xla_gpu_enable_command_buffer": "CUBLAS,FUSION",
    }
    assert "(nothing)" in reason(Thunk("kKernel", False), effective_options(""))
