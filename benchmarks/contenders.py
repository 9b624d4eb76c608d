"""What benchmarks/serve.py measures: how a server is installed, started, watched and ended."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cudagraph_jax.demo.bert.model_folder import find_model

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
MODEL, OURS = "all-MiniLM-L6-v2", "ours"
START_S, END_S = 300.0, 20.0
SENTENCE_TRANSFORMERS = ("torch==2.13.0+cpu", "sentence-transformers==6.2.0")


class Place(NamedTuple):
    """What a command is made of.

    Attributes:
        python: The interpreter of the contender's environment.
        model: The model's folder.
        port: Where it shall listen, on 127.0.0.1.
        cache: A folder that stays.
    """

    python: Path
    model: Path
    port: int
    cache: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A server.

    Attributes:
        command: Starts it.
        env: The name of its environment; None: the one that runs this.
        requirements: What is installed there.
        prepare: Makes what it needs beside that, once, in its environment.
        ready: This path answers with 200 once it serves.
    """

    command: Callable[[Place], Sequence[object]]
    env: str | None = None
    requirements: tuple[str, ...] = ()
    prepare: Callable[[Place], None] = lambda place: None
    ready: str = "/health"


def our_server(place: Place) -> Sequence[object]:
    """This library's server."""
    flags = ("--port", place.port, "--store", place.cache / "store")
    return (place.python, "-m", "cudagraph_jax", "serve", *flags)


def script(name: str, *settings: object) -> Callable[[Place], Sequence[object]]:
    """A server of `benchmarks/peers/`."""

    def command(place: Place) -> Sequence[object]:
        flags = ("--model", place.model, "--port", place.port)
        return (place.python, PEERS / name, *flags, *settings)

    return command


def infinity(*settings: object, onnx: bool = False) -> Callable[[Place], Sequence[object]]:
    """infinity's own server."""

    def command(place: Place) -> Sequence[object]:
        # Of an ONNX model infinity gives optimum a path that holds only in the model's own folder.
        start = ("env", "-C", place.cache / "onnx") if onnx else ()
        flags = ("--model-id", "." if onnx else place.model, "--served-model-name", MODEL)
        address = ("--host", "127.0.0.1", "--port", place.port, "--url-prefix", "/v1")
        server = (place.python.parent / "infinity_emb", "v2", "--device", "cpu")
        return (*start, *server, *flags, *address, *settings)

    return command


def export_onnx(place: Place) -> None:
    """The model for ONNX Runtime, made once by optimum."""
    folder, draft = place.cache / "onnx", place.cache / "onnx.draft"
    if folder.exists():
        return
    cli = (place.python.parent / "optimum-cli", "export", "onnx", "--model", place.model)
    # infinity's own optimizing asks for an option that this optimum no longer has.
    flags = ("--task", "feature-extraction", "--library", "transformers", "--optimize", "O2")
    run(*cli, *flags, draft)
    # infinity cuts texts there, and would compute up to 512 tokens where all others stop at 256.
    config = json.loads((draft / "config.json").read_text())
    limit = json.loads((place.model / "sentence_bert_config.json").read_text())["max_seq_length"]
    (draft / "config.json").write_text(json.dumps(config | {"max_position_embeddings": limit}))
    draft.rename(folder)


