"""What is said of memory: buckets that come and go, and arrays that a function closes over."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, CUDAGraphWarning, bucket_jit
from cudagraph_jax.testing import FakeCompiler
from tests.helpers.functions import assert_close, double, floats, stats_of
from tests.helpers.memory import keeps, sized_manager

CONFIG = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), warmup_iterations=0)
W = np.arange(200_000, dtype=np.float32)


def faked(function, in_axes="batch seq", **options):
    manager = CUDAGraphManager(CONFIG, compiler=FakeCompiler(runs=True))
    return bucket_jit(function, in_axes=in_axes, manager=manager, **options)


def said(told):
    return [str(warning.message) for warning in told]


def test_buckets_that_come_and_go_are_said_once():
    """Buckets that drive each other out before they are worth it are said once, with the limit."""
    manager = sized_manager(keeps, capture_sizes=(1, 2))
    function = bucket_jit(double, in_axes=("batch _",), manager=manager)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in (1, 2) * 6:
            function(floats(0, batch, 1))
    (message,) = said(told)
    assert message.startswith("thrashing: double at 1x1 is compiled again and again")
    assert "raise memory_pool_size_mb=1" in message


def test_functions_of_one_name_are_not_thrashing():
    """Many functions of one name, each compiled once, drive each other out without a word."""
    manager = sized_manager(keeps, capture_sizes=(1,))
    functions = [
        bucket_jit(
            lambda x, times=times: x * times, in_axes=("batch _",), manager=manager, name="f"
        )
        for times in range(12)
    ]
    for function in functions:
        function(floats(0, 1, 1))
    assert manager.registry.evictions > 8


def test_functions_that_come_and_go_are_not_thrashing(caplog):
    """Python gives the number of a function that is gone to another one."""
    manager = sized_manager(keeps, capture_sizes=(1,), max_graphs=1)
    for times in range(100):
        function = bucket_jit(
            lambda x, times=times: x * times, in_axes=("batch _",), manager=manager, name="f"
        )
        function(floats(0, 1, 1))
    assert not [line for line in caplog.messages if "thrashing" in line]


def test_a_limit_on_graphs_is_logged(caplog):
    """Where buckets come and go because of max_graphs, which somebody chose, the log says so."""
    manager = sized_manager(keeps, capture_sizes=(1, 2), max_graphs=1)
    function = bucket_jit(double, in_axes=("batch _",), manager=manager)
    for batch in (1, 2) * 6:
        function(floats(0, batch, 1))
    (message,) = [line for line in caplog.messages if "thrashing" in line]
    assert "raise max_graphs=1" in message


def test_buckets_that_served_before_they_left_are_not_thrashing():
    """A bucket that serves many calls before it leaves may come again without a word."""
    manager = sized_manager(keeps, capture_sizes=(1, 2))
    function = bucket_jit(double, in_axes=("batch _",), manager=manager)
    for batch in (1, 2) * 4:
        for _ in range(12):
            function(floats(0, batch, 1))
    assert function.registry.evictions == 7


def test_arrays_that_a_function_closes_over_are_said_once():
    """At the first capture: how many bytes, in how many buckets, and what to do."""
    function = faked(lambda x: x + W[: x.shape[1]] + W.sum() * 0 + jnp.asarray(W)[0] * 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in (1, 2, 4):
            function(floats(0, batch, 8))
    (message,) = said(told)
    for part in ("bytes for the 6 buckets", "None in in_axes", "closes over arrays of"):
        assert part in message
    graphs = stats_of(function)["registry"]
    assert graphs["closed_over_bytes"] >= 3 * W.nbytes


def test_following_the_advice_ends_it():
    """Passed as an argument with None in in_axes, arrays are in no bucket, and nothing is said."""
    function = faked(lambda w, x: x + w[0], in_axes=(None, "batch seq"))
    assert_close(function(W, floats(0, 3, 5)), floats(0, 3, 5))
    assert stats_of(function)["registry"]["closed_over_bytes"] == 0


def test_little_is_not_worth_a_word():
    """Arrays of less than a megabyte in all buckets together are counted, and not said."""
    few = np.arange(8, dtype=np.float32)
    function = faked(lambda x: x + few[0] * jnp.asarray(few).sum())
    function(floats(0, 3, 5))
    assert stats_of(function)["registry"]["closed_over_bytes"] == few.nbytes


def test_what_is_loaded_keeps_what_it_closes_over(tmp_path):
    """After a restart a fingerprinted function's arrays count as they did when it was compiled."""

    def shifted(x):
        return x + jnp.asarray(W).sum()

    def warmed():
        function = bucket_jit(
            shifted, in_axes=("batch seq",), config=CONFIG, store=tmp_path, fingerprint="1"
        )
        with pytest.warns(CUDAGraphWarning, match="closes over arrays of 800,000 bytes"):
            function(floats(0, 1, 8))
        (entry,) = function.registry.entries()
        function.manager.close()
        return entry.is_loaded, entry.stats()["closed_over_bytes"]

    assert [warmed(), warmed()] == [(False, W.nbytes), (True, W.nbytes)]
