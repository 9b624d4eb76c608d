"""One process that serves an application until it is told to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.applications import Starlette

from cudagraph_jax._base.checks import names_nearest, waiting_time
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.server.connection import Connection
from cudagraph_jax.server.readiness import Readiness

logger = logging.getLogger("cudagraph_jax.server")

_BACKLOG = 2048
_SAME_SIGNAL_S = 1.0
_KEEP_ALIVE_S = 65
"""Load balancers let a connection rest for 60 s: where that is longer, they use one that ended."""


@names_nearest
def run(
    app: Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    listener: socket.socket | None = None,
    drain_delay_s: float = 0.0,
    drain_s: float = 35.0,
) -> None:
    """Serves what `embeddings_app` made until SIGTERM or SIGINT, then drains and returns.

    At the first signal `/ready` says 503. After `drain_delay_s`, in which load balancers take
    notice and requests are answered as before, no connection is accepted any more, what was
    accepted is answered, and whatever is not after `drain_s` is cut off. A second signal, a second
    later or more, ends it at once. Call it in the main thread.

    Args:
        app: The application.
        host: Where to listen.
        port: The same; 0: any that is free, which the logger `cudagraph_jax.server` tells.
        listener: A socket that listens already, instead of both.
        drain_delay_s: Seconds between `/ready` and the end of new connections.
        drain_s: Seconds for the answers; more than a request's own time, or some are cut off.

    Raises:
        CUDAGraphError: The warm-up failed; the address is taken.
        ConfigError: An argument is not valid.
    """
    readiness = getattr(getattr(app, "state", None), "readiness", None)
    if not isinstance(readiness, Readiness):
        raise ConfigError(f"app={app!r:.60} is no application that embeddings_app made")
    delay_s = waiting_time("drain_delay_s", drain_delay_s)
    drain_s = waiting_time("drain_s", drain_s)
    allow_many_connections()
    listener = listen(host, port) if listener is None else listener
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # the application has one
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(drain_s) + 1,
        backlog=_BACKLOG,
    )
    server = _DrainingServer(config, readiness, delay_s=delay_s)
    with listener:
        server.run([listener])
    if readiness.failure is not None:
        raise CUDAGraphError(f"the warm-up failed: {readiness.failure}") from readiness.failure


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        CUDAGraphError: The address cannot be had.
        ConfigError: There is none.
    """
    if not host:
        raise ConfigError("host='' is no address: give '0.0.0.0' for all of this machine")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server(
            (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=False
        )
    except (OSError, OverflowError) as error:
        raise CUDAGraphError(
            f"cannot listen on host={host!r}, port={port}: {error}. Give another"
        ) from error
    port = listener.getsockname()[1]  # another than 0
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    return listener


def allow_many_connections() -> None:
    """Raises the limit of open files to what the system allows; most begin with 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _DrainingServer(uvicorn.Server):
    """Ends in two steps, and by a signal that it was sent as if it had ended of itself.

    Args:
        config: As uvicorn has it.
        readiness: What it tells of.
        delay_s: Between the two steps.
    """

    def __init__(self, config: uvicorn.Config, readiness: Readiness, *, delay_s: float) -> None:
        super().__init__(config)
        self._readiness, self._delay_s = readiness, delay_s
        self._left_at = 0.0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends by signals, which uvicorn would send itself once more when it has ended."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for each in signals:
            loop.add_signal_handler(each, self._leave)
        watching = loop.create_task(self._watch_warm_up())
        try:
            yield
        finally:
            watching.cancel()
            for each in signals:
                loop.remove_signal_handler(each)

    def _leave(self) -> None:
        loop = asyncio.get_running_loop()
        if self._readiness.is_leaving:
            # A supervisor and whoever told it may send one signal twice.
            if loop.time() > self._left_at + _SAME_SIGNAL_S:
                self.force_exit = self.should_exit = True
            return
        logger.info("draining")
        self._readiness.is_leaving, self._left_at = True, loop.time()
        loop.call_later(self._delay_s, self._drain)

    def _drain(self) -> None:
        self._readiness.is_draining = self.should_exit = True

    async def _watch_warm_up(self) -> None:
        """Ends a server that will never be ready; has the collector leave alone what is warm."""
        await asyncio.to_thread(self._readiness.settled.wait)
        if self._readiness.failure is not None:
            self.should_exit = True
            return
        # What a warm-up leaves lives as long as the process: a full collection takes 0.1 s of it.
        gc.collect()
        gc.freeze()
