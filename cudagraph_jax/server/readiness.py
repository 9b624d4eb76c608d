"""Whether a server answers requests: it warms up, is ready, and drains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from cudagraph_jax._base.log import logger
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.server.request_error import RequestError
from cudagraph_jax.server.text_queue import TextEncoder

Progress = Callable[[int, int, Any], object]

_RETRY_S = 1.0


class _EndedError(Exception):
    """The server ends before it is warm."""


class Readiness:
    """What `/ready` says, and why requests are refused meanwhile.

    Args:
        encoder: What is warmed up.
        progress: Told of each step of the warm-up: how many are done, of how many, and which.

    Attributes:
        is_leaving: Whether load balancers should send no more; requests are answered still.
        is_draining: Whether new requests are refused.
        failure: What the warm-up failed with.
        settled: Set once the server is warm, or will never be.
    """

    def __init__(self, encoder: TextEncoder, *, progress: Progress | None) -> None:
        self._encoder, self._progress = encoder, progress
        self.settled = threading.Event()
        self.begin()
        self._step = "not begun; the ASGI server has to run the application's lifespan"

    def begin(self) -> None:
        """Begins anew, as with each start of the application."""
        self._step = "begins"
        self.is_leaving = False
        self.is_draining = False
        self.failure: Exception | None = None
        self.settled.clear()

    @property
    def is_warm(self) -> bool:
        """Whether nothing compiles in a request: the function is sealed, or runs eagerly."""
        return self._encoder.function.manager.mode is not CUDAGraphMode.CAPTURE

    def obstacle(self) -> str | None:
        """Why a load balancer should send nothing; None where all is well."""
        if self.is_leaving or self.is_draining:
            return "the server drains"
        return self._coldness()

    def check(self) -> None:
        """Raises where a request cannot be answered.

        Raises:
            RequestError: 503, and when to try again.
        """
        if self.is_draining:
            what, code = "the server drains: try another", "draining"
        elif (coldness := self._coldness()) is not None:
            what, code = coldness, "not_ready"
        else:
            return
        raise RequestError(503, what, code=code, retry_after_s=_RETRY_S)

    def _coldness(self) -> str | None:
        if self.failure is not None:
            return "the warm-up failed: the server's log says why"  # which may name files of its
        return None if self.is_warm else f"the server warms up: {self._step}"

    async def warm_up(self) -> None:
        """Captures the grid and seals it, in a thread."""
        try:
            await asyncio.to_thread(self._warm_up)
        except _EndedError:
            pass
        except Exception as error:
            self.failure = error
            logger.exception("the warm-up failed, and the server will not be ready")
        finally:
            self.settled.set()

    def _warm_up(self) -> None:
        if not self.is_warm:
            self._encoder.warmup(progress=self._tell)
            self._encoder.function.seal()
            registry = self._encoder.function.registry
            logger.getChild("server").info(
                "warm: %d buckets compiled, %d loaded", registry.capture_count, registry.load_count
            )

    def _tell(self, done: int, total: int, step: Any) -> None:
        self._step = f"{done} of {total} steps, {step}"
        if self._progress is not None:
            self._progress(done, total, step)
        if self.is_draining:
            raise _EndedError
