"""How the figures look."""

import dataclasses
import io
import subprocess
import sys

import pytest

from cudagraph_jax.demo.figures import (
    Comparison,
    Environment,
    Padding,
    TrafficFigures,
    WarmupFigures,
)
from cudagraph_jax.demo.planned_figures import GridFigures, PlannedResult
from cudagraph_jax.demo.show import Screen

FIGURES = TrafficFigures(
    micro_batches=2,
    passages=10,
    seconds=0.5,
    passages_per_second=20.0,
    p50_ms=12.34,
    p99_ms=56.78,
    max_ms=60.0,
    compiles=None,
    stalled_calls=None,
    stalled_seconds=None,
)
PADDING = Padding(hit_rate=1.0, real_elements=3, padded_elements=1, waste=0.25, tokens=2)


@pytest.fixture
def screen():
    return Screen(io.StringIO())


def printed(screen):
    return screen._output.getvalue()


def test_compiles_that_are_not_reported(screen):
    """Where JAX reports no compiles the screen says so, and claims no zero."""
    screen.warmup(WarmupFigures(buckets=(), seconds=1.0, compiles=None))
    screen.traffic(FIGURES, PADDING)
    assert printed(screen).count("not reported by this JAX") == 2


@pytest.mark.parametrize(
    ("of", "expected"), [(2, "the whole stream"), (9, "the first 2 of 9 micro-batches")]
)
def test_part_of_the_stream(screen, of, expected):
    """A comparison over a part of the stream says which."""
    figures = dataclasses.replace(FIGURES, compiles=1, stalled_calls=1, stalled_seconds=0.4)
    comparison = Comparison(
        bucket_jit=FIGURES, jit=figures, jit_again=figures, shapes=2, max_difference=1e-7
    )
    screen.comparison(comparison, of=of)
    assert expected in printed(screen)
    assert "0.4 s" in printed(screen)


@pytest.mark.parametrize(("planned", "is_half"), [(2, True), (3, False), (6, False)])
def test_a_plan_that_does_not_halve_the_padding(screen, planned, is_half):
    """A plan that saves less than half says so, and why."""
    guessed = GridFigures(
        batch_sizes=(1,),
        seq_lens=(16,),
        warmup=WarmupFigures(buckets=(), seconds=1.0, compiles=0),
        traffic=FIGURES,
        padding=dataclasses.replace(PADDING, padded_elements=4),
    )
    padding = dataclasses.replace(PADDING, padded_elements=planned)
    result = PlannedResult(
        environment=Environment(versions={}, backend="cpu", device="cpu", cpu_cores=2),
        passages=10,
        micro_batches=4,
        seen_micro_batches=2,
        seen_passages=5,
        plan={},
        powers_of_two=guessed,
        planned=dataclasses.replace(guessed, padding=padding),
        least_waste=0.1,
        answers=(),
        total_seconds=1.0,
    )
    screen.grids(result)
    assert f"Padded elements: {planned / 4:.2f} times those of powers of two" in printed(screen)
    assert ("Not halved: 5 passages tell little" in printed(screen)) == (not is_half)


def test_plain_text():
    """Without rich the tables are plain text."""
    script = (
        "import sys; sys.modules['rich'] = None\n"
        "from cudagraph_jax.demo.figures import WarmupFigures, BucketFigures\n"
        "from cudagraph_jax.demo.show import Screen\n"
        "bucket = BucketFigures(bucket='4x32', capture_time_ms=250.0, memory_bytes=2**20)\n"
        "Screen().warmup(WarmupFigures(buckets=(bucket,), seconds=1.0, compiles=1))"
    )
    printed_text = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert printed_text.splitlines()[1:] == [
        "Warm-up: 1 bucket in 1.0 s, 1 compile",
        "bucket  compile ms  memory MiB",
        "4x32           250         1.0",
    ]
