"""The demo with a planned grid from start to end, and what it prints."""

import io
import json
import math

import pytest

from cudagraph_jax import ConfigError, InputShapeError
from cudagraph_jax._base.files import ReportError
from cudagraph_jax.demo import DemoError, run_planned
from cudagraph_jax.demo.corpus import numpy_passages
from cudagraph_jax.demo.traffic import micro_batches

# The demo's real model, compiled for each size by plain JAX, too.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    """A small run: its result, what it printed, and what it wrote."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    output = io.StringIO()
    result = run_planned(
        ["sort the elements"],
        limit=20,
        json_path=path,
        config=short,
        progress=False,
        output=output,
    )
    return result, output.getvalue(), json.loads(path.read_text(encoding="utf-8"))


def test_grids(finished, short):
    """The plan has no more buckets than the guess, and holds as much."""
    result, _, _ = finished
    before, after = result.powers_of_two, result.planned
    assert before.batch_sizes == short.capture_sizes
    assert before.seq_lens == short.capture_seq_lens
    assert len(after.warmup.buckets) == len(after.batch_sizes) * len(after.seq_lens)
    assert len(after.warmup.buckets) <= len(before.warmup.buckets) == 4
    assert after.batch_sizes[-1] >= short.max_batch_size
    assert after.seq_lens[-1] >= short.max_seq_len


def test_same_stream(finished):
    """Both grids serve the part of the stream that the plan has not seen, and nothing compiles."""
    result, _, _ = finished
    assert result.passages == 20
    for grid in (result.powers_of_two, result.planned):
        assert grid.traffic.micro_batches == result.micro_batches - result.seen_micro_batches
        assert grid.traffic.passages == 20 - result.seen_passages
        assert grid.traffic.compiles == 0
        assert grid.padding.hit_rate == 1
    assert result.powers_of_two.padding.real_elements == result.planned.padding.real_elements
    assert result.powers_of_two.padding.tokens == result.planned.padding.tokens


def padded_by(ladders, batches):
    """Padded elements of micro-batches in the smallest buckets of a grid that hold them."""
    real = computed = 0
    for batch in batches:
        real += batch.mask.size
        computed += math.prod(
            min(size for size in ladder if size >= wanted)
            for ladder, wanted in zip(ladders, batch.mask.shape, strict=True)
        )
    return computed - real


def test_ratios(finished, encoder):
    """The ratios are those of the micro-batches themselves, and no plan beats the least waste."""
    result, _, _ = finished
    before, after = result.powers_of_two, result.planned
    rows = encoder.tokenize([passage.text for passage in numpy_passages(limit=20)])
    rest = micro_batches(rows, max_size=encoder.max_batch_size)[result.seen_micro_batches :]
    padded = [padded_by((grid.batch_sizes, grid.seq_lens), rest) for grid in (before, after)]
    assert padded == [before.padding.padded_elements, after.padding.padded_elements]
    assert result.padding_ratio == pytest.approx(padded[1] / padded[0])
    # Both serve the same passages.
    assert result.throughput_ratio == pytest.approx(before.traffic.seconds / after.traffic.seconds)
    assert result.least_waste <= after.padding.waste


def test_json(finished):
    """The file holds the same figures."""
    result, _, written = finished
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["planned"]["traffic"]["compiles"] == 0
    assert written["plan"]["seq_lens"] == list(result.planned.seq_lens)
    assert written["padding_ratio"] == result.padding_ratio


def test_answers(finished):
    """Every passage was embedded, by the one grid or the other: the best ones are found."""
    (answer,) = finished[0].answers
    scores = [match.score for match in answer.matches]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.3


def test_printed(finished):
    """Every part of the report is there."""
    result, printed, _ = finished
    for part in (
        f"The first {result.seen_micro_batches} micro-batch",
        "batch sizes",
        "sequence lengths",
        "powers of two",
        "planned",
        "padded elements",
        "throughput",
        f"Padded elements: {result.padding_ratio:.2f} times those of powers of two",
        f"{result.least_waste:.1%}",
        "Done in",
    ):
        assert part in printed


@pytest.mark.parametrize("limit", [0, 2.5, True])
def test_limit(limit):
    """A limit that is no positive integer is refused at once."""
    with pytest.raises(ConfigError, match="limit="):
        run_planned(limit=limit)


def test_too_few(short):
    """A stream that cannot be divided is refused before anything is captured."""
    output = io.StringIO()
    with pytest.raises(DemoError, match="raise --limit"):
        run_planned(limit=1, config=short, output=output)
    assert output.getvalue() == ""


def test_single_query():
    """A query that is a string is not taken for a sequence of letters."""
    with pytest.raises(InputShapeError, match="wrap it in a list"):
        run_planned("sort")


def test_json_path(tmp_path):
    """A file that cannot be written is told before the work is done."""
    with pytest.raises(ReportError, match=r"a folder that does not exist.*make the folder first"):
        run_planned(json_path=tmp_path / "missing" / "figures.json")
