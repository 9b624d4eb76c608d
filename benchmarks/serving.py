"""What a server pays around its replays on a GPU: warm-up, reload, throughput, memory.

gpu.py calls it. By itself, `python benchmarks/serving.py --size 0.5b --scope FULL` prints as JSON
what memory a step takes in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from decoding import SCOPES, Lab, Steps, bucketed_step
from parts import ChildError, Row, Rows, Run, nvidia_smi
from warmup import RANDOM, random_params

import cudagraph_jax as cg
from cudagraph_jax.demo.bert import tokens
from cudagraph_jax.demo.bert.model import MINILM, encode
from cudagraph_jax.demo.bert.model_folder import PACKAGE
from cudagraph_jax.demo.corpus import numpy_passages
from cudagraph_jax.demo.encoder import Encoder, default_config
from cudagraph_jax.demo.requirements import DemoError

WARMUP_HEADER = ("workers", "seconds", "times as fast as one", "weights")
STORE_HEADER = ("model", "how", "warm-up", "seconds", "tokens after 10 steps", "replays", "shown")
ENCODER_HEADER = ("scope", "warm-up, s", "passages a second", "weights")
MEMORY_HEADER = (
    "model",
    "scope",
    "MiB outside XLA's pool after 5 runs",
    "MiB the compiler reports",
)


def warm_up(run: Run) -> Rows:
    """A grid of 25 buckets, compiled by one worker and by several.

    Each in a process of its own: what XLA's autotuning found in one would help the next.
    """
    alone: float | None = None
    for workers in ("1", "4", "16"):
        args = "--rounds", "1", "--json", "--workers", workers
        try:
            found = run.child("warmup.py", *args, timeout_s=200)
        except ChildError as error:
            yield [workers, f"left out: {error}"]
            continue
        (seconds,) = found["seconds"][workers]
        alone = seconds if workers == "1" else alone
        yield [workers, seconds, alone / seconds if alone else "", found["weights"]]


def store(run: Run) -> Rows:
    """A step that was stored and loaded: is its answer the same, and does it still replay?

    With AUTO, which sets no option of the compiler's: what was compiled with any is stored for
    CPUs alone.

    Raises:
        RuntimeError: The second step was compiled, and not loaded.
    """
    lab = run.labs[0]
    with tempfile.TemporaryDirectory() as directory:
        for how in ("compiled", "loaded"):
            run.begin(f"a step that is {how}")
            yield _stored(lab, directory, how)


def _stored(lab: Lab, directory: str, how: str) -> Row:
    auto = cg.CommandBufferScope.AUTO
    step = bucketed_step(1, auto, store=directory, fingerprint="gpu.py")
    lab.params  # noqa: B018  # made before the clock runs
    start = time.perf_counter()
    report = lab.compile(step, 1)
    seconds = time.perf_counter() - start
    if report is None or (how == "loaded" and report.loaded != 1):
        raise RuntimeError(f"the step was not loaded from the store: {report}")
    loop = Steps(step, lab.params, lab.state(1))
    loop.run(10)
    read = np.asarray(loop.state[1]).tolist()
    (shown,) = step.manager.profile_replays(lambda: loop.run(20)).buckets
    step.manager.close()
    counts = f"{report.captured} captured, {report.loaded} loaded"
    return [lab.size, how, counts, seconds, str(read), shown.replays, shown.shown]


class RandomEncoder(Encoder):
    """The demo's encoder without the model package: random weights, and tokens as random."""

    def __init__(self, config: cg.CUDAGraphConfig) -> None:
        self.config = config
        self.params = jax.device_put(random_params())
        self.tokenize = random_tokens
        self.function = cg.bucket_jit(
            encode, in_axes=(None, "batch seq", "batch seq"), config=config
        )
        self.max_batch_size = max(config.capture_sizes)


def random_tokens(texts: Sequence[str]) -> list[tokens.Row]:
    """A token for four characters of each text, about as many as the tokenizer finds."""
    draw = np.random.default_rng(0)
    lengths = (min(tokens.MAX_TOKENS, 2 + len(text) // 4) for text in texts)
    return [draw.integers(MINILM.vocab_size, size=length).tolist() for length in lengths]


def encoder(run: Run) -> Rows:
    """Passages a second of the demo's encoder without command buffers and with all of them."""
    texts = [passage.text for passage in numpy_passages(limit=300)]
    for name in ("NONE", "FULL"):
        run.begin(f"the encoder with {name}")
        config = replace(default_config(), command_buffers=SCOPES[name])
        try:
            served, whose = Encoder(config), PACKAGE
        except DemoError:
            served, whose = RandomEncoder(config), RANDOM
        start = time.perf_counter()
        served.warmup(progress=False, workers=8)
        warm = time.perf_counter() - start
        taken = []
        for _ in range(run.rounds):
            start = time.perf_counter()
            served.embed(texts)
            taken.append(time.perf_counter() - start)
        yield [name, warm, len(texts) / statistics.median(taken), whose]


def memory(run: Run) -> Rows:
    """Memory outside of XLA's own pool that a step takes by its fifth run, by scope.

    Each scope in a process of its own, since libraries are loaded but once. What a step takes
    without any graph is the row NONE, which the others compare with.
    """
    size = run.labs[0].size
    for name in SCOPES:
        try:
            figures = run.child("serving.py", "--size", size, "--scope", name, timeout_s=100)
        except ChildError as error:
            figures = [f"left out: {error}"]
        yield [size, name, *figures]


def memory_of(size: str, scope: str) -> Row:
    """MiB outside of XLA's pool that a step has taken after five runs, and what XLA reports."""
    lab, step = Lab(size), bucketed_step(1, SCOPES[scope])
    lab.compile(step, 1)
    loop = Steps(step, lab.params, lab.state(1))
    jax.block_until_ready(loop.state)
    # Of all processes together; a graph lies outside of what JAX counts.
    before = nvidia_smi("memory.used")
    loop.run(5)
    after = nvidia_smi("memory.used")
    known = before is not None and after is not None
    grown = int(after) - int(before) if known else "not reported"
    return [grown, (step.registry.entries()[0].memory_bytes or 0) / 2**20]


def main() -> int:
    """Prints the figures of a scope."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--scope", choices=SCOPES, default="FULL")
    options = parser.parse_args()
    print(json.dumps(memory_of(options.size, options.scope)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
