"""Tables as text and as HTML."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.tables import html_table, text_table


def test_text():
    """Columns are as wide as their widest cell, and one without any content is left out."""
    table = text_table(("bucket", "error", "ms"), [("1x16", "", "3"), ("128x1024", "", "12")])
    assert table.split("\n") == [
        "bucket    ms",
        "1x16      3",
        "128x1024  12",
    ]


@pytest.mark.parametrize("rows", [[], [("", "")]])
def test_text_of_nothing(rows):
    """A table without content is empty."""
    assert text_table(("a", "b"), rows).strip() == ""


def test_html():
    """The HTML table has a caption, a head and a body."""
    assert html_table("two", ("a", "b"), [("1", "2"), ("3", "")]) == (
        "<table><caption>two</caption><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td>2</td></tr><tr><td>3</td><td></td></tr></tbody></table>"
    )


class Reader(HTMLParser):
    """Collects the tags and the text of each cell."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.cells = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("caption", "th", "td"):
            self.cells.append("")

    def handle_data(self, data):
        self.cells[-1] += data


CELL = st.text() | st.sampled_from(["<script>", "</td>", "&amp;", "\"'", "<!--", "a<b>&c"])


@given(CELL, st.lists(st.tuples(CELL, CELL), min_size=1))
def test_html_shows_any_text_as_it_is(title, table):
    """Whatever the title and the cells hold, a browser shows it as text, in its cell."""
    reader = Reader()
    reader.feed(html_table(title, table[0], table[1:]))
    reader.close()
    assert reader.cells == [title, *(cell for row in table for cell in row)]
    assert set(reader.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
