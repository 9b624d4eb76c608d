"""The sizes of observed requests."""

import math
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.observed import Observed
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.stores import peak_bytes

PAIRS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=30)
EXPECTED = (
    "expected lengths (N,), (batch, seq_len) pairs (N, 2), or a mapping of either to its count"
)
WHOLE = "give whole numbers from 1 to 2**53"


def found(sizes):
    """The distinct sizes and their counts, in their order."""
    observed = Observed.of(sizes)
    pairs = zip(*[column.tolist() for column in observed.columns], strict=True)
    return list(zip(pairs, observed.counts.tolist(), strict=True))


@given(PAIRS)
def test_distinct_sizes_are_counted(pairs):
    """Each different pair is there once, ascending, with how often it came."""
    expected = sorted(Counter(pairs).items())
    assert found(pairs) == expected
    assert found(Counter(pairs)) == expected
    observed = Observed.of(pairs)
    assert observed.requests == len(pairs)
    assert observed.largest == tuple(map(max, zip(*pairs, strict=True)))
    assert type(observed.largest[0]) is int


@pytest.mark.parametrize(
    "sizes",
    [
        [7, 9, 7],
        (7, 9, 7),
        iter([7, 9, 7]),
        (size for size in (7, 9, 7)),
        np.array([7, 9, 7], np.int16),
        np.array([7, 9, 7], np.uint64),
        np.array([7.0, 9.0, 7.0], np.float32),
        [np.int64(7), 9.0, 7],
        jnp.array([7, 9, 7]),
        [[1, 7], [1, 9], [1, 7]],
        [(1, 7), Bucket(1, 9), (1, 7)],
        ((1, size) for size in (7, 9, 7)),
        {7: 2, 9: 1},
        {7: 2.0, 9: np.int32(1), 11: 0},
        {(1, 7): 2, (1, 9): 1},
        {Bucket(1, 7): 2, Bucket(1, 9): 1},
        Counter([7, 9, 7]),
    ],
    ids=lambda sizes: type(sizes).__name__,
)
def test_forms(sizes):
    """Every form of the same three lengths is the same sizes, with batch 1."""
    assert found(sizes) == [((1, 7), 2.0), ((1, 9), 1.0)]


def test_observed_stays():
    """What was observed already is taken as it is."""
    observed = Observed.of([1, 2])
    assert Observed.of(observed) is observed


def test_large_values():
    """The largest size and counts beyond any integer type's sum are kept exactly."""
    assert found([2**53, (2**31)]) == [((1, 2**31), 1.0), ((1, 2**53), 1.0)]
    assert Observed.of({1: 2**53, 2: 2**53}).requests == 2**54
    assert found([(2**53, 2**53), (1, 2**53)]) == [((1, 2**53), 1.0), ((2**53, 2**53), 1.0)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], f"sizes are empty: {EXPECTED}"),
        ({}, f"sizes are empty: {EXPECTED}"),
        (np.zeros((0, 2)), f"sizes are empty: {EXPECTED}"),
        ("", f"sizes='' is text: {EXPECTED}"),
        ("128", f"sizes='128' is text: {EXPECTED}"),
        (b"128", f"sizes=b'128' is text: {EXPECTED}"),
        ([(1, 2), (3,)], f"sizes are ragged: {EXPECTED}"),
        ({5: 1, (1, 5): 1}, f"sizes are ragged: {EXPECTED}"),
        (5, f"sizes have the shape (): {EXPECTED}"),
        (None, f"sizes have the shape (): {EXPECTED}"),
        (np.ones((4, 3)), f"sizes have the shape (4, 3): {EXPECTED}"),
        (np.ones((4, 2, 1)), f"sizes have the shape (4, 2, 1): {EXPECTED}"),
        ({(1, 2, 3): 4}, f"sizes have the shape (1, 3): {EXPECTED}"),
        ([3, 0], f"sizes[1]=0 is below 1: {WHOLE}"),
        ([(1, 4), (2, -4)], f"sizes[1]=[2, -4] is below 1: {WHOLE}"),
        ([1.0, 2.5], f"sizes[1]=2.5 is no whole number: {WHOLE}"),
        ([1.0, math.nan], f"sizes[1]=nan is no whole number: {WHOLE}"),
        ([1.0, math.inf], f"sizes[1]=inf is no whole number: {WHOLE}"),
        ([2**53 + 1], f"sizes[0]=9007199254740993 is above 2**53: {WHOLE}"),
        (
            np.array([2**64 - 1], np.uint64),
            f"sizes[0]=18446744073709551615 is above 2**53: {WHOLE}",
        ),
        ([1e300], f"sizes[0]=1e+300 is above 2**53: {WHOLE}"),
        ([2**70], f"sizes have the dtype object: {WHOLE}"),
        ([True, False], f"sizes have the dtype bool: {WHOLE}"),
        (["a", "b"], f"sizes have the dtype <U1: {WHOLE}"),
        ([1, None], f"sizes have the dtype object: {WHOLE}"),
        ([1j], f"sizes have the dtype complex128: {WHOLE}"),
        ({4: 0, 5: 0}, f"sizes hold no request, all counts are 0: {EXPECTED}"),
        ({4: 1, 5: -1}, "counts[1]=-1 is below 0: give whole numbers from 0 to 2**53"),
        ({4: 1.5}, "counts[0]=1.5 is no whole number: give whole numbers from 0 to 2**53"),
        ({4: math.nan}, "counts[0]=nan is no whole number: give whole numbers from 0 to 2**53"),
        ({4: "2"}, "counts have the dtype <U1: give whole numbers from 0 to 2**53"),
        ({4: True}, "counts have the dtype bool: give whole numbers from 0 to 2**53"),
        ({4: [1], 5: [2, 3]}, "counts have the dtype object: give whole numbers from 0 to 2**53"),
        ({4: [1]}, "counts are no numbers: give a whole number of 0 or more for each size"),
    ],
    ids=repr,
)
def test_bad_sizes(sizes, message):
    """What are no sizes is told where and why, and what to give."""
    with pytest.raises(ConfigError) as caught:
        Observed.of(sizes)
    assert str(caught.value) == message


def test_many_requests():
    """Of very many requests the same is found, with little memory, and which of them is wrong."""
    lengths = np.random.default_rng(0).integers(1, 1000, 1_000_000)
    observed: list[Observed] = []
    assert peak_bytes(lambda: observed.append(Observed.of(lengths))) < 3 * lengths.nbytes
    assert observed[0].counts.tolist() == np.bincount(lengths)[1:].tolist()
    assert observed[0].columns[1].tolist() == list(range(1, 1000))
    lengths[777_777] = 0
    with pytest.raises(ConfigError, match=r"sizes\[777777\]=0 is below 1"):
        Observed.of(lengths)
