"""From nothing to a sealed grid: compiled, from JAX's persistent cache, from a `GraphStore`.

    python benchmarks/cold_start.py [--rounds 3] [--json FILE]

The demo's MiniLM encoder on the grid of warmup.py. Each contender is a fresh process in every
round, in turn; what it finds on the disk was put there by an earlier process of its kind, which is
not counted. The clock starts when jax and cudagraph_jax are imported and the weights are on the
device, which is the same for all, and stops when the grid is sealed. No bucket is run meanwhile
(`warmup_iterations=0`): on a CPU its first run would take as long as any other, for all alike.
Then one text is embedded, which must give what the first contender gave. The exit status is 1
where a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cudagraph_jax import BucketedFunction

TEXT = "How do I sort an array?"
TOLERANCE = 1e-5


class Contender(NamedTuple):
    """How a process comes by its executables."""

    title: str
    caches: bool


CONTENDERS = {
    "none": Contender("nothing cached: compile", False),
    "jax": Contender("JAX's persistent cache, warm", True),
    "store": Contender("store, warm", True),
    "fingerprint": Contender("store with fingerprint, warm", True),
}
OURS = "fingerprint"
PROMISES = {"none": 8.0, "jax": 2.0}

Measured = dict[str, Any]


def child(kind: str, directory: str) -> Measured:
    """What one process measures of itself."""
    import jax

    from cudagraph_jax.demo.bert import model_folder, tokens, weights
    from cudagraph_jax.xla.compiles import CompileCounter, compiles_are_reported

    jax.config.update("jax_enable_compilation_cache", kind == "jax")
    if kind == "jax":
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    folder = model_folder.find_model()
    begun = time.perf_counter()
    params = jax.block_until_ready(jax.device_put(weights.load_params(folder)))
    weights_s = time.perf_counter() - begun
    ids, mask = tokens.stack(tokens.load_tokenizer(folder)([TEXT]))
    with CompileCounter() as counter:
        start = time.perf_counter()
        function = bucketed(kind, directory)
        report = function.warmup(params, ids, mask, progress=False)
        function.seal()
        sealed = time.perf_counter()
        vector = function(params, ids, mask)
        answered = time.perf_counter()
    device = jax.devices()[0].device_kind
    return {
        "sealed_s": sealed - start,
        "warmup_s": report.total_ms / 1e3,
        "first_call_ms": (answered - sealed) * 1e3,
        "weights_s": weights_s,
        "buckets": len(report.buckets),
        "loaded": report.loaded,
        # The last of all, since finding it out compiles something.
        "compiles": counter.compiles if compiles_are_reported() else None,
        "vector": vector[0].tolist(),
        "where": f"Python {sys.version.split()[0]}, jax {jax.__version__}, {device}",
    }


def bucketed(kind: str, directory: str) -> BucketedFunction:
    """The encoder on a grid, with or without a store."""
    from warmup import CONFIG

    import cudagraph_jax as cg
    from cudagraph_jax.demo import encoder
    from cudagraph_jax.demo.bert.model import encode

    return cg.bucket_jit(
        encode,
        in_axes=(None, "batch seq", "batch seq"),
        config=CONFIG,
        store=directory if kind in ("store", "fingerprint") else None,
        fingerprint=encoder.model_fingerprint() if kind == "fingerprint" else None,
    )


def fresh(kind: str, directory: Path) -> Measured:
    """What a new process of this kind measures."""
    command = [sys.executable, __file__, "--child", kind, str(directory)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(rounds: int) -> tuple[dict[str, list[Measured]], dict[str, float]]:
    """All rounds of each contender, and the MiB that each keeps on the disk."""
    taken: dict[str, list[Measured]] = {kind: [] for kind in CONTENDERS}
    with tempfile.TemporaryDirectory() as root:
        folders = {kind: Path(root, kind) for kind in CONTENDERS}
        for kind, folder in folders.items():
            folder.mkdir(mode=0o700)
            if CONTENDERS[kind].caches:
                fresh(kind, folder)
        for done in range(rounds):
            for kind, folder in folders.items():
                print(f"round {done + 1} of {rounds}: {kind}", file=sys.stderr, flush=True)
                taken[kind].append(fresh(kind, folder))
        sizes = {
            kind: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
            for kind, folder in folders.items()
        }
    return taken, sizes


def spread(measured: Sequence[Measured], name: str, digits: int) -> str:
    """The median of a figure with its least and its most."""
    values = [one[name] for one in measured]
    shown = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return "{} ({}..{})".format(*shown)


def counted(measured: Sequence[Measured], name: str) -> str:
    """A count that is the same in all rounds, or each of them."""
    values = dict.fromkeys("not reported" if one[name] is None else one[name] for one in measured)
    return ", ".join(map(str, values))


def ratio(taken: dict[str, list[Measured]], kind: str) -> float:
    """The median over the rounds of a contender's time over that of ours."""
    pairs = zip(taken[kind], taken[OURS], strict=True)
    return statistics.median(a["sealed_s"] / b["sealed_s"] for a, b in pairs)


