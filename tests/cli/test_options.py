"""Values on the command line."""

from argparse import ArgumentTypeError

import pytest

from cudagraph_jax.cli.options import age_s, bucket, byte_count, headroom, part, positive


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
    [("14050", 14050), ("16x256", (16, 256)), ("0.25", 0.25), ("1.0", 1.0), ("src=8", {"src": 8})],
)
def test_headroom(text, expected):
    """A length, a pair, an axis or a fraction, in the types that plan_buckets tells apart."""
    found = headroom(text)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    "text", ["", "x", "16x", "x256", "1x2x3", "much", "0.2_5", "nan", "\u0660.\u0665"]
)
def test_no_headroom(text):
    """Anything else is refused, with an example of each."""
    with pytest.raises(ArgumentTypeError, match=r"\(14050\).*\(16x256\).*\(src=512\).*\(0.25\)"):
        headroom(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000", 1000),
        ("7B", 7),
        ("512MiB", 512 << 20),
        ("20G", 20 << 30),
        ("1.5 GiB", 3 << 29),
        ("64k", 65536),
        ("2TiB", 2 << 40),
    ],
)
def test_byte_count(text, expected):
    """Bytes alone, or with a unit that is a power of 1024, whether it says so or not."""
    assert byte_count(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1GB", "1kb", "iB", "1iB", "1e9", "many", "9" * 5000])
def test_no_byte_count(text):
    """Anything else is refused, and so are units that are powers of 1000 to some."""
    with pytest.raises(ArgumentTypeError, match="is no number of bytes, such as"):
        byte_count(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("45", 45), ("45s", 45), ("90m", 5400), ("1.5h", 5400), ("30d", 2592000)],
)
def test_age(text, expected):
    """Seconds alone, or with the unit's letter."""
    assert age_s(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "d", "1y", "1D", "1_0", "inf", "9" * 5000])
def test_no_age(text):
    """Anything else is refused."""
    with pytest.raises(ArgumentTypeError, match="is no age, such as 30d"):
        age_s(text)


@pytest.mark.parametrize("text", ["8", "8x", "8x128x2", "x8", "8X128", "8x12\u0668"])
def test_bucket(text):
    """A bucket has two sizes, and those of further axes by their names."""
    assert bucket("8x128") == "8x128"
    assert bucket("8x1,height=4,width=8") == "8x1,height=4,width=8"
    with pytest.raises(ArgumentTypeError, match="is no bucket, such as 8x128"):
        bucket(text)


@pytest.mark.parametrize("text", ["1e3", "+5", "5e-1", "1."])
def test_headroom_is_written_plainly(text):
    """What could be a length or a fraction is neither."""
    with pytest.raises(ArgumentTypeError, match="is no seq_len"):
        headroom(text)
