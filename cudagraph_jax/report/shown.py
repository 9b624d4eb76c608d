"""What a notebook shows by its statistics."""

from __future__ import annotations

from typing import Any


class ShownByStats:
    """Something that a notebook shows by its statistics."""

    def stats(self) -> dict[str, Any]:
        """Counts and times, as `stats_html` takes them."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        # Here, because most processes that serve show nothing.
        from cudagraph_jax.report.stats import stats_html

        return stats_html(type(self).__name__, self.stats())
