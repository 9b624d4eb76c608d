"""Warm-up: the whole grid, the largest first, everything captured before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    Bucket,
    CaptureError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphWarning,
    InputShapeError,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.capture.warmup import warm_up
from cudagraph_jax.report.progress import Progress
from tests.helpers.functions import (
    GRID,
    KINDS,
    PARAMS,
    assert_close,
    dense,
    double,
    floats,
    stats_of,
    tokens,
)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_order_and_iterations(iterations):
    """Buckets are captured from the largest down, then each runs `warmup_iterations` times."""
    events: list[object] = []

    def observed(x):
        jax.debug.callback(lambda: events.append(("run", x.shape)))
        return x * 2

    config = CUDAGraphConfig(
        capture_sizes=(1, 4), capture_seq_lens=(2, 16), warmup_iterations=iterations
    )
    function = bucket_jit(observed, in_axes=("batch seq",), config=config)

    def progress(done, total, bucket):
        jax.effects_barrier()
        events.append((done, total, tuple(bucket), function.registry.num_graphs))

    report = function.warmup(floats(0, 2, 3), progress=progress)
    order = [(4, 16), (1, 16), (4, 2), (1, 2)]
    captured = [(n, 4, bucket, n) for n, bucket in enumerate(order, start=1)]
    ran: list[object] = []
    for n, bucket in enumerate(order, start=1):
        ran += [("run", bucket)] * iterations
        ran.append((n, 4, bucket, 4))
    assert events == captured + ran
    assert [tuple(record.bucket) for record in report.buckets] == order
    assert {record.status for record in report.buckets} == {"captured"}
    assert (report.captured, report.failed) == (4, ())


def test_a_second_warmup_finds_everything_present():
    """Buckets that are there are reported as present and not captured again."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    function(floats(0, 2, 2))
    first = function.warmup(floats(0, 1, 1), progress=False)
    assert (first.captured, len(first.buckets)) == (5, 6)
    second = function.warmup(floats(0, 4, 4), progress=False)
    assert {record.status for record in second.buckets} == {"present"}
    assert function.registry.capture_count == 6
    assert "3x5" in str(second)


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
@pytest.mark.parametrize("name", KINDS)
def test_example_sizes_do_not_matter(name, abstract):
    """Any example, arrays or shapes, warms the same grid: later calls compile nothing."""
    kind = KINDS[name]
    function = kind.bucketed(dataclasses.replace(GRID, capture_sizes=(4,)))
    example = kind.arguments(0, 2, 3)
    if abstract:
        example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), example)
    function.warmup(*example, progress=False)
    with no_compiles():
        for batch, seq in [(1, 1), (4, 5)]:
            function(*kind.arguments(0, batch, seq))
    assert stats_of(function)["misses"] == 0


def test_warmup_counts_no_replays():
    """Runs of a warm-up are no requests."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    stats = stats_of(function)
    assert (stats["calls"], stats["hits"], stats["misses"]) == (0, 0, 0)
    assert stats["registry"]["capture_count"] == stats["registry"]["num_graphs"] == 6


def test_without_a_sequence_the_grid_is_the_batches():
    """Sizes that no argument carries do not multiply the grid."""
    function = bucket_jit(double, in_axes=("batch _",), config=GRID)
    report = function.warmup(floats(0, 1, 7), progress=False)
    assert [record.bucket for record in report.buckets] == [
        Bucket(4, 1),
        Bucket(3, 1),
        Bucket(1, 1),
    ]


def test_without_lengths_the_example_gives_the_length():
    """Without capture_seq_lens the grid has the example's own length."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), warmup_iterations=0)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    report = function.warmup(floats(0, 1, 7), progress=False)
    assert [record.bucket for record in report.buckets] == [Bucket(4, 7), Bucket(2, 7)]


