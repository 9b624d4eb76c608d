"""Functions for tests of batchers: they double, and the host has a say in each call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cudagraph_jax import BucketedFunction, CUDAGraphConfig, bucket_jit

# One batch size, so that what shares a call does not depend on what was measured.
CONFIG = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=1)
BAD = -1.0


def row(value: float, length: int = 3) -> np.ndarray:
    return np.full(length, value, np.float32)


class Doubling:
    """A function that doubles; compiled, it asks the host, which waits or raises where told.

    Attributes:
        calls: The rows of each call, by their first element; padding is 0.
        entered: Set whenever a call computes.
        go: Calls wait for it.
    """

    def __init__(self, config: CUDAGraphConfig = CONFIG) -> None:
        self.calls: list[list[float]] = []
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.when_called: Callable[[np.ndarray], object] = lambda x: None
        self.function: BucketedFunction[..., Any] = bucket_jit(
            self._double, in_axes="batch seq", config=config, name="doubling"
        )
        self.function.warmup(row(1.0)[None], progress=False)
        self.calls.clear()
        self.entered.clear()

    def _double(self, x: jax.Array) -> Any:
        return jax.pure_callback(self._on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def _on_host(self, x: Any) -> np.ndarray:
        array = np.asarray(x)
        self.calls.append([first for first in array[:, 0].tolist() if first])
        self.entered.set()
        assert self.go.wait(60)
        self.when_called(array)
        if (array == BAD).any():
            raise RuntimeError("a bad row")
        return array * 2

    def hold(self) -> None:
        """Has the next calls wait."""
        self.entered.clear()
        self.go.clear()
