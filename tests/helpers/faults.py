"""What goes wrong when a test says so: clocks, callbacks that raise, captures that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, CUDAGraphRegistry, bucket_jit
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.graphs.route import Routes
from tests.helpers.functions import GRID

NO_MEMORY = "RESOURCE_EXHAUSTED: out of memory"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def managed(
    config: CUDAGraphConfig = GRID,
    *,
    clock: Callable[[], float] | None = None,
    evicts: bool = False,
    registry: CUDAGraphRegistry | None = None,
) -> CUDAGraphManager:
    """A manager with a clock, a backend and a registry of the test's choice."""
    manager = CUDAGraphManager(config)
    if registry is not None:
        manager.registry = registry
    capturer = Capturer(
        manager.registry, clock=Clock() if clock is None else clock, captures_evict=lambda: evicts
    )
    manager.dispatcher = Dispatcher(manager.registry, capturer=capturer)
    return manager


def through_host(trouble: list[str]) -> Callable[..., Any]:
    """A function that doubles; compiled, it asks the host, which raises while there is trouble."""

    def on_host(x):
        if trouble:
            raise RuntimeError(trouble[0])
        return np.asarray(x) * 2

    def doubled(x):
        if isinstance(x, jax.core.Tracer):
            return jax.pure_callback(on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return x * 2

    return doubled


class Held:
    """A function that doubles, and waits for `go` whenever it is traced."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()

    def __call__(self, x):
        if isinstance(x, jax.core.Tracer):
            self.entered.set()
            assert self.go.wait(60)
        return x * 2


class Told(Routes):
    """Routes that tell when they are forgotten, as they are when the mode changes."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell: Callable[[], None] | None = None
        super().__init__()
        self._tell = tell

    def forget_routes(self) -> None:
        super().forget_routes()
        if self._tell is not None:
            self._tell()


class Interrupted(CUDAGraphRegistry):
    """A registry in which something happens while the entry of a call is looked up.

    Attributes:
        lookups: How often that was.
        after: At which look-up from now on `happen` is called; -1: never.
        happen: What happens.
    """

    def __init__(self, config: CUDAGraphConfig) -> None:
        super().__init__(config)
        self.lookups = 0
        self.after = -1
        self.happen: Callable[[], object] = lambda: None

    def find(self, bucket, variant):
        found = super().find(bucket, variant)
        self.lookups += 1
        self.after -= 1
        if self.after == -1:
            self.happen()
        return found


def by_bucket_jit(manager: CUDAGraphManager, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through `bucket_jit`."""
    return bucket_jit(function, in_axes=("batch seq",), manager=manager)


def by_execute(manager: CUDAGraphManager, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through `execute_or_capture`."""
    return lambda x: manager.execute_or_capture(x.shape[0], x.shape[1], function, x)


def busy(manager: CUDAGraphManager) -> threading.Event:
    """Keeps the worker of the background busy until the event is set."""
    begun, go = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait(60)

    manager.dispatcher.capturer.background.submit("busy", work)
    assert begun.wait(60)
    return go
