"""A plan tried on requests that it was not planned from."""

from __future__ import annotations

from dataclasses import dataclass

from cudagraph_jax._base.text import text_table
from cudagraph_jax.planning.costs import ELEMENTS
from cudagraph_jax.planning.evaluation import Evaluation, evaluate, standard_grids
from cudagraph_jax.planning.observed import Observed, Sizes
from cudagraph_jax.planning.plan import BucketPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What each grid does to the requests that the plan has not seen; `str()` is a table.

    Attributes:
        plan: The plan's evaluation.
        standard: Powers of two, vLLM's and SGLang's ladders, up to the largest of these requests.
    """

    plan: Evaluation
    standard: dict[str, Evaluation]

    @classmethod
    def of(cls, plan: BucketPlan, sizes: Sizes) -> HeldOut:
        """The plan and the standard ladders, tried on `sizes`."""
        observed = Observed.of(sizes)
        return cls(
            plan=plan.evaluate(sizes),
            standard={
                grid.name: evaluate(observed, grid.batch_sizes, grid.seq_lens, ELEMENTS)
                for grid in standard_grids(*observed.largest)
            },
        )

    def __str__(self) -> str:
        rows = [
            (name, f"{found.graphs:,}", f"{found.waste:.1%}", f"{found.overflows:,}")
            for name, found in {"this plan": self.plan, **self.standard}.items()
        ]
        lines = [
            f"On the other {self.plan.requests:,} requests, which it was not planned from:",
            "",
            text_table(("grid", "buckets", "waste", "overflows"), rows),
        ]
        if self.plan.overflows:
            lines += ["", self._remedy()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """All fields as values that JSON can hold."""
        return {
            **self.plan._asdict(),
            "comparison": [
                {"name": name, **found._asdict()} for name, found in self.standard.items()
            ],
        }

    def _remedy(self) -> str:
        return (
            f"{self.plan.overflows:,} of {self.plan.requests:,} requests are larger than the "
            "largest bucket and not in its waste: --headroom makes room for them."
        )
