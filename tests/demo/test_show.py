"""How the figures look."""

import dataclasses
import io
import subprocess
import sys

import pytest

from cudagraph_jax.demo.figures import Comparison, Padding, TrafficFigures, WarmupFigures
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
        "4x32    250         1.0",
    ]
