"""Assertions on what JAX compiles, in whichever thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import jax
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.testing import assert_compiles, assert_no_compiles
from cudagraph_jax.testing.compile_assertions import check_countable

CONFIG = CUDAGraphConfig(capture_sizes=(2, 4), warmup_iterations=0)


def halving():
    """A new function, of which nothing is compiled."""

    @jax.jit
    def halved(x):
        return x / 2

    return halved


def ones(size: int) -> np.ndarray:
    return np.ones(size, np.float32)


def each(function: Callable[[np.ndarray], object], sizes: Iterable[int]) -> None:
    for size in sizes:
        function(ones(size))


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_as_many_as_expected(n):
    """As many programs as there are new sizes are compiled; calls that are cached are none."""
    halved = halving()
    with assert_compiles(n):
        each(halved, [*range(1, n + 1), *range(1, n + 1)])


@pytest.mark.parametrize("expected", [1, 3])
def test_more_or_fewer(expected):
    """One too many and one too few fail, and the names of all are told."""
    halved = halving()
    message = f"2 programs were compiled, expected {expected}: jit\\(halved\\), jit\\(halved\\)"
    with pytest.raises(AssertionError, match=message), assert_compiles(expected):
        each(halved, (1, 2))


def test_nothing_is_compiled():
    """Where nothing was compiled at all, the message says so."""
    with (
        pytest.raises(AssertionError, match=r"^0 programs were compiled, expected 1: nothing$"),
        assert_compiles(1),
    ):
        pass


def test_no_compiles():
    """Nothing may be compiled; what is has its name in the message, and its result all the same."""
    halved = halving()
    halved(ones(1))
    with assert_no_compiles():
        halved(ones(1))
    with (
        pytest.raises(AssertionError, match=r"^1 programs were compiled, expected 0: jit"),
        assert_no_compiles(),
    ):
        assert halved(ones(2)).shape == (2,)


def test_other_threads():
    """A compile in another thread counts."""
    halved = halving()
    with assert_compiles(2):
        in_a_thread(lambda: halved(ones(1)))
        halved(ones(2))
    with pytest.raises(AssertionError, match="halved"), assert_no_compiles():
        in_a_thread(lambda: halved(ones(3)))


def test_before_and_after():
    """What is compiled before and after the block does not count, nor is it counted twice."""
    halved = halving()
    halved(ones(1))
    with assert_compiles(2):
        with assert_compiles(1):
            halved(ones(2))
        halved(ones(3))
    halved(ones(4))


def test_buckets():
    """A captured bucket is one compile, and none afterwards, however many sizes it serves."""
    doubled = bucket_jit(lambda x: x * 2, in_axes=("batch",), config=CONFIG, name="doubled")
    with assert_compiles(1):
        doubled(ones(1))
    with assert_no_compiles():
        doubled(ones(2))
    with pytest.raises(AssertionError, match="doubled"), assert_no_compiles():
        doubled(ones(3))


def test_what_the_block_raises():
    """An error of the block goes through, whatever it has compiled, and ends the counting."""
    halved = halving()
    with pytest.raises(ZeroDivisionError), assert_no_compiles():
        each(halved, (1 // at for at in (1, 0)))
    with assert_no_compiles():
        halved(ones(1))


def test_fewer_than_none():
    """No block compiles fewer than no programs."""
    with pytest.raises(ConfigError, match="n=-1 is below 0"), assert_compiles(-1):
        pass


def test_compiles_that_are_not_reported():
    """Where JAX does not report what it compiles, a count of none is not believed."""
    with pytest.raises(ConfigError, match=r"none can be counted: use no_compiles\(\)"):
        check_countable(0, are_reported=False)
    check_countable(0, are_reported=True)