@pytest.mark.parametrize("seq_len", [0, 9])
def test_a_length_whose_calls_have_no_bucket(seq_len):
    """An example whose one length is empty or beyond the limit is refused: no call would hit."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), max_capture_seq_len=8, warmup_iterations=0)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    with pytest.raises(
        ConfigError, match=rf"seq_len={seq_len}, .*outside the limits, 1 to 8: give"
    ):
        function.warmup(floats(0, 1, seq_len), progress=False)
    assert function.registry.num_graphs == 0


def test_keywords_and_statics():
    """Keyword, static and masked arguments warm the programs that such calls use."""

    def scaled(x, *, mask, by, sign):
        return jnp.where(mask, x, 0) * by * sign

    function: Any = bucket_jit(
        scaled, in_axes=("batch seq",), mask_argname="mask", static_argnames="sign", config=GRID
    )
    function.warmup(floats(0, 1, 1), by=np.float32(2), sign=-1, progress=False)
    with no_compiles():
        assert_close(function(floats(0, 2, 4), by=np.float32(3), sign=-1), floats(0, 2, 4) * -3)
    assert function.registry.num_graphs == 6


def test_buckets_that_cannot_be_traced_are_reported():
    """A bucket that fails is reported and warned of; the others are captured and serve."""

    def short_only(x):
        if x.shape[1] > 2:
            raise ValueError("too long for the position table")
        return x * 2

    function = bucket_jit(short_only, in_axes=("batch seq",), out_axes="batch seq", config=GRID)
    with pytest.warns(CUDAGraphWarning, match="too long for the position table") as told:
        report = function.warmup(floats(0, 1, 2), progress=False)
    assert len(told) == 1
    assert {record.bucket.seq_len for record in report.failed} == {5}
    assert all("position table" in str(record.error) for record in report.failed)
    assert report.captured == function.registry.num_graphs == 3
    assert_close(function(floats(0, 2, 2)), floats(0, 2, 2) * 2)


def test_a_mistake_in_the_function_itself_is_raised():
    """What the plain function raises of the example is raised at once, and not remembered."""
    mistakes = [KeyError("weight")]

    def mistaken(x):
        if mistakes:
            raise mistakes[0]
        return x * 2

    function = bucket_jit(mistaken, in_axes="batch seq", config=GRID)
    with pytest.raises(CaptureError, match="mistaken itself fails on the example") as got:
        function.warmup(floats(0, 1, 1), progress=False)
    assert got.value.__cause__ is mistakes.pop()
    assert stats_of(function)["failed_buckets"] == 0
    assert function.warmup(floats(0, 1, 1), progress=False).captured == 6


@pytest.mark.parametrize("example", [floats(0, 1, 1), jax.ShapeDtypeStruct((1, 1), np.float32)])
def test_what_cannot_be_traced_but_run_is_reported(example):
    """A function that JAX cannot trace serves eagerly, and so does one that nobody can ask."""

    def branches(x):
        return x * 2 if x.sum() > 0 else x

    function = bucket_jit(branches, in_axes="batch seq", config=GRID)
    with pytest.warns(CUDAGraphWarning, match="branches runs eagerly at") as told:
        assert len(function.warmup(example, progress=False).failed) == 6
    assert len(told) == 1
    assert stats_of(function)["failed_buckets"] == 6


def test_buckets_that_do_not_run_are_reported():
    """A bucket that compiles but does not run is reported, dropped and served eagerly."""

    def refuse(x):
        if x.shape[0] == 4:
            raise RuntimeError("no room")
        return x

    function = bucket_jit(
        lambda x: jax.pure_callback(refuse, x, x), in_axes=("batch seq",), config=GRID
    )
    with pytest.warns(CUDAGraphWarning, match="does not run"):
        report = function.warmup(floats(0, 1, 1), progress=False)
    assert {record.bucket.batch_size for record in report.failed} == {4}
    assert function.registry.num_graphs == 4
    assert_close(function(floats(0, 2, 2)), floats(0, 2, 2))
    assert stats_of(function)["hits"] == 1


def test_bad_examples_are_the_callers_error():
    """Arguments that do not fit are an error of warm-up itself, and nothing is captured."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    with pytest.raises(InputShapeError, match="x has 1 dimension"):
        function.warmup(floats(0, 3))
    flat = bucket_jit(lambda x: x.reshape(-1), in_axes=("batch seq",), config=GRID)
    with pytest.raises(InputShapeError, match="cannot be trimmed"):
        flat.warmup(floats(0, 3, 5))
    assert function.registry.num_graphs == flat.registry.num_graphs == 0


