"""What a server pays around its replays on a GPU: warm-up, reload, throughput, memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from decoding import SCOPES, Lab, Steps, bucketed_step

import cudagraph_jax as cg
from cudagraph_jax.demo.corpus import numpy_passages
from cudagraph_jax.demo.encoder import BATCH_SIZES, SEQ_LENS, Encoder

Rows = list[list[object]]
HERE = Path(__file__).parent
# This process holds most of the GPU's memory.
CHILD = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.15"}
WARMUP_HEADER = ("workers", "seconds", "times as fast as one")
STORE_HEADER = ("how", "warm-up", "seconds", "tokens after 10 steps", "replays", "shown")
ENCODER_HEADER = ("scope", "warm-up, s", "passages a second")
MEMORY_HEADER = ("model", "scope", "MiB that recording takes", "MiB the compiler reports")


def warm_up() -> Rows:
    """The demo's grid of 25 buckets, compiled by one worker and by several.

    Each in a process of its own: what XLA's autotuning found in one would help the next.
    """
    seconds = {}
    for workers in ("1", "4", "16"):
        command = [sys.executable, str(HERE / "warmup.py"), "--rounds", "1", "--json"]
        done = subprocess.run(
            [*command, "--workers", workers],
            check=True,
            env=CHILD,
            stdout=subprocess.PIPE,
            text=True,
            timeout=200,
        )
        (seconds[workers],) = json.loads(done.stdout)[workers]
    return [[workers, taken, seconds["1"] / taken] for workers, taken in seconds.items()]


def store(lab: Lab) -> Rows:
    """A step that was stored and loaded: is its answer the same, and does it still replay?"""
    rows: Rows = []
    state = jax.eval_shape(partial(lab.state, 1))
    with tempfile.TemporaryDirectory() as directory:
        for how in ("compiled", "loaded"):
            options: dict[str, Any] = {"store": directory, "fingerprint": "gpu.py"}
            step = bucketed_step(1, cg.CommandBufferScope.FULL, **options)
            start = time.perf_counter()
            report = step.warmup(lab.params, *state, progress=False)
            seconds = time.perf_counter() - start
            loop = Steps(step, lab.params, lab.state(1))
            loop.run(10)
            tokens = np.asarray(loop.state[1]).tolist()
            (shown,) = step.manager.profile_replays(lambda loop=loop: loop.run(20)).buckets
            counts = f"{report.captured} captured, {report.loaded} loaded"
            rows.append([how, counts, seconds, str(tokens), shown.replays, shown.shown])
            step.manager.close()
    return rows


def encoder(*, rounds: int) -> Rows:
    """Passages a second of the demo's encoder without command buffers and with all of them."""
    texts = [passage.text for passage in numpy_passages(limit=300)]
    rows: Rows = []
    for name in ("NONE", "FULL"):
        config = cg.CUDAGraphConfig(
            capture_sizes=BATCH_SIZES, capture_seq_lens=SEQ_LENS, command_buffers=SCOPES[name]
        )
        served = Encoder(config)
        start = time.perf_counter()
        served.warmup(progress=False, workers=8)
        warm = time.perf_counter() - start
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            served.embed(texts)
            taken.append(time.perf_counter() - start)
        rows.append([name, warm, len(texts) / statistics.median(taken)])
    return rows


def memory(lab: Lab) -> Rows:
    """Memory outside of XLA's own pool that a step takes once it is recorded, by scope."""
    rows: Rows = []
    for name, scope in SCOPES.items():
        step = bucketed_step(1, scope)
        step.warmup(lab.params, *jax.eval_shape(partial(lab.state, 1)), progress=False)
        loop = Steps(step, lab.params, lab.state(1))
        before = _used_mib()
        loop.run(5)
        after = _used_mib()
        grown = "not reported" if before is None or after is None else f"{after - before:,}"
        reported = step.registry.entries()[0].memory_bytes or 0
        rows.append([lab.size, name, grown, reported / 2**20])
    return rows


def _used_mib() -> int | None:
    """Of the first GPU, all processes together; a graph lies outside of what JAX counts."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
