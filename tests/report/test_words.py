"""Numbers in words that fit a cell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.report.words import exact, listed, milliseconds, part, seconds, short, things


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0k"),
        (99_949, "99.9k"),
        (99_950, "100k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (12_345_678, "12.3M"),
        (7 * 10**9, "7.00G"),
        (187 * 10**12, "187T"),
    ],
)
def test_short(number, text):
    """Small numbers have all their digits, larger ones three and a unit."""
    assert short(number) == text


@given(st.integers(0, 10**14))
def test_short_is_short(number):
    """No number up to a hundred trillion needs more than five characters."""
    assert len(short(number)) <= 5


@given(st.integers(10_000, 10**15))
def test_short_is_near(number):
    """What is left of a large number is right to half a percent."""
    text = short(number)
    size = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[text[-1]]
    assert float(text[:-1]) * size == pytest.approx(number, rel=0.0051)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0%"),
        (1e-9, "<0.1%"),
        (0.0005, "0.1%"),
        (0.305, "30.5%"),
        (0.9994, "99.9%"),
        (0.99999, ">99.9%"),
        (1.0, "100.0%"),
    ],
)
def test_part(share, text):
    """Only all of something is 100.0%, and only nothing 0.0%."""
    assert part(share) == text


def test_words():
    """Counts agree with what they count, and times have the digits that matter."""
    assert exact(1234567) == "1,234,567"
    assert things(1, "bucket") == "1 bucket"
    assert things(2000, "bucket") == "2,000 buckets"
    assert seconds(0.126) == "0.13 s"
    assert [milliseconds(value) for value in (0, 0.75, 12.34, 420.4, 999.7)] == [
        "0.00 ms", "0.75 ms", "12.3 ms", "420 ms", "1.00 s",
    ]  # fmt: skip
    assert seconds(1234.56) == "1,234.6 s"
    assert listed([("miss", 3), ("overflow", 1000)]) == "miss 3, overflow 1,000"
