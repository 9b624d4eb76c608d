"""Statistics for a terminal and for a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cudagraph_jax._base.html import styled
from cudagraph_jax._base.text import escaped, one_line, text_pairs
from cudagraph_jax.report.grid import ON_A_TERMINAL, Grid
from cudagraph_jax.report.summary import alerts, headline, tiles, totals, troubles
from cudagraph_jax.report.tables import NONE_YET, buckets_html, buckets_text

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
    grid = Grid.of(stats, most=ON_A_TERMINAL)
    maps = [grid.hits_map().text(), grid.waste_map().text()]
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
