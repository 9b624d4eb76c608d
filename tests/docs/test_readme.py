"""The README is short, and its example and the pages that go on from it do what they say."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

import cudagraph_jax
from cudagraph_jax.cli.probe import EXTRAS
from tests.docs import pages
from tests.helpers.examples import as_a_whole

MOST_BYTES = 8192

needs_pages = pytest.mark.skipif(
    not pages.DOCS.is_dir(), reason="a source distribution has no documentation"
)


def test_short():
    """The README is read on one page; what is longer stands in docs/."""
    assert pages.README.stat().st_size <= MOST_BYTES


@needs_pages
def test_extras():
    """The table of extras has those that the doctor looks for."""
    text = (pages.DOCS / "get_started.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| ", text, flags=re.MULTILINE)) == set(EXTRAS)


@needs_pages
def test_one_example():
    """The README's example is that of the page that others go on from."""
    (readme,) = pages.blocks(pages.README)
    (page,) = pages.blocks(pages.DOCS / "get_started.md")
    assert readme.code == page.code


@pytest.fixture(scope="module")
def quickstart():
    """What the example prints, in lines, and its names."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = pages.run(pages.README)
    return printed.getvalue().splitlines(), names


def test_quickstart(quickstart):
    """The example prints what its comments say, and compiles nothing after warm-up."""
    printed, _ = quickstart
    assert printed[0] == "(3, 384)"
    assert printed[1].startswith("embed at 3x57: REPLAY in the bucket 4x64")


def test_quickstart_stands_debug_mode(quickstart):
    """The example's function, whose mask is an ordinary input, is not accused of a leak."""
    _, names = quickstart
    config = cudagraph_jax.CUDAGraphConfig(
        capture_sizes=(4,), capture_seq_lens=(64,), debug_mode=True
    )
    checked = cudagraph_jax.bucket_jit(
        as_a_whole(names["embed"].__wrapped__),
        in_axes=(None, "batch seq", "batch seq"),
        config=config,
    )
    arguments = (names["params"], names["ids"], names["mask"])
    assert not checked.warmup(*arguments, progress=False).failed
    assert checked(*arguments).shape == (3, 384)


@needs_pages
def test_a_plan_is_put_in_place():
    """What the page on choosing buckets plans is the grid once the background is done."""
    names = pages.run(pages.DOCS / "choosing_buckets.md")
    assert names["embed"].manager.config.buckets() == names["plan"].buckets()
