"""The table of captured buckets, the most replayed first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cudagraph_jax._base.text import escaped, table_fragment, text_table
from cudagraph_jax.report.words import exact, part, things

NONE_YET = "No bucket is captured yet."

_HEADER = (
    "bucket",
    "replays",
    "waste",
    "mean ms",
    "capture ms",
    "memory bytes",
    "state",
    "function",
)


def buckets_text(stats: Mapping[str, Any]) -> str:
    """Every bucket, a line each."""
    graphs = _sorted(stats)
    return text_table(_HEADER, [_row(*pair) for pair in graphs]) if graphs else NONE_YET


def buckets_html(stats: Mapping[str, Any], *, most: int) -> str:
    """The `most` replayed buckets, and in words what was left out."""
    graphs = _sorted(stats)
    if not graphs:
        return f"<p>{escaped(NONE_YET)}</p>"
    shown, others = graphs[:most], graphs[most:]
    table = table_fragment("Buckets", _HEADER, [_row(*pair) for pair in shown])
    if not others:
        return table
    hits = sum(graph["replay_count"] for _, graph in others)
    return (
        f"{table}<p>Shown: {things(len(shown), 'most replayed bucket')}. Left out: "
        f"{things(len(others), 'bucket')} with {things(hits, 'replay')}.</p>"
    )


def _sorted(stats: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    graphs: Mapping[str, Mapping[str, Any]] = stats["registry"]["graphs"]
    return sorted(
        graphs.items(),
        key=lambda item: (-item[1]["replay_count"], item[1]["batch_size"], item[1]["seq_len"]),
    )


def _row(key: str, graph: Mapping[str, Any]) -> tuple[str, ...]:
    replayed = graph["replay_count"]
    return (
        key,
        exact(replayed),
        part(graph["waste"]) if replayed else "–",
        f"{graph['avg_replay_time_ms']:,.3f}" if replayed else "–",
        f"{graph['capture_time_ms']:,.0f}",
        "" if graph["memory_bytes"] is None else exact(graph["memory_bytes"]),
        graph["state"],
        graph["variant"],
    )
