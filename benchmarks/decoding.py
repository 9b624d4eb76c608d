"""A decode step and a prefill in several ways, each with a state of its own; gpu.py times them.

The model is the demo's decoder in bfloat16 with random weights. A step's KV cache is donated, and
what a step returns is what the next one takes, as in a server.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cudagraph_jax as cg
from cudagraph_jax.demo.decoder_model import KVCache, greedy_prefill, greedy_step
from cudagraph_jax.demo.decoder_params import DecoderConfig, Params, random_params

SIZES = {
    # For a look at the benchmark itself, on any machine.
    "tiny": DecoderConfig(dtype="bfloat16"),
    # Hidden size, heads and layers of Qwen2-0.5B and Llama-3.2-3B.
    "0.5b": DecoderConfig(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        dtype="bfloat16",
    ),
    "3b": DecoderConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
    ),
}
SCOPES = {
    "NONE": cg.CommandBufferScope.NONE,
    "AUTO": cg.CommandBufferScope.AUTO,
    "FULL": cg.CommandBufferScope.FULL,
}
# All that a step returns takes the place of what it was given, so that nothing moves.
DONATED = (1, 2, 3)


@dataclass(slots=True)
class Steps:
    """Decode steps of one contender, one after the other.

    Attributes:
        step: Takes (params, cache, tokens, positions).
        params: The weights.
        state: What the next step takes besides.
        step_ms: Milliseconds of a step, round by round, waiting for the last one.
        host_us: Microseconds until a step is dispatched, round by round.
    """

    step: Callable[..., Any]
    params: Params
    state: tuple[Any, ...]
    step_ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """Dispatches so many steps, and waits."""
        for _ in range(steps):
            self.state = self.step(self.params, *self.state)
        jax.block_until_ready(self.state)

    def time(self, steps: int) -> None:
        """One round."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state = self.step(self.params, *self.state)
        dispatched = time.perf_counter()
        jax.block_until_ready(self.state)
        end = time.perf_counter()
        self.step_ms.append((end - start) / steps * 1e3)
        self.host_us.append((dispatched - start) / steps * 1e6)


def params_of(size: str) -> Params:
    """Random weights on the device."""
    placed: Params = jax.device_put(random_params(SIZES[size]))
    return placed


def fresh_state(size: str, batch: int, context: int) -> tuple[Any, ...]:
    """An empty cache, and tokens at its beginning."""
    config = SIZES[size]
    shape = (batch, context, config.num_kv_heads, config.head_dim)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    row = jnp.zeros(batch, jnp.int32)
    return KVCache(layers(), layers()), row, row + 1


def bucketed_step(
    batch: int, context: int, scope: cg.CommandBufferScope, **options: Any
) -> cg.BucketedFunction[..., Any]:
    """The step with its only bucket."""
    config = cg.CUDAGraphConfig(
        capture_sizes=(batch,), capture_seq_lens=(context,), command_buffers=scope, on_miss="error"
    )
    return cg.bucket_jit(
        greedy_step,
        in_axes=(None, "batch seq _ _", "batch", "batch"),
        unpad="none",
        donate_argnums=DONATED,
        config=config,
        **options,
    )


def steppers(size: str, params: Params, batch: int, context: int) -> dict[str, Steps]:
    """Plain `jax.jit`, and the bucketed step with each scope; all warm."""
    found = {"jax.jit": Steps(jax.jit(greedy_step, donate_argnums=DONATED), params, ())}
    for name, scope in SCOPES.items():
        step = bucketed_step(batch, context, scope)
        step.warmup(params, *fresh_state(size, batch, context), progress=False)
        found[name] = Steps(step, params, ())
    for contender in found.values():
        contender.state = fresh_state(size, batch, context)
        contender.run(5)
    return found


def timed_steps(contenders: Mapping[str, Steps], *, rounds: int, steps: int) -> list[list[object]]:
    """A row for each contender: milliseconds of a step, of the first one's, and host time."""
    for _ in range(rounds):
        for contender in contenders.values():
            contender.time(steps)
    first = next(iter(contenders.values()))
    return [
        [
            name,
            statistics.median(contender.step_ms),
            statistics.median(a / b for a, b in zip(contender.step_ms, first.step_ms, strict=True)),
            statistics.median(contender.host_us),
        ]
        for name, contender in contenders.items()
    ]


def timed_prefill(size: str, params: Params, seq: int, *, rounds: int) -> list[list[object]]:
    """A row for each contender: milliseconds of a prefill of one prompt."""
    tokens, lengths = np.zeros((1, seq), np.int32), np.full(1, seq, np.int32)
    contenders: dict[str, Callable[..., Any]] = {"jax.jit": jax.jit(greedy_prefill)}
    for name, scope in SCOPES.items():
        contenders[name] = cg.bucket_jit(
            greedy_prefill,
            in_axes=(None, "batch seq", "batch"),
            unpad="none",
            config=cg.CUDAGraphConfig(
                capture_sizes=(1,), capture_seq_lens=(seq,), command_buffers=scope
            ),
        )
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 3):  # three runs to be warm
        for name, contender in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(contender(params, tokens, lengths))
            if number >= 3:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return [[name, statistics.median(times)] for name, times in taken.items()]
