"""A decode step and a prefill in several ways, compiled and timed for gpu.py.

The model is the demo's decoder in bfloat16 with random weights. A step's KV cache is donated, and
what a step returns is what the next one takes, as in a server.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from sizes import SIZES

import cudagraph_jax as cg
from cudagraph_jax.demo.decoder.decoder_params import DecoderParams, param_shapes
from cudagraph_jax.demo.decoder.transformer import KVCache, greedy_prefill, greedy_step

CONTEXT, PROMPT = 1024, 512
STEPS = 20  # in a round
PLAIN = "jax.jit"
SCOPES = {
    "NONE": cg.CommandBufferScope.NONE,
    "AUTO": cg.CommandBufferScope.AUTO,
    "FULL": cg.CommandBufferScope.FULL,
}
# All that a step returns takes the place of what it was given, so that nothing moves.
DONATED = (1, 2, 3)

Step = Callable[..., Any]


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

    step: Step
    params: DecoderParams
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


class Lab:
    """One size's weights, and its steps and prefills, each compiled once for all who ask for it.

    Args:
        size: One of `SIZES`.
    """

    def __init__(self, size: str) -> None:
        self.size = size
        self._steps: dict[int, dict[str, Step]] = {}

    @cached_property
    def params(self) -> DecoderParams:
        """The weights, made when they are first asked for."""
        return random_on_device(self.size)

    def state(self, batch: int) -> tuple[Any, ...]:
        """An empty cache, and tokens at its beginning."""
        return fresh_state(self.size, batch)

    def compile(self, step: Step, batch: int) -> cg.WarmupReport | None:
        """Compiles a step of that batch without running it; a bucketed one gives its report."""
        state = jax.eval_shape(partial(fresh_state, self.size, batch))
        if isinstance(step, cg.BucketedFunction):
            return step.warmup(self.params, *state, progress=False)
        # AOT compiling fills the cache of `jax.jit`, too (docs/xla.md, "Compiling, freeing").
        step.lower(self.params, *state).compile()
        return None

    def steps(self, batch: int) -> dict[str, Step]:
        """Plain `jax.jit` and the bucketed step with each scope: compiled, and not run yet."""
        if batch not in self._steps:
            made: dict[str, Step] = {PLAIN: jax.jit(greedy_step, donate_argnums=DONATED)}
            made |= {name: bucketed_step(batch, scope) for name, scope in SCOPES.items()}
            first_alone(*(partial(self.compile, step, batch) for step in made.values()))
            self._steps[batch] = made
        return self._steps[batch]

    def bucketed(self, batch: int, scope: str) -> cg.BucketedFunction[..., Any]:
        """The step with its only bucket."""
        step = self.steps(batch)[scope]
        assert isinstance(step, cg.BucketedFunction)
        return step

    def warm(self, step: Step, batch: int) -> Steps:
        """Steps that have been run often enough to be recorded."""
        found = Steps(step, self.params, self.state(batch))
        found.run(5)
        return found


def side_by_side(*tasks: Callable[[], Any]) -> list[Any]:
    """What they give, run at once as far as there are cores: XLA compiles without the GIL."""
    with ThreadPoolExecutor(min(len(tasks), os.cpu_count() or 1)) as pool:
        return [task.result() for task in [pool.submit(task) for task in tasks]]


def first_alone(*tasks: Callable[[], Any]) -> None:
    """Runs one, then the others at once: they find in the process what its autotuning found.

    Kernels of another compilation would disturb the ones that are timed to choose among them.
    """
    first, *others = tasks
    first()
    side_by_side(*others)


def random_on_device(size: str) -> DecoderParams:
    """Random weights, made on the device: billions of them take NumPy minutes."""
    leaves, structure = jax.tree.flatten(param_shapes(SIZES[size]))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [_kernel(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    found: DecoderParams = jax.tree.unflatten(structure, made)
    return found


def fresh_state(size: str, batch: int) -> tuple[Any, ...]:
    """An empty cache, and tokens at its beginning."""
    config = SIZES[size]
    shape = (batch, config.num_kv_heads, CONTEXT, config.head_dim)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    row = jnp.zeros(batch, jnp.int32)
    return KVCache(layers(), layers()), row, row + 1


def bucketed_step(
    batch: int,
    scope: cg.CommandBufferScope,
    *,
    donate_argnums: tuple[int, ...] = DONATED,
    compiler_options: Mapping[str, str] | None = None,
    **options: Any,
) -> cg.BucketedFunction[..., Any]:
    """The step with its only bucket; `warmup` compiles it and does not run it."""
    config = cg.CUDAGraphConfig(
        capture_sizes=(batch,),
        capture_seq_lens=(CONTEXT,),
        command_buffers=scope,
        on_miss="error",
        warmup_iterations=0,
        compiler_options=compiler_options or {},
    )
    return cg.bucket_jit(
        greedy_step,
        in_axes=(None, "batch _ seq _", "batch", "batch"),
        unpad="none",
        donate_argnums=donate_argnums,
        config=config,
        **options,
    )


def timed_steps(contenders: Mapping[str, Steps], *, rounds: int, steps: int) -> list[list[object]]:
    """A row for each contender: milliseconds of a step, over the first one's, and host time."""
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


def timed_prefill(lab: Lab, *, rounds: int) -> list[list[object]]:
    """A row for each contender: milliseconds of a prefill of one prompt, over the first one's."""
    tokens, lengths = jnp.zeros((1, PROMPT), jnp.int32), jnp.full(1, PROMPT, jnp.int32)
    contenders: dict[str, Step] = {PLAIN: jax.jit(greedy_prefill)}
    for name, scope in SCOPES.items():
        config = cg.CUDAGraphConfig(
            capture_sizes=(1,), capture_seq_lens=(PROMPT,), command_buffers=scope
        )
        contenders[name] = cg.bucket_jit(
            greedy_prefill, in_axes=(None, "batch seq", "batch"), unpad="none", config=config
        )
    first_alone(*(partial(each, lab.params, tokens, lengths) for each in contenders.values()))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 3):  # three runs to be warm
        for name, contender in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(contender(lab.params, tokens, lengths))
            if number >= 3:
                taken[name].append((time.perf_counter() - start) * 1e3)
    first = taken[PLAIN]
    return [
        [
            name,
            statistics.median(times),
            statistics.median(a / b for a, b in zip(times, first, strict=True)),
            "",
        ]
        for name, times in taken.items()
    ]


# Once for each shape: one program of all kernels compiles for the better part of a minute.
@partial(jax.jit, static_argnums=(1, 2))
def _kernel(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if len(shape) == 1:  # a norm's scale
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)
