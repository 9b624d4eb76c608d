"""XLA compiles for a GPU that is not here, and what it records is seen.

It takes JAX's CUDA plugin, which `make test-gpu-compiler` adds for these tests alone.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CaptureError,
    CommandBufferScope,
    ConfigError,
    CUDAGraphConfig,
    bucket_jit,
)
from cudagraph_jax.cli import main
from cudagraph_jax.demo.decoder.decoder_params import DecoderConfig, random_params
from cudagraph_jax.demo.decoder.transformer import KVCache, greedy_step
from cudagraph_jax.xla.gpus import absent_gpu, has_cuda_plugin, target_config

CONFIG = CUDAGraphConfig(
    capture_sizes=(4,), command_buffers=CommandBufferScope.FULL, warmup_iterations=0
)
LAYERS = np.zeros((6, 512, 512), np.float32)
UNROLL = {"xla_gpu_command_buffer_unroll_loops": "True"}


needs_compiler = pytest.mark.skipif(
    not has_cuda_plugin(), reason="JAX's CUDA plugin is not installed"
)


KEPT: list[object] = []
"""Functions whose entries are compiled again, which takes the function."""


def captured(function, weights, config=CONFIG):
    """The entry of a function of stacked weights and rows."""
    bucketed = bucket_jit(function, in_axes=(None, "batch _"), config=config)
    bucketed(weights, np.ones((3, 512), np.float32))
    KEPT.append(bucketed)
    (entry,) = bucketed.registry.entries()
    return entry


def scanned(weights, x):
    return jax.lax.scan(lambda carry, weight: (jnp.tanh(carry @ weight), None), x, weights)[0]


def unrolled(weights, x):
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return x


@pytest.mark.skipif(has_cuda_plugin(), reason="JAX's CUDA plugin is installed")
def test_without_a_compiler():
    """It is said what to install."""
    with pytest.raises(ConfigError, match=r"pip install 'jax\[cuda13\]'"):
        captured(unrolled, LAYERS).inspect(gpu="h100")


@needs_compiler
def test_a_file_of_something_else(tmp_path):
    """A file that XLA cannot read is refused with what it should be."""
    path = tmp_path / "gpu.pbtxt"
    path.write_text(f"nonsense: 1\n{target_config('h100')}")
    with pytest.raises(ConfigError, match=r"Is it a gpu_target_config\.pbtxt of XLA's\?"):
        absent_gpu(str(path))


@needs_compiler
def test_callbacks():
    """Callbacks cannot be compiled for a GPU that is not here, and it is said so."""

    def shown(weights, x):
        jax.debug.print("{}", x[0, 0])
        return unrolled(weights, x)

    with pytest.raises(CaptureError, match=r"jax\.debug\.print too, cannot be compiled"):
        captured(shown, LAYERS).inspect(gpu="h100")


@needs_compiler
def test_the_reason_knows_what_was_in_effect():
    """Options of the function stay with each scope, and what XLA had switched off is the reason."""
    only = {"xla_gpu_enable_command_buffer": "CUBLAS"}
    config = replace(CONFIG, command_buffers=CommandBufferScope.AUTO, compiler_options=only)
    entry = captured(unrolled, LAYERS, config)
    own, full = entry.inspect(gpu="h100", scopes=[CommandBufferScope.FULL]).scopes
    assert {kind.reason for kind in own.outside} == {
        "FUSION is not in xla_gpu_enable_command_buffer=CUBLAS"
    }
    assert full.coverage == 1


@needs_compiler
def test_scopes():
    """With NONE nothing is recorded; with AUTO and FULL everything that FUSION allows."""
    found = captured(unrolled, LAYERS).inspect(gpu="h100", scopes=CommandBufferScope)
    coverage = {scope.scope: scope.coverage for scope in found.scopes}
    assert found.platform == "NVIDIA H100 80GB HBM3"
    assert coverage == {"own options": 1, "AUTO": 1, "NONE": 0, "PIECEWISE": 1, "FULL": 1}


@needs_compiler
@pytest.mark.parametrize("gpu", ["a100", "h200", "b200"])
def test_other_gpus(gpu):
    """XLA compiles for every GPU that is known by name."""
    found = captured(unrolled, LAYERS).inspect(gpu=gpu)
    assert gpu.upper() in found.platform
    assert found.scopes[0].coverage == 1


@needs_compiler
def test_a_decode_step():
    """FULL records at least 95 % of the demo decoder's step, whose KV cache is donated."""
    config = DecoderConfig(dtype="bfloat16", num_layers=3)
    step = bucket_jit(
        greedy_step,
        in_axes=(None, "batch _ seq _", "batch", "batch"),
        unpad="none",
        donate_argnums=(1, 2, 3),
        config=replace(CONFIG, capture_seq_lens=(64,)),
    )
    shape = (4, config.num_kv_heads, 64, config.head_dim)
    layers = tuple(jnp.zeros(shape, jnp.bfloat16) for _ in range(config.num_layers))
    rows = jnp.zeros(4, jnp.int32)
    cache = KVCache(layers, jax.tree.map(jnp.copy, layers))
    step(random_params(config), cache, rows, rows + 1)
    (entry,) = step.registry.entries()
    (found,) = entry.inspect(gpu="h100").scopes
    assert found.coverage is not None
    assert found.coverage >= 0.95
    assert found.command_buffers == 1


@needs_compiler
def test_a_scan_over_layers():
    """XLA does not record a loop over stacked weights; what the reason advises helps."""
    (found,) = captured(scanned, LAYERS).inspect(gpu="h100").scopes
    (loop,) = [kind for kind in found.outside if kind.kind == "kWhile"]
    assert str(UNROLL) in loop.reason
    advised = captured(scanned, LAYERS, replace(CONFIG, compiler_options=UNROLL))
    (found,) = advised.inspect(gpu="h100").scopes
    assert (found.command_buffers, found.coverage) == (1, 1)


@needs_compiler
def test_a_library_that_refuses():
    """What a library does not allow stays outside, with the reason, and splits the graph."""

    def factor(weights, x):
        return unrolled(weights, x) @ jnp.linalg.cholesky(weights[0])

    (found,) = (
        captured(factor, np.stack([np.eye(512, dtype=np.float32)] * 6)).inspect(gpu="h100").scopes
    )
    (call,) = found.outside
    assert (call.kind, call.number) == ("kCustomCall", 1)
    assert "its library does not allow it" in call.reason
    assert found.command_buffers == 2


@needs_compiler
def test_the_command(tmp_path, monkeypatch, capsys):
    """`cudagraph-jax inspect --gpu` says it of a function in a file."""
    (tmp_path / "gpu_model.py").write_text("def mlp(weights, x):\n    return (x @ weights) + 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--arg", "float32[512,512]", "--arg", "float32[batch,512]"]
    assert main(["inspect", "gpu_model:mlp", "--batch", "8", "--gpu", "h200", *arguments]) == 0
    assert "mlp 8x1 on NVIDIA H200" in capsys.readouterr().out


def test_an_unknown_gpu():
    """A name that is not known is refused before anything is compiled."""
    with pytest.raises(ConfigError, match="is none of a100, h100"):
        captured(unrolled, LAYERS).inspect(gpu="h300")
