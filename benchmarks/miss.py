"""What a missed bucket of a real model costs, over `jax.jit`'s first call at the same padded shape.

    python benchmarks/miss.py [--rounds 5] [--layers 6] [--warmup]

The demo's MiniLM encoder with random weights. Each call is made with a function object of its own,
ends with its answer on the host, and includes one run of the model. The contenders take turns, and
each round begins with another one; the ratio is taken round by round, and its median and quartiles
are shown. One round before is not timed, nor one after it, in which traces, files and calls are
counted.

traces: runs of the model's Python function.
opened: how often a file below the store's directory is opened.
calls: into the library in the calling thread, as `journeys.py` counts them.

With --warmup, also how long a warm-up of 24 buckets takes with 4 workers, without a store and into
an empty one: in seconds, and in seconds of all cores, which other processes disturb less. The
second is to take at most 1.1 times the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from journeys import Recorder
from timing import Timing

import cudagraph_jax as cg
from cudagraph_jax.demo.bert.model import MINILM, Dense, Layer, Norm, Params, encode

CONFIG = cg.CUDAGraphConfig(
    capture_sizes=(1, 2, 4, 8, 16, 32), capture_seq_lens=(16, 32, 64, 128), warmup_iterations=3
)
WARMED = dataclasses.replace(CONFIG, warmup_iterations=0)  # runs would take as long with a store
AXES = (None, "batch seq", "batch seq")
SIZES = ((2, 12), (4, 12))  # of the two buckets that are missed
JITTED = ("jit's first call, 2x16", "jit's first call, 4x16")
WARMUPS = ("without a store", "into an empty store")
WORKERS = 4


def random_params(layers: int) -> Params:
    """Weights of MiniLM's shapes, but for its 30,522 tokens; no layer shares any with another."""
    draw, hidden = np.random.default_rng(0), MINILM.hidden_size

    def kernel(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)

    def dense(inputs: int, outputs: int) -> Dense:
        return Dense(kernel(inputs, outputs), np.zeros(outputs, np.float32))

    def norm() -> Norm:
        return Norm(np.ones(hidden, np.float32), np.zeros(hidden, np.float32))

    def layer() -> Layer:
        attention = (dense(hidden, hidden) for _ in range(4))
        wide = (dense(hidden, 4 * hidden), dense(4 * hidden, hidden))
        return Layer(*attention, norm(), *wide, norm())

    return Params(
        kernel(1000, hidden), kernel(512, hidden), norm(), tuple(layer() for _ in range(layers))
    )


class Opened:
    """Counts the files that are opened below a folder; a hook, so it stays for good."""

    def __init__(self) -> None:
        self.count = 0
        self._folder: str | None = None
        sys.addaudithook(self._hook)

    @contextmanager
    def below(self, folder: str) -> Iterator[None]:
        """Counts from 0 meanwhile."""
        self.count, self._folder = 0, os.path.join(folder, "")
        try:
            yield
        finally:
            self._folder = None

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or self._folder is None or not isinstance(arguments[0], (str, bytes)):
            return
        path = os.fsdecode(arguments[0])
        # Of the programs here only a store opens by a relative name: below a folder it has open.
        self.count += path.startswith(self._folder) or not os.path.isabs(path)


