"""Tables: captured buckets, the most replayed first; asked sizes, the most asked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cudagraph_jax._base.html import escaped, table_fragment
from cudagraph_jax._base.text import text_table
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.report.heatmap import bucket_of
from cudagraph_jax.report.words import exact, part, things
from cudagraph_jax.shapes.ladder import Bucket, axis_name

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
        key=lambda item: (-item[1]["replay_count"], bucket_of(item[1])),
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


def sizes_text(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> str:
    """The most asked sizes, and in words what was left out; empty without any."""
    if not sizes:
        return ""
    return "\n".join(
        [
            _title(),
            text_table(*_size_table(sizes, config)),
            *filter(None, [_others(sizes)]),
        ]
    )


def sizes_html(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> str:
    """The same as HTML."""
    if not sizes:
        return ""
    others = _others(sizes)
    note = f"<p>{escaped(others)}</p>" if others else ""
    return table_fragment(_title(), *_size_table(sizes, config)) + note


def _title() -> str:
    return "Most asked sizes"


def _sorted_sizes(sizes: Mapping[Bucket, int]) -> Sequence[tuple[Bucket, int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _size_table(
    sizes: Mapping[Bucket, int], config: CUDAGraphConfig
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header, and a row for each of the most asked sizes."""
    total, shown = sum(sizes.values()), _sorted_sizes(sizes)[:MOST_SIZES]
    axes = ("batch", "seq", *sorted({axis for size, _ in shown for axis, _ in size[2:]}))
    rows = [
        (
            *(str(size.sizes.get(axis, "")) for axis in axes),
            exact(calls),
            part(calls / total) if total else "–",
            *_bucket(size, config),
        )
        for size, calls in shown
    ]
    return (*map(axis_name, axes), "calls", "part of all", "bucket", "padding"), rows


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
