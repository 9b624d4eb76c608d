"""The sizes that calls had."""

from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.report.tables import MOST_SIZES, sizes_html, sizes_text
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.html_reader import Reader

CONFIG = CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(16, 64))
SIZES = {Bucket(1, 16): 1, Bucket(3, 57): 1000, Bucket(9, 9): 999}


def test_text():
    """The most asked sizes come first, with their bucket and the padding in it."""
    assert sizes_text(SIZES, CONFIG).split("\n") == [
        "Most asked sizes",
        "batch  seq_len  calls  part of all  bucket                    padding",
        "    3       57  1,000        50.0%  4x64                        33.2%",
        "    9        9    999        50.0%  none: outside the limits        –",
        "    1       16      1         0.1%  1x16                         0.0%",
    ]


def test_nothing():
    """Where no sizes are counted there is nothing to show."""
    assert sizes_text({}, CONFIG) == sizes_html({}, CONFIG) == ""


def test_html():
    """The HTML has the same cells."""
    reader = Reader(sizes_html(SIZES, CONFIG))
    assert reader.all("td")[:6] == ["3", "57", "1,000", "50.0%", "4x64", "33.2%"]


def test_many():
    """Of many sizes the most asked are shown, and it is said what was left out."""
    many = {Bucket(1, seq): 100 - seq for seq in range(1, MOST_SIZES + 3)}
    left_out = f"Left out: 2 sizes with {100 - MOST_SIZES - 1 + 100 - MOST_SIZES - 2} calls."
    assert sizes_text(many, CONFIG).split("\n")[-1] == left_out
    assert Reader(sizes_html(many, CONFIG)).all("p") == [left_out]


@given(
    st.dictionaries(
        st.builds(Bucket, st.integers(0, 10**5), st.integers(0, 10**5)), st.integers(0, 10**9)
    ),
    st.booleans(),
)
def test_any_histogram(sizes, enabled):
    """Any histogram can be rendered, empty and huge sizes included."""
    config = CUDAGraphConfig(capture_sizes=(1, 4), enabled=enabled)
    text = sizes_text(sizes, config)
    assert all(f"{calls:,}" in text for calls in sorted(sizes.values())[-MOST_SIZES:])
    Reader(sizes_html(sizes, config))


def test_further_axes_have_columns():
    """Sizes of further axes stand beside batch and sequence, blank where a call has none."""
    config = CUDAGraphConfig(capture_sizes=(4,), capture_axes={"height": (8,), "width": (8,)})
    sizes = {Bucket(3, 1, height=6, width=8): 3, Bucket(2, 1): 1}
    lines = sizes_text(sizes, config).split("\n")
    assert lines[1].split()[:4] == ["batch", "seq_len", "height", "width"]
    assert lines[2].split()[:5] == ["3", "1", "6", "8", "3"]
    assert "4x1,height=8,width=8" in lines[2]
    assert lines[3].split()[:3] == ["2", "1", "1"]
    assert Reader(sizes_html(sizes, config)).all("th")[2:4] == ["height", "width"]
