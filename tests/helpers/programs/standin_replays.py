"""Run in a process of its own, on the stand-in: prints as JSON what XLA did for each question."""

from __future__ import annotations

import ctypes
import json
import sys

import jax
import jax.numpy as jnp
from jax import lax

import cudagraph_jax as cg
from cudagraph_jax.demo.decoder.decoder_params import DecoderConfig, random_params
from cudagraph_jax.demo.decoder.transformer import KVCache, greedy_step
from cudagraph_jax.report.replay_profile import KEEP_COMMAND_BUFFERS

FULL, NONE = cg.CommandBufferScope.FULL, cg.CommandBufferScope.NONE
NAMES = ("kernels", "launches", "nodes", "updates", "instances")
driver = ctypes.CDLL("libcuda.so.1")
weights = [jnp.ones((64, 64), jnp.bfloat16)] * 6
stacked = jnp.ones((6, 64, 64), jnp.bfloat16)
rows = jnp.ones((4, 64), jnp.bfloat16)


def counts():
    found = (ctypes.c_long * len(NAMES))()
    driver.standin_counts(found)
    return list(found)


def counted(run):
    """What the driver was asked to do while `run` runs."""
    before = counts()
    jax.block_until_ready(run())
    return dict(zip(NAMES, (b - a for a, b in zip(before, counts(), strict=True)), strict=True))


def layers(weights, x):
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return x


def state_step(weights, state):
    return layers(weights, state) + state


def scanned(weights, x):
    return lax.scan(lambda carry, weight: (jnp.tanh(carry @ weight), None), x, weights)[0]


def bucketed(function, scope=FULL, **options):
    compiler_options = {KEEP_COMMAND_BUFFERS: "True", **options.pop("compiler_options", {})}
    config = cg.CUDAGraphConfig(
        capture_sizes=(4,),
        command_buffers=scope,
        warmup_iterations=0,
        compiler_options=compiler_options,
    )
    return cg.bucket_jit(
        function, in_axes=(None, "batch _"), unpad="none", config=config, **options
    )


def profiled(step, run):
    """What `profile_replays` says of the only bucket of `step`."""
    (shown,) = step.manager.profile_replays(run).buckets
    (graph,) = step.stats()["registry"]["graphs"].values()
    return {
        "replays": shown.replays,
        "executed": shown.executed,
        "updated": shown.updated,
        "recorded": shown.recorded,
        "moved": [argument.argument for argument in shown.moved],
        "state": graph["state"],
    }


def hot_loop():
    """A step whose state is donated: the first runs, and a profile."""
    step = bucketed(state_step, donate_argnums=1)
    state = jnp.copy(rows)

    def run(times):
        nonlocal state
        for _ in range(times):
            state = step(weights, state)
        return state

    first = [counted(lambda: run(1)) for _ in range(3)]
    return {"first": first, "profile": profiled(step, lambda: jax.block_until_ready(run(20)))}


def decoding():
    """The demo decoder's step in a hot loop, all that it returns in place of what it was given."""
    config = DecoderConfig(dtype="bfloat16", num_layers=3)
    step = cg.bucket_jit(
        greedy_step,
        in_axes=(None, "batch _ seq _", "batch", "batch"),
        unpad="none",
        donate_argnums=(1, 2, 3),
        config=cg.CUDAGraphConfig(
            capture_sizes=(4,),
            capture_seq_lens=(64,),
            command_buffers=FULL,
            compiler_options={KEEP_COMMAND_BUFFERS: "True"},
        ),
    )
    params = jax.device_put(random_params(config))
    shape = (4, config.num_kv_heads, 64, config.head_dim)
    keys, values = (tuple(jnp.zeros(shape, jnp.bfloat16) for _ in range(3)) for _ in range(2))
    state = KVCache(keys, values), jnp.zeros(4, jnp.int32), jnp.ones(4, jnp.int32)

    def run(times):
        nonlocal state
        for _ in range(times):
            state = step(params, *state)
        return jax.block_until_ready(state)

    run(3)
    return {"usual": counted(lambda: run(1)), "profile": profiled(step, lambda: run(20))}


def moving():
    """A step whose results are kept: each lies elsewhere, and so does what it is given."""
    step = bucketed(state_step)
    kept = [rows]

    def run(times):
        for _ in range(times):
            kept.append(step(weights, kept[-1]))
        return kept[-1]

    run(3)
    return {"profile": profiled(step, lambda: jax.block_until_ready(run(20)))}


def late_capture():
    """A replay before and after another function is captured, and the one after that."""
    step, other = bucketed(layers), bucketed(lambda weights, x: layers(weights, x) + 1)
    for _ in range(3):
        step(weights, rows)
    usual = counted(lambda: step(weights, rows))
    jax.block_until_ready(other(weights, rows))
    after = [counted(lambda: step(weights, rows)) for _ in range(2)]
    return {"usual": usual, "after": after}


def scopes():
    """The third replay without command buffers, of a scan, and of an unrolled one."""
    unroll = {"xla_gpu_command_buffer_unroll_loops": "True"}
    found = {}
    for name, step, args in (
        ("none", bucketed(layers, NONE), (weights, rows)),
        ("scan", bucketed(scanned), (stacked, rows)),
        ("unrolled", bucketed(scanned, compiler_options=unroll), (stacked, rows)),
    ):
        for _ in range(2):
            step(*args)
        found[name] = counted(lambda step=step, args=args: step(*args))
    return found


if __name__ == "__main__":
    questions = (hot_loop, decoding, moving, late_capture, scopes)
    json.dump({question.__name__: question() for question in questions}, sys.stdout)
