"""Statistics as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cudagraph_jax.tables import html_table, text_table

_HEADER = ("bucket", "variant", "capture ms", "memory bytes", "replays", "mean ms", "waste")


def stats_text(name: str, stats: Mapping[str, Any]) -> str:
    """A table of all buckets under a line of totals."""
    return f"{_title(name, stats)}\n{text_table(_HEADER, _rows(stats))}"


def stats_html(name: str, stats: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return html_table(_title(name, stats), _HEADER, _rows(stats))


def _title(name: str, stats: Mapping[str, Any]) -> str:
    return (
        f"{name}: mode {stats['mode']}, {stats['calls']} calls, {stats['hits']} hits, "
        f"{stats['misses']} misses, {stats['eager_calls']} eager, "
        f"{stats['waste']:.1%} of computed elements were padding"
    )


def _rows(stats: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            key,
            graph["variant"],
            f"{graph['capture_time_ms']:.0f}",
            "" if graph["memory_bytes"] is None else f"{graph['memory_bytes']:,}",
            f"{graph['replay_count']}",
            f"{graph['avg_replay_time_ms']:.3f}",
            f"{graph['waste']:.1%}",
        )
        for key, graph in stats["registry"]["graphs"].items()
    ]
