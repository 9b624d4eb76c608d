"""What would happen to a call, and what to change."""

from __future__ import annotations

from dataclasses import dataclass

from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.tables import html_table


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would happen to a call; nothing was run.

    Attributes:
        name: The function's name.
        mode: REPLAY, CAPTURE, or NONE and DISABLED for an eager run.
        sizes: The call's (batch, seq_len).
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

    def __str__(self) -> str:
        what = "an error" if self.error else self.mode.name
        where = "" if self.bucket is None else f" in the bucket {self.bucket}"
        remedy = f" To change that: {self.remedy}." if self.remedy else ""
        return f"{self.name} at {self.sizes}: {what}{where}, because {self.reason}.{remedy}"

    def _repr_html_(self) -> str:
        rows = [
            ("call", f"{self.name} at {self.sizes}"),
            ("happens", "error" if self.error else self.mode.name),
            ("bucket", "" if self.bucket is None else str(self.bucket)),
            ("because", self.reason),
            ("to change", self.remedy),
        ]
        return html_table("Explanation", ("", ""), rows)
