"""Statistics as a manager gives them, made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

ACTING = "\x1b[31m\u202e\a"
"""What acts on a terminal, or turns the text behind it around."""
SHOWN = "\ufffd[31m\ufffd\ufffd"
"""The same as it is shown."""
HOSTILE = "</td></style><script>alert(\"1\")</script><!-- & 'x' ]]> &lt;"


def graph(batch: int, seq: int, replays: int = 0, waste: float = 0.0, **more: Any) -> dict:
    return {
        "batch_size": batch,
        "seq_len": seq,
        "variant": "embed(float32[·,·])",
        "graph_id": 1,
        "state": "warmed",
        "capture_time_ms": 12.6,
        "memory_bytes": 1234567,
        "flops": None,
        "replay_count": replays,
        "total_replay_time_ms": 0.25 * replays,
        "avg_replay_time_ms": 0.25 if replays else 0.0,
        "waste": waste,
        **more,
    }


def keyed(graphs: list[dict]) -> dict[str, dict]:
    """The graphs by the keys that a registry gives them."""
    by_key: dict[str, dict] = {}
    for number, record in enumerate(graphs):
        named = "".join(f",{axis}={size}" for axis, size in record.get("axes", {}).items())
        key = f"{record['batch_size']}x{record['seq_len']}{named}"
        by_key[f"{key}#{number}" if key in by_key else key] = record
    return by_key


def registry_stats(graphs: Mapping[str, dict]) -> dict[str, Any]:
    replays = sum(record["replay_count"] for record in graphs.values())
    return {
        "num_graphs": len(graphs),
        "capture_count": len(graphs),
        "total_replays": replays,
        "total_replay_time_ms": 0.25 * replays,
        "avg_replay_time_ms": 0.25 if replays else 0.0,
        "capture_time_ms": 12.6 * len(graphs),
        "load_count": 0,
        "load_time_ms": 0.0,
        "memory_bytes": 2048,
        "evictions": 1,
        "graphs": graphs,
    }


def manager_stats(*graphs: dict, **more: Any) -> dict[str, Any]:
    registry = registry_stats(keyed(list(graphs)))
    hits = registry["total_replays"]
    return {
        "enabled": True,
        "mode": "capture",
        "registry": registry,
        "calls": hits,
        "hits": hits,
        "misses": 0,
        "replays": {"exact": hits, "padded": 0, "larger": 0},
        "captures": 0,
        "splits": 0,
        "splits_by_reason": {},
        "pieces": 0,
        "queued": 0,
        "recorded_again": 0,
        "eager_calls": 0,
        "eager_by_reason": {},
        "errors_by_reason": {},
        "failed_buckets": 0,
        "evictions": 1,
        "real_elements": 0,
        "padded_elements": 0,
        "waste": 0.0,
        "compile_seconds": 12.6e-3 * len(graphs),
        **more,
    }


COUNTS = st.integers(0, 10**15)
SIZES = st.integers(1, 10**6)
REASONS = st.dictionaries(st.text(max_size=9), COUNTS, max_size=3)
GRAPHS = st.builds(
    graph,
    SIZES | st.integers(1, 5),
    SIZES | st.integers(1, 5),
    COUNTS | st.integers(0, 2),
    st.floats(0, 1),
    variant=st.text() | st.just(HOSTILE),
    memory_bytes=st.none() | COUNTS,
    capture_time_ms=st.floats(0, 1e9),
    axes=st.just({}) | st.dictionaries(st.sampled_from(["height", "src"]), st.integers(1, 5)),
)
STATS = st.builds(
    lambda graphs, more: manager_stats(*graphs, **more),
    st.lists(GRAPHS, max_size=60),
    st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["capture", "replay", "none", "disabled"]),
            "enabled": st.booleans(),
            "calls": COUNTS,
            "waste": st.floats(0, 1),
            "real_elements": COUNTS,
            "padded_elements": COUNTS,
            "eager_by_reason": REASONS,
            "errors_by_reason": REASONS,
            "failed_buckets": COUNTS,
        }
    ),
)
