"""Compiler options of each executable: command-buffer scopes and the user's own."""

from __future__ import annotations

import pytest

from cudagraph_jax import (
    CommandBufferScope,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphRegistry,
)
from tests.helpers.functions import assert_close, double, floats


@pytest.mark.parametrize("scope", CommandBufferScope)
def test_every_scope_compiles(scope):
    """The options of each scope are known to this jaxlib, also together with the user's."""
    config = CUDAGraphConfig(
        command_buffers=scope,
        compiler_options={"xla_cpu_enable_fast_math": "False"},
        warmup_iterations=1,
    )
    entry = CUDAGraphRegistry(config).capture(2, 3, double, (2, 3))
    assert_close(entry.replay(floats(0, 2, 3)), floats(0, 2, 3) * 2)


@pytest.mark.parametrize(
    "options",
    [
        {"xla_gpu_no_such_option": "1"},
        {"xla_gpu_enable_command_buffer": "FUSION,NO_SUCH_COMMAND"},
        {"xla_gpu_graph_min_graph_size": "many"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_unknown_options_are_refused(options):
    """An option or a value that XLA does not know is a ConfigError, and nothing is kept."""
    registry = CUDAGraphRegistry(CUDAGraphConfig(compiler_options=options))
    with pytest.raises(ConfigError, match="correct compiler_options"):
        registry.capture(2, 3, double, (2, 3))
    assert registry.num_graphs == 0


def test_options_may_be_numbers():
    """Values that are no text are made text, so that 1 and "1" are the same program."""
    numbers = CUDAGraphConfig(compiler_options={"xla_gpu_graph_min_graph_size": 2})  # type: ignore[dict-item]
    text = CUDAGraphConfig(compiler_options={"xla_gpu_graph_min_graph_size": "2"})
    assert numbers == text
    CUDAGraphRegistry(numbers).capture(2, 3, double, (2, 3))


def test_profiles_name_the_bucket():
    """The executable carries the function's name and the bucket's sizes."""
    entry = CUDAGraphRegistry().capture(2, 3, double, (2, 3))
    assert "double_2x3" in str(entry.executable.call.as_text())
