"""What XLA records of a bucket is read from its dump."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CaptureError,
    CommandBufferScope,
    ConfigError,
    CUDAGraphConfig,
    UnexpectedCompileError,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.graphs.inspection import dump, inspect

CONFIG = CUDAGraphConfig(
    capture_sizes=(4,), command_buffers=CommandBufferScope.FULL, warmup_iterations=0
)
BEFORE = "000: kKernel\t\n001: kGemm  \t\n002: kFft   \t\n"
AFTER = "003: kCommandBuffer\t\n    000: kKernel\t\n    001: kGemm  \t\n002: kFft\t\n"


@pytest.fixture
def entry():
    double = bucket_jit(lambda x: jnp.sin(x) * 2, in_axes="batch", config=CONFIG, name="double")
    double(np.ones(3, np.float32))
    (found,) = double.registry.entries()
    yield found
    del double  # not before: an entry cannot be compiled again without its function


def written(files):
    """A dump that consists of these files."""

    def write(lowering, options, directory):
        for name, text in files.items():
            (directory / name).write_text(text)

    return write


def on_gpu(entry, files):
    return inspect(
        entry.program,
        entry.bucket,
        {"own options": entry.options},
        platform=lambda: "gpu",
        dump=written(files),
    )


def test_on_a_cpu(entry):
    """A CPU has no command buffers, and nothing is compiled to find that out."""
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    found = entry.inspect(scopes=CommandBufferScope)
    assert found.scopes == ()
    assert "no command buffers on cpu" in str(found)


def test_a_dump_is_read(entry):
    """What the passes made of the program counts, and its options are its bucket's own."""
    (found,) = on_gpu(
        entry,
        {
            "module_0001.jit_f.thunk_sequence.txt": BEFORE,
            "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt": AFTER,
        },
    ).scopes
    assert (found.command_buffers, found.recorded, found.left) == (1, 2, 1)
    assert found.options == CommandBufferScope.FULL.compiler_options()


def test_a_program_without_command_buffers(entry):
    """Without a change by the passes there is one file, and no command buffer."""
    (found,) = on_gpu(entry, {"module_0001.jit_f.thunk_sequence.txt": BEFORE}).scopes
    assert (found.command_buffers, found.recorded, found.left) == (0, 0, 3)


def test_programs_beside_it(entry):
    """Small programs of XLA's autotuning are left out."""
    (found,) = on_gpu(
        entry,
        {
            "module_0001.jit_f.thunk_sequence.txt": BEFORE,
            "module_0002.gemm.thunk_sequence.txt": "000: kGemm\t\n",
        },
    ).scopes
    assert found.left == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "set JAX_ENABLE_COMPILATION_CACHE=false"),
        ({"module_0001.jit_f.before_optimizations.txt": ""}, "dumped no thunk sequence"),
    ],
)
def test_no_dump(entry, files, message):
    """Where XLA dumped nothing that helps, it is said why."""
    with pytest.raises(CaptureError, match=message):
        on_gpu(entry, files)


def test_xla_dumps_one_executable(entry, tmp_path):
    """The dump is of this executable alone, compiled with its options."""
    lowering = entry.program.lower(entry.bucket, clock=lambda: 0.0)
    dump(lowering, entry.options, tmp_path)
    jax.jit(lambda x: x + 3)(np.ones(5, np.float32))
    names = {path.name for path in tmp_path.iterdir()}
    assert any("double_4x1" in name for name in names)
    assert all("lambda" not in name for name in names)
    (options,) = tmp_path.glob("*.debug_options")
    assert "xla_gpu_graph_min_graph_size: 1" in options.read_text()


def test_unknown_options(entry, tmp_path):
    """An option that XLA does not know is a clear error."""
    lowering = entry.program.lower(entry.bucket, clock=lambda: 0.0)
    with pytest.raises(ConfigError, match="correct compiler_options"):
        dump(lowering, {"xla_no_such_option": "1"}, tmp_path)


def test_in_no_compiles(entry):
    """Inspecting compiles, so it is refused where nothing may."""
    with no_compiles(), pytest.raises(UnexpectedCompileError):
        entry.inspect()
