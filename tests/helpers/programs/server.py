"""A server that starts on a store, in a process of its own; prints what it found as JSON.

python -m tests.helpers.programs.server DIRECTORY [--function NAME] [--fingerprint TEXT]
    [--jax-cache DIRECTORY] [--limit-bytes N] [--patience SECONDS] [--no-store] [--dies-at N]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, GraphStore, bucket_jit
from cudagraph_jax.store import Files
from tests.helpers.processes import ROOT, run_script

_NAME = "tests.helpers.programs.server"
CONFIG = CUDAGraphConfig(
    capture_sizes=(2, 4), capture_seq_lens=(4, 8), warmup_iterations=1, on_overflow="error"
)
BUCKETS = len(CONFIG.buckets())
X = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def scaled(x):
    """A function of XLA's own operations."""
    return jnp.tanh(x @ jnp.ones((x.shape[1], 3), x.dtype)[:, :1] * 0 + x) * 2


def inverted(x):
    """A function that calls LAPACK."""
    square = jnp.eye(3, dtype=x.dtype)[None] * 2 + jnp.zeros((x.shape[0], 1, 1), x.dtype)
    _, _, vectors = jnp.linalg.svd(square)
    return x * jnp.linalg.inv(square)[:, 0, :1] * jnp.abs(vectors[:, 0, :1])


FUNCTIONS = {"scaled": scaled, "inverted": inverted}


class Dies(Files):
    """System calls that change a store; the process is killed instead of the nth, if any."""

    def __init__(self, step: int) -> None:
        self.left = step

    def _count(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def write(self, file: int, data: bytes | memoryview) -> int:
        self._count()
        return super().write(file, data)

    def sync(self, file: int) -> None:
        self._count()
        super().sync(file)

    def rename(self, old: str, new: str, *, directory: int) -> None:
        self._count()
        super().rename(old, new, directory=directory)


def start(
    directory: Path, *options: str, check: bool = True, executable: str | None = None
) -> dict[str, Any]:
    """What a server found that was started on `directory`."""
    if executable is None:
        done = run_script(f"from {_NAME} import main; main()", directory, *options)
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        server = started(directory, *options, executable=executable)
        out, err = server.communicate(timeout=120)
        status = server.returncode
    if check and status:
        raise AssertionError(f"exit status {status}: {err[-2000:]}")
    return {"status": status, "stderr": err, **(json.loads(out) if out else {})}


def start_together(number: int, directory: Path, *options: str) -> list[dict[str, Any]]:
    """What servers found that were started on `directory` at once."""
    done = run_script(f"from {_NAME} import fork; fork({number})", directory, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def fork(number: int) -> None:
    """Becomes so many servers, each in a process of its own, and waits for them."""
    servers = []
    for _ in range(number):
        if (server := os.fork()) == 0:
            return main()
        servers.append(server)
    statuses = [os.waitpid(server, 0)[1] for server in servers]
    sys.exit(any(statuses))


def started(
    directory: Path, *options: str, executable: str = sys.executable
) -> subprocess.Popen[str]:
    """A server that is starting on `directory`, in an interpreter of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if executable != sys.executable:
        environment.pop("XLA_FLAGS", None)  # another version refuses to start with one it lacks
    return subprocess.Popen(
        [executable, "-m", _NAME, str(directory), *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def main() -> None:
    """Starts, answers one call, and prints what became of each bucket."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--function", default="scaled")
    parser.add_argument("--fingerprint")
    parser.add_argument("--jax-cache")
    parser.add_argument("--limit-bytes", type=int)
    parser.add_argument("--patience", type=float, default=120)
    parser.add_argument("--no-store", action="store_true")
    parser.add_argument("--dies-at", type=int, default=-1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.jax_cache:
        jax.config.update("jax_compilation_cache_dir", options.jax_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    store = None
    if not options.no_store:
        files = Dies(options.dies_at)
        store = GraphStore(options.directory, patience_s=options.patience, files=files)
    if options.limit_bytes is not None:
        jax.devices()  # before, since what starts an accelerator may write files of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.limit_bytes, options.limit_bytes))
    function = FUNCTIONS[options.function]
    served = bucket_jit(
        function,
        in_axes=("batch seq",),
        manager=CUDAGraphManager(CONFIG, store=store),
        fingerprint=options.fingerprint,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = served.warmup(X, progress=False)
        served.seal()
        answer = served(X)
    found = {
        "captured": report.captured,
        "loaded": report.loaded,
        "failed": len(report.failed),
        "total_ms": report.total_ms,
        "is_right": bool(np.allclose(answer, function(X), atol=1e-5)),
        "warnings": [str(warning.message) for warning in told],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
