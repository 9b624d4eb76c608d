"""What would happen to a call."""

import pytest

from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.report.explanation import Explanation
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.html_reader import Reader
from tests.helpers.snapshots import ACTING, HOSTILE, SHOWN

SIZES = Bucket(3, 57)


@pytest.mark.parametrize(
    ("explanation", "text"),
    [
        (
            Explanation("embed", CUDAGraphMode.REPLAY, SIZES, Bucket(4, 64), "it is captured"),
            "embed at 3x57: REPLAY in the bucket 4x64 (33.2% padding), because it is captured.",
        ),
        (
            Explanation("f", CUDAGraphMode.NONE, SIZES, None, "batch=3 is too large", "add 4"),
            "f at 3x57: NONE, an eager run, because batch=3 is too large. To change that: add 4.",
        ),
        (
            Explanation("f", CUDAGraphMode.NONE, SIZES, Bucket(4, 64), "it is sealed", error=True),
            "f at 3x57: an error, because it is sealed.",
        ),
    ],
)
def test_text(explanation, text):
    """The text says what happens, where, why, and what to change if anything."""
    assert str(explanation) == text


@pytest.mark.parametrize(
    ("sizes", "bucket", "waste"),
    [
        (Bucket(3, 57), Bucket(4, 64), 1 - 3 * 57 / 256),
        (Bucket(4, 64), Bucket(4, 64), 0.0),
        (Bucket(3, 57), None, None),
        (Bucket(5, 57), Bucket(4, 64), None),
    ],
)
def test_waste(sizes, bucket, waste):
    """The padding is known where a bucket holds the call; an exact fit shows none."""
    explanation = Explanation("f", CUDAGraphMode.REPLAY, sizes, bucket, "it is so")
    assert explanation.waste == waste
    assert ("padding" in str(explanation)) == bool(waste)


@pytest.mark.parametrize(
    ("error", "bucket", "remedy", "cells"),
    [
        (False, Bucket(4, 64), HOSTILE, ["CAPTURE", "4x64 (33.2% padding)", HOSTILE]),
        (True, None, "", ["an error", "none", "nothing has to be changed"]),
    ],
)
def test_html(error, bucket, remedy, cells):
    """The HTML has a row for each answer, and shows any text as it is."""
    explanation = Explanation(
        HOSTILE, CUDAGraphMode.CAPTURE, SIZES, bucket, "a < b", remedy, error=error
    )
    reader = Reader(explanation._repr_html_())
    assert reader.all("caption") == [f"{HOSTILE} at 3x57"]
    assert reader.all("th") == ["happens", "bucket", "because", "to change that"]
    happens, where, change = cells
    assert reader.all("td") == [happens, where, "a < b", change]


def test_names_that_act_on_a_terminal():
    """Names and reasons are only text, on one line."""
    name, reason = f"f{ACTING}", f"a\n{ACTING}"
    explanation = Explanation(name, CUDAGraphMode.NONE, SIZES, None, reason)
    assert str(explanation) == f"f{SHOWN} at 3x57: NONE, an eager run, because a {SHOWN}."
    reader = Reader(explanation._repr_html_())
    assert reader.all("caption") == [f"f{SHOWN} at 3x57"]
    assert reader.all("td")[2] == f"a\n{SHOWN}"
