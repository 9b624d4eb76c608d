"""What command buffers are worth on a GPU: decode steps, warm-up, store, encoder, memory.

    python benchmarks/gpu.py [--sizes 0.5b 3b] [--only decode store]

Prints a table for each part, and writes benchmarks/results/gpu-<device>.json with versions and the
date. On a CPU there are no command buffers: `--sizes tiny` tries the benchmark itself, and nothing
is written. PyTorch's figures for the same model come from a peer that is not here yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before JAX is started: profiles are to show the command buffers.
_KEEP = "--xla_enable_command_buffers_during_profiling=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_KEEP}".strip()

import jax  # noqa: E402
import jaxlib  # noqa: E402
import numpy as np  # noqa: E402
from decoding import (  # noqa: E402
    SCOPES,
    Steps,
    bucketed_step,
    fresh_state,
    params_of,
    steppers,
    timed_prefill,
    timed_steps,
)
from warmup import warmup_seconds  # noqa: E402

import cudagraph_jax as cg  # noqa: E402
from cudagraph_jax.demo.corpus import numpy_passages  # noqa: E402
from cudagraph_jax.demo.encoder import BATCH_SIZES, SEQ_LENS, Encoder  # noqa: E402
from cudagraph_jax.tables import text_table  # noqa: E402

CONTEXT, PROMPT = 1024, 512
BATCHES = (1, 8, 64)
RESULTS = Path(__file__).parent / "results"

Rows = list[list[object]]


def decode(sizes: Sequence[str], rounds: int) -> tuple[tuple[str, ...], Rows]:
    """A decode step for each size and batch, and a prefill."""
    rows: Rows = []
    for size in sizes:
        params = params_of(size)
        for batch in BATCHES:
            contenders = steppers(size, params, batch, CONTEXT)
            found = timed_steps(contenders, rounds=rounds, steps=20)
            rows += [[size, f"decode, batch {batch}", *row] for row in found]
            del contenders
        prefill = timed_prefill(size, params, PROMPT, rounds=rounds)
        rows += [[size, f"prefill of {PROMPT}", *row, "", ""] for row in prefill]
    return ("model", "what", "by", "ms", "over jax.jit", "host µs"), rows


def evidence(sizes: Sequence[str], rounds: int) -> tuple[tuple[str, ...], Rows]:
    """What the command buffers of a hot decode loop do, and how much of the step they cover."""
    rows: Rows = []
    for size in sizes:
        params = params_of(size)
        for name, scope in SCOPES.items():
            step = bucketed_step(1, CONTEXT, scope)
            step.warmup(params, *fresh_state(size, 1, CONTEXT), progress=False)
            loop = Steps(step, params, fresh_state(size, 1, CONTEXT))
            loop.run(5)
            profile = step.manager.profile_replays(lambda loop=loop: loop.run(50))
            shown = profile.buckets[0]
            moved = ", ".join(argument.argument for argument in shown.moved[:3])
            (entry,) = step.registry.entries()
            inspected = entry.inspect().scopes
            coverage = inspected[0].coverage if inspected else None
            rows.append(
                [
                    size,
                    name,
                    "–" if coverage is None else f"{coverage:.1%}",
                    shown.replays,
                    shown.executed,
                    shown.updated,
                    shown.recorded,
                    shown.shown,
                    moved,
                ]
            )
    header = ("model", "scope", "recorded", "replays", "executed", "updated", "recorded then")
    return (*header, "shown", "moved"), rows


def host(sizes: Sequence[str], rounds: int) -> tuple[tuple[str, ...], Rows]:
    """Host time of a bucketed step over that of its executable, round by round."""
    rows: Rows = []
    for size in sizes:
        params = params_of(size)
        step = bucketed_step(1, CONTEXT, cg.CommandBufferScope.AUTO)
        step.warmup(params, *fresh_state(size, 1, CONTEXT), progress=False)
        (entry,) = step.registry.entries()
        raw, ours = (
            Steps(call, params, fresh_state(size, 1, CONTEXT))
            for call in (entry.executable.call, step)
        )
        for contender in (raw, ours):
            contender.run(5)
        for _ in range(rounds * 4):
            raw.time(10)
            ours.time(10)
        ratios = [a / b for a, b in zip(ours.host_us, raw.host_us, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append([size, statistics.median(raw.host_us), middle, low, high])
    return ("model", "raw host µs", "bucketed over raw", "lower quartile", "upper"), rows


def warm_up(sizes: Sequence[str], rounds: int) -> tuple[tuple[str, ...], Rows]:
    """The demo's grid of 25 buckets, compiled by one worker and by several."""
    taken = warmup_seconds(workers=(1, 4, 8), rounds=1)
    first = taken[1][0]
    rows: Rows = [[workers, times[0], first / times[0]] for workers, times in taken.items()]
    return ("workers", "seconds", "times as fast as one"), rows


