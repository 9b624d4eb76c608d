"""How the figures look."""

import dataclasses
import io

import pytest

from cudagraph_jax.demo.figures import (
    Comparison,
    Environment,
    Padding,
    TextFigures,
    TrafficFigures,
)
from cudagraph_jax.demo.planned.grid_figures import GridFigures, PlannedResult
from cudagraph_jax.demo.show import Screen
from cudagraph_jax.demo.warmup_figures import BucketFigures, StoreFigures, WarmupFigures
from tests.helpers.processes import said_by

FIGURES = TrafficFigures(
    micro_batches=2,
    passages=10,
    seconds=0.5,
    passages_per_second=20.0,
    p50_ms=12.34,
    p99_ms=56.78,
    max_ms=60.0,
    compiles=None,
)
TEXTS = TextFigures(
    passages=10,
    calls=2,
    shapes=2,
    seconds=0.5,
    passages_per_second=20.0,
    p50_ms=12.34,
    p99_ms=56.78,
    max_ms=60.0,
    real_elements=3,
    computed_elements=4,
    real_ratio=0.75,
    compiles=None,
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
    screen.traffic(TEXTS)
    assert printed(screen).count("not reported by this JAX") == 3
    assert "75.0%" in printed(screen)


LOADED = StoreFigures(
    path="/graphs", loaded=2, compiled=0, written=0, seconds=0.25, compile_seconds=3.0
)


@pytest.mark.parametrize(
    ("changes", "compiles", "told"),
    [
        (
            {},
            0,
            "all 2 buckets were loaded from /graphs in 0.2 s, and nothing was compiled.\n"
            "Compiling them took 3.0 s.",
        ),
        (
            {"compile_seconds": None},
            None,
            "all 2 buckets were loaded from /graphs in 0.2 s, and nothing was compiled.",
        ),
        (
            {"compile_seconds": None},
            1,
            "all 2 buckets were loaded from /graphs in 0.2 s, and no bucket was compiled.",
        ),
        (
            {"loaded": 1, "compiled": 1, "written": 1},
            1,
            "1 of 2 buckets were loaded from /graphs and 1 compiled, in 0.2 s.\n"
            "1 were put there: the next run loads all of them.",
        ),
        (
            {"loaded": 0, "compiled": 2},
            2,
            "0 of 2 buckets were loaded from /graphs and 2 compiled, in 0.2 s.\n0 were put there.",
        ),
    ],
)
def test_store(screen, changes, compiles, told):
    """The screen says what was loaded and compiled, and nothing that it does not know."""
    bucket = BucketFigures(bucket="4x32", capture_time_ms=125.0, memory_bytes=None)
    figures = WarmupFigures(
        buckets=(bucket, bucket),
        seconds=1.0,
        compiles=compiles,
        store=dataclasses.replace(LOADED, **changes),
    )
    screen.stored(figures, title="The grid")
    assert printed(screen) == f"\nThe grid: {told}\n"


def test_no_store(screen):
    """Without a store nothing is said of one."""
    screen.stored(WarmupFigures(buckets=(), seconds=1.0, compiles=0))
    assert printed(screen) == ""


@pytest.mark.parametrize(
    ("of", "expected"), [(10, "The same stream served"), (90, "The first 10 of the 90 texts")]
)
@pytest.mark.parametrize("theirs", [None, 34.5])
def test_part_of_the_stream(screen, of, expected, theirs):
    """A comparison over a part of the stream says which, and of a peer only where there is one."""
    figures = dataclasses.replace(TEXTS, compiles=1, stalled_seconds=0.4)
    comparison = Comparison(
        batcher=TEXTS,
        fifo=TEXTS,
        jit=figures,
        jit_again=figures,
        fifo_size=16,
        sentence_transformers=theirs,
        max_difference=1e-7,
    )
    screen.comparison(comparison, of=of)
    assert expected in printed(screen)
    assert "0.4 s" in printed(screen)
    assert ("34.5 texts/s" in printed(screen)) == (theirs is not None)


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
        "from cudagraph_jax.demo.warmup_figures import WarmupFigures, BucketFigures\n"
        "from cudagraph_jax.demo.show import Screen\n"
        "bucket = BucketFigures(bucket='4x32', capture_time_ms=250.0, memory_bytes=2**20)\n"
        "Screen().warmup(WarmupFigures(buckets=(bucket,), seconds=1.0, compiles=1))"
    )
    assert said_by(script).splitlines()[1:] == [
        "Warm-up: 1 bucket in 1.0 s, 1 compile",
        "bucket  status     ms  memory MiB",
        "4x32    compiled  250         1.0",
    ]