@dataclass(slots=True, eq=False)
class Model:
    """A new function on each instance, which counts its traces, and the calls of it."""

    params: Params
    folder: str
    traces: int = 0
    fingerprint: str = field(default_factory=lambda: uuid.uuid4().hex)
    _bucketed: Callable[..., object] | None = None

    def encode(self, params: Params, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        """The encoder."""
        self.traces += 1
        return encode(params, ids, mask)

    def jit(self, bucket: tuple[int, int]) -> np.ndarray:
        """A new function's first call at a bucket's shape, padded beforehand."""
        jitted = jax.jit(self.encode)
        return np.asarray(jitted(self.params, *arrays(bucket)))

    def first(self, **options: object) -> object:
        """A new function's first bucketed call."""
        self._bucketed = self.bucketed(**options)
        return jax.block_until_ready(self._bucketed(self.params, *arrays(SIZES[0])))

    def further(self) -> object:
        """The same function's call in another bucket."""
        return self._bucketed(self.params, *arrays(SIZES[1]))

    def stored(self) -> object:
        """A new manager's first call, with the folder as its store."""
        return self.first(store=self.folder, fingerprint=self.fingerprint)

    def bucketed(self, **options: object) -> Callable[..., object]:
        """The function with its buckets, and a manager of its own."""
        return cg.bucket_jit(self.encode, in_axes=AXES, **{"config": CONFIG, **options})


def arrays(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of that size."""
    return np.ones(size, np.int32), np.ones(size, np.int32)


Take = Callable[[str, Model, Callable[[], object]], None]


def missed(params: Params, take: Take, *, starting_at: int = 0) -> None:
    """Makes every call once, in groups of those that depend on each other."""

    def jit_first(model: Model) -> None:
        take(JITTED[0], model, lambda: model.jit((2, 16)))

    def jit_second(model: Model) -> None:
        take(JITTED[1], model, lambda: model.jit((4, 16)))

    def plain(model: Model) -> None:
        take("first miss", model, model.first)
        take("further miss", model, model.further)

    def declared(model: Model) -> None:
        take("first miss, out_axes declared", model, lambda: model.first(out_axes="batch _"))

    def left(model: Model) -> None:
        take('first miss, unpad="none"', model, lambda: model.first(unpad="none"))

    def stored(model: Model) -> None:
        take("first miss, into an empty store", model, model.stored)
        take("first miss, from a store", model, model.stored)

    groups = (jit_first, jit_second, plain, declared, left, stored)
    for index in range(len(groups)):
        with tempfile.TemporaryDirectory() as folder:
            groups[(starting_at + index) % len(groups)](Model(params, folder))


def peer_of(name: str) -> str:
    """Whose first call has the same padded shape."""
    return JITTED[name in (JITTED[1], "further miss")]


def timed(params: Params, rounds: int) -> dict[str, Timing]:
    """The time of each call, round by round; one round before is not timed."""
    taken: dict[str, list[float]] = {}

    def take(name: str, _: Model, call: Callable[[], object]) -> None:
        gc.collect()
        start = time.perf_counter()
        call()
        taken.setdefault(name, []).append((time.perf_counter() - start) * 1e6)

    missed(params, take)
    names = tuple(taken)
    taken.clear()
    for index in range(rounds):
        missed(params, take, starting_at=index)
    return {name: Timing(tuple(taken[name])) for name in names}


def counted(params: Params) -> dict[str, tuple[int, int, int]]:
    """Traces, files opened below the store's directory, and calls into the library."""
    opened, counts = Opened(), {}

    def take(name: str, model: Model, call: Callable[[], object]) -> None:
        before, recorder = model.traces, Recorder()
        with opened.below(model.folder):
            recorder.record(call)
        counts[name] = (model.traces - before, opened.count, recorder.calls)

    missed(params, take)
    return counts


def runs_in_a_miss() -> int:
    """How often a miss runs the function: warm-up iterations would be runs of it as well."""
    runs = itertools.count()

    def tick(x: np.ndarray) -> np.ndarray:
        next(runs)
        return x

    def ticking(x):
        return jax.pure_callback(tick, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    cg.bucket_jit(ticking, in_axes="batch seq", config=CONFIG)(np.ones(SIZES[0], np.float32))
    return next(runs)


class WarmupTime(NamedTuple):
    """What a warm-up took: by the clock, and of all cores together."""

    wall_s: float
    cpu_s: float


def warmup_times(params: Params, rounds: int) -> dict[str, list[WarmupTime]]:
    """The time of each warm-up, without and with a store, in turn."""
    taken: dict[str, list[WarmupTime]] = {name: [] for name in WARMUPS}
    for _, (name, times) in itertools.product(range(rounds), taken.items()):
        with tempfile.TemporaryDirectory() as folder:
            model = Model(params, folder)
            store = folder if name == WARMUPS[1] else None
            function = model.bucketed(config=WARMED, store=store, fingerprint=model.fingerprint)
            gc.collect()
            start, cpu_start = time.perf_counter(), time.process_time()
            report = function.warmup(params, *arrays(SIZES[0]), progress=False, workers=WORKERS)
            wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
            times.append(WarmupTime(wall_s, cpu_s))
            assert report.captured == len(CONFIG.buckets()), report
    return taken


def show_misses(times: Mapping[str, Timing], counts: Mapping[str, tuple[int, int, int]]) -> None:
    """Prints a line for each call."""
    print(
        f"{'what':32} {'ms':>8} {'of jit':>6} {'quartiles':>11} "
        f"{'traces':>6} {'opened':>6} {'calls':>6}"
    )
    for name, timing in times.items():
        low, ratio, high = timing.ratio_to(times[peer_of(name)])
        traces, opened, calls = counts[name]
        print(
            f"{name:32} {timing.median_us / 1000:8.1f} {ratio:6.2f} {low:5.2f}-{high:<5.2f} "
            f"{traces:6} {opened:6} {calls:6}"
        )


def show_warmups(times: Mapping[str, list[WarmupTime]]) -> None:
    """Prints a line for each warm-up."""
    first = times[WARMUPS[0]]
    for name, taken in times.items():
        shown = []
        for index, unit in enumerate(("s", "s of all cores")):
            ratio = statistics.median(
                a[index] / b[index] for a, b in zip(taken, first, strict=True)
            )
            median = statistics.median(time[index] for time in taken)
            shown.append(f"{median:8.2f} {unit}, {ratio:.2f} times")
        print(f"{f'warm-up, {name}':32} {'; '.join(shown)}")


def main() -> int:
    """Prints the table; the exit status says whether a miss runs the model once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="2 or more")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--warmup", action="store_true", help="time warm-ups, too")
    options = parser.parse_args()
    warnings.simplefilter("error", cg.CUDAGraphWarning)
    params = jax.device_put(random_params(options.layers))
    runs = runs_in_a_miss()
    device, cores = jax.devices()[0].device_kind, os.cpu_count()
    print(
        f"python {platform.python_version()}, jax {jax.__version__}, {device}, {cores} cores, "
        f"{options.layers} layers, medians of {options.rounds} rounds"
    )
    show_misses(timed(params, options.rounds), counted(params))
    print(f"{'runs of a function in its miss':32} {runs:8}")
    if options.warmup:
        buckets = len(CONFIG.buckets())
        print(f"{buckets} buckets, {WORKERS} workers, none of them run")
        show_warmups(warmup_times(params, options.rounds))
    return 0 if runs == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