def difference(taken: dict[str, list[Measured]]) -> float:
    """The largest one between the first contender's vector and any other."""
    first = taken["none"][0]["vector"]
    vectors = [one["vector"] for measured in taken.values() for one in measured]
    return max(abs(a - b) for vector in vectors for a, b in zip(vector, first, strict=True))


def show(taken: dict[str, list[Measured]], sizes: dict[str, float]) -> None:
    """Prints the table."""
    first = taken["none"][0]
    every = [one for measured in taken.values() for one in measured]
    print(
        f"{first['where']}: {first['buckets']} buckets, warmup_iterations=0 (nothing is run), "
        f"{len(taken[OURS])} rounds, median (least..most)"
    )
    print(
        f"{'':30} {'to sealed, s':>20} {'of it warm-up, s':>20} {'over ours*':>11} "
        f"{'compiles':>8} {'loaded':>6} {'first call, ms':>20} {'disk, MiB':>9}"
    )
    for kind, measured in taken.items():
        print(
            f"{CONTENDERS[kind].title:30} {spread(measured, 'sealed_s', 2):>20} "
            f"{spread(measured, 'warmup_s', 2):>20} {ratio(taken, kind):>10.1f}x "
            f"{counted(measured, 'compiles'):>8} {counted(measured, 'loaded'):>6} "
            f"{spread(measured, 'first_call_ms', 1):>20} {sizes[kind]:>9.1f}"
        )
    print(
        "* the store with fingerprint, round by round. Before the clock starts, for all alike: "
        f"weights {spread(every, 'weights_s', 2)} s"
    )


def verdict(taken: dict[str, list[Measured]]) -> bool:
    """Prints the promises; whether all hold."""
    found = difference(taken)
    warm = [one for kind in CONTENDERS if CONTENDERS[kind].caches for one in taken[kind]]
    kept = [found <= TOLERANCE, not any(one["compiles"] for one in warm)]
    print(f"{_word(kept[0])}: embeddings of one text differ by {found:.1e}, {TOLERANCE} at most")
    print(f"{_word(kept[1])}: who is warm compiles nothing")
    for kind, promised in PROMISES.items():
        times = ratio(taken, kind)
        kept.append(times >= promised)
        print(
            f"{_word(kept[-1])}: {times:.1f} times as fast as {CONTENDERS[kind].title!r}, "
            f"promised {promised:.0f}"
        )
    return all(kept)


def _word(is_kept: bool) -> str:
    return "kept" if is_kept else "NOT KEPT"


def main() -> int:
    """Prints the table; 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds to FILE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return 0
    taken, sizes = measure(options.rounds)
    show(taken, sizes)
    if options.json is not None:
        options.json.write_text(json.dumps({"rounds": taken, "disk_mib": sizes}, indent=1) + "\n")
    return 0 if verdict(taken) else 1


if __name__ == "__main__":
    sys.exit(main())
