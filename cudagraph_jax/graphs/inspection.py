"""Asks XLA what it records of a bucket: compiles it once more, with a dump."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from cudagraph_jax._base.fork import use_jax
from cudagraph_jax.errors import CaptureError, ConfigError
from cudagraph_jax.program.program import Program
from cudagraph_jax.report.command_buffers import Inspection, ScopeInspection
from cudagraph_jax.report.thunks import ThunkSequence, effective_options, parse_thunks
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.gpus import absent_gpu
from cudagraph_jax.xla.stages import Lowering

# XLA takes it per executable, too: nothing else of the process is dumped.
_DUMP_TO = "xla_dump_to"


def dump(lowering: Lowering, options: Mapping[str, str], directory: Path) -> None:
    """Has XLA compile `lowering` with `options`, and dump what it does into `directory`.

    Raises:
        CaptureError: It cannot be compiled.
        ConfigError: XLA does not know one of the options.
    """
    lowering.compile(compiler_options={**options, _DUMP_TO: str(directory)})


def inspect(
    program: Program,
    bucket: Bucket,
    scopes: Mapping[str, Mapping[str, str]],
    *,
    gpu: str | None = None,
    platform: Callable[[], str] = jax.default_backend,
    dump: Callable[[Lowering, Mapping[str, str], Path], None] = dump,
) -> Inspection:
    """What XLA records of `program` at `bucket` into command buffers.

    On a CPU it is only lowered, unless `gpu` is given. Elsewhere it is compiled once for each of
    `scopes`, and what was compiled is dropped again. On a GPU the graphs that the process has
    recorded are then recorded again at their next run (docs/xla.md): inspect before
    traffic, or in a process of its own.

    Args:
        program: What to compile.
        bucket: For which sizes.
        scopes: Compiler options, by what the result calls them.
        gpu: The GPU to compile for, be it here or not: `"a100"`, `"h100"`, `"h200"`, `"b200"`, or
            a file (`cudagraph_jax.xla.gpus.target_config`). None: for the default backend.
        platform: Gives the backend's name.
        dump: Has it compiled with a dump.

    Raises:
        CaptureError: It cannot be compiled, or XLA dumped nothing.
        ConfigError: XLA does not know one of the options, or `gpu`, or has no compiler for it.
    """
    use_jax()
    name = program.target.name
    device = None if gpu is None else _absent(gpu, program)
    where = platform() if device is None else device.device_kind
    lowering = _lowered(program, bucket, device)
    if where == "cpu":
        return Inspection(name, bucket, where, ())
    found = []
    for scope, options in scopes.items():
        with tempfile.TemporaryDirectory(prefix="cudagraph_jax-") as directory:
            dump(lowering, options, Path(directory))
            sequence, effective = read_dump(Path(directory), name=f"{name} {bucket}")
        found.append(ScopeInspection.of(scope, options, sequence, effective=effective))
    return Inspection(name, bucket, where, tuple(found))


def _lowered(program: Program, bucket: Bucket, device: jax.Device | None) -> Lowering:
    try:
        return program.lower(bucket, clock=time.perf_counter, device=device)
    except CaptureError as error:
        # JAX asks for the backend itself where the program calls back to the host.
        if device is None or "Unknown backend" not in str(error):
            raise
        raise CaptureError(
            f"{error}. Callbacks to the host, jax.debug.print too, cannot be compiled for a GPU "
            "that is not here: leave them out, or inspect it where the GPU is",
            stage="lower",
        ) from error


def _absent(gpu: str, program: Program) -> jax.Device:
    shardings = [leaf.sharding for leaf in program.variant.leaves if leaf.sharding is not None]
    devices = max((len(sharding.device_set) for sharding in shardings), default=1)
    if devices > 1:
        raise ConfigError(
            f"cannot inspect {program.target.name} for gpu={gpu!r}: its arrays are spread over "
            f"{devices} devices, and gpu= compiles for one: inspect it where the devices are"
        )
    return absent_gpu(gpu)


def read_dump(directory: Path, *, name: str) -> tuple[ThunkSequence, dict[str, str] | None]:
    """The thunk sequence of the program that XLA dumped into `directory`, and its options.

    Autotuning may dump small programs beside it: the longest sequence is the program's. The options
    are None where XLA did not write its configuration.

    Args:
        directory: Where XLA dumped what it compiled, and nothing else.
        name: What errors call the program.

    Raises:
        CaptureError: There is none.
    """
    # The second kind is written only where a pass, such as that to command buffers, did something.
    before = sorted(directory.glob("*thunk_sequence.txt"))
    after = sorted(directory.glob("*thunk_sequence_after_thunk_passes*.txt"))
    known = {_module(path): path for path in (*before, *after)}
    if not known:
        raise CaptureError(f"cannot inspect {name}: {_why_nothing(directory)}", stage="compile")
    sequences = {module: parse_thunks(_text(path)) for module, path in known.items()}
    module = max(sequences, key=lambda module: len(sequences[module].thunks))
    config = directory / f"{module}config.pbtxt"
    return sequences[module], effective_options(_text(config)) if config.exists() else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _module(path: Path) -> str:
    return path.name.partition("thunk_sequence")[0]


def _why_nothing(directory: Path) -> str:
    if any(directory.iterdir()):
        return "XLA dumped no thunk sequence, as backends other than a GPU's do"
    return (
        "XLA dumped nothing, as if JAX's persistent cache had given the executable: "
        "set JAX_ENABLE_COMPILATION_CACHE=false and try again"
    )
