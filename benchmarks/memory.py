"""Resident memory, and how much of it JAX itself keeps for programs that are gone."""

from __future__ import annotations

import gc
from pathlib import Path

import jax
import numpy as np


def resident_mb() -> float:
    """Resident memory of this process, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def kept_by_jax_mb(programs: int) -> float:
    """What this process grows by when JAX alone compiles, runs and drops so many programs, in MiB.

    Args:
        programs: How many; each has a shape of its own, and is one addition.
    """
    before = resident_mb()
    for size in range(1, programs + 1):
        x = np.ones((3, size), np.float32)
        jax.jit(lambda x: x + 1).lower(x).compile()(x)
    gc.collect()
    return resident_mb() - before
