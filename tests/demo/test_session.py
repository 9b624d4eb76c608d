"""The demo from start to end, and what it prints."""

import io
import json

import jax
import pytest

from cudagraph_jax import ConfigError, InputShapeError
from cudagraph_jax._base.files import ReportError
from cudagraph_jax.demo import run

# The demo's real model, compiled for each size by plain JAX, too.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    """A small run: its result, what it printed, and what it wrote."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    output = io.StringIO()
    result = run(
        ["sort the elements"],
        limit=12,
        json_path=path,
        config=short,
        progress=False,
        output=output,
    )
    return result, output.getvalue(), json.loads(path.read_text(encoding="utf-8"))


def test_nothing_compiles_in_traffic(finished):
    """The warm-up compiles each bucket, and single texts nothing, however they are batched."""
    result, _, _ = finished
    assert result.warmup.compiles == len(result.warmup.buckets) == 4
    assert result.traffic.compiles == result.traffic.stalled_seconds == 0
    assert result.comparison.batcher.compiles == result.comparison.fifo.compiles == 0


def test_plain_jit_compiles(finished):
    """Plain jit compiles each distinct size once, and gives the same embeddings."""
    comparison = finished[0].comparison
    assert comparison.jit.compiles == comparison.jit.shapes >= 1
    assert comparison.jit_again.compiles == 0
    assert 0 < comparison.jit.stalled_seconds <= comparison.jit.seconds
    assert comparison.max_difference < 1e-5


def test_figures(finished, short):
    """The figures agree with each other."""
    result, _, _ = finished
    comparison = result.comparison
    ways = [comparison.batcher, comparison.fifo, comparison.jit, comparison.jit_again]
    assert result.environment.versions["jax"] == jax.__version__
    assert {record.bucket for record in result.warmup.buckets} == set(map(str, short.buckets()))
    for figures in (result.traffic, *ways):
        assert result.passages == figures.passages == 12
        assert 0 < figures.p50_ms <= figures.p99_ms <= figures.max_ms
        assert figures.max_ms <= figures.seconds * 1e3 * 1.01
        assert figures.real_elements == result.traffic.real_elements
        assert figures.real_elements <= figures.computed_elements
        assert figures.shapes <= figures.calls <= 12
    assert comparison.jit.computed_elements <= comparison.fifo.computed_elements


def test_json(finished):
    """The file holds the same figures."""
    result, _, written = finished
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["traffic"]["compiles"] == 0
    assert written["comparison"]["jit"]["calls"] == result.comparison.jit.calls == 3
    assert written["answers"][0]["query"] == "sort the elements"


def test_answers(finished):
    """The best passages are printed with their scores, the best first."""
    result, printed, _ = finished
    (answer,) = result.answers
    scores = [match.score for match in answer.matches]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3
    assert f"{scores[0]:.3f}  {answer.matches[0].passage.name}" in printed


def test_printed(finished):
    """Every part of the report is there."""
    _, printed, _ = finished
    for part in (
        "12 paragraphs of NumPy's docstrings",
        "Warm-up: 4 buckets",
        "4 compiles",
        "4x32",
        "12 single texts through the batcher",
        "real of computed tokens",
        "p99 latency",
        "FIFO batches",
        "jax.jit, cold",
        "Done in",
    ):
        assert part in printed


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_limit(limit):
    """A limit that is no positive integer is refused at once."""
    with pytest.raises(ConfigError, match="limit="):
        run(limit=limit)


def test_single_query():
    """A query that is a string is not taken for a sequence of letters."""
    with pytest.raises(InputShapeError, match="wrap it in a list"):
        run("sort")


def test_json_path(tmp_path):
    """A file that cannot be written is told before the work is done."""
    with pytest.raises(ReportError, match=r"a folder that does not exist.*make the folder first"):
        run(json_path=tmp_path / "missing" / "figures.json")
