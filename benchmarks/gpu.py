"""What command buffers are worth on a GPU, beside plain `jax.jit` and PyTorch's CUDA graphs.

    python benchmarks/gpu.py [--sizes 0.5b 3b] [--only decode store] [--seconds 450]

Prints a table for each part, and writes benchmarks/results/gpu-<device>.json with versions and the
date. What does not begin in time is left out, and said so. On a CPU there are no command buffers:
`--sizes tiny` tries the benchmark itself, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

# Before JAX is started: profiles are to show the command buffers, and PyTorch needs memory, too.
_KEEP = "--xla_enable_command_buffers_during_profiling=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_KEEP}".strip()
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")

import jax  # noqa: E402
import jaxlib  # noqa: E402
import replaying  # noqa: E402
import serving  # noqa: E402
from decoding import (  # noqa: E402
    CONTEXT,
    PROMPT,
    SCOPES,
    Lab,
    Steps,
    side_by_side,
    timed_prefill,
    timed_steps,
)
from kernels import device_us  # noqa: E402
from sizes import SIZES  # noqa: E402

from cudagraph_jax.tables import text_table  # noqa: E402

BATCHES = (1, 8, 64)
STEPS = 20
HERE = Path(__file__).parent
RESULTS = HERE / "results"

Rows = list[list[object]]
Table = tuple[tuple[str, ...], Rows]


def decode(labs: Sequence[Lab], rounds: int) -> Table:
    """A decode step for each size and batch, and a prefill."""
    rows: Rows = []
    for lab in labs:
        for batch in BATCHES:
            contenders = {name: lab.warm(step, batch) for name, step in lab.steps(batch).items()}
            found = timed_steps(contenders, rounds=rounds, steps=STEPS)
            rows += [[lab.size, f"decode, batch {batch}", *row] for row in found]
            del contenders
        found = timed_prefill(lab, rounds=rounds)
        rows += [[lab.size, f"prefill of {PROMPT}", *row] for row in found]
    return ("model", "what", "by", "ms", "over jax.jit", "host µs"), rows


def torch(labs: Sequence[Lab], rounds: int) -> Table:
    """The same model in PyTorch, eager and as a CUDA graph, in a process for each size."""
    command = [sys.executable, str(HERE / "torch_peer.py")]
    command += ["--batches", *map(str, BATCHES), "--context", str(CONTEXT), "--prompt", str(PROMPT)]
    command += ["--rounds", str(rounds), "--steps", str(STEPS)]
    command += ["--device", "cpu" if jax.default_backend() == "cpu" else "cuda"]
    rows: Rows = []
    for lab in labs:
        done = subprocess.run(
            [*command, "--sizes", lab.size],
            check=False,
            capture_output=True,
            text=True,
            timeout=180,
        )
        if done.returncode:
            rows.append([lab.size, "left out", done.stderr.strip()[-300:], "", ""])
        else:
            found = json.loads(done.stdout)["rows"]
            rows += [
                [row["size"], row["what"], row["by"], row["ms"], row["host_us"]] for row in found
            ]
    return ("model", "what", "by", "ms", "host µs"), rows


def evidence(labs: Sequence[Lab], rounds: int) -> Table:
    """What the command buffers of a hot decode loop do, and how much of the step they cover."""
    rows: Rows = []
    for lab in labs:
        steps = {name: lab.bucketed(1, name) for name in SCOPES}
        # Before the first run: whatever is compiled has all graphs recorded again.
        inspected = side_by_side(*(step.registry.entries()[0].inspect for step in steps.values()))
        for (name, step), inspection in zip(steps.items(), inspected, strict=True):
            loop = lab.warm(step, 1)
            (shown,) = step.manager.profile_replays(lambda loop=loop: loop.run(50)).buckets
            coverage = [scope.coverage for scope in inspection.scopes]
            covered = f"{coverage[0]:.1%}" if coverage else "–"
            counts = [shown.replays, shown.executed, shown.updated, shown.recorded]
            moved = ", ".join(argument.argument for argument in shown.moved[:3])
            rows.append([lab.size, name, covered, *counts, shown.shown, moved])
    header = ("model", "scope", "covered", "replays", "executed", "updated", "recorded")
    return (*header, "shown", "moved"), rows


def host(labs: Sequence[Lab], rounds: int) -> Table:
    """Host time of a bucketed step over that of its executable, round by round."""
    rows: Rows = []
    for lab in labs:
        step = lab.bucketed(1, "AUTO")
        (entry,) = step.registry.entries()
        raw, ours = lab.warm(entry.executable.call, 1), lab.warm(step, 1)
        for _ in range(rounds * 4):
            raw.time(10)
            ours.time(10)
        ratios = [a / b for a, b in zip(ours.host_us, raw.host_us, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append([lab.size, statistics.median(raw.host_us), middle, low, high])
    return ("model", "raw host µs", "bucketed over raw", "lower quartile", "upper"), rows


def kernels(labs: Sequence[Lab], rounds: int) -> Table:
    """Where the device time of a step at batch 1 goes, and how much of the step is idle."""
    rows: Rows = []
    for lab in labs:
        loop: Steps = lab.warm(lab.bucketed(1, "NONE"), 1)
        taken = device_us(partial(loop.run, STEPS))
        total = sum(taken.values())
        rows += [
            [lab.size, name, us / STEPS, us / total] for name, us in taken.most_common(10) if total
        ]
        rows.append([lab.size, "all kernels", total / STEPS, 1.0])
    return ("model", "kernel", "µs a step", "part"), rows


def cheap(labs: Sequence[Lab], rounds: int) -> Table:
    """What makes replays cheap; see replaying.py."""
    lab = labs[0]
    rows = replaying.by_option(lab, rounds=rounds)
    rows += replaying.first_runs(lab) + replaying.late_capture(lab, rounds=rounds)
    if jax.default_backend() != "cpu":
        rows += replaying.by_update_mode(lab.size)
    width = len(replaying.HEADER)
    return replaying.HEADER, [[*row, *[""] * (width - len(row))] for row in rows]


PARTS: dict[str, Callable[[Sequence[Lab], int], Table]] = {
    "decode": decode,
    "torch": torch,
    "evidence": evidence,
    "host": host,
    "kernels": kernels,
    "store": lambda labs, rounds: (serving.STORE_HEADER, serving.store(labs[0])),
    "memory": lambda labs, rounds: (serving.MEMORY_HEADER, serving.memory(labs[0])),
    "cheap": cheap,
    "warmup": lambda labs, rounds: (serving.WARMUP_HEADER, serving.warm_up()),
    "encoder": lambda labs, rounds: (serving.ENCODER_HEADER, serving.encoder(rounds=rounds)),
}


def main() -> int:
    """Prints the tables and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b", "3b"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=450, help="no part begins after these")
    options = parser.parse_args()
    begun = time.perf_counter()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {os.cpu_count()} cores\n", flush=True)
    labs = [Lab(size) for size in options.sizes]
    found: dict[str, Any] = {}
    failed = []
    for part in options.only:
        start = time.perf_counter()
        if start - begun > options.seconds:
            print(f"{part}: left out, {options.seconds:.0f} s are over", flush=True)
            continue
        try:
            header, rows = PARTS[part](labs, options.rounds)
        except Exception:  # the GPU's time is scarce: the other parts are measured all the same
            failed.append(part)
            traceback.print_exc()
            continue
        found[part] = {"header": header, "rows": rows}
        shown = text_table(header, [[_cell(value) for value in row] for row in rows])
        print(f"{part} ({time.perf_counter() - start:.0f} s)\n{shown}\n", flush=True)
        if device.platform != "cpu":  # which has no command buffers
            _write(device.device_kind, found)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def _cell(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def _write(device: str, found: Mapping[str, Any]) -> None:
    """After each part, so that a later one may fail."""
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": sys.version}
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    text = json.dumps(
        {"device": device, "versions": versions, "made_at": made_at, **found}, indent=1
    )
    (RESULTS / f"gpu-{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
