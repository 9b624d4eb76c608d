"""What has a report: its statistics, configuration and surroundings at one moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.dispatch.planned import Planned
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.report.shown import ShownByStats
from cudagraph_jax.xla.environment import environment

if TYPE_CHECKING:
    from cudagraph_jax.report.replay_profile import ReplayProfile
    from cudagraph_jax.report.report import Report


class Reported(Planned, ShownByStats):
    """The part of a manager that shows what it knows.

    Attributes:
        registry: The captured buckets.
        dispatcher: What serves the calls.
    """

    registry: CUDAGraphRegistry
    dispatcher: Dispatcher

    def report(self, path: str | os.PathLike[str] | None = None) -> Report:
        """Everything that is known at this moment, to print, to look at and to keep.

        `print(manager.report())` shows it as text, a notebook shows it with heat maps, and
        `manager.report("cache.html")` also writes it as a page of its own. What is rendered is a
        snapshot: no lock is held, and no call waits.

        Args:
            path: An HTML file to write, whole or not at all; one that is there is replaced. Its
                folder must exist. The page loads nothing from elsewhere and runs no script.

        Raises:
            ConfigError: `path` is no path.
            OSError: The file cannot be written, as a `CUDAGraphError` that says why.
        """
        from cudagraph_jax.report.report import Report

        names = {entry.variant.name for entry in self.registry.entries()}
        report = Report(
            name=", ".join(sorted(names)) or "no function yet",
            made_at=datetime.now().astimezone(),
            stats=self.stats(),
            config=_config(self.registry),
            environment=environment(backend_started=self.registry.capture_count > 0),
            sizes=self.sizes(),
            failures=[
                (str(bucket), str(variant), str(error))
                for bucket, variant, error in self.dispatcher.capturer.failures.snapshot()
            ],
        )
        if path is not None:
            report.save(path)
        return report

    def profile_replays(self, run: Callable[[], object]) -> ReplayProfile:
        """What XLA's command buffers do while `run` runs: executed, updated, recorded.

        A hot loop must show executions alone. An argument that lies elsewhere each time has its
        command buffer updated; the profile says which ones moved. Afterwards `stats()` calls those
        buckets `"replaying"` that were seen to, until something else is captured.

        XLA runs no command buffers while it is profiled, unless the buckets were captured with
        `compiler_options={"xla_enable_command_buffers_during_profiling": "True"}`. Replays from
        all threads count; they are slower meanwhile, the more the more arguments there are.

        Args:
            run: Called once; let it wait for its last result. A server may pass
                `lambda: time.sleep(5)`.

        Raises:
            ConfigError: `run` cannot be called.
            CUDAGraphError: A profile is running already.
        """
        from cudagraph_jax.dispatch.profiling import profile_replays

        if not callable(run):
            raise ConfigError(f"run={run!r:.60} cannot be called: pass a function that replays")
        return profile_replays(self.registry, run)


def _config(registry: CUDAGraphRegistry) -> CUDAGraphConfig:
    """The configuration, with the store that is used, however it was given."""
    if registry.shelf is None:
        return registry.config
    return replace(registry.config, store=str(registry.shelf.store.path))
