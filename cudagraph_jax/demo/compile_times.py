"""What compiling took, noted beside the executables: a run that loads them can tell what it saved.

A store leaves alone what is none of its files. The note decides nothing, and may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import jax

from cudagraph_jax import GraphStore
from cudagraph_jax._base.files import ReportError, write_json

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
