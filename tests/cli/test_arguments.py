"""Values on the command line."""

from argparse import ArgumentTypeError

import pytest

from cudagraph_jax.cli.arguments import headroom, part, positive


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("16", 16), ("007", 7)])
def test_positive(text, number):
    """Whole numbers above 0 are taken."""
    assert positive(text) == number


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "x", "", "1_0", "9" * 5000])
def test_not_positive(text):
    """Anything else is refused."""
    with pytest.raises(ArgumentTypeError, match="is no whole number above 0"):
        positive(text)


@pytest.mark.parametrize("text", ["0", "1", "-0.5", "nan", "inf", "half", "", "0.5_0"])
def test_no_part(text):
    """A part lies between 0 and 1."""
    assert part("0.5") == 0.5
    with pytest.raises(ArgumentTypeError, match="is no part between 0 and 1"):
        part(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("14050", 14050), ("16x256", (16, 256)), ("0.25", 0.25), ("1.0", 1.0)],
)
def test_headroom(text, expected):
    """A length, a pair or a fraction, in the types that plan_buckets tells apart."""
    found = headroom(text)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    "text", ["", "x", "16x", "x256", "1x2x3", "much", "0.2_5", "nan", "\u0660.\u0665"]
)
def test_no_headroom(text):
    """Anything else is refused, with an example of each."""
    with pytest.raises(ArgumentTypeError, match=r"\(14050\).*\(16x256\).*\(0.25\)"):
        headroom(text)
