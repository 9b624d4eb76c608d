"""What would happen to a call, and what to change."""

from __future__ import annotations

from dataclasses import dataclass

from cudagraph_jax._base.html import html_pairs
from cudagraph_jax._base.text import one_line
from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.report.words import part
from cudagraph_jax.shapes.ladder import Bucket


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would happen to a call; nothing was run.

    Attributes:
        name: The function's name.
        mode: REPLAY, CAPTURE, or NONE and DISABLED for an eager run.
        sizes: The call's.
        bucket: The bucket it would be padded to; None where there is none.
        reason: Why, in one sentence.
        remedy: What to change for a replay; empty where nothing has to be.
        error: Whether the call would raise instead.
    """

    name: str
    mode: CUDAGraphMode
    sizes: Bucket
    bucket: Bucket | None
    reason: str
    remedy: str = ""
    error: bool = False

    @property
    def waste(self) -> float | None:
        """The part of the bucket that would be padding; None where no bucket holds the call."""
        bucket, sizes = self.bucket, self.sizes
        if bucket is None or not bucket.holds(sizes):
            return None
        return 1 - sizes.elements / bucket.elements

    def __str__(self) -> str:
        where = f" in the bucket {self._where}" if self._where else ""
        remedy = f" To change that: {self.remedy}." if self.remedy else ""
        return one_line(
            f"{self.name} at {self.sizes}: {self._happens}{where}, because {self.reason}.{remedy}"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("happens", self._happens),
            ("bucket", self._where or "none"),
            ("because", self.reason),
            ("to change that", self.remedy or "nothing has to be changed"),
        ]
        return html_pairs(f"{self.name} at {self.sizes}", rows)

    @property
    def _happens(self) -> str:
        if self.error:
            return "an error"
        has_bucket = self.mode in (CUDAGraphMode.REPLAY, CUDAGraphMode.CAPTURE)
        return self.mode.name if has_bucket else f"{self.mode.name}, an eager run"

    @property
    def _where(self) -> str:
        """The bucket that it runs in, and how much of that is padding; empty for eager runs."""
        if self.bucket is None or self.mode not in (CUDAGraphMode.REPLAY, CUDAGraphMode.CAPTURE):
            return ""
        padding = f" ({part(self.waste)} padding)" if self.waste else ""
        return f"{self.bucket}{padding}"
