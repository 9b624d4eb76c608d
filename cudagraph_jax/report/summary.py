"""What all calls and captures add up to, as labels and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cudagraph_jax._base.html import escaped, styled
from cudagraph_jax._base.text import one_line, text_pairs
from cudagraph_jax.report.heatmap import ON_A_TERMINAL, HeatGrid
from cudagraph_jax.report.tables import NONE_YET, buckets_html, buckets_text
from cudagraph_jax.report.words import exact, listed, milliseconds, part, seconds, things

Pairs = list[tuple[str, str]]


def headline(stats: Mapping[str, Any]) -> Pairs:
    """The few figures that say whether all is well; those of a registry where there is no more."""
    registry = stats["registry"]
    pairs = [("graphs", exact(registry["num_graphs"]))]
    if "calls" in stats:
        pairs += [
            ("mode", stats["mode"]),
            ("calls", exact(stats["calls"])),
            ("hit rate", _hit_rate(stats)),
            ("waste", part(stats["waste"]) if _computed(stats) else "–"),
        ]
    else:
        pairs.append(("replays", exact(registry["total_replays"])))
    return [*pairs, ("compiling", seconds(registry["capture_time_ms"] / 1e3))]


def troubles(stats: Mapping[str, Any]) -> list[str]:
    """What somebody should look at, a sentence each."""
    found = []
    if stats.get("failed_buckets"):
        buckets = things(stats["failed_buckets"], "bucket")
        found.append(f"{buckets} could not be captured; calls of that size run eagerly.")
    if stats.get("errors_by_reason"):
        errors = stats["errors_by_reason"]
        calls = things(sum(errors.values()), "call")
        found.append(f"{calls} ended in an error: {listed(errors.items())}.")
    return found


def totals(stats: Mapping[str, Any]) -> Pairs:
    """All totals of a manager, or of a registry alone."""
    return [*(_calls(stats) if "calls" in stats else []), *_captures(stats)]


def tiles(pairs: Pairs) -> str:
    """Labels and values as HTML, side by side."""
    inner = "".join(
        f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}</dd></div>" for label, value in pairs
    )
    return f'<dl class="tiles">{inner}</dl>'


def alerts(sentences: list[str]) -> str:
    """Sentences that must not be overlooked, as HTML."""
    return "".join(f'<p class="alert">{escaped(sentence)}</p>' for sentence in sentences)


def _hit_rate(stats: Mapping[str, Any]) -> str:
    # A call in pieces is served by captured buckets, too, where it is no miss.
    served = stats["hits"] + stats["splits_by_reason"].get("overflow", 0)
    return part(served / stats["calls"]) if stats["calls"] else "–"


def _computed(stats: Mapping[str, Any]) -> int:
    computed: int = stats["real_elements"] + stats["padded_elements"]
    return computed


def _waste(stats: Mapping[str, Any]) -> str:
    computed = _computed(stats)
    if not computed:
        return "–"
    padding = f"{exact(stats['padded_elements'])} of {exact(computed)} computed elements"
    return f"{part(stats['waste'])}: {padding} were padding"


def _calls(stats: Mapping[str, Any]) -> Pairs:
    eager, errors = stats["eager_by_reason"], stats["errors_by_reason"]
    splits = _with(stats["splits"], stats["splits_by_reason"])
    return [
        ("mode", stats["mode"] if stats["enabled"] else f"{stats['mode']} (switched off)"),
        ("calls", exact(stats["calls"])),
        ("hits", _with(stats["hits"], stats["replays"])),
        ("hit rate", _hit_rate(stats)),
        ("misses", exact(stats["misses"])),
        ("captures in a call", exact(stats["captures"])),
        ("split calls", f"{splits}, in {things(stats['pieces'], 'piece')}"),
        ("eager calls", _with(stats["eager_calls"], eager)),
        ("errors", _with(sum(errors.values()), errors)),
        ("waste", _waste(stats)),
        ("waiting for capture", exact(stats["queued"])),
        ("failed buckets", exact(stats["failed_buckets"])),
    ]


def _captures(stats: Mapping[str, Any]) -> Pairs:
    registry = stats["registry"]
    captures, compile_ms = registry["capture_count"], registry["capture_time_ms"]
    mean = f", {compile_ms / captures:,.0f} ms each" if captures else ""
    return [
        ("graphs", f"{exact(registry['num_graphs'])} held, {exact(registry['evictions'])} evicted"),
        ("memory", f"{exact(registry['memory_bytes'])} bytes"),
        *_closed_over(registry),
        ("captures", exact(captures)),
        ("compiling", f"{seconds(compile_ms / 1e3)} in all{mean}"),
        *_loads(registry),
        ("replays", exact(registry["total_replays"])),
        (
            "replaying",
            f"{milliseconds(registry['total_replay_time_ms'])} in all, "
            f"{registry['avg_replay_time_ms']:,.3f} ms each"
            if registry["total_replays"]
            else "–",
        ),
    ]


def _closed_over(registry: Mapping[str, Any]) -> Pairs:
    closed_over = registry.get("closed_over_bytes")  # older snapshots do not have it
    return [("of it closed over", f"{exact(closed_over)} bytes")] if closed_over else []


def _loads(registry: Mapping[str, Any]) -> Pairs:
    loads, load_ms = registry["load_count"], registry["load_time_ms"]
    if not loads:
        return []
    return [
        ("loaded", f"{exact(loads)} in {seconds(load_ms / 1e3)}, {load_ms / loads:,.0f} ms each")
    ]


def _with(total: int, parts: Mapping[str, int]) -> str:
    inside = listed((name, number) for name, number in parts.items() if number)
    return f"{exact(total)} ({inside})" if inside else exact(total)


_FEW = 20


def stats_text(name: str, stats: Mapping[str, Any]) -> str:
    """Totals, heat maps of hits and of waste, and every bucket.

    Args:
        name: Whose statistics they are.
        stats: What `stats()` of a manager, a function or a registry gives.
    """
    stats = _managers(stats)
    head = [one_line(name), *troubles(stats), text_pairs(totals(stats))]
    if not stats["registry"]["graphs"]:
        return "\n\n".join(["\n".join(head), NONE_YET])
    maps = [each.text() for each in HeatGrid.of(stats, most=ON_A_TERMINAL).maps()]
    return "\n\n".join(["\n".join(head), *maps, buckets_text(stats)])


def stats_html(name: str, stats: Mapping[str, Any]) -> str:
    """The figures that matter and the buckets used most, short enough for a notebook."""
    stats = _managers(stats)
    return styled(
        f"<p><b>{escaped(name)}</b></p>",
        tiles(headline(stats)),
        alerts(troubles(stats)),
        buckets_html(stats, most=_FEW),
    )


def _managers(stats: Mapping[str, Any]) -> Mapping[str, Any]:
    """Statistics in the form that a manager gives, also those of a registry alone."""
    return stats if "registry" in stats else {"registry": stats}
