"""What may be done from when to when: modes, sealing, closing, and starting anew."""

from __future__ import annotations

from typing import Self

from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.dispatch.dispatcher import Dispatcher
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.modes import CUDAGraphMode


class Lifecycle:
    """The part of a manager that says what it may do.

    Attributes:
        registry: The captured buckets.
        dispatcher: What serves the calls.
    """

    registry: CUDAGraphRegistry
    dispatcher: Dispatcher

    @property
    def config(self) -> CUDAGraphConfig:
        """Limits and policies; `replan` changes the grid."""
        return self.registry.config

    @property
    def mode(self) -> CUDAGraphMode:
        """The most that is done with a call; setting it takes effect for the next call."""
        return self.dispatcher.mode

    @mode.setter
    def mode(self, mode: CUDAGraphMode) -> None:
        if not isinstance(mode, CUDAGraphMode):
            raise ConfigError(f"mode={mode!r} is no CUDAGraphMode: use one of its members")
        if not self.config.enabled and mode is not CUDAGraphMode.DISABLED:
            raise ConfigError(
                f"mode={mode.name} cannot be set while the config has enabled=False: "
                "make a manager with an enabled config"
            )
        self.dispatcher.capturer.gate.mode = mode
        self.registry.changed()

    def is_enabled(self) -> bool:
        """False when the config is disabled or the mode is DISABLED."""
        return self.mode is not CUDAGraphMode.DISABLED

    def seal(self) -> None:
        """Captures nothing from now on: the mode becomes REPLAY.

        What is under way or queued in the background is captured first. Then every bucket is run
        once where a new capture throws recorded graphs away, so that none is stale. Called from
        within a warm-up or a capture, as by a callback of one, it does not wait for that one.
        """
        self.mode = CUDAGraphMode.REPLAY
        capturer = self.dispatcher.capturer
        capturer.gate.settle(is_waited_for=capturer.background.runs_here())
        self.wait()
        self.dispatcher.capturer.record_again()

    def wait(self) -> None:
        """Waits until every capture that is queued in the background has ended."""
        self.dispatcher.capturer.background.drain()

    def close(self) -> None:
        """Ends the background worker; what waits is dropped, and calls are served on."""
        self.dispatcher.capturer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self) -> None:
        """Drops all buckets, counts and remembered failures; the mode stays."""
        # What waits goes first, so that none of it begins between the two.
        self.dispatcher.capturer.reset()
        self.registry.reset()
        self.dispatcher.outcomes.clear()
