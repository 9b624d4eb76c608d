"""`max_bucket_elements`: no bucket of the grid has more elements; what needs one overflows."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from cudagraph_jax import (
    Bucket,
    BucketOverflowError,
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    bucket_jit,
    no_compiles,
    testing,
)
from cudagraph_jax.capture.capturer import is_stale
from cudagraph_jax.planning.planner import plan_buckets
from tests.helpers.functions import assert_close, double, floats

# Of 1, 2, 4, 8 rows and 4, 8, 16 positions: 32 elements let 8x4, 4x8 and 2x16 in.
BUDGET = CUDAGraphConfig(
    capture_sizes=(1, 2, 4, 8),
    capture_seq_lens=(4, 8, 16),
    max_bucket_elements=32,
    warmup_iterations=0,
)
INSIDE, OVER = (4, 7), (4, 9)  # the buckets are 4x8, with 32 elements, and 4x16, with 64
LADDERS = st.sets(st.integers(1, 12), min_size=1, max_size=4).map(tuple)
NAMED = ("height", "src")


def budgeted(on_overflow, **fields):
    return dataclasses.replace(BUDGET, on_overflow=on_overflow, **fields)


def doubled(on_overflow, **fields):
    return bucket_jit(double, in_axes="batch seq", config=budgeted(on_overflow, **fields))


@st.composite
def requests(draw):
    """A budgeted configuration, the axes that a function carries, and the sizes of a call."""
    axes = draw(st.dictionaries(st.sampled_from(NAMED), LADDERS))
    batches, lengths = draw(LADDERS), draw(st.none() | LADDERS)
    least = math.prod(map(min, (batches, lengths or (1,), *axes.values())))
    config = CUDAGraphConfig(
        capture_sizes=batches,
        capture_seq_lens=lengths,
        capture_axes=axes,
        max_bucket_elements=draw(st.integers(least, 20 * least)),
        max_capture_batch_size=draw(st.none() | st.integers(max(batches), 16)),
    )
    carried = draw(st.sets(st.sampled_from(["batch", "seq", *axes]), min_size=1))
    return config, carried, Bucket.of({axis: draw(st.integers(1, 16)) for axis in carried})


@given(requests())
def test_the_grid_and_the_limits_agree(request):
    """Every bucket of a grid is within the budget, and every admitted call has the least of them.

    Whatever axes the function carries; a batch above the ladder is a bucket of its own size.
    """
    config, carried, sizes = request
    grid = config.grid(carried, sizes)
    assert all(bucket.elements <= config.max_bucket_elements for bucket in grid)
    assert all(bucket.elements <= config.max_bucket_elements for bucket in config.buckets())
    bucket = config.padded(sizes, carried)
    if config.admits(sizes, carried):
        assert bucket.holds(sizes)
        assert bucket.elements <= config.max_bucket_elements
        assert bucket in grid or sizes.batch_size > max(config.capture_sizes)
    else:
        ladders = {axis: config.ladder(axis) or (sizes.size(axis),) for axis in carried}
        fits = all(sizes.size(axis) <= max(ladders[axis]) for axis in carried)
        assert not (fits and any(each.holds(sizes) for each in grid))


@given(requests())
def test_without_a_budget_the_grid_is_whole(request):
    """A budget takes exactly those buckets out that have more elements."""
    config, carried, sizes = request
    whole = dataclasses.replace(config, max_bucket_elements=None).grid(carried, sizes)
    kept = [bucket for bucket in whole if bucket.elements <= config.max_bucket_elements]
    assert list(config.grid(carried, sizes)) == kept


def test_the_grid():
    """A product that is over the budget has no bucket, though each size alone has one."""
    assert Bucket(2, 16) in BUDGET.buckets()
    assert Bucket(4, 16) not in BUDGET.buckets()
    assert len(BUDGET.buckets()) == 9
    example = CUDAGraphConfig(
        capture_sizes=(16, 64), capture_seq_lens=(128, 512), max_bucket_elements=8192
    )
    assert example.buckets() == ((16, 128), (16, 512), (64, 128))


def test_the_specifications_calls_respect_it():
    """Sizes whose bucket is over the budget are outside the limits of all methods that take two."""
    manager = CUDAGraphManager(BUDGET)
    shapes = {sizes: {"x": sizes} for sizes in (INSIDE, OVER)}
    assert BUDGET.should_use_cudagraph(*INSIDE)
    assert not BUDGET.should_use_cudagraph(*OVER)
    assert manager.should_capture(*INSIDE)
    assert not manager.should_capture(*OVER)
    assert manager.get_mode_for_batch(*OVER) is CUDAGraphMode.NONE
    entry = manager.capture_graph(*INSIDE, lambda x: x["x"] * 2, shapes[INSIDE])
    assert entry is not None
    assert entry.key == (4, 8)
    assert manager.capture_graph(*OVER, lambda x: x["x"] * 2, shapes[OVER]) is None
    x = floats(0, *OVER)
    assert_close(manager.execute_or_capture(*OVER, double, x), x * 2)
    assert manager.stats()["eager_by_reason"] == {"overflow": 1}


def test_a_size_that_no_array_carries_counts_as_it_was_stated():
    """`execute_or_capture` counts both sizes that it is given; `bucket_jit` what arrays carry."""
    manager = CUDAGraphManager(BUDGET)
    rows = floats(0, 4)
    manager.execute_or_capture(4, 9, double, rows)
    assert manager.stats()["eager_by_reason"] == {"overflow": 1}
    function = bucket_jit(double, in_axes="batch", config=BUDGET)
    function(floats(0, 8))
    assert function.stats()["captures"] == 1


def test_axes_that_a_function_does_not_carry_count_as_one():
    """Images count their own axes alone, beside texts of the same manager."""
    config = dataclasses.replace(BUDGET, capture_axes={"height": (2, 4)}, max_bucket_elements=16)
    manager = CUDAGraphManager(config)
    images = bucket_jit(double, in_axes="batch height", manager=manager, name="images")
    texts = bucket_jit(double, in_axes="batch seq", manager=manager, name="texts")
    assert images.explain(floats(0, 3, 3)).bucket == Bucket(4, 1, height=4)
    assert images.explain(floats(0, 5, 3)).bucket is None
    assert texts.explain(floats(0, 3, 4)).bucket == Bucket(4, 4)
    assert texts.explain(floats(0, 3, 5)).bucket is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_warm_up_captures_the_grid(workers):
    """A warm-up captures what is within the budget, whatever the size of its example."""
    function = doubled("eager")
    report = function.warmup(floats(0, *OVER), progress=False, workers=workers)
    assert report.captured == 9
    assert {entry.bucket for entry in function.registry.entries()} == set(BUDGET.buckets())
    with no_compiles():
        function(floats(0, *INSIDE))


def test_a_warm_up_without_a_bucket():
    """Where lengths are not padded, one that leaves no batch is refused, with what to do."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), max_bucket_elements=32)
    function = bucket_jit(double, in_axes="batch seq", config=config)
    assert function.warmup(floats(0, 1, 16), progress=False).captured == 1
    said = r"double at 1x17 has no bucket within max_bucket_elements=32: raise it, or warm up"
    with pytest.raises(ConfigError, match=said):
        function.warmup(floats(0, 1, 17), progress=False)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((8, 16), [2, 2, 2, 2]), ((5, 9), [2, 2, 1]), ((11, 8), [4, 4, 3]), ((9, 3), [8, 1])],
)
def test_split_cuts_into_the_largest_pieces_that_fit(shape, rows):
    """A piece has as many rows as the budget allows at the other sizes of the request."""
    function = doubled("split")
    function.warmup(floats(0, 1, 4), progress=False)
    function.seal()
    x = floats(1, *shape)
    with no_compiles():
        assert_close(function(x), x * 2)
    assert function.stats()["splits"] == 1
    assert function.stats()["pieces"] == len(rows)
    assert f"pieces of {rows[0]} rows" in str(function.explain(x))


