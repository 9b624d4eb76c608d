"""`cudagraph-jax plan`."""

from __future__ import annotations

import argparse
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cudagraph_jax._base.files import check_writable, write_json, write_whole
from cudagraph_jax._base.text import text_table
from cudagraph_jax.cli.options import axis_column, axis_multiple, headroom, part, positive
from cudagraph_jax.cli.trace import STDIN, read_sizes
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.costs import chosen_cost
from cudagraph_jax.planning.evaluation import Evaluation, evaluate, standard_grids
from cudagraph_jax.planning.observed import BATCH_SEQ, Observed, Sizes, checked_axes
from cudagraph_jax.planning.plan import BucketPlan
from cudagraph_jax.planning.planner import Headroom, plan_buckets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cudagraph_jax.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "plan",
        help="the buckets that waste least on your own traffic",
        description=(
            "Reads the sizes of requests from a trace, finds the grid of buckets that wastes least "
            "on them, compares it with powers of two, vLLM's and SGLang's, and prints the "
            "configuration to paste. Starts no accelerator."
        ),
    )
    parser.add_argument(
        "trace",
        metavar="TRACE",
        help="a .csv file with a header, or .jsonl or .ndjson; - for CSV on the standard input",
    )
    columns = parser.add_mutually_exclusive_group(required=True)
    columns.add_argument("--column", metavar="NAME", help="the column of the sequence lengths")
    columns.add_argument(
        "--axis",
        type=axis_column,
        action="append",
        metavar="NAME=COLUMN",
        help="an axis and the column of its sizes, once for each axis of the buckets: src=Prompt",
    )
    parser.add_argument(
        "--max-graphs", required=True, type=positive, metavar="N", help="the most buckets"
    )
    parser.add_argument("--batch-column", metavar="NAME", help="the column of the batch sizes")
    _add_options(parser)
    parser.set_defaults(run=_run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    for axis, sizes in (("batch", "batch sizes"), ("seq", "sequence lengths")):
        parser.add_argument(
            f"--{axis}-multiple",
            type=positive,
            default=1,
            metavar="N",
            help=f"{sizes} of buckets are multiples of N",
        )
    parser.add_argument(
        "--multiple",
        type=axis_multiple,
        action="append",
        default=[],
        metavar="NAME=N",
        help="sizes of buckets on an axis are multiples of N: src=8",
    )
    parser.add_argument(
        "--max-padding",
        type=part,
        metavar="FRACTION",
        help="no request seen may leave more of its bucket empty",
    )
    parser.add_argument(
        "--headroom",
        type=headroom,
        action="append",
        default=[],
        metavar="SIZE",
        help=(
            "a bucket for sizes not seen yet: up to a seq_len (14050), up to a batch and a "
            "seq_len (16x256), up to a size of an axis (src=512, once for each), or by a fraction "
            "above the largest seen (0.25)"
        ),
    )
    parser.add_argument(
        "--max-bucket-elements",
        type=positive,
        metavar="N",
        help="no bucket has sizes that multiply to more: a token budget",
    )
    parser.add_argument(
        "--fit-on",
        type=part,
        metavar="FRACTION",
        help="plan from this part of the rows, the first of them, and try the plan on the rest",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw waste over buckets (.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write plan and config as JSON")


def _run(options: argparse.Namespace) -> int:
    _refuse_one_file_twice(options)
    if options.json is not None:
        check_writable(options.json)
    if options.plot is not None:
        check_plot(options.plot)
    axes, columns = _axes(options)
    seen, rest = _divided(read_sizes(options.trace, columns), options.fit_on)
    plan = plan_buckets(
        seen,
        axes=axes,
        max_graphs=options.max_graphs,
        batch_multiple=options.batch_multiple,
        seq_multiple=options.seq_multiple,
        multiples=dict(options.multiple),
        headroom=_headroom(options.headroom),
        max_padding=options.max_padding,
        max_bucket_elements=options.max_bucket_elements,
    )
    print(plan)
    held_out = None if rest is None else HeldOut.of(plan, rest)
    if held_out is not None:
        print(f"\n{held_out}")
    config = CUDAGraphConfig.from_plan(plan, max_bucket_elements=options.max_bucket_elements)
    source = config_source(config, lengths_alone="batch" not in axes or len(columns) < len(axes))
    print(f"\nThe configuration to paste:\n\n{source}")
    if options.json is not None:
        tried = None if held_out is None else held_out.to_dict()
        written = {**plan.to_dict(), "held_out": tried, "config": config.to_dict()}
        write_json(options.json, written)
    if options.plot is not None:
        save_plot(plan, options.plot)
    return 0


def _axes(options: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the axes, and the columns of their sizes: lengths alone have one for both."""
    if options.axis is None:
        batch = () if options.batch_column is None else (options.batch_column,)
        return BATCH_SEQ, (*batch, options.column)
    if options.batch_column is not None:
        raise ConfigError(
            f"--batch-column {options.batch_column} goes with --column: write --axis "
            f"batch={options.batch_column} beside the other axes"
        )
    axes = checked_axes([axis for axis, _ in options.axis])
    return axes, tuple(column for _, column in options.axis)


def _headroom(given: Sequence[Headroom]) -> Headroom | None:
    """What `--headroom` says: sizes of axes by name, or one thing of another kind."""
    named = [each for each in given if isinstance(each, Mapping)]
    sizes = {axis: size for each in named for axis, size in each.items()}
    if len(given) > 1 and len(sizes) < len(given):
        raise ConfigError(
            f"--headroom was given {len(given)} times: give it once, or once for each axis, as "
            "src=512"
        )
    return sizes if named else next(iter(given), None)


def _refuse_one_file_twice(options: argparse.Namespace) -> None:
    """No output takes the place of the trace or of the other output."""
    files = {"--json": options.json, "--plot": options.plot}
    if options.trace != STDIN:
        files = {"TRACE": options.trace, **files}
    names: dict[str, str] = {}
    for name, path in files.items():
        if path is None:
            continue
        other = names.setdefault(os.path.realpath(path), name)
        if other != name:
            raise ConfigError(
                f"{other} and {name} are the same file, {path}: give {name} a file of its own"
            )


def _divided(
    sizes: npt.NDArray[np.int64], fit_on: float | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """What the plan is made from, and what it is tried on."""
    if fit_on is None:
        return sizes, None
    count = int(len(sizes) * fit_on)
    if count < 1:
        raise ConfigError(
            f"--fit-on {fit_on} of {len(sizes)} rows is not one row: give a larger part"
        )
    return sizes[:count], sizes[count:]


_WIDTH = 88
_PUT_BATCHES = "  # no batch sizes were given: put yours here"


def config_source(config: CUDAGraphConfig, *, lengths_alone: bool) -> str:
    """Code that makes a configuration with the same ladders and budget.

    Args:
        config: With a ladder on each axis.
        lengths_alone: Whether its batch ladder is only a place for one.
    """
    batches = _field("capture_sizes", config.capture_sizes, _PUT_BATCHES if lengths_alone else "")
    lengths = _field("capture_seq_lens", config.capture_seq_lens or ())
    named = "".join(
        _field(repr(axis), ladder, indent=8, mark=": ") + "\n"
        for axis, ladder in config.capture_axes.items()
    )
    axes = f"\n    capture_axes={{\n{named}    }}," if named else ""
    budget = config.max_bucket_elements
    axes += "" if budget is None else f"\n    max_bucket_elements={budget},"
    return (
        "from cudagraph_jax import CUDAGraphConfig\n\n"
        f"config = CUDAGraphConfig(\n{batches}\n{lengths}{axes}\n)"
    )


def _field(
    name: str, ladder: Sequence[int], comment: str = "", *, indent: int = 4, mark: str = "="
) -> str:
    margin = " " * indent
    line = f"{margin}{name}{mark}{tuple(ladder)!r},{comment}"
    if len(line) <= _WIDTH:
        return line
    sizes = textwrap.fill(
        ", ".join(map(str, ladder)) + ",",
        _WIDTH,
        initial_indent=margin + " " * 4,
        subsequent_indent=margin + " " * 4,
    )
    return f"{margin}{name}{mark}({comment}\n{sizes}\n{margin}),"


SIZE_INCHES = (8.0, 4.5)
DPI = 150


def check_plot(path: Path) -> None:
    """Finds out what would keep the figure from being drawn or written.

    Raises:
        ConfigError: matplotlib is not installed, or does not write such files.
        ReportError: The file could not be written.
    """
    if _form(path) not in _figure().canvas.get_supported_filetypes():
        raise ConfigError(
            f"{path} is no kind of picture: give a name that ends in .png, .svg or .pdf"
        )
    check_writable(path)


def save_plot(plan: BucketPlan, path: Path) -> None:
    """Draws waste over number of buckets.

    Raises:
        ConfigError: matplotlib is not installed.
        ReportError: The file cannot be written.
    """
    figure = _figure()
    plan.plot(figure.subplots())
    drawn = io.BytesIO()
    figure.savefig(drawn, format=_form(path), dpi=DPI)
    write_whole(path, drawn.getvalue())


def _form(path: Path) -> str:
    """What kind of picture the name asks for, in matplotlib's words."""
    return path.suffix.lower().removeprefix(".")


def _figure() -> Figure:
    # No pyplot: it looks for a display and keeps every figure.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: run pip install 'cudagraph-jax[plot]'"
        ) from error
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
        observed = Observed.of(sizes, plan.axes)
        cost = chosen_cost(None, plan.axes)
        return cls(
            plan=plan.evaluate(sizes),
            standard={
                grid.name: evaluate(observed, grid.ladders, cost)
                for grid in standard_grids(plan.axes, observed.largest)
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
