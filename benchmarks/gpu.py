"""What command buffers are worth on a GPU, beside plain `jax.jit` and PyTorch's CUDA graphs.

    python benchmarks/gpu.py [--sizes 0.5b 3b] [--only decode store] [--seconds 450]

Prints a table for each part, and writes benchmarks/results/gpu-<device>.json, where each part has
its date, versions and sizes; those of an earlier run stay. What does not begin in time is left
out, and said so. On a CPU there are no command buffers: `--sizes tiny` tries the benchmark itself,
and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

# Before JAX is started: profiles are to show the command buffers, and PyTorch needs memory, too.
_KEEP = "--xla_enable_command_buffers_during_profiling=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_KEEP}".strip()
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")

import jax  # noqa: E402
import jaxlib  # noqa: E402
import kernels  # noqa: E402
import replaying  # noqa: E402
import serving  # noqa: E402
from decoding import (  # noqa: E402
    CONTEXT,
    PROMPT,
    SCOPES,
    STEPS,
    Lab,
    side_by_side,
    timed_prefill,
    timed_steps,
)
from parts import HERE, ChildError, LeftOutError, Row, Rows, Run, nvidia_smi  # noqa: E402
from sizes import SIZES  # noqa: E402

import cudagraph_jax as cg  # noqa: E402
from cudagraph_jax._base.text import text_table  # noqa: E402

BATCHES = (1, 8, 64)
RESULTS = HERE / "results"

Header = tuple[str, ...]
DECODE_HEADER = ("model", "what", "by", "ms", "over jax.jit", "host µs")
TORCH_HEADER = ("model", "what", "by", "ms", "host µs")
EVIDENCE_HEADER = (
    *("model", "scope", "covered", "replays", "executed", "updated", "recorded"),
    *("shown", "moved"),
)
HOST_HEADER = ("model", "raw host µs", "bucketed over raw", "lower quartile", "upper")


def decode(run: Run) -> Rows:
    """A decode step for each size and batch, and a prefill."""
    for lab in run.labs:
        for batch in BATCHES:
            run.begin(f"{lab.size}, batch {batch}")
            yield from _decode(lab, batch, run.rounds)
        run.begin(f"{lab.size}, prefill")
        for row in timed_prefill(lab, rounds=run.rounds):
            yield [lab.size, f"prefill of {PROMPT}", *row]


def _decode(lab: Lab, batch: int, rounds: int) -> list[Row]:
    contenders = {name: lab.warm(step, batch) for name, step in lab.steps(batch).items()}
    found = timed_steps(contenders, rounds=rounds, steps=STEPS)
    return [[lab.size, f"decode, batch {batch}", *row] for row in found]


def in_torch(run: Run) -> Rows:
    """The same model in PyTorch, eager and as a CUDA graph, in a process for each size."""
    args = ["--batches", *map(str, BATCHES), "--context", str(CONTEXT), "--prompt", str(PROMPT)]
    args += ["--rounds", str(run.rounds), "--steps", str(STEPS)]
    args += ["--device", "cpu" if jax.default_backend() == "cpu" else "cuda"]
    for lab in run.labs:
        try:
            found = run.child("torch_peer.py", *args, "--sizes", lab.size, timeout_s=180)
        except ChildError as error:
            yield [lab.size, f"left out: {error}"]
            continue
        run.facts.update(versions=found["versions"], cudagraph=found["cudagraph"])
        for row in found["rows"]:
            yield [row["size"], row["what"], row["by"], row["ms"], row["host_us"]]


def evidence(run: Run) -> Rows:
    """What the command buffers of a hot decode loop do, and how much of the step they cover."""
    for lab in run.labs:
        run.begin(lab.size)
        steps = {name: lab.bucketed(1, name) for name in SCOPES}
        # Before the first run: whatever is compiled has all graphs recorded again.
        inspected = side_by_side(*(step.registry.entries()[0].inspect for step in steps.values()))
        for (name, step), inspection in zip(steps.items(), inspected, strict=True):
            coverage = [scope.coverage for scope in inspection.scopes]
            covered = f"{coverage[0]:.1%}" if coverage else "–"
            yield [lab.size, name, covered, *_shown(lab, step)]


def _shown(lab: Lab, step: cg.BucketedFunction[..., Any]) -> Row:
    # The loop ends with this function. Were its state still held while the next step is warmed,
    # XLA's temporary buffer would move when it is freed, and a graph be updated.
    loop = lab.warm(step, 1)
    (shown,) = step.manager.profile_replays(lambda: loop.run(50)).buckets
    moved = ", ".join(argument.argument for argument in shown.moved[:3])
    counts = [shown.replays, shown.executed, shown.updated, shown.recorded]
    return [*counts, shown.shown, moved]


def host(run: Run) -> Rows:
    """Host time of a bucketed step over that of its executable, round by round."""
    for lab in run.labs:
        run.begin(lab.size)
        step = lab.bucketed(1, "AUTO")
        (entry,) = step.registry.entries()
        raw, ours = lab.warm(entry.executable.call, 1), lab.warm(step, 1)
        for _ in range(run.rounds * 4):
            raw.time(10)
            ours.time(10)
        ratios = [a / b for a, b in zip(ours.host_us, raw.host_us, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        yield [lab.size, statistics.median(raw.host_us), middle, low, high]


PARTS: dict[str, tuple[Header, Callable[[Run], Rows]]] = {
    "decode": (DECODE_HEADER, decode),
    "torch": (TORCH_HEADER, in_torch),
    "evidence": (EVIDENCE_HEADER, evidence),
    "host": (HOST_HEADER, host),
    "warmup": (serving.WARMUP_HEADER, serving.warm_up),
    "kernels": (kernels.HEADER, kernels.by_kernel),
    "store": (serving.STORE_HEADER, serving.store),
    "memory": (serving.MEMORY_HEADER, serving.memory),
    "cheap": (replaying.HEADER, replaying.cheap),
    "encoder": (serving.ENCODER_HEADER, serving.encoder),
}


def main() -> int:
    """Prints the tables and writes the file; 1 where a part failed."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b", "3b"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=450, help="nothing begins after these")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {os.cpu_count()} cores\n", flush=True)
    labs = [Lab(size) for size in options.sizes]
    run = Run(labs=labs, rounds=options.rounds, deadline=begun + options.seconds)
    failed = []
    for part in options.only:
        found = measured(part, replace(run, facts={}))
        _show(part, found)
        if "failed" in found:
            failed.append(part)
        if found["rows"] and device.platform != "cpu":
            _write(device.device_kind, part, found)
    if device.platform == "cpu":
        print("nothing was written: a CPU has no command buffers", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def measured(part: str, run: Run) -> dict[str, Any]:
    """What a part gives until it is through, has no time left or fails."""
    start = time.perf_counter()
    header, given = PARTS[part]
    rows: list[Row] = []
    found: dict[str, Any] = {"sizes": [lab.size for lab in run.labs], "rounds": run.rounds}
    found |= {"header": header, "rows": rows}
    try:
        run.begin(part)
        for row in given(run):
            rows.append([*row, *[""] * (len(header) - len(row))])
    except LeftOutError as error:
        found["left_out"] = str(error)
    except Exception:  # the GPU's time is scarce: the other parts are measured all the same
        found["failed"] = traceback.format_exc()
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": sys.version}
    versions |= {"driver": nvidia_smi("driver_version"), **run.facts.pop("versions", {})}
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    taken = time.perf_counter() - start
    return {"made_at": made_at, "seconds": taken, "versions": versions, **run.facts, **found}


def _show(part: str, found: Mapping[str, Any]) -> None:
    print(f"{part} ({found['seconds']:.0f} s)")
    if found["rows"]:
        print(text_table(found["header"], [list(map(_cell, row)) for row in found["rows"]]))
    if "left_out" in found:
        print(f"left out: {found['left_out']}")
    print(found.get("failed", ""), flush=True)


def _cell(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def _write(device: str, part: str, found: Mapping[str, Any]) -> None:
    """After each part, so that a later one may fail; the file's other parts stay."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path, partly = RESULTS / f"gpu-{name}.json", RESULTS / f"gpu-{name}.json.tmp"
    RESULTS.mkdir(exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"device": device}
    partly.write_text(f"{json.dumps({**known, part: found}, indent=1)}\n", encoding="utf-8")
    partly.replace(path)


if __name__ == "__main__":
    sys.exit(main())