def test_a_larger_grid_than_max_graphs():
    """A grid that does not fit is an error before anything is compiled."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 2, 4), capture_seq_lens=(5,), max_graphs=2, warmup_iterations=1
    )
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    with pytest.raises(ConfigError, match="3 buckets, more than max_graphs=2: raise it"):
        function.warmup(floats(0, 1, 1), progress=False)
    assert function.registry.num_graphs == 0


def test_random_keys_must_be_given():
    """A PRNG key cannot be made up: a warm-up from its shape says so."""

    def noisy(key, x):
        return x + jax.random.uniform(key)

    function = bucket_jit(noisy, in_axes=(None, "batch"), config=GRID)
    key = jax.random.key(0)
    assert not function.warmup(key, floats(0, 1), progress=False).failed
    shape = jax.ShapeDtypeStruct(key.shape, key.dtype)
    with pytest.raises(InputShapeError, match="give the key itself"):
        bucket_jit(noisy, in_axes=(None, "batch"), config=GRID).warmup(shape, floats(0, 1))


def test_progress_is_logged(caplog):
    """Without a terminal each step is a log line."""
    function = bucket_jit(double, in_axes=("batch",), config=GRID)
    with caplog.at_level(logging.INFO, logger="cudagraph_jax"):
        function.warmup(floats(0, 1))
    lines = [record.getMessage() for record in caplog.records]
    assert "capturing double: 4x1 (1 of 3)" in lines
    assert "warming up double: 1x1 (3 of 3)" in lines
    assert any(line.startswith("captured 4x1 of double(float32[·]) in ") for line in lines)


def test_total_time_is_the_clocks():
    """The report's time is that of the injected clock."""
    ticks = itertools.count(step=0.5)
    report = warm_up(
        "nothing",
        (),
        lambda bucket: pytest.fail("there is no bucket"),
        iterations=1,
        call=bucket_jit(double, in_axes="batch").describe(floats(0, 1)),
        broken=lambda entry, error: None,
        failed=lambda bucket, error: None,
        progress=Progress(False),
        clock=lambda: next(ticks),
    )
    assert (report.total_ms, report.buckets) == (500, ())


def test_two_functions_share_one_manager():
    """Warm-ups of two functions of one manager fill one registry and disturb neither."""
    manager = CUDAGraphManager(GRID)
    first = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    second = bucket_jit(dense, in_axes=(None, "batch seq ..."), manager=manager)
    first.warmup(floats(0, 1, 1), progress=False)
    second.warmup(PARAMS, floats(0, 1, 1, 3), progress=False)
    assert manager.registry.num_graphs == 12
    manager.seal()
    with no_compiles():
        first(floats(0, 2, 2))
        second(PARAMS, floats(0, 2, 2, 3))
    assert stats_of(manager)["hits"] == 2


def test_the_first_call_of_another_dtype_is_a_miss():
    """Warm-up is for the dtypes of its example; another one captures on its first call."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    function(tokens(0, 2, 2))
    assert stats_of(function)["captures"] == 1


def test_disable_jit():
    """Under `jax.disable_jit` a warm-up says that it does nothing, and loses nothing."""
    warm = bucket_jit(double, in_axes="batch seq", config=GRID)
    warm.warmup(floats(0, 2, 4), progress=False)
    cold = bucket_jit(double, in_axes="batch seq", config=GRID)
    for function in (warm, cold):
        before = function.registry.num_graphs
        with (
            jax.disable_jit(),
            pytest.warns(
                CUDAGraphWarning, match=r"double is not warmed up: jax\.disable_jit is on"
            ),
        ):
            report = function.warmup(floats(0, 2, 4), progress=False)
        assert len(report.failed) == len(GRID.buckets())
        assert "jax.disable_jit is on" in str(report)
        assert function.registry.num_graphs == before
    with no_compiles():
        assert_close(warm(floats(0, 3, 5)), floats(0, 3, 5) * 2)
    assert cold.warmup(floats(0, 2, 4), progress=False).failed == ()