@given(st.integers(1, 20), st.integers(1, 16))
def test_split_serves_any_request_of_rows_that_fit(batch, seq):
    """Whatever the sizes, a grid that is warm answers in pieces, and nothing compiles."""
    if not SPLITTING.registry.entries():
        SPLITTING.warmup(floats(0, 1, 4), progress=False)
    x = floats(seq, batch, seq)
    with no_compiles():
        assert_close(SPLITTING(x), x * 2)


SPLITTING = doubled("split")


def test_one_row_that_is_too_large():
    """What no cut along the batch brings within the budget is an error, or runs eagerly."""
    config = dataclasses.replace(BUDGET, max_bucket_elements=8)
    x = floats(0, 2, 9)
    split = bucket_jit(
        double, in_axes="batch seq", config=dataclasses.replace(config, on_overflow="split")
    )
    with pytest.raises(BucketOverflowError, match=r'raise max_bucket_elements or set .*"exact"'):
        split(x)
    eager = bucket_jit(double, in_axes="batch seq", config=config)
    assert_close(eager(x), x * 2)
    assert eager.stats()["eager_by_reason"] == {"overflow": 1}


def test_error_names_the_budget():
    """The error has the bucket, its elements, the budget, and what to do."""
    with pytest.raises(BucketOverflowError) as caught:
        doubled("error")(floats(0, *OVER))
    assert str(caught.value) == (
        "the bucket of 4x9, 4x16, has 64 elements, more than max_bucket_elements=32: "
        'raise max_bucket_elements or set on_overflow="split"'
    )
    with pytest.raises(BucketOverflowError) as caught:
        doubled("error")(floats(0, 9, 16))
    assert str(caught.value) == (
        "batch=9 is larger than the largest bucket, 8 and the bucket of 9x16, 9x16, has 144 "
        "elements, more than max_bucket_elements=32: add a bucket and raise max_bucket_elements or "
        'set on_overflow="split"'
    )


