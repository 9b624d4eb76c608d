"""Counts of sizes, in bounded memory."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.graphs.replay_counts import SizeHistogram
from cudagraph_jax.shapes.ladder import Bucket

SIZES = st.builds(Bucket, st.integers(1, 60), st.integers(1, 900))


@given(st.lists(SIZES))
def test_counts_are_exact_below_the_limit(sizes):
    """Each size has the number of times that it was added, in ascending order."""
    histogram = SizeHistogram()
    for size in sizes:
        histogram.add(size)
    assert histogram.counts() == Counter(sizes)
    assert list(histogram.counts()) == sorted(set(sizes))


@given(st.lists(SIZES, min_size=1), st.integers(1, 8))
def test_bounded_without_losing_a_request(sizes, limit):
    """No more sizes than the limit are told apart; none is lost, shrunk, or above the largest."""
    histogram = SizeHistogram(max_sizes=limit)
    for size in sizes:
        histogram.add(size)
    counts = histogram.counts()
    assert len(counts) <= limit
    assert sum(counts.values()) == len(sizes)
    for axis in range(2):
        assert max(size[axis] for size in counts) == max(size[axis] for size in sizes)
        assert sum(size[axis] * count for size, count in counts.items()) >= sum(
            size[axis] for size in sizes
        )


@pytest.mark.parametrize("sizes", [Bucket(0, 3), Bucket(3, 0)])
def test_empty_requests_are_left_out(sizes):
    """An empty batch or sequence is nothing that a bucket could serve."""
    histogram = SizeHistogram()
    histogram.add(sizes)
    assert histogram.counts() == {}


def test_fading():
    """Fading halves the counts, keeps what came once, and waits for new requests."""
    histogram = SizeHistogram()
    histogram.add(Bucket(1, 2), 9)
    histogram.add(Bucket(3, 4))
    for _ in range(3):
        histogram.fade()
        assert histogram.counts() == {Bucket(1, 2): 4, Bucket(3, 4): 1}
    histogram.add(Bucket(5, 6), 3)
    histogram.fade()
    assert histogram.counts() == {Bucket(1, 2): 2, Bucket(3, 4): 1, Bucket(5, 6): 1}


def test_clearing():
    """After clear it counts from nothing, as finely as a new one."""
    histogram = SizeHistogram(max_sizes=1)
    for size in (Bucket(1, 1), Bucket(2, 700)):
        histogram.add(size)
    histogram.clear()
    histogram.add(Bucket(1, 3))
    assert histogram.counts() == {Bucket(1, 3): 1}


def test_threads():
    """Counts stay exact when many threads add at once."""
    histogram = SizeHistogram(max_sizes=16)
    ready = threading.Barrier(8)

    def work(seed: int) -> None:
        ready.wait()
        for n in range(500):
            histogram.add(Bucket(1 + (n * seed) % 7, 1 + n % 90))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(histogram.counts().values()) == 8 * 500
