"""`cudagraph-jax plan`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cudagraph_jax._base.files import check_writable, write_json
from cudagraph_jax.cli.figure import check_plot, save_plot
from cudagraph_jax.cli.held_out import HeldOut
from cudagraph_jax.cli.options import headroom, part, positive
from cudagraph_jax.cli.paste import config_source
from cudagraph_jax.cli.trace import STDIN, Columns, read_sizes
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.planner import plan_buckets

if TYPE_CHECKING:
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
    parser.add_argument(
        "--column", required=True, metavar="NAME", help="the column of the sequence lengths"
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
        "--headroom",
        type=headroom,
        metavar="SIZE",
        help=(
            "a bucket for sizes not seen yet: up to a seq_len (14050), up to a batch and a "
            "seq_len (16x256), or by a fraction above the largest seen (0.25)"
        ),
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
    columns = Columns(options.column, options.batch_column)
    seen, rest = _divided(read_sizes(options.trace, columns), options.fit_on)
    plan = plan_buckets(
        seen,
        max_graphs=options.max_graphs,
        batch_multiple=options.batch_multiple,
        seq_multiple=options.seq_multiple,
        headroom=options.headroom,
    )
    print(plan)
    held_out = None if rest is None else HeldOut.of(plan, rest)
    if held_out is not None:
        print(f"\n{held_out}")
    config = CUDAGraphConfig.from_plan(plan)
    source = config_source(config, lengths_alone=options.batch_column is None)
    print(f"\nThe configuration to paste:\n\n{source}")
    if options.json is not None:
        tried = None if held_out is None else held_out.to_dict()
        write_json(options.json, {**plan.to_dict(), "held_out": tried, "config": config.to_dict()})
    if options.plot is not None:
        save_plot(plan, options.plot)
    return 0


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
