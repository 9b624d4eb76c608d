"""explain(): what would happen and what to change, and nothing happens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from cudagraph_jax import (
    Bucket,
    CUDAGraphConfig,
    CUDAGraphMode,
    CUDAGraphWarning,
    Explanation,
    InputShapeError,
    bucket_jit,
    no_compiles,
)
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

X, EXACT = floats(0, 2, 4), floats(0, 3, 5)
LARGE, TALL, EMPTY = floats(0, 9, 9), floats(0, 9, 4), floats(0, 0, 4)

CASES: dict[str, tuple[dict[str, Any], str | None, np.ndarray, str, str]] = {
    "exact": ({}, None, EXACT, "REPLAY", "a bucket of exactly this size is captured"),
    "padded": ({}, None, X, "REPLAY", "it is padded to 3x5, which is captured"),
    "miss": ({}, "clear", X, "CAPTURE", '3x5 is not captured yet and on_miss="capture"'),
    "miss, eager": ({"on_miss": "eager"}, "clear", X, "NONE", 'on_miss="eager"'),
    "miss, error": ({"on_miss": "error"}, "clear", X, "an error", 'on_miss="error" forbids'),
    "overflow": ({}, None, LARGE, "NONE", "larger than the limits, batch 4 and seq_len 5"),
    "overflow, eager": ({}, None, LARGE, "NONE, an eager run", 'on_overflow="eager" runs it'),
    "overflow, error": ({"on_overflow": "error"}, None, LARGE, "an error", 'on_overflow="error"'),
    "overflow, split": ({"on_overflow": "split"}, None, LARGE, "an error", 'on_overflow="split"'),
    "split": ({"on_overflow": "split"}, None, TALL, "REPLAY", 'as on_overflow="split" says'),
    "split, sealed": (
        {"on_overflow": "split"},
        "seal cold",
        TALL,
        "NONE, an eager run",
        'its pieces of 4 rows (on_overflow="split") have no captured bucket',
    ),
    "empty": ({}, None, EMPTY, "NONE", "a call without elements has no bucket"),
    "paused": ({}, "NONE", X, "NONE", "the mode is NONE"),
    "disabled": ({}, "DISABLED", X, "DISABLED", "the manager is switched off"),
    "sealed": ({}, "seal cold", X, "NONE", "3x5 is not captured, and no capture is allowed now"),
    "larger": ({}, "seal larger", X, "REPLAY", "its own bucket 3x5 is not captured"),
    "unpadded": ({"cudagraph_copy_inputs": False}, None, X, "an error", "not a bucket's shape"),
}


def prepare(function, how):
    """Brings a warm function into the state of a case."""
    if how == "clear":
        function.registry.clear()
    elif how == "seal cold":
        function.registry.clear()
        function.seal()
    elif how == "seal larger":
        function.registry.remove(3, 5)
        function.seal()
    elif how is not None:
        function.manager.mode = CUDAGraphMode[how]


@pytest.mark.parametrize("case", CASES)
def test_every_decision_in_words(case):
    """Each decision has a sentence and a remedy; asking runs, compiles and counts nothing."""
    options, how, x, happens, because = CASES[case]
    config = dataclasses.replace(GRID, capture_seq_lens=(5,), **options)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    function.warmup(EXACT, progress=False)
    prepare(function, how)
    before = stats_of(function)
    with no_compiles():
        explanation = function.explain(x)
    assert stats_of(function) == before
    text = str(explanation)
    assert text.startswith(f"double at {x.shape[0]}x{x.shape[1]}: {happens}")
    assert because in text
    assert explanation.error == (happens == "an error")
    assert explanation.remedy or case in ("exact", "padded", "empty", "split")
    assert ("To change that" in text) == bool(explanation.remedy)
    assert "because" in explanation._repr_html_()
    happened = {"REPLAY": "hits", "CAPTURE": "captures"}.get(happens, "eager_calls")
    happened = "splits" if case == "split" else happened
    if not explanation.error:
        assert_close(function(x), x * 2)
        assert stats_of(function)[happened] == before[happened] + 1


def test_a_failed_bucket_in_words():
    """A bucket that failed says why, and that reset() forgets it."""

    def branching(x):
        return x if x.sum() > 0 else -x

    function = bucket_jit(branching, in_axes=("batch seq",), config=GRID)
    with pytest.warns(CUDAGraphWarning):
        function(X)
    explanation = function.explain(X)
    assert explanation.mode is CUDAGraphMode.NONE
    assert "could not be captured before: cannot trace branching" in explanation.reason
    assert "reset()" in explanation.remedy


def test_a_reason_that_ends_with_a_dot():
    """The words of a failure that are a sentence themselves end with one dot, with any policy."""

    def refusing(x):
        if x.shape[0] == 3:
            raise ValueError("Not three rows.")
        return x

    for policy in ("capture", "error"):
        config = dataclasses.replace(GRID, capture_sizes=(3,), on_miss="capture")
        function = bucket_jit(refusing, in_axes=("batch seq",), config=config)
        with pytest.warns(CUDAGraphWarning):
            function(X)
        function.registry.config = dataclasses.replace(config, on_miss=policy)
        text = str(function.explain(X))
        assert "ValueError: Not three rows" in text
        assert "rows.." not in text
        assert "rows.)" not in text


def test_literally():
    """The sentence of a padded hit, word for word."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    function(X)
    assert function.explain(X) == Explanation(
        name="double",
        mode=CUDAGraphMode.REPLAY,
        sizes=Bucket(2, 4),
        bucket=Bucket(3, 5),
        reason="it is padded to 3x5, which is captured",
    )
    assert str(function.explain(X)) == (
        "double at 2x4: REPLAY in the bucket 3x5 (46.7% padding), "
        "because it is padded to 3x5, which is captured."
    )


