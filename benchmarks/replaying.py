"""What makes replays cheap: options of XLA's, stable addresses, runs before, captures later.

gpu.py calls it. By itself, `python benchmarks/replaying.py --size 0.5b` prints what one process
finds, as JSON: for options of XLA that hold for a whole process, given in XLA_FLAGS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from decoding import DONATED, STEPS, Lab, Steps, bucketed_step, first_alone
from parts import ChildError, Rows, Run

import cudagraph_jax as cg

FULL = cg.CommandBufferScope.FULL
# What may be set for one executable. Each is compiled with FULL besides.
OPTIONS: dict[str, dict[str, str]] = {
    "FULL": {},
    # More than a step has: nothing is recorded.
    "at least 1000 thunks": {"xla_gpu_graph_min_graph_size": "1000"},
    "scheduled SERIALIZE": {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"},
    "scheduled CONCURRENT": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
}
# These change how XLA allocates, in the whole process.
UPDATE_MODES = ("ALWAYS_UPDATE", "SKIP_TEMP", "SKIP_PROFILED")

HEADER = ("model", "what", "ms a step", "replays", "executed", "updated", "recorded", "moved")


def cheap(run: Run) -> Rows:
    """All of it, for the first size."""
    lab = run.labs[0]
    yield from by_option(run, lab)
    run.begin("first runs")
    yield from first_runs(lab)
    run.begin("late captures")
    yield from late_capture(lab, rounds=run.rounds)
    if jax.default_backend() != "cpu":
        yield from by_update_mode(run, lab.size)


def by_option(run: Run, lab: Lab) -> Rows:
    """A row for each of `OPTIONS`, and one for a step whose state is not donated."""
    run.begin("options of XLA's")
    steps = {
        name: bucketed_step(1, FULL, donate_argnums=donated, compiler_options=options)
        for name, options, donated in (
            *((name, options, DONATED) for name, options in OPTIONS.items()),
            ("FULL, nothing donated", {}, ()),
        )
    }
    first_alone(*(partial(lab.compile, step, 1) for step in steps.values()))
    loops = {name: lab.warm(step, 1) for name, step in steps.items()}
    for _ in range(run.rounds):
        for loop in loops.values():
            loop.time(STEPS)
    for name, loop in loops.items():
        run.begin(name)
        yield [lab.size, name, *_figures(loop, steps[name])]


def by_update_mode(run: Run, size: str) -> Rows:
    """A row for each of `UPDATE_MODES`, in a process of its own."""
    for mode in UPDATE_MODES:
        run.begin(f"update mode {mode}")
        flag = f"--xla_gpu_command_buffer_update_mode={mode}"
        try:
            figures = run.child("replaying.py", "--size", size, timeout_s=150, xla_flags=flag)
        except ChildError as error:
            figures = [f"left out: {error}"]
        yield [size, f"update mode {mode}", *figures]


def first_runs(lab: Lab) -> Rows:
    """Milliseconds of each of the first runs: which one records?"""
    step = bucketed_step(1, FULL)
    lab.compile(step, 1)
    loop = Steps(step, lab.params, lab.state(1))
    for _ in range(6):
        loop.time(1)
    for number, ms in enumerate(loop.step_ms, 1):
        yield [lab.size, f"run {number}", ms]


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
    for name, ms in taken.items():
        yield [lab.size, f"{name} capture", statistics.median(ms)]


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
    step = bucketed_step(1, FULL)
    lab.compile(step, 1)
    loop = lab.warm(step, 1)
    for _ in range(7):
        loop.time(STEPS)
    print(json.dumps(_figures(loop, step)), flush=True)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    # Not `sys.exit`: with SKIP_TEMP or SKIP_PROFILED, XLA has been seen to hang as it ends.
    os._exit(main())
