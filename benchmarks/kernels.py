"""Where a step's device time goes, by kernel, as JAX's profiler shows it."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

# What XLA numbers: the same kernel of every layer.
_NUMBER = re.compile(r"([._]\d+)+$")


def device_us(run: Callable[[], object]) -> Counter[str]:
    """Microseconds that kernels take on the device while `run` runs, by kernel.

    Empty on a CPU, which has no device plane in the profile.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib 0.12's own types
            return _summed(Path(directory))


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