# infinity-emb needs numpy < 2, which pyarrow (of `datasets`, of optimum) has left behind. Its two
# engines need different versions of optimum: 2.0 took BetterTransformer out, and before that no
# export to ONNX knows this torch.
INFINITY = (
    "torch==2.13.0+cpu",
    "infinity-emb[server,torch,optimum]==0.0.78",
    "numpy<2",
    "pyarrow<22",
    "onnx",
)
CONTENDERS = {
    OURS: Contender(command=our_server, ready="/ready"),
    "litserve": Contender(
        command=script("behind_litserve.py"),
        env="litserve",
        requirements=(*SENTENCE_TRANSFORMERS, "litserve==0.2.19"),
    ),
    "infinity": Contender(
        command=infinity("--engine", "torch"),
        env="infinity",
        requirements=(*INFINITY, "optimum<2", "transformers<4.49"),
    ),
    "infinity-onnx": Contender(
        command=infinity(
            *("--engine", "optimum", "--pooling-method", "mean", "--onnx-disable-optimize"),
            onnx=True,
        ),
        env="infinity-onnx",
        requirements=(*INFINITY, "optimum==2.1.0"),
        prepare=export_onnx,
    ),
    "ray": Contender(
        command=script("behind_ray.py"),
        env="ray",
        requirements=(*SENTENCE_TRANSFORMERS, "ray[serve]==2.60.0"),
        ready="/",
    ),
    "starlette": Contender(
        command=script("behind_starlette.py"),
        env="starlette",
        requirements=(*SENTENCE_TRANSFORMERS, "starlette", "uvicorn[standard]"),
    ),
}


class UnavailableError(Exception):
    """A contender cannot take part; says why."""


def environment(cache: Path) -> dict[str, str]:
    """Variables of the contenders: nobody asks a hub, or tells anybody anything."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hf"),
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(),
    }


def run(*command: object) -> None:
    """Runs a command to its end.

    Raises:
        UnavailableError: It failed.
    """
    arguments = list(map(str, command))
    ended = subprocess.run(arguments, check=False, capture_output=True, text=True)
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise UnavailableError(f"{Path(arguments[0]).name}: {said[-1]}")


def installed(contender: Contender, cache: Path) -> Path:
    """The interpreter of a contender's environment, which is made where it is not there.

    Raises:
        UnavailableError: pip cannot install it.
    """
    if contender.env is None:
        return Path(sys.executable)
    folder = cache / contender.env
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(contender.requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {contender.env} into {folder} (once; minutes)", file=sys.stderr)
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(python, "-m", "pip", "install", "--quiet", *contender.requirements)
        stamp.write_text(wanted)
    return python


class Process(NamedTuple):
    """A process of the machine: what its `stat` says."""

    pid: int
    session: int
    cpu_s: float


def processes() -> Iterator[Process]:
    """Those that there are."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks = int(fields[11]) + int(fields[12])
        yield Process(int(path.parent.name), int(fields[3]), ticks / os.sysconf("SC_CLK_TCK"))


class Cores:
    """Cores that are taken by what is neither a server nor this process, since this was made.

    Args:
        session: The server's.
    """

    def __init__(self, session: int) -> None:
        self._session = session
        self._start, self._before = time.perf_counter(), self._others_s()

    def _others_s(self) -> float:
        line = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _idle, _waits, irq, softirq, steal = map(int, line[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        server = sum(each.cpu_s for each in processes() if each.session == self._session)
        return busy - server - time.process_time()

    def others(self) -> float:
        """How many, on average."""
        took = time.perf_counter() - self._start
        return max(0.0, (self._others_s() - self._before) / took)


class Server(NamedTuple):
    """A server that runs: its port on 127.0.0.1, and the session of its processes."""

    port: int
    session: int


@contextmanager
def serving(name: str, cache: Path) -> Iterator[Server]:
    """A server while it runs; behind it nothing of it is left.

    Args:
        name: Of the contender.
        cache: Where environments and other things that stay are kept.

    Raises:
        UnavailableError: It does not come up.
    """
    contender, model = CONTENDERS[name], find_model().weights.parent
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = Place(installed(contender, cache), model, port, cache)
    contender.prepare(place)
    log = cache / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, contender.command(place))),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(cache),
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}{contender.ready}", log)
        yield Server(port, process.pid)
    finally:
        end(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Returns when the URL answers with 200.

    Raises:
        UnavailableError: The server ended, or takes too long.
    """
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UnavailableError(f"ended with {process.returncode}: {last[-1]} (see {log})")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise UnavailableError(f"not ready after {START_S:.0f} s (see {log})")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server, and what it started: all are of one session."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Its id stays taken while one of the session is there.
    for left in (each for each in processes() if each.session == process.pid):
        with suppress(ProcessLookupError):
            os.kill(left.pid, signal.SIGKILL)