@pytest.mark.parametrize(
    ("policy", "sizes", "message"),
    [
        # Eight rows of 16 are cut, so that their number is no reason; four would be too many.
        (
            "split",
            (99, 16),
            r"^the bucket of 4x16, the smallest piece of 99x16, 4x16, has 64 .*: raise max_",
        ),
        # At its very size a bucket of two rows of 17 would be within the budget of 40.
        ("split", (99, 17), r"^seq_len=17 is larger .*: add a bucket or set"),
        ("error", (1, 17), r"^seq_len=17 is larger .*: add a bucket or set"),
        ("error", (9, 17), r"^batch=9 .* and seq_len=17 .*: add a bucket and raise max_bucket_el"),
    ],
)
def test_an_error_asks_for_what_helps(policy, sizes, message):
    """Of a bucket and a larger budget errors ask for what helps, for both only if need be."""
    smallest = 2 if sizes[1] == 17 else 4
    config = CUDAGraphConfig(
        capture_sizes=(smallest, 8),
        capture_seq_lens=(4, 16),
        max_bucket_elements=40,
        on_overflow=policy,
    )
    function = bucket_jit(double, in_axes="batch seq", config=config)
    with pytest.raises(BucketOverflowError, match=message):
        function(floats(0, *sizes))


def test_exact_captures_that_very_size():
    """What is over the budget gets a bucket of its own size, and keeps it."""
    function = doubled("exact")
    x = floats(0, *OVER)
    for _ in range(2):
        assert_close(function(x), x * 2)
    assert [entry.bucket for entry in function.registry.entries()] == [OVER]
    assert function.stats()["replays"]["exact"] == 1


def test_eager_says_what_was_exceeded(caplog):
    """explain and the log name the budget and the elements of the bucket, and not other limits."""
    caplog.set_level(logging.WARNING, "cudagraph_jax")
    function = doubled("eager")
    x = floats(0, *OVER)
    explanation = function.explain(x)
    assert explanation.mode is CUDAGraphMode.NONE
    beyond = "max_bucket_elements=32, of which its bucket, 4x16, takes 64"
    assert beyond in explanation.reason
    assert explanation.remedy.startswith("raise max_bucket_elements, or set on_overflow=")
    function(x)
    assert f"ran eagerly at 4x9, outside the limits, {beyond}: " in caplog.text
    assert "add larger buckets" not in caplog.text
    assert doubled("exact").explain(x).remedy == "raise max_bucket_elements"


def test_a_larger_captured_bucket_serves():
    """A sealed manager serves from captured buckets, all within the budget."""
    function = doubled("eager")
    function(floats(0, 4, 8))
    function.seal()
    x = floats(1, 2, 3)
    assert_close(function(x), x * 2)
    assert function.stats()["replays"]["larger"] == 1


def test_a_bucket_over_a_new_budget_is_stale():
    """What has no place under the budget of a new grid goes, unless it was over both."""
    function = bucket_jit(
        double, in_axes="batch seq", config=dataclasses.replace(BUDGET, max_bucket_elements=None)
    )
    function(floats(0, 4, 9))
    function(floats(0, 4, 8))
    free = function.manager.config
    stale = {
        entry.bucket: is_stale(entry.program, entry.bucket, free, BUDGET)
        for entry in function.registry.entries()
    }
    assert stale == {Bucket(4, 16): True, Bucket(4, 8): False}


def test_of_a_plan():
    """A plan's ladders take a budget as any field."""
    plan = plan_buckets([(1, 16), (8, 4)], max_graphs=4)
    config = CUDAGraphConfig.from_plan(plan, max_bucket_elements=32)
    assert config.buckets() == ((1, 4), (1, 16), (8, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"capture_sizes": (2, 4), "capture_seq_lens": (8, 16), "max_bucket_elements": 15},
            "max_bucket_elements=15 leaves no bucket, as the smallest, 2x8, has 16 elements: "
            "raise it, or give smaller sizes",
        ),
        (
            {"capture_axes": {"height": (224,)}, "max_bucket_elements": 223},
            "max_bucket_elements=223 leaves no bucket, as the smallest, 1x1,height=224, has 224 "
            "elements: raise it, or give smaller sizes",
        ),
    ],
)
def test_a_budget_that_leaves_nothing(fields, message):
    """A budget below the smallest bucket is an error that names both."""
    with pytest.raises(ConfigError) as caught:
        CUDAGraphConfig(**fields)
    assert str(caught.value) == message


@given(testing.sizes(BUDGET))
def test_drawn_sizes_are_within_the_budget(sizes):
    """The kit draws sizes inside the limits alone."""
    assert BUDGET.admits(sizes)


@pytest.mark.parametrize("largest", [(8, 4), (4, 8), (2, 16)])
def test_drawn_sizes_go_up_to_the_budget(largest):
    """The kit draws each of the largest sizes that the budget allows."""
    assert find(testing.sizes(BUDGET), lambda sizes: sizes == largest) == largest


def test_the_kit_checks_functions_under_a_budget():
    """`assert_bucketing_preserves` draws what the budget allows."""
    testing.assert_bucketing_preserves(double, in_axes="batch seq", config=BUDGET)


def test_answers_are_the_plain_functions():
    """In any policy that answers, the budget changes no answer."""
    for policy in ("eager", "split", "exact"):
        x = floats(0, 8, 16)
        np.testing.assert_allclose(doubled(policy)(x), x * 2, rtol=1e-6)
