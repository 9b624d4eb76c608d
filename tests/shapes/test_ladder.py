"""Ladders and buckets."""

import copy
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.ladder import Bucket, Ladder

MAXIMA = st.integers(1, 2000)
CONSTRUCTORS = st.one_of(
    st.just(Ladder.powers_of_two),
    st.just(Ladder.vllm),
    st.just(Ladder.sglang),
    st.integers(1, 300).map(lambda step: lambda top: Ladder.linear(step, top)),
    st.floats(1, 10, exclude_min=True).map(lambda ratio: lambda top: Ladder.geometric(ratio, top)),
)
SIZES = st.sets(st.integers(1, 500), min_size=1)


@given(CONSTRUCTORS, MAXIMA, st.data())
def test_every_size_up_to_the_maximum_fits(make, top, data):
    """Whatever the constructor, the maximum is a size and every n up to it has one."""
    ladder = make(top)
    assert ladder.max == ladder[-1] == top
    assert ladder.fit(top) == top
    n = data.draw(st.integers(1, top))
    assert n <= ladder.fit(n) <= top
    assert ladder.fit(top + 1) is None


@given(SIZES, st.integers(-1, 600))
def test_fit_is_the_smallest_size_that_holds(sizes, n):
    """`fit` gives the smallest size that holds n, and None above the largest."""
    assert Ladder(sizes).fit(n) == min((size for size in sizes if size >= n), default=None)


@given(st.floats(1.01, 10), MAXIMA, st.data())
def test_geometric_bounds_the_padding(ratio, top, data):
    """The padding of any n in a geometric ladder is below `ratio - 1` of it."""
    n = data.draw(st.integers(1, top))
    fitted = Ladder.geometric(ratio, top).fit(n)
    assert fitted is not None
    assert fitted - n < (ratio - 1) * n + 1e-9 * n


@given(SIZES)
def test_value(sizes):
    """A ladder is a sorted tuple that survives pickling, copies and its repr."""
    ladder = Ladder(list(sizes))
    assert ladder == tuple(sorted(sizes))
    assert hash(ladder) == hash(tuple(sorted(sizes)))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        same = pickle.loads(pickle.dumps(ladder, protocol))
        assert (type(same), same) == (Ladder, ladder)
    assert copy.deepcopy(ladder) == eval(repr(ladder)) == ladder


@pytest.mark.parametrize(
    ("ladder", "sizes"),
    [
        (Ladder.powers_of_two(1), (1,)),
        (Ladder.powers_of_two(20), (1, 2, 4, 8, 16, 20)),
        (Ladder.powers_of_two(16), (1, 2, 4, 8, 16)),
        (Ladder.linear(8, 32), (8, 16, 24, 32)),
        (Ladder.linear(8, 20), (8, 16, 20)),
        (Ladder.linear(8, 5), (5,)),
        (Ladder.geometric(2, 20), (1, 2, 4, 8, 16, 20)),
        (Ladder.geometric(1.5, 20), (1, 2, 3, 5, 8, 12, 18, 20)),
        (Ladder.geometric(1.1, 8), (1, 2, 3, 4, 5, 6, 7, 8)),
        (Ladder.vllm(1), (1,)),
        (Ladder.vllm(20), (1, 2, 4, 8, 16, 20)),
        (Ladder.vllm(256), (1, 2, 4, *range(8, 257, 8))),
        (Ladder.vllm(512), (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))),
        (Ladder.vllm(300), (1, 2, 4, *range(8, 257, 8), 272, 288, 300)),
        (Ladder.sglang(1), (1,)),
        (Ladder.sglang(14), (1, 2, 4, 8, 12, 14)),
        (Ladder.sglang(160), (1, 2, 4, 8, 12, *range(16, 161, 8))),
        (Ladder.sglang(512), (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 513, 16))),
        (
            Ladder.sglang(600),
            (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 513, 16), 544, 576, 600),
        ),
    ],
)
def test_sizes(ladder, sizes):
    """The constructors give exactly these sizes."""
    assert ladder == sizes
    assert type(ladder) is Ladder


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "capture_sizes is empty: give at least one size"),
        ((4, 2, 4), "capture_sizes has 4 twice: give each size once"),
        (
            (2, -1),
            "capture_sizes[1]=-1 is below 1: give a size of 1 or more",
        ),
        (
            (2, True),
            "capture_sizes[1]=True is not an integer: give a size of 1 or more",
        ),
        ("124", "capture_sizes='124' is text: give integers, such as (1, 2, 4)"),
        (b"124", "capture_sizes=b'124' is text: give integers, such as (1, 2, 4)"),
        (
            8,
            "capture_sizes=8 is not a collection of integers: give one, such as (1, 2, 4)",
        ),
    ],
    ids=repr,
)
def test_bad_sizes(sizes, message):
    """What is no ladder is told why, under the name that it was given."""
    with pytest.raises(ConfigError) as caught:
        Ladder(sizes, name="capture_sizes")
    assert str(caught.value) == message


@pytest.mark.parametrize("top", [0, -1, True, 1.5, "8", None, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        Ladder.powers_of_two,
        Ladder.vllm,
        Ladder.sglang,
        lambda top: Ladder.linear(8, top),
        lambda top: Ladder.geometric(2, top),
    ],
    ids=["powers_of_two", "vllm", "sglang", "linear", "geometric"],
)
def test_bad_maximum(make, top):
    """No constructor takes a maximum that is no size."""
    with pytest.raises(ConfigError, match=r"\bmax_size="):
        make(top)


@pytest.mark.parametrize("step", [0, -8, True, 2.5, "8", None])
def test_bad_step(step):
    """A linear ladder has a step that is a size."""
    with pytest.raises(ConfigError, match=r"\bstep="):
        Ladder.linear(step, 64)


@pytest.mark.parametrize("ratio", [1, 1.0, 0.5, 0, -2, math.nan, True, math.inf, "2", None])
def test_bad_ratio(ratio):
    """A geometric ladder has a ratio above 1, and a finite one."""
    with pytest.raises(ConfigError, match=r"\bratio="):
        Ladder.geometric(ratio, 64)


def test_text():
    """The reprs of a ladder and of a bucket, and a bucket's name in statistics."""
    assert repr(Ladder((4, 1))) == "Ladder((1, 4))"
    assert repr(Ladder((4,))) == "Ladder((4,))"
    assert repr(Bucket(4, 64)) == "Bucket(batch_size=4, seq_len=64)"
    assert str(Bucket(4, 64)) == "4x64"
    assert Bucket(4, 64).elements == 256
