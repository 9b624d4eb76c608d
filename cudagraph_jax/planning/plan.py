"""A planned grid: its ladders, what it wastes, and what others would."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cudagraph_jax._base.html import escaped, styled, table_fragment
from cudagraph_jax._base.text import text_table
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.planning.costs import Cost, chosen_cost
from cudagraph_jax.planning.evaluation import Evaluation, evaluate
from cudagraph_jax.planning.observed import BATCH_SEQ, Observed, Sizes, checked_axes
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
        batch_sizes: The batch ladder; `(1,)` from lengths alone, or without the axis "batch".
        seq_lens: The sequence ladder; `(1,)` without the axis "seq".
        expected_waste: The part of all cost that is spent on padding on the sizes it was planned
            from: the padded part of all elements, unless planned for another cost. From 0 to 1,
            or below 0 where larger buckets are cheaper.
        requests: How many requests it was planned from.
        curve: The least waste found for each number of buckets, ascending: the marginal value of
            one more.
        comparison: What powers of two, vLLM's and SGLang's ladders waste on the same sizes, with
            the buckets that these sizes need of them; multiples and headroom are the plan's alone.
        axes: The names of the axes, in the order of a size.
        further_sizes: The ladders of those that are not "batch" or "seq", in that order; see
            `sizes` for all of them by their names.
        worst_padding: The largest part of its bucket's elements that is padding for any request it
            was planned from; None where no bound was asked for.
    """

    batch_sizes: Ladder
    seq_lens: Ladder
    expected_waste: float
    requests: int
    curve: tuple[PlanPoint, ...]
    comparison: tuple[PlanRow, ...]
    axes: tuple[str, ...] = BATCH_SEQ
    further_sizes: tuple[Ladder, ...] = ()
    worst_padding: float | None = None

    @classmethod
    def of(
        cls,
        sizes: Mapping[str, Ladder],
        *,
        expected_waste: float,
        requests: int,
        curve: tuple[PlanPoint, ...],
        comparison: tuple[PlanRow, ...],
        worst_padding: float | None = None,
    ) -> Self:
        """The plan with these ladders, by the names of their axes, in the order of a size."""
        return cls(
            batch_sizes=sizes.get("batch", Ladder((1,))),
            seq_lens=sizes.get("seq", Ladder((1,))),
            axes=tuple(sizes),
            further_sizes=tuple(sizes[axis] for axis in sizes if axis not in BATCH_SEQ),
            expected_waste=expected_waste,
            requests=requests,
            curve=curve,
            comparison=comparison,
            worst_padding=worst_padding,
        )

    @property
    def sizes(self) -> dict[str, Ladder]:
        """The ladder of each axis by its name, in the order of a size."""
        further = iter(self.further_sizes)
        own = {"batch": self.batch_sizes, "seq": self.seq_lens}
        return {axis: own[axis] if axis in own else next(further) for axis in self.axes}

    def __repr__(self) -> str:
        named = [
            f"{len(ladder)}" if self.axes == BATCH_SEQ else f"{axis} {len(ladder)}"
            for axis, ladder in self.sizes.items()
        ]
        by = "x" if self.axes == BATCH_SEQ else " x "
        return (
            f"BucketPlan({self.num_graphs} {'bucket' if self.num_graphs == 1 else 'buckets'}: "
            f"{by.join(named)}, expected waste {self.expected_waste:.1%})"
        )

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self._ladders())
        ladders = "\n".join(f"{name:{width}}  {sizes}" for name, sizes in self._ladders())
        return (
            f"{self._title()}\n\n{ladders}\n\n"
            f"{text_table(_HEADER, self._compared())}\n\n"
            f"{text_table(('buckets', 'least waste'), self._marginal())}"
        )

    def _repr_html_(self) -> str:
        return styled(
            f"<p><b>{escaped(self._title())}</b></p>",
            table_fragment("Ladders", ("ladder", "sizes"), self._ladders()),
            table_fragment("On the same sizes", _HEADER, self._compared()),
            table_fragment("Waste by buckets", ("buckets", "least waste"), self._marginal()),
        )

    @property
    def num_graphs(self) -> int:
        """How many buckets the grid has."""
        return math.prod(len(ladder) for ladder in self.sizes.values())

    def buckets(self) -> tuple[Bucket, ...]:
        """The grid, ascending."""
        ladders = {"batch": self.batch_sizes, "seq": self.seq_lens, **self.sizes}
        return tuple(
            Bucket.of(dict(zip(ladders, sizes, strict=True)))
            for sizes in itertools.product(*ladders.values())
        )

    def evaluate(self, sizes: Sizes, *, cost: Cost | None = None) -> Evaluation:
        """The plan tried on other requests than those that it was planned from.

        Args:
            sizes: As for `plan_buckets`.
            cost: As for `plan_buckets`.

        Raises:
            ConfigError: `sizes` are no sizes, or `cost` is no cost.
        """
        observed = Observed.of(sizes, self.axes)
        return evaluate(observed, [*self.sizes.values()], chosen_cost(cost, self.axes))

    def to_dict(self) -> dict[str, object]:
        """All fields as values that JSON can hold; ladders by their axes where these were named."""
        sizes: dict[str, object] = {axis: list(ladder) for axis, ladder in self.sizes.items()}
        pair = {"batch_sizes": list(self.batch_sizes), "seq_lens": list(self.seq_lens)}
        padding = {} if self.worst_padding is None else {"worst_padding": self.worst_padding}
        return {
            **(pair if self.axes == BATCH_SEQ else {"axes": list(self.axes), "sizes": sizes}),
            "expected_waste": self.expected_waste,
            **padding,
            "requests": self.requests,
            "curve": [point._asdict() for point in self.curve],
            "comparison": [row._asdict() for row in self.comparison],
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """The plan that `to_dict` gave `d`, through JSON or not; what else is in it is passed over.

        Raises:
            ConfigError: `d` is no such mapping.
        """
        try:
            axes = checked_axes(d.get("axes", BATCH_SEQ))
            pair = {"batch": d.get("batch_sizes"), "seq": d.get("seq_lens")}
            sizes = d.get("sizes", pair)
            return cls.of(
                {axis: Ladder(sizes[axis], name=axis) for axis in axes},
                expected_waste=float(d["expected_waste"]),
                requests=int(d["requests"]),
                curve=tuple(PlanPoint(**point) for point in d["curve"]),
                comparison=tuple(PlanRow(**row) for row in d["comparison"]),
                worst_padding=d.get("worst_padding"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"d={d!r:.80} is no plan: give what to_dict() gave") from error

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
                f"ax={ax!r:.80} is no matplotlib Axes: leave it out, and save the figure with "
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
        worst = self.worst_padding
        bound = "" if worst is None else f", none padded by more than {worst:.1%}"
        return f"{self!r} from {self.requests:,} requests{bound}"

    def _ladders(self) -> list[tuple[str, str]]:
        names = ("batch_sizes", "seq_lens") if self.axes == BATCH_SEQ else self.axes
        return list(zip(names, map(_listed, self.sizes.values()), strict=True))

    def _compared(self) -> list[tuple[str, str, str]]:
        rows = [PlanRow("this plan", self.num_graphs, self.expected_waste), *self.comparison]
        return [(row.name, f"{row.graphs:,}", f"{row.waste:.1%}") for row in rows]

    def _marginal(self) -> list[tuple[str, str]]:
        return [(f"{point.graphs}", f"{point.waste:.1%}") for point in _thinned(self.curve)]


def _listed(ladder: Ladder) -> str:
    return ", ".join(map(str, ladder))


def _thinned(curve: Sequence[PlanPoint]) -> list[PlanPoint]:
    """The points at about doubling numbers of buckets, and the last two: what one more is worth."""
    doubling = {1 << power for power in range(curve[-1].graphs.bit_length())}
    return [
        point
        for index, point in enumerate(curve)
        if point.graphs in doubling or index >= len(curve) - 2
    ]
