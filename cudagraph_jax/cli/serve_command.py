"""`cudagraph-jax serve`."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cudagraph_jax.cli.options import positive, seconds
from cudagraph_jax.cli.store.opening import add_store, kept_store
from cudagraph_jax.errors import ConfigError, CUDAGraphError

if TYPE_CHECKING:
    from cudagraph_jax.cli.options import Commands
    from cudagraph_jax.config import CUDAGraphConfig

_LONGEST_KEY = 4096
_TELL_EVERY_S = 2.0
_MAX_GRAPHS = 36


def add_to(commands: Commands) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible embeddings server",
        description=(
            "Serves the embeddings of a sentence-transformers model of the BERT family as OpenAI's "
            "API does. Listens at once, answers when it is warm (GET /ready), and ends at SIGTERM "
            "when what it accepted is answered. A line of JSON for each request goes to the "
            "standard output."
        ),
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="the model's folder (default: the demo's model)"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="what clients call it (default: the folder's name)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=_port, default=8000, help="the same; 0: any (default: %(default)s)"
    )
    add_store(parser, use="a restarted server loads them and compiles nothing")
    parser.add_argument(
        "--plan",
        metavar="TRACE",
        help=(
            "fit the buckets to the texts of a trace: .csv or .jsonl with their lengths in tokens "
            "in a column 'tokens'"
        ),
    )
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    _add_limits(parser)
    parser.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=_run, says="cudagraph-jax serve")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="the key that clients must send"
    )
    parser.add_argument(
        "--max-waiting",
        type=positive,
        default=2048,
        metavar="N",
        help="texts that may wait; more are refused with 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="in which a request is answered or refused (default: %(default)g)",
    )
    parser.add_argument(
        "--no-truncate",
        action="store_true",
        help="refuse texts beyond the model's limit, instead of cutting off their end",
    )
    parser.add_argument(
        "--drain-delay",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="from SIGTERM until no connection is accepted; /ready is 503 (default: %(default)g)",
    )


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 <= (number := int(text[:6])) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, a number from 0 to 65535")
    return number


def _run(options: argparse.Namespace) -> int:
    # Only this command needs JAX to be started, and packages that it alone has.
    try:
        from cudagraph_jax.server.process import listen
        from cudagraph_jax.server.workers import end_with_parent
    except ImportError as error:
        raise CUDAGraphError(str(error)) from None

    _set_up_logs(is_worker=options.listener is not None)
    # Until the server has a handler of its own; as the first process of a container it has none.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    if options.listener is not None:  # one of several workers
        end_with_parent()
        _serve(options, socket.socket(fileno=options.listener))
        return 0
    _refuse_pipes(options)
    with listen(options.host, options.port) as listener:
        return _listening(options, listener)


def _refuse_pipes(options: argparse.Namespace) -> None:
    """Refuses a key that several workers would read, of whom one alone gets it."""
    if options.workers == 1:
        return
    for name, path in (("--api-key-file", options.api_key_file), ("--key-file", options.key_file)):
        if path is not None and path.exists() and not path.is_file():
            raise ConfigError(
                f"{name} {path} is read by each of --workers {options.workers}: give a file, not a "
                "pipe"
            )


def _listening(options: argparse.Namespace, listener: socket.socket) -> int:
    """Serves, here or by several workers; the exit status."""
    from cudagraph_jax.server.workers import supervise

    if options.workers == 1:
        _serve(options, listener)
        return 0
    command = [sys.executable, "-m", "cudagraph_jax", *options.argv, "--listener"]
    return supervise(command, workers=options.workers, listener=listener)


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    from cudagraph_jax.demo import Encoder
    from cudagraph_jax.server import Limits, embeddings_app, run

    limits = Limits(
        max_waiting=options.max_waiting,
        timeout_s=options.timeout,
        truncate=not options.no_truncate,
    )
    key = _key(options.api_key_file)
    config = None if options.plan is None else _planned(options.plan, options.model)
    store = kept_store(options)
    encoder = Encoder(config, model=options.model, store=store, max_waiting=options.max_waiting)
    app = embeddings_app(
        encoder,
        model=encoder.name if options.name is None else options.name,
        api_key=key,
        limits=limits,
        progress=_Progress(),
    )
    if options.listener is not None:
        # Workers share a socket: one that is cold would take requests that a warm one answers.
        encoder.warmup(progress=_Progress())
        encoder.function.seal()
    run(
        app,
        listener=listener,
        drain_delay_s=options.drain_delay,
        drain_s=options.timeout + 5,
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is answered, and the status is 0


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        with path.open(encoding="utf-8") as file:
            key = file.read(_LONGEST_KEY + 1).strip()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or NUL in a name
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--api-key-file {path} cannot be read: {why}") from error
    if not 0 < len(key) <= _LONGEST_KEY or not key.isprintable() or not key.isascii():
        raise ConfigError(
            f"--api-key-file {path} holds no key: write one line of up to {_LONGEST_KEY} ASCII "
            "characters"
        )
    return key


def _planned(trace: str, model: Path | None) -> CUDAGraphConfig:
    """The grid for the texts of a trace; those beyond the model's limit lose their end."""
    from dataclasses import replace

    import numpy as np

    from cudagraph_jax import plan_for_batcher
    from cudagraph_jax.cli.trace import read_sizes
    from cudagraph_jax.config import CUDAGraphConfig
    from cudagraph_jax.demo.bert.model_folder import find_model, read_folder
    from cudagraph_jax.demo.encoder import default_config

    limit = (find_model() if model is None else read_folder(model)).max_tokens
    lengths = np.minimum(read_sizes(trace, ["tokens"]), limit)
    plan = plan_for_batcher(lengths, max_graphs=_MAX_GRAPHS, headroom=limit)
    planned = CUDAGraphConfig.from_plan(plan)
    return replace(planned, warmup_iterations=default_config().warmup_iterations)


def _set_up_logs(*, is_worker: bool) -> None:
    """Requests as JSON to the standard output; what the server does, to the standard error.

    Args:
        is_worker: Whether lines name the process, by the number that its end is told with.
    """
    line = "%(asctime)s %(levelname)s %(message)s"
    if is_worker:
        line = line.replace("%(message)s", "worker %(process)d: %(message)s")
    access = logging.getLogger("cudagraph_jax.access")
    access.addHandler(_plain(sys.stdout, "%(message)s"))
    access.propagate = False
    access.setLevel(logging.INFO)
    logging.getLogger().addHandler(_plain(sys.stderr, line))
    logging.getLogger("cudagraph_jax.server").setLevel(logging.INFO)


def _plain(stream: Any, text: str) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(text))
    return handler


class _Progress:
    """Shows the warm-up: one line that changes on a terminal, else one every two seconds."""

    def __init__(self) -> None:
        self._told_at = 0.0

    def __call__(self, done: int, total: int, step: object) -> None:
        """Shows one step."""
        line = f"warming up: {done} of {total}, {step}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{line}\x1b[K" + "\n" * (done == total))
            sys.stderr.flush()
        elif done == total or time.monotonic() > self._told_at + _TELL_EVERY_S:
            self._told_at = time.monotonic()
            logging.getLogger("cudagraph_jax.server").info(line)
