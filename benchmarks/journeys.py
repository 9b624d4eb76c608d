"""How much of the library a call goes through: its files, functions and calls, by kind of call.

    python benchmarks/journeys.py [-v] [--json FILE]

The calling thread's Python calls are counted by `sys.setprofile`; no time is taken. Each journey is
made twice, by functions of its own, and the second one counted: what a process imports or remembers
at its first is not.

files, functions: of the library, entered at least once.
calls: into them. Resuming a generator is one; from Python 3.12 on a list comprehension is none.
returns: the calls into a file that was entered before, other than the caller's.
depth: the most calls that were open at once.
traces: runs of the user's Python function.
to XLA: the library's open calls when JAX's compile is entered; - where nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np

import cudagraph_jax as cg

ROOT = str(Path(cg.__file__).parent) + "/"
DEMO = ROOT + "demo/"  # a user's code, as far as the library is concerned
COMPILE = ("jax/_src/stages.py", "compile")  # JAX's last Python call of its own before XLA's
CONFIG = cg.CUDAGraphConfig(capture_sizes=(1, 2, 4, 8), capture_seq_lens=(8, 16, 32))
COLUMNS = ("files", "functions", "calls", "returns", "depth", "traces", "to XLA")


@dataclass(slots=True)
class Recorder:
    """The library's calls in the calling thread while a function runs."""

    functions: Counter[tuple[str, str]] = field(default_factory=Counter)
    files: dict[str, None] = field(default_factory=dict)
    returns: int = 0
    depth: int = 0
    chain: tuple[str, ...] = ()
    _open: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """All calls."""
        return self.functions.total()

    def record(self, function: Callable[[], object]) -> None:
        """Runs the function."""
        sys.setprofile(self._event)
        try:
            function()
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if _is_ours(frame):
            if event == "call":
                self._enter(code.co_filename.removeprefix(ROOT), code.co_qualname)
            elif event == "return":
                self._open.pop()
        elif event == "call" and not self.chain and _is_compile(frame):
            self.chain = tuple(_frames_of_ours(frame))[::-1]

    def _enter(self, file: str, function: str) -> None:
        self.returns += file in self.files and self._open[-1:] not in ([], [file])
        self.files[file] = None
        self.functions[file, function] += 1
        self._open.append(file)
        self.depth = max(self.depth, len(self._open))


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(ROOT) and not file.startswith(DEMO)


def _is_compile(frame: FrameType) -> bool:
    file, function = COMPILE
    return frame.f_code.co_name == function and frame.f_code.co_filename.endswith(file)


def _frames_of_ours(frame: FrameType | None) -> Iterator[str]:
    """The library's frames, from the innermost outwards."""
    while frame is not None:
        code = frame.f_code
        if _is_ours(frame):
            yield f"{code.co_filename.removeprefix(ROOT)}:{code.co_qualname}"
        frame = frame.f_back


@dataclass(frozen=True, slots=True)
class Journey:
    """What one call went through."""

    name: str
    recorder: Recorder
    traces: int

    def counts(self) -> dict[str, int | None]:
        """The columns of the table."""
        seen = self.recorder
        numbers = (len(seen.files), len(seen.functions), seen.calls, seen.returns, seen.depth)
        return dict(zip(COLUMNS, (*numbers, self.traces, len(seen.chain) or None), strict=True))

    def details(self) -> dict[str, object]:
        """The counts, the functions by file with their calls, and the chain to XLA."""
        functions: dict[str, dict[str, int]] = {file: {} for file in self.recorder.files}
        for (file, function), calls in self.recorder.functions.items():
            functions[file][function] = calls
        counts = self.counts()
        return {
            "name": self.name,
            **counts,
            "functions of": functions,
            "chain": self.recorder.chain,
        }


class Model:
    """A new function on each instance, which counts its traces."""

    def __init__(self) -> None:
        self.traces = 0
        self.parameters = jnp.ones((10, 4))

        def embed(parameters, ids, mask):
            self.traces += 1
            return (parameters[ids] * mask[..., None]).sum(1)

        self._embed = embed

    def bucketed(self, **options: object) -> Callable[..., object]:
        """The function with its buckets, and a manager of its own."""
        axes = (None, "batch seq", "batch seq")
        return cg.bucket_jit(self._embed, in_axes=axes, config=CONFIG, **options)

    def call(self, function: Callable[..., object], batch: int, seq: int) -> Callable[[], object]:
        """A call with NumPy arrays of that size."""
        ids, mask = np.ones((batch, seq), np.int32), np.ones((batch, seq), np.float32)
        return lambda: function(self.parameters, ids, mask)

    def journey(self, name: str, call: Callable[[], object]) -> Journey:
        """Makes the call, and says what it went through."""
        before, recorder = self.traces, Recorder()
        recorder.record(call)
        return Journey(name, recorder, self.traces - before)


def hits_and_misses() -> Iterator[Journey]:
    """A function's first calls without a store, in the order of their lengths."""
    model = Model()
    function = model.bucketed()
    first = model.journey("miss of a new function", model.call(function, 3, 9))
    further = model.journey("miss of a further bucket", model.call(function, 5, 9))
    padded = model.call(function, 3, 10)
    new_shape = model.journey("first hit of a new shape", padded)
    ids, mask = jnp.ones((4, 16), jnp.int32), jnp.ones((4, 16))

    def exact() -> object:
        return function(model.parameters, ids, mask)

    exact()
    yield model.journey("exact hit, JAX arrays", exact)
    yield model.journey("padded hit, NumPy arrays", padded)
    yield new_shape
    yield first
    yield further
    yield model.journey("stats()", function.stats)


def stored_misses() -> Iterator[Journey]:
    """Misses that a store answers by the function's fingerprint, with a new manager."""
    model = Model()
    options = {"fingerprint": uuid.uuid4().hex}  # no other function of this process has it
    with tempfile.TemporaryDirectory() as options["store"]:
        sizes = {"stored miss of a new function": (3, 9), "stored miss of a further bucket": (5, 9)}
        putting = model.bucketed(**options)
        for size in sizes.values():
            model.call(putting, *size)()
        loading = model.bucketed(**options)
        for name, size in sizes.items():
            yield model.journey(name, model.call(loading, *size))


def all_journeys() -> list[Journey]:
    """Every journey, made once."""
    return [*hits_and_misses(), *stored_misses()]


def show(journey: Journey, *, verbose: bool) -> None:
    """Prints a line of the table, and below it what it counts."""
    numbers = ("-" if n is None else n for n in journey.counts().values())
    print(f"{journey.name:32}", *(f"{n:>9}" for n in numbers))
    if verbose:
        for file, functions in journey.details()["functions of"].items():
            print(f"    {file}:", ", ".join(f"{name} {n}" for name, n in functions.items()))
        if journey.recorder.chain:
            print("  to XLA:", " > ".join(journey.recorder.chain))


def main() -> int:
    """Prints a line for each journey."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-v", "--verbose", action="store_true", help="list what was entered")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it to a file")
    options = parser.parse_args()
    warnings.simplefilter("error", cg.CUDAGraphWarning)
    all_journeys()
    journeys = all_journeys()
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{'journey':32}", *(f"{column:>9}" for column in COLUMNS))
    for journey in journeys:
        show(journey, verbose=options.verbose)
    if options.json:
        found = {**versions, "journeys": [journey.details() for journey in journeys]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
