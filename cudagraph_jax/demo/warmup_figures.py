"""The demo's warm-up, measured: what was compiled, and what a store had already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax

from cudagraph_jax import GraphStore, WarmupReport
from cudagraph_jax._base.files import ReportError, write_json
from cudagraph_jax.demo.encoder import Encoder
from cudagraph_jax.report.progress import Callback
from cudagraph_jax.report.warmup_report import Status
from cudagraph_jax.xla.compiles import CompileCounter


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketFigures:
    """One captured bucket.

    Attributes:
        bucket: Its sizes.
        capture_time_ms: Time to compile or load it.
        memory_bytes: None where the compiler does not say.
        status: What became of it.
    """

    bucket: str
    capture_time_ms: float
    memory_bytes: int | None
    status: Status = "captured"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFigures:
    """What a store had to do with a warm-up.

    Attributes:
        path: The store's directory.
        loaded: Buckets that were loaded from it.
        compiled: Buckets that were compiled.
        written: Executables that were put there.
        seconds: Time to compile and load all of them, without their runs.
        compile_seconds: What compiling all of them took, now or in earlier runs; None if unknown.
    """

    path: str
    loaded: int
    compiled: int
    written: int
    seconds: float
    compile_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupFigures:
    """The warm-up.

    Attributes:
        buckets: The largest first.
        seconds: The whole of it, with the runs.
        compiles: XLA compiles; None where JAX does not report them.
        store: What a store had to do with it; None without one.
    """

    buckets: tuple[BucketFigures, ...]
    seconds: float
    compiles: int | None
    store: StoreFigures | None = None


def warm_up(
    encoder: Encoder, *, progress: Callback | bool | None, compiles_reported: bool
) -> WarmupFigures:
    """Warms an encoder up, and says how that went.

    Args:
        encoder: What to warm up.
        progress: As for `BucketedFunction.warmup`.
        compiles_reported: Whether this JAX reports its compiles.
    """
    store = encoder.function.manager.store
    before = _written(store)
    with CompileCounter() as counter:
        report = encoder.warmup(progress=progress)
    return WarmupFigures(
        buckets=tuple(
            BucketFigures(
                bucket=str(record.bucket),
                capture_time_ms=record.capture_time_ms,
                memory_bytes=record.memory_bytes,
                status=record.status,
            )
            for record in report.buckets
        ),
        seconds=report.total_ms / 1e3,
        compiles=counter.compiles if compiles_reported else None,
        store=None if store is None else _stored(store, report, _written(store) - before),
    )


def _stored(store: GraphStore, report: WarmupReport, written: int) -> StoreFigures:
    times_ms = {str(record.bucket): record.capture_time_ms for record in report.buckets}
    compiled_ms = {
        str(record.bucket): record.capture_time_ms
        for record in report.buckets
        if record.status == "captured"
    }
    note_compile_times(store, compiled_ms)
    known_ms = {**compile_times_ms(store), **compiled_ms}
    is_known = known_ms.keys() >= times_ms.keys()
    return StoreFigures(
        path=str(store.path),
        loaded=report.loaded,
        compiled=report.captured,
        written=written,
        seconds=sum(times_ms.values()) / 1e3,
        compile_seconds=sum(map(known_ms.__getitem__, times_ms)) / 1e3 if is_known else None,
    )


def _written(store: GraphStore | None) -> int:
    return 0 if store is None else int(store.stats()["written"])


NOTE = "demo-compile-times.json"


def compile_times_ms(store: GraphStore) -> dict[str, float]:
    """Milliseconds by bucket, as earlier runs with this JAX on this kind of device noted them."""
    found = _read(store.path / NOTE).get(_setup())
    times = found.items() if isinstance(found, dict) else ()
    return {bucket: float(time) for bucket, time in times if isinstance(time, int | float)}


def note_compile_times(store: GraphStore, times_ms: Mapping[str, float]) -> None:
    """Adds buckets that were compiled now; where nothing can be written they are forgotten."""
    if store.mode == "ro" or not times_ms:
        return
    known = compile_times_ms(store)
    with suppress(ReportError):
        path = store.path / NOTE
        write_json(path, {**_read(path), _setup(): {**known, **times_ms}})


def _read(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _setup() -> str:
    return f"jax {jax.__version__}, {jax.devices()[0].device_kind}"
