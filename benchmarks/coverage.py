"""How much of the demo's models XLA records into command buffers, for a GPU that need not be here.

    make test-gpu-compiler              # installs XLA's CUDA compiler beside .venv, once
    JAX_PLATFORMS=cpu PYTHONPATH=.venv/cuda .venv/bin/python benchmarks/coverage.py [--gpu h100]

Prints for each program and scope how many steps (kernels, copies, calls of libraries) it has, and
which part of them is recorded. Nothing is run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from decoding import CONTEXT, PROMPT, SCOPES, bucketed_step, fresh_state
from sizes import SIZES

import cudagraph_jax as cg
from cudagraph_jax._base.text import text_table
from cudagraph_jax.demo.bert import model_folder, tokens, weights
from cudagraph_jax.demo.bert.model import encode
from cudagraph_jax.demo.decoder.decoder_params import param_shapes
from cudagraph_jax.demo.decoder.transformer import greedy_prefill
from cudagraph_jax.demo.requirements import DemoError
from cudagraph_jax.graphs.inspection import inspect
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket

HEADER = ("program", "scope", "graphs", "steps", "recorded", "left outside")

Bucketed = cg.BucketedFunction[..., Any]


def programs(size: str) -> Iterator[tuple[str, Bucketed, tuple[Any, ...], Bucket]]:
    """A name, a function, its arguments and a bucket."""
    params = param_shapes(SIZES[size])
    for batch in (1, 8, 64):
        state = jax.eval_shape(lambda batch=batch: fresh_state(size, batch))
        step = bucketed_step(batch, SCOPES["FULL"])
        yield f"decode {size}", step, (params, *state), Bucket(batch, CONTEXT)
    prefill = cg.bucket_jit(greedy_prefill, in_axes=(None, "batch seq", "batch"), unpad="none")
    prompt = np.zeros((1, PROMPT), np.int32), np.full(1, PROMPT, np.int32)
    yield f"prefill {size}", prefill, (params, *prompt), Bucket(1, PROMPT)


def encoders() -> Iterator[tuple[str, Bucketed, tuple[Any, ...], Bucket]]:
    """The demo's MiniLM in its smallest and its largest bucket."""
    folder = model_folder.find_model()
    params = weights.load_params(folder)
    example = tokens.stack(tokens.load_tokenizer(folder)(["How do I sort an array?"]))
    encoder = cg.bucket_jit(encode, in_axes=(None, "batch seq", "batch seq"))
    for bucket in (Bucket(1, 16), Bucket(16, 256)):
        yield "encoder", encoder, (params, *example), bucket


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100", help="as for `cudagraph-jax inspect`")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b", "3b"])
    options = parser.parse_args()
    scopes = {name: scope.compiler_options() for name, scope in SCOPES.items()}
    asked = [program for size in options.sizes for program in programs(size)]
    try:
        asked += encoders()
    except DemoError as error:
        print(f"encoder: left out: {error}", flush=True)
    rows = []
    start = time.perf_counter()
    for name, function, args, bucket in asked:
        task = function.describe(*args)
        found = inspect(Program(task), bucket, scopes, gpu=options.gpu)
        for scope in found.scopes:
            left = ", ".join(f"{kind.kind} {kind.number}" for kind in scope.outside)
            steps = scope.recorded + scope.left
            covered = f"{scope.coverage or 0:.1%}"
            buffers = str(scope.command_buffers)
            rows.append((f"{name} {bucket}", scope.scope, buffers, str(steps), covered, left))
    print(f"{found.platform}, jax {jax.__version__}, {time.perf_counter() - start:.0f} s")
    print(text_table(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
