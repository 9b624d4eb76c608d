"""Tables: captured buckets, the most replayed first; asked sizes, the most asked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cudagraph_jax._base.html import escaped, table_fragment
from cudagraph_jax._base.text import text_table
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.report.words import exact, part, things
from cudagraph_jax.shapes.ladder import Bucket

NONE_YET = "No bucket is captured yet."

_BUCKET_HEADER = (
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
    graphs = _sorted_graphs(stats)
    return (
        text_table(_BUCKET_HEADER, [_bucket_row(*pair) for pair in graphs]) if graphs else NONE_YET
    )


def buckets_html(stats: Mapping[str, Any], *, most: int) -> str:
    """The `most` replayed buckets, and in words what was left out."""
    graphs = _sorted_graphs(stats)
    if not graphs:
        return f"<p>{escaped(NONE_YET)}</p>"
    shown, others = graphs[:most], graphs[most:]
    table = table_fragment("Buckets", _BUCKET_HEADER, [_bucket_row(*pair) for pair in shown])
    if not others:
        return table
    hits = sum(graph["replay_count"] for _, graph in others)
    return (
        f"{table}<p>Shown: {things(len(shown), 'most replayed bucket')}. Left out: "
        f"{things(len(others), 'bucket')} with {things(hits, 'replay')}.</p>"
    )


def _sorted_graphs(stats: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    graphs: Mapping[str, Mapping[str, Any]] = stats["registry"]["graphs"]
    return sorted(
        graphs.items(),
        key=lambda item: (-item[1]["replay_count"], item[1]["batch_size"], item[1]["seq_len"]),
    )


def _bucket_row(key: str, graph: Mapping[str, Any]) -> tuple[str, ...]:
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


MOST_SIZES = 20
"""Sizes shown."""

_SIZE_HEADER = ("batch", "seq_len", "calls", "part of all", "bucket", "padding")


def sizes_text(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> str:
    """The most asked sizes, and in words what was left out; empty without any."""
    if not sizes:
        return ""
    return "\n".join(
        [
            _title(),
            text_table(_SIZE_HEADER, _size_rows(sizes, config)),
            *filter(None, [_others(sizes)]),
        ]
    )


def sizes_html(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> str:
    """The same as HTML."""
    if not sizes:
        return ""
    others = _others(sizes)
    note = f"<p>{escaped(others)}</p>" if others else ""
    return table_fragment(_title(), _SIZE_HEADER, _size_rows(sizes, config)) + note


def _title() -> str:
    return "Most asked sizes"


def _sorted_sizes(sizes: Mapping[Bucket, int]) -> Sequence[tuple[Bucket, int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _size_rows(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> list[tuple[str, ...]]:
    total = sum(sizes.values())
    return [
        (
            str(size[0]),
            str(size[1]),
            exact(calls),
            part(calls / total) if total else "–",
            *_bucket(size, config),
        )
        for size, calls in _sorted_sizes(sizes)[:MOST_SIZES]
    ]


def _bucket(size: Bucket, config: CUDAGraphConfig) -> tuple[str, str]:
    """The bucket that the configuration pads a size to, and the padding in it."""
    if not config.admits(size):
        return "none: outside the limits", "–"
    bucket = config.padded(size)
    return str(bucket), part(1 - size.elements / bucket.elements)


def _others(sizes: Mapping[Bucket, int]) -> str:
    others = _sorted_sizes(sizes)[MOST_SIZES:]
    if not others:
        return ""
    calls = sum(count for _, count in others)
    return f"Left out: {things(len(others), 'size')} with {things(calls, 'call')}."