def store(sizes: Sequence[str], rounds: int) -> tuple[tuple[str, ...], Rows]:
    """A step that was stored and loaded: is its answer the same, and does it still replay?"""
    rows: Rows = []
    size = sizes[0]
    params = params_of(size)
    with tempfile.TemporaryDirectory() as directory:
        for how in ("compiled", "loaded"):
            options = {"store": directory, "fingerprint": "gpu.py"}
            step = bucketed_step(1, CONTEXT, cg.CommandBufferScope.AUTO, **options)
            start = time.perf_counter()
            report = step.warmup(params, *fresh_state(size, 1, CONTEXT), progress=False)
            seconds = time.perf_counter() - start
            loop = Steps(step, params, fresh_state(size, 1, CONTEXT))
            loop.run(10)
            tokens = np.asarray(loop.state[1]).tolist()
            profile = step.manager.profile_replays(lambda loop=loop: loop.run(20))
            counts = f"{report.captured} captured, {report.loaded} loaded"
            rows.append([how, counts, seconds, str(tokens), profile.buckets[0].shown])
    return ("how", "warm-up", "seconds", "tokens after 10 steps", "shown"), rows


def encoder(sizes: Sequence[str], rounds: int) -> tuple[tuple[str, ...], Rows]:
    """Passages a second of the demo's encoder with each scope."""
    texts = [passage.text for passage in numpy_passages(limit=300)]
    rows: Rows = []
    for name, scope in SCOPES.items():
        config = cg.CUDAGraphConfig(
            capture_sizes=BATCH_SIZES, capture_seq_lens=SEQ_LENS, command_buffers=scope
        )
        served = Encoder(config)
        served.warmup(progress=False)
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            served.embed(texts)
            taken.append(time.perf_counter() - start)
        rows.append([name, len(texts) / statistics.median(taken)])
    return ("scope", "passages a second"), rows


def memory(sizes: Sequence[str], rounds: int) -> tuple[tuple[str, ...], Rows]:
    """Device memory that a captured and recorded step takes, by scope."""
    rows: Rows = []
    for size in sizes:
        params = params_of(size)
        for name, scope in SCOPES.items():
            before = _bytes_in_use()
            step = bucketed_step(8, CONTEXT, scope)
            step.warmup(params, *fresh_state(size, 8, CONTEXT), progress=False)
            after = _bytes_in_use()
            grown = "not reported" if before is None or after is None else f"{after - before:,}"
            rows.append([size, name, grown, step.registry.entries()[0].memory_bytes])
    return ("model", "scope", "bytes more in use", "bytes the compiler reports"), rows


def _bytes_in_use() -> int | None:
    found = jax.devices()[0].memory_stats()
    return None if found is None else int(found["bytes_in_use"])


PARTS: dict[str, Callable[[Sequence[str], int], tuple[tuple[str, ...], Rows]]] = {
    "decode": decode,
    "evidence": evidence,
    "host": host,
    "warmup": warm_up,
    "store": store,
    "encoder": encoder,
    "memory": memory,
}


def _cell(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def main() -> int:
    """Prints the tables and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["0.5b", "3b"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": sys.version}
    print(f"{device.device_kind}, jax {jax.__version__}, {os.cpu_count()} cores\n", flush=True)
    found: dict[str, Any] = {}
    for part in options.only:
        start = time.perf_counter()
        header, rows = PARTS[part](options.sizes, options.rounds)
        found[part] = {"header": header, "rows": rows}
        shown = text_table(header, [[_cell(value) for value in row] for row in rows])
        print(f"{part} ({time.perf_counter() - start:.0f} s)\n{shown}\n", flush=True)
        if device.platform != "cpu":  # which has no command buffers
            _write({"device": device.device_kind, "versions": versions, **found})
    return 0


def _write(found: Mapping[str, Any]) -> None:
    """After each part, so that a later one may fail."""
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"made_at": made_at, **found}, indent=1)
    (RESULTS / f"gpu-{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
