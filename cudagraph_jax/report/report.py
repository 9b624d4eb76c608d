"""All that is known of a manager at one moment, to print, to look at and to keep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cudagraph_jax._base.files import write_whole
from cudagraph_jax._base.html import escaped, pairs_fragment, styled, table_fragment
from cudagraph_jax._base.text import one_line, text_pairs, text_table
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.report.heatmap import ON_A_PAGE, HeatGrid
from cudagraph_jax.report.page import page, section
from cudagraph_jax.report.summary import alerts, headline, stats_text, tiles, totals, troubles
from cudagraph_jax.report.tables import buckets_html, sizes_html, sizes_text
from cudagraph_jax.shapes.ladder import Bucket

_MANY = 200
_FAILURES = ("bucket", "function", "error")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report:
    """A snapshot of a manager, readable as text, in a notebook and as an HTML file.

    `print(report)` shows it as text; a notebook shows it with heat maps; `save` writes a page that
    needs nothing else.

    Attributes:
        name: What it is about.
        made_at: When.
        stats: What `CUDAGraphManager.stats` gave.
        config: The configuration.
        environment: What it ran on, as labels and values.
        sizes: How often each size was asked for.
        failures: Buckets that could not be captured: bucket, function and error.
    """

    name: str
    made_at: datetime
    stats: Mapping[str, Any]
    config: CUDAGraphConfig
    environment: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[Bucket, int] = field(default_factory=dict)
    failures: Sequence[tuple[str, str, str]] = ()

    def __repr__(self) -> str:
        graphs = self.stats["registry"]["num_graphs"]
        return one_line(f"Report({self.name}, {graphs} graphs, {self.moment})")

    def __str__(self) -> str:
        parts = [
            stats_text(f"{self.name}, {self.moment}", self.stats),
            sizes_text(self.sizes, self.config),
            _titled("Failures", text_table(_FAILURES, self.failures) if self.failures else ""),
            _titled("Configuration", text_pairs(self._configuration())),
            _titled("Environment", text_pairs(list(self.environment.items()))),
        ]
        return "\n\n".join(filter(None, parts))

    def _repr_html_(self) -> str:
        return styled(f"<p><b>{escaped(self.name)}</b>, {escaped(self.moment)}</p>", self.body())

    def html(self) -> str:
        """A complete HTML document; it loads nothing from elsewhere and runs no script."""
        return page(self.name, self.moment, self.body())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `html()` to a file, whole or not at all, and gives its absolute path.

        Args:
            path: The file; one that is there is replaced. Its folder must exist.

        Raises:
            ConfigError: `path` is no path.
            OSError: The file cannot be written, as a `CUDAGraphError` that says why; what was
                there before is untouched.
        """
        return write_whole(path, self.html())

    @property
    def moment(self) -> str:
        """When it was made, as a text."""
        return self.made_at.isoformat(sep=" ", timespec="seconds")

    def body(self) -> str:
        """The content of the page, as HTML without its style; it is the same in a notebook."""
        stats = self.stats
        maps: list[str] = []
        if stats["registry"]["graphs"]:
            maps = [each.html() for each in HeatGrid.of(stats, most=ON_A_PAGE).maps()]
        failures = table_fragment("Failures", _FAILURES, self.failures) if self.failures else ""
        environment = list(self.environment.items())
        return "\n".join(
            [
                tiles(headline(stats)),
                alerts(troubles(stats)),
                section("Failures", failures),
                section("Hits and waste", *maps),
                section("Buckets", buckets_html(stats, most=_MANY)),
                section("Most asked sizes", sizes_html(self.sizes, self.config)),
                section("Totals", pairs_fragment("Totals", totals(stats))),
                section("Configuration", pairs_fragment("Configuration", self._configuration())),
                section(
                    "Environment",
                    pairs_fragment("Environment", environment) if environment else "",
                ),
            ]
        )

    def _configuration(self) -> list[tuple[str, str]]:
        return [(name, _shown(value)) for name, value in self.config.to_dict().items()]


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}={option}" for name, option in value.items()) or "none"
    return "none" if value is None else str(value)


def _titled(title: str, text: str) -> str:
    return f"{title}\n{text}" if text else ""
