"""The demo with a store: what a second run finds there."""

import dataclasses
import io
import json

import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, GraphStore
from cudagraph_jax.demo import Encoder, run, run_planned
from cudagraph_jax.demo.warmup_figures import NOTE, warm_up


@pytest.fixture(scope="module")
def pair():
    """Two buckets, which hold the first of the passages."""
    return CUDAGraphConfig(capture_sizes=(1, 2), capture_seq_lens=(16,), warmup_iterations=1)


def stored(measured):
    """What the store had to do with it, which is known in all of these."""
    return measured.warmup.store


def warmed(config, store):
    encoder = Encoder(config, store=store)
    return encoder, warm_up(encoder, progress=False, compiles_reported=True)


@pytest.fixture(scope="module")
def filled(pair, tmp_path_factory):
    """A directory that the first run of the demo has filled, and that run."""
    path = tmp_path_factory.mktemp("store") / "graphs"
    output = io.StringIO()
    result = run(["sort"], limit=2, config=pair, store=path, progress=False, output=output)
    return path, result, output.getvalue()


def test_first_run(filled):
    """The first run compiles every bucket, keeps it, and says so."""
    path, result, printed = filled
    store = result.warmup.store
    assert (store.loaded, store.compiled, store.written) == (0, 2, 2)
    assert result.warmup.compiles == 2
    assert len(GraphStore(path)) == 2
    assert f"Store: 0 of 2 buckets were loaded from {path} and 2 compiled" in printed
    assert "2 were put there: the next run loads all of them." in printed


def test_second_run(filled, pair):
    """The second run compiles nothing in its warm-up, says so, and answers the same."""
    path, first, _ = filled
    output = io.StringIO()
    result = run(["sort"], limit=2, config=pair, store=path, progress=False, output=output)
    store = stored(result)
    assert (store.loaded, store.compiled, store.written) == (2, 0, 0)
    assert result.warmup.compiles == result.traffic.compiles == 0
    assert {record.status for record in result.warmup.buckets} == {"loaded"}
    assert store.compile_seconds == pytest.approx(first.warmup.store.seconds)
    printed = output.getvalue()
    assert f"Store: all 2 buckets were loaded from {path} in" in printed
    assert "and nothing was compiled.\nCompiling them took" in printed
    # Which texts share a call depends on when they came, and rounding on that.
    for matches, before in zip(result.answers[0].matches, first.answers[0].matches, strict=True):
        assert matches.passage == before.passage
        assert matches.score == pytest.approx(before.score, abs=1e-5)
    assert json.loads(json.dumps(result.to_dict()))["warmup"]["store"] == dataclasses.asdict(store)


@pytest.mark.slow  # the demo's real model, compiled for two grids
def test_second_plan(pair, tmp_path):
    """With a plan the second run loads both grids."""
    outputs = [io.StringIO(), io.StringIO()]
    results = [
        run_planned(["sort"], limit=6, config=pair, store=tmp_path, progress=False, output=output)
        for output in outputs
    ]
    assert results[1].plan == results[0].plan
    for grid in (results[1].powers_of_two, results[1].planned):
        assert stored(grid).loaded == len(grid.warmup.buckets)
        assert grid.warmup.compiles == 0
    printed = outputs[1].getvalue()
    assert "Powers of two: all 2 buckets were loaded" in printed
    assert "The planned grid: all" in printed
    assert printed.count("and nothing was compiled") == 2


def test_a_larger_grid(filled, pair):
    """A grid that was stored in part is compiled for the rest, which alone is written."""
    path, first, _ = filled
    wider = dataclasses.replace(pair, capture_sizes=(2, 3), max_capture_batch_size=None)
    encoder, figures = warmed(wider, path)
    store = figures.store
    assert (store.loaded, store.compiled, store.written, figures.compiles) == (1, 1, 1, 1)
    known = {record.bucket: record.capture_time_ms for record in first.warmup.buckets}
    compiled = next(one for one in figures.buckets if one.status == "captured")
    expected = (known["2x16"] + compiled.capture_time_ms) / 1e3
    assert store.compile_seconds == pytest.approx(expected)
    np.testing.assert_allclose(
        encoder.embed(["sort", "an array"]),
        Encoder(pair, store=path).embed(["sort", "an array"]),
        atol=1e-5,
    )


def test_only_read(tmp_path):
    """A store that is only read gets neither executables nor notes."""
    config = CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(16,), warmup_iterations=0)
    _, figures = warmed(config, GraphStore(tmp_path, mode="ro"))
    store = figures.store
    assert (store.loaded, store.compiled, store.written) == (0, 1, 0)
    assert store.compile_seconds == store.seconds
    assert not (tmp_path / NOTE).exists()
    assert list(tmp_path.iterdir()) == []
