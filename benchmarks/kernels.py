"""Where a step's device time goes, by kernel, as JAX's profiler shows it."""

from __future__ import annotations

import re
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from decoding import STEPS, Lab
from parts import LeftOutError, Row, Rows, Run

HEADER = ("model", "kernel", "µs a step", "part of the step")
# What XLA numbers: the same kernel of every layer.
_NUMBER = re.compile(r"([._]\d+)+$")


def by_kernel(run: Run) -> Rows:
    """Where the time of a step at batch 1 without command buffers goes, and what is idle of it.

    Raises:
        LeftOutError: The profile shows no kernels, as on a CPU, or the time is over.
    """
    for lab in run.labs:
        run.begin(lab.size)
        yield from _of_step(lab, run.rounds)


def device_us(run: Callable[[], object]) -> Counter[str]:
    """Microseconds that kernels take on the device while `run` runs, by kernel.

    Empty where the profile has no device plane, as on a CPU.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib 0.12's own types
            return _summed(Path(directory))


def _of_step(lab: Lab, rounds: int) -> list[Row]:
    loop = lab.warm(lab.bucketed(1, "NONE"), 1)
    for _ in range(rounds):
        loop.time(STEPS)
    # From rounds without a profile, which slows down the host and not the kernels.
    wall = statistics.median(loop.step_ms) * 1e3
    taken = device_us(partial(loop.run, STEPS))
    if not taken:
        raise LeftOutError("the profile has no GPU plane with kernels")
    busy = taken.total() / STEPS
    rows: list[Row] = [
        [lab.size, name, us / STEPS, us / STEPS / wall] for name, us in taken.most_common(10)
    ]
    rows.append([lab.size, "all kernels", busy, busy / wall])
    rows.append([lab.size, "idle", wall - busy, 1 - busy / wall])
    return rows


def _summed(directory: Path) -> Counter[str]:
    taken: Counter[str] = Counter()
    for path in directory.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            # Other lines repeat the same time by operation or module.
            for line in (line for line in plane.lines if "Stream" in line.name):
                for event in line.events:
                    taken[_NUMBER.sub("", event.name)] += event.duration_ns / 1e3
    return taken
