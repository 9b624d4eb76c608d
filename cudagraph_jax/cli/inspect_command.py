"""`cudagraph-jax inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cudagraph_jax._base.files import check_writable, write_json
from cudagraph_jax.cli.options import named_size, positive
from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.xla.gpus import GPUS

if TYPE_CHECKING:
    from cudagraph_jax.cli.options import Commands


_DESCRIPTION = """\
Compiles one bucket with each command-buffer scope, and says how many of its steps XLA records into
command buffers, which stay outside and why. On a CPU there are none; with --gpu it is compiled for
a GPU that need not be here.

MODULE is imported from the current directory or wherever Python finds it. FUNCTION is what
bucket_jit made, or a plain function. What its arguments are like is said by --arg, once for each,
or by --example; a plain function with an example takes --in-axes, too, and a bucketed one that has
captured something needs none of these."""
_EPILOG = """\
examples:
  cudagraph-jax inspect model:embed --batch 8 --seq 128 --example example_arguments
  cudagraph-jax inspect model:mlp --batch 8 --arg 'float32[512,512]' --arg 'float32[batch,512]'
  cudagraph-jax inspect model:mlp --batch 8 --example given --in-axes none --in-axes 'batch _'
  cudagraph-jax inspect model:see --size height=224 --size width=192 \\
    --arg 'float32[batch,height,width,3]'
  JAX_PLATFORMS=cpu cudagraph-jax inspect model:embed --batch 8 --gpu h100"""


def add_to(commands: Commands) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "inspect",
        help="what XLA records of a function into command buffers (the CUDA graph)",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_function(parser)
    _add_compiler(parser)
    parser.set_defaults(run=_run)


def _add_function(parser: argparse.ArgumentParser) -> None:
    """What is compiled."""
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="such as model:embed")
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="N",
        help="the bucket's batch size (default: 1)",
    )
    parser.add_argument(
        "--seq", type=positive, default=1, metavar="N", help="its sequence length (default: 1)"
    )
    parser.add_argument(
        "--size",
        action="append",
        type=named_size,
        default=[],
        metavar="NAME=N",
        help="its size along a further axis, such as height=224; may be given several times "
        "(default: the example's)",
    )
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="DTYPE[DIM,...]",
        help="a positional argument; dimensions are numbers, batch, seq, the axis of a --size, or "
        "what follows from one, as seq+1: 'int32[batch,seq]'",
    )
    parser.add_argument(
        "--example",
        metavar="NAME",
        help="what MODULE has the positional arguments in: a tuple, or a function that gives one",
    )

    parser.add_argument(
        "--in-axes",
        action="append",
        default=[],
        metavar="AXES",
        help="for a plain function with --example, once for each argument: none, or the names of "
        "its dimensions, as for bucket_jit: 'batch seq ...'",
    )


def _add_compiler(parser: argparse.ArgumentParser) -> None:
    """What it is compiled with, and what is written."""
    parser.add_argument(
        "--scope",
        action="append",
        default=[],
        choices=[scope.name for scope in CommandBufferScope],
        help="compile with this scope alone; may be given several times (default: all). A bucketed "
        "function is compiled with its own options besides",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further option of XLA's compiler; may be given several times",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME|FILE",
        help=f"compile for this GPU, be it here or not: {', '.join(GPUS)}, or a "
        "gpu_target_config.pbtxt of XLA's; takes JAX's CUDA plugin",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")


def _run(options: argparse.Namespace) -> int:
    # Only here: it imports JAX, which takes most of a second, and what the module imports.
    from cudagraph_jax.cli.named_function import inspected

    if options.json is not None:
        check_writable(options.json)
    scopes = [CommandBufferScope[name] for name in options.scope] or list(CommandBufferScope)
    found = inspected(
        options.function,
        {"batch": options.batch, "seq": options.seq, **dict(options.size)},
        arguments=options.arg,
        example=options.example,
        in_axes=options.in_axes,
        scopes=scopes,
        compiler_options=options.option,
        gpu=options.gpu,
    )
    print(found)
    if options.json is not None:
        write_json(options.json, found.to_dict())
    return 0