def test_it_refuses_what_the_call_refuses():
    """Arguments that do not fit are the same error as in the call."""
    function = bucket_jit(double, in_axes=("batch seq",), config=GRID)
    with pytest.raises(InputShapeError, match="x has 1 dimension"):
        function.explain(floats(0, 3))
    with pytest.raises(InputShapeError, match="missing a required argument"):
        function.explain()


def test_keywords_and_abstract_arguments():
    """Keywords and shapes alone will do."""
    function = bucket_jit(lambda x, *, by=1.0: x * by, in_axes=("batch seq",), config=GRID)
    shape = jax.ShapeDtypeStruct((2, 4), np.float32)
    assert function.explain(x=shape, by=2.0).mode is CUDAGraphMode.CAPTURE
    function(X, by=2.0)
    assert function.explain(x=shape, by=2.0).mode is CUDAGraphMode.REPLAY
    # What is left out has its default, which that program takes as it takes any other number.
    assert function.explain(x=shape).mode is CUDAGraphMode.REPLAY


def test_without_lengths():
    """The limits of the sentence are those of the config, lengths or none."""
    config = CUDAGraphConfig(capture_sizes=(4,), max_capture_seq_len=6)
    function = bucket_jit(double, in_axes=("batch seq",), config=config)
    assert "batch 4 and seq_len 6" in str(function.explain(floats(0, 2, 7)))
    assert function.explain(floats(0, 2, 5)).bucket == Bucket(4, 5)


def by_keywords(x, **options):
    return x * options["a"] + options["b"]


def by_name(x, *, b, a):
    return x * a + b


@pytest.mark.parametrize("function", [by_keywords, by_name])
def test_errors_name_the_right_keyword(function):
    """Keyword arguments are named as they are, in whatever order they are declared or given."""
    function = bucket_jit(function, in_axes=("batch seq",), config=GRID)
    for given in ({"b": 1.0, "a": "text"}, {"a": "text", "b": 1.0}):
        for ask in (function, function.explain):
            with pytest.raises(InputShapeError, match=r"^a is a str"):
                ask(X, **given)
    with pytest.raises(InputShapeError, match=r"^b is a str"):
        function(X, b="text", a=1.0)


@pytest.mark.parametrize("function", [by_keywords, by_name])
def test_the_nearest_bucket_names_the_right_keyword(function):
    """A keyword argument that differs from what is captured is called by its name."""
    function = bucket_jit(function, in_axes=("batch seq",), config=GRID)
    one, half = np.float32(1), np.float16(0.5)
    function(X, b=one, a=one)
    function.seal()
    assert "with a of dtype float32, not float16" in function.explain(X, b=one, a=half).reason
    assert "with b of dtype float32, not float16" in function.explain(X, a=one, b=half).reason


def test_sizes_above_the_grid_and_within_the_limits():
    """What no warm-up captures is not to be warmed up, and the advice for it works."""
    x = np.ones((6, 5), np.float32)
    for sizes, remedy in (
        ((1, 4), "add a larger bucket, since its own is within the limits and not on the grid"),
        ((1, 16), "warm up with arguments like these first"),
    ):
        config = CUDAGraphConfig(
            capture_sizes=sizes, capture_seq_lens=(8,), max_capture_batch_size=16
        )
        function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=config)
        assert function.explain(x).remedy == remedy
    function.warmup(x, progress=False)
    with no_compiles():
        function(x)
