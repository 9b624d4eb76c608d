"""A planned grid: its ladders, what it wastes, and what others would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cudagraph_jax._base.html import escaped, styled, table_fragment
from cudagraph_jax._base.text import text_table
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.planning.costs import Cost, chosen_cost
from cudagraph_jax.planning.evaluation import Evaluation, evaluate
from cudagraph_jax.planning.observed import Observed, Sizes
from cudagraph_jax.shapes.ladder import Bucket, Ladder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADER = ("grid", "buckets", "waste")


class PlanPoint(NamedTuple):
    """The least waste of a number of buckets.

    Attributes:
        graphs: The number.
        waste: The part of all cost that is spent on padding, from 0 to 1.
    """

    graphs: int
    waste: float


class PlanRow(NamedTuple):
    """Another grid on the same sizes.

    Attributes:
        name: What it is called.
        graphs: Buckets that the sizes need of it.
        waste: The part of all cost that is spent on padding, from 0 to 1.
    """

    name: str
    graphs: int
    waste: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BucketPlan:
    """The grid that `plan_buckets` found; `CUDAGraphConfig.from_plan` makes a configuration of it.

    Attributes:
        batch_sizes: The batch ladder; `(1,)` from lengths alone.
        seq_lens: The sequence ladder.
        expected_waste: The part of all cost that is spent on padding on the sizes it was planned
            from: the padded part of all elements, unless planned for another cost. From 0 to 1,
            or below 0 where larger buckets are cheaper.
        requests: How many requests it was planned from.
        curve: The least waste found for each number of buckets, ascending: the marginal value of
            one more.
        comparison: What powers of two, vLLM's and SGLang's ladders waste on the same sizes, with
            the buckets that these sizes need of them; multiples and headroom are the plan's alone.
    """

    batch_sizes: Ladder
    seq_lens: Ladder
    expected_waste: float
    requests: int
    curve: tuple[PlanPoint, ...]
    comparison: tuple[PlanRow, ...]

    def __repr__(self) -> str:
        return (
            f"BucketPlan({self.num_graphs} {'bucket' if self.num_graphs == 1 else 'buckets'}: "
            f"{len(self.batch_sizes)}x{len(self.seq_lens)}, "
            f"expected waste {self.expected_waste:.1%})"
        )

    def __str__(self) -> str:
        return (
            f"{self._title()}\n\nbatch_sizes  {_listed(self.batch_sizes)}\n"
            f"seq_lens     {_listed(self.seq_lens)}\n\n"
            f"{text_table(_HEADER, self._compared())}\n\n"
            f"{text_table(('buckets', 'least waste'), self._marginal())}"
        )

    def _repr_html_(self) -> str:
        ladders = [
            ("batch_sizes", _listed(self.batch_sizes)),
            ("seq_lens", _listed(self.seq_lens)),
        ]
        return styled(
            f"<p><b>{escaped(self._title())}</b></p>",
            table_fragment("Ladders", ("ladder", "sizes"), ladders),
            table_fragment("On the same sizes", _HEADER, self._compared()),
            table_fragment("Waste by buckets", ("buckets", "least waste"), self._marginal()),
        )

    @property
    def num_graphs(self) -> int:
        """How many buckets the grid has."""
        return len(self.batch_sizes) * len(self.seq_lens)

    def buckets(self) -> tuple[Bucket, ...]:
        """The grid, ascending."""
        return tuple(
            Bucket(batch, length) for batch in self.batch_sizes for length in self.seq_lens
        )

    def evaluate(self, sizes: Sizes, *, cost: Cost | None = None) -> Evaluation:
        """The plan tried on other requests than those that it was planned from.

        Args:
            sizes: As for `plan_buckets`.
            cost: As for `plan_buckets`.

        Raises:
            ConfigError: `sizes` are no sizes, or `cost` is no cost.
        """
        return evaluate(Observed.of(sizes), self.batch_sizes, self.seq_lens, chosen_cost(cost))

    def to_dict(self) -> dict[str, object]:
        """All fields as values that JSON can hold."""
        return {
            "batch_sizes": list(self.batch_sizes),
            "seq_lens": list(self.seq_lens),
            "expected_waste": self.expected_waste,
            "requests": self.requests,
            "curve": [point._asdict() for point in self.curve],
            "comparison": [row._asdict() for row in self.comparison],
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws waste over number of buckets, with the other grids as points.

        Args:
            ax: Where to draw; a new figure of its own if None.

        Raises:
            CUDAGraphError: matplotlib is not installed.
            ConfigError: `ax` is no Axes.
        """
        if ax is not None and not hasattr(ax, "plot"):
            raise ConfigError(
                f"ax={ax!r} is no matplotlib Axes: leave it out, and save the figure with "
                "plan.plot().figure.savefig(path)"
            )
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise CUDAGraphError(
                    "a plot needs matplotlib: pip install 'cudagraph-jax[plot]'"
                ) from error
            _, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
        self._draw(ax)
        return ax

    def _draw(self, ax: Axes) -> None:
        graphs, wastes = zip(*self.curve, strict=True)
        ax.plot(graphs, [100 * waste for waste in wastes], marker=".", label="best grid")
        ax.plot(
            [self.num_graphs],
            [100 * self.expected_waste],
            marker="o",
            linestyle="none",
            label=f"this plan: {self.num_graphs} buckets, {self.expected_waste:.1%}",
        )
        for row, marker in zip(self.comparison, "sD^", strict=False):
            label = f"{row.name}: {row.graphs:,} buckets, {row.waste:.1%}"
            ax.plot([row.graphs], [100 * row.waste], marker=marker, linestyle="none", label=label)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.set_xlabel("buckets")
        ax.set_ylabel("padding, % of all computed")
        ax.set_title(f"Waste over number of buckets, {self.requests:,} requests")
        ax.grid(alpha=0.3)
        ax.legend()

    def _title(self) -> str:
        return f"{self!r} from {self.requests:,} requests"

    def _compared(self) -> list[tuple[str, str, str]]:
        rows = [PlanRow("this plan", self.num_graphs, self.expected_waste), *self.comparison]
        return [(row.name, f"{row.graphs:,}", f"{row.waste:.1%}") for row in rows]

    def _marginal(self) -> list[tuple[str, str]]:
        return [(f"{point.graphs}", f"{point.waste:.1%}") for point in _thinned(self.curve)]


def _listed(ladder: Ladder) -> str:
    return ", ".join(map(str, ladder))


def _thinned(curve: Sequence[PlanPoint]) -> list[PlanPoint]:
    """The points at about doubling numbers of buckets, and the last two: what one more is worth."""
    doubling = {1 << power for power in range(len(curve).bit_length())}
    return [
        point
        for index, point in enumerate(curve)
        if point.graphs in doubling or index >= len(curve) - 2
    ]
