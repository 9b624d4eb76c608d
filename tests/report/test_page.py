"""A whole HTML page."""

import re

from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.report.page import page, section
from tests.helpers.html_reader import Reader, shown
from tests.helpers.snapshots import HOSTILE

PAGE = page("Cache", "2026-01-02", "<p>body</p>")


def test_is_a_complete_document():
    """It has a doctype, its encoding, a viewport, both colour schemes, a title and a language."""
    assert PAGE.startswith('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in PAGE
    assert '<meta name="color-scheme" content="light dark">' in PAGE
    reader = Reader(PAGE)
    assert reader.all("title") == ["Cache, 2026-01-02"]
    assert reader.all("h1", "p") == ["Cache", "2026-01-02", "body"]


def test_asks_for_nothing_from_elsewhere():
    """No address, no import and no script is in it."""
    assert not re.search(r"https?:|//|url\(|@import|<script|src=|href=", PAGE)


def test_light_dark_and_paper():
    """It has rules for dark screens and for paper."""
    assert "prefers-color-scheme:dark" in PAGE
    assert "@media print" in PAGE


@given(st.text() | st.just(HOSTILE) | st.just("$body ${style} $$"))
def test_titles_are_text(title):
    """Whatever the titles hold, a browser shows it as text."""
    reader = Reader(page(title, title, "") + section(title, "<p></p>"))
    text = shown(title)
    assert reader.all("title", "h1", "h2") == [shown(f"{title}, {title}"), text, text]


def test_section():
    """A section has a heading; without content there is none."""
    assert section("a & b", "<p>1</p>", "") == "<section><h2>a &amp; b</h2><p>1</p></section>"
    assert section("a", "", "") == ""
