"""What a registry holds and did, in values that JSON can hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cudagraph_jax.capture.build import Builder
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.replay_counts import ReplayTotals


def inventory(
    entries: Iterable[CUDAGraphEntry], *, builder: Builder, totals: ReplayTotals, evictions: int
) -> dict[str, Any]:
    """The figures of a registry; `graphs` by `"8x128"`.

    Further variants of the same bucket have `"#"` and their graph_id behind it.
    """
    held = list(entries)
    graphs: dict[str, object] = {}
    for entry in held:
        key = str(entry.bucket)
        graphs[f"{key}#{entry.graph_id}" if key in graphs else key] = entry.stats()
    return {
        "num_graphs": len(held),
        "capture_count": builder.captures,
        "total_replays": totals.replays,
        "total_replay_time_ms": totals.seconds * 1e3,
        "avg_replay_time_ms": totals.mean_ms,
        "capture_time_ms": builder.capture_ms,
        "load_count": builder.loads,
        "load_time_ms": builder.load_ms,
        "memory_bytes": sum(entry.memory_bytes or 0 for entry in held),
        "evictions": evictions,
        "graphs": graphs,
    }
