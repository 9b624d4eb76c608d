"""What would happen to a call."""

import pytest

from cudagraph_jax.modes import CUDAGraphMode
from cudagraph_jax.report.explanation import Explanation
from cudagraph_jax.shapes.ladder import Bucket

SIZES = Bucket(3, 57)


@pytest.mark.parametrize(
    ("explanation", "text"),
    [
        (
            Explanation("embed", CUDAGraphMode.REPLAY, SIZES, Bucket(4, 64), "it is captured"),
            "embed at 3x57: REPLAY in the bucket 4x64, because it is captured.",
        ),
        (
            Explanation("f", CUDAGraphMode.NONE, SIZES, None, "batch=3 is too large", "add 4"),
            "f at 3x57: NONE, because batch=3 is too large. To change that: add 4.",
        ),
        (
            Explanation("f", CUDAGraphMode.NONE, SIZES, Bucket(4, 64), "it is sealed", error=True),
            "f at 3x57: an error in the bucket 4x64, because it is sealed.",
        ),
    ],
)
def test_text(explanation, text):
    """The text says what happens, where, why, and what to change if anything."""
    assert str(explanation) == text


@pytest.mark.parametrize(
    ("error", "bucket", "cells"),
    [
        (False, Bucket(4, 64), ("CAPTURE", "4x64")),
        (True, None, ("error", "")),
    ],
)
def test_html(error, bucket, cells):
    """The HTML has a row for each answer, escaped."""
    explanation = Explanation(
        "<lambda>", CUDAGraphMode.CAPTURE, SIZES, bucket, "a < b", "<script>", error=error
    )
    rows = [
        ("call", "&lt;lambda&gt; at 3x57"),
        ("happens", cells[0]),
        ("bucket", cells[1]),
        ("because", "a &lt; b"),
        ("to change", "&lt;script&gt;"),
    ]
    body = "".join(f"<tr><td>{label}</td><td>{value}</td></tr>" for label, value in rows)
    assert f"<tbody>{body}</tbody>" in explanation._repr_html_()
