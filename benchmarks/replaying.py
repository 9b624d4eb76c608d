"""What makes replays cheap: options of XLA's, stable addresses, runs before, captures later.

gpu.py calls it. By itself, `python benchmarks/replaying.py --size 0.5b` prints what one process
finds, as JSON: for options of XLA that hold for a whole process, given in XLA_FLAGS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from decoding import CONTEXT, SCOPES, Lab, Steps, bucketed_step, side_by_side
from serving import CHILD

import cudagraph_jax as cg
from cudagraph_jax.demo.decoder_model import greedy_step

FULL = cg.CommandBufferScope.FULL
# What may be set for one executable. Each is compiled with FULL besides.
OPTIONS: dict[str, dict[str, str]] = {
    "FULL": {},
    "at least 5 thunks": {"xla_gpu_graph_min_graph_size": "5"},
    "at least 100 thunks": {"xla_gpu_graph_min_graph_size": "100"},
    "scheduled SERIALIZE": {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"},
    "scheduled CONCURRENT": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
}
# These change how XLA allocates, in the whole process.
UPDATE_MODES = ("ALWAYS_UPDATE", "SKIP_TEMP", "SKIP_PROFILED")

Rows = list[list[object]]
HEADER = ("model", "what", "ms a step", "replays", "executed", "updated", "recorded", "moved")


def by_option(lab: Lab, *, rounds: int) -> Rows:
    """A row for each of `OPTIONS`, and one for a step whose state is not donated."""
    steps = {
        name: bucketed_step(1, FULL, compiler_options=options) for name, options in OPTIONS.items()
    }
    steps["FULL, nothing donated"] = _undonated()
    state = jax.eval_shape(partial(lab.state, 1))
    side_by_side(
        *(partial(step.warmup, lab.params, *state, progress=False) for step in steps.values())
    )
    loops = {name: lab.warm(step, 1) for name, step in steps.items()}
    for _ in range(rounds):
        for loop in loops.values():
            loop.time(20)
    return [[lab.size, name, *_figures(loops[name], steps[name])] for name in loops]


def by_update_mode(size: str) -> Rows:
    """A row for each of `UPDATE_MODES`, in a process of its own."""
    rows: Rows = []
    for mode in UPDATE_MODES:
        flags = f"{os.environ['XLA_FLAGS']} --xla_gpu_command_buffer_update_mode={mode}"
        done = subprocess.run(
            [sys.executable, Path(__file__), "--size", size],
            check=False,
            env={**CHILD, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=150,
        )
        if done.returncode:
            rows.append([size, f"update mode {mode}", done.stderr.strip()[-200:], *[""] * 5])
        else:
            rows.append([size, f"update mode {mode}", *json.loads(done.stdout)])
    return rows


def first_runs(lab: Lab) -> Rows:
    """Milliseconds of each of the first runs: which one records?"""
    step = bucketed_step(1, FULL)
    step.warmup(lab.params, *jax.eval_shape(partial(lab.state, 1)), progress=False)
    loop = Steps(step, lab.params, lab.state(1))
    for _ in range(6):
        loop.time(1)
    return [[lab.size, f"run {number + 1}", ms] for number, ms in enumerate(loop.step_ms)]


def late_capture(lab: Lab, *, rounds: int) -> Rows:
    """Milliseconds of a step before and after another program is compiled and run."""
    loop = lab.warm(lab.bucketed(1, "FULL"), 1)
    taken: dict[str, list[float]] = {"usual": [], "1st after": [], "2nd after": [], "3rd after": []}
    for number in range(rounds):
        loop.step_ms.clear()
        loop.time(1)
        # Small, and large enough to be recorded.
        other = jax.jit(lambda x, number=number: [jnp.sin(x * k + number) @ x for k in range(8)])
        jax.block_until_ready(other(jnp.ones((64, 64))))
        for _ in range(3):
            loop.time(1)
        for times, ms in zip(taken.values(), loop.step_ms, strict=True):
            times.append(ms)
    return [[lab.size, f"{name} capture", statistics.median(ms)] for name, ms in taken.items()]


def _undonated() -> cg.BucketedFunction[..., Any]:
    config = cg.CUDAGraphConfig(
        capture_sizes=(1,), capture_seq_lens=(CONTEXT,), command_buffers=FULL, warmup_iterations=0
    )
    return cg.bucket_jit(
        greedy_step, in_axes=(None, "batch _ seq _", "batch", "batch"), unpad="none", config=config
    )


def _figures(loop: Steps, step: cg.BucketedFunction[..., Any]) -> list[object]:
    profile = step.manager.profile_replays(lambda: loop.run(50))
    (shown,) = profile.buckets
    moved = ", ".join(argument.argument for argument in shown.moved[:2])
    return [
        statistics.median(loop.step_ms),
        shown.replays,
        shown.executed,
        shown.updated,
        shown.recorded,
        moved,
    ]


def main() -> int:
    """Prints the figures of a step with FULL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="0.5b")
    options = parser.parse_args()
    start = time.perf_counter()
    lab = Lab(options.size)
    step = bucketed_step(1, SCOPES["FULL"])
    step.warmup(lab.params, *jax.eval_shape(partial(lab.state, 1)), progress=False)
    loop = lab.warm(step, 1)
    for _ in range(7):
        loop.time(20)
    print(json.dumps(_figures(loop, step)))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
