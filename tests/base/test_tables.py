"""Tables as text and as HTML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax._base.html import escaped, html_pairs, html_table, table_fragment
from cudagraph_jax._base.text import error_text, one_line, text_pairs, text_table
from tests.helpers.html_reader import Reader, shown
from tests.helpers.snapshots import HOSTILE


def test_text():
    """Columns are as wide as their widest cell, and one without any content is left out."""
    table = text_table(("bucket", "error", "ms"), [("1x16", "", "3"), ("128x1024", "", "12")])
    assert table.split("\n") == [
        "bucket    ms",
        "1x16       3",
        "128x1024  12",
    ]


NUMBERS = [
    "3",
    "1,234",
    "0.5",
    ".5",
    "-2",
    "\u22122",
    "12.5%",
    "12 %",
    "3 ms",
    "1e-05",
    "2.1×",
    "–",
]
WORDS = ["8x64", "4x64#2", "a 3", "1.2.3", "3 buckets", "-", "v1"]


@pytest.mark.parametrize("cell", [*NUMBERS, "<0.1%"])
def test_numbers_go_to_the_right(cell):
    """A column of numbers, blank cells aside, is aligned to the right, its header too."""
    rows = [(cell, "x"), ("", "y"), ("1", "z")]
    assert text_table(("a longer header", "b"), rows).split("\n")[1] == f"{cell:>15}  x"
    assert table_fragment("", ("a", "b"), rows).count('class="n"') == 4


@pytest.mark.parametrize("cell", WORDS)
def test_words_go_to_the_left(cell):
    """A column with anything else is aligned to the left."""
    rows = [(cell, "x"), ("1", "y")]
    assert text_table(("a longer header", "b"), rows).split("\n")[1] == f"{cell:<15}  x"
    assert 'class="n"' not in table_fragment("", ("a", "b"), rows)


@pytest.mark.parametrize("rows", [[], [("", "")]])
def test_text_of_nothing(rows):
    """A table without content is empty."""
    assert text_table(("a", "b"), rows).strip() == ""


def test_text_pairs():
    """Values stand below each other behind their labels."""
    assert text_pairs([("calls", "12"), ("hit rate", "")]) == "calls     12\nhit rate"
    assert text_pairs([]) == ""


def test_a_cell_is_one_line():
    """What would break a line or act on a terminal does not, in tables and pairs."""
    assert one_line("a\n\tb\x1b[31m\x00é") == "a  b\ufffd[31m\ufffdé"
    assert text_table(("a",), [("1\n2",)]) == "a\n1 2"
    assert text_pairs([("a\n", "1\n2")]) == "a   1 2"


def test_html():
    """The HTML table has a caption, a head and a body, and scrolls where it is too wide."""
    assert table_fragment("two", ("a", "b"), [("1", "x"), ("3", "")]) == (
        '<div class="scroll" role="region" aria-label="two" tabindex="0">'
        "<table><caption>two</caption>"
        '<thead><tr><th scope="col" class="n">a</th><th scope="col">b</th></tr></thead>'
        '<tbody><tr><td class="n">1</td><td>x</td></tr>'
        '<tr><td class="n">3</td><td></td></tr></tbody></table></div>'
    )


def test_html_of_nothing():
    """A table without rows has its head."""
    assert Reader(html_table("none", ("a", "b"), [])).all("caption", "th") == ["none", "a", "b"]


def test_html_pairs():
    """Each label is the head of its row."""
    html = html_pairs("two", [("a", "1"), ("b", "a long text, which breaks where a line ends")])
    reader = Reader(html)
    assert reader.all("caption", "th") == ["two", "a", "b"]
    assert reader.all("td")[0] == "1"
    assert html.count('<th scope="row">') == 2
    assert html.count('<td class="w">') == 1


CELL = st.text() | st.sampled_from([HOSTILE, "</td>", "&amp;", "\"'", "<!--", "a<b>&c"])


@given(CELL, st.lists(st.tuples(CELL, CELL), min_size=1))
def test_html_shows_any_text_as_it_is(title, table):
    """Whatever the title and the cells hold, a browser shows it as text, in its cell."""
    texts = [shown(text) for text in (title, *(cell for row in table for cell in row))]
    found = Reader(html_table(title, table[0], table[1:]))
    assert found.all("caption", "th", "td") == texts
    assert Reader(html_pairs(title, table)).all("caption", "th", "td") == texts


def test_html_keeps_lines_alone():
    """Line breaks stay, and what would act on a terminal or turn the text around does not."""
    assert escaped("<a>\n\x1b[31m\u202eb\t'") == "&lt;a&gt;\n\ufffd[31m\ufffdb &#x27;"


class UnspeakableError(Exception):
    """An error whose text cannot be had."""

    def __str__(self):
        raise RuntimeError("no text")


REMOTE = """INTERNAL: CpuCallback error: Traceback (most recent call last):
  File "a.py", line 1, in host
    return table[3]
           ~~~~~^^^
KeyError: 3

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in host
ValueError: no such row
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(" no\nwhy "), "no\nwhy"),
        (RuntimeError(REMOTE), "INTERNAL: CpuCallback error: ValueError: no such row"),
        (ValueError(), "ValueError"),
        (UnspeakableError(), "(its own text fails with RuntimeError)"),
    ],
)
def test_what_an_error_says(error, said):
    """A traceback within the text is cut down to its last error, and no error is too odd."""
    assert error_text(error) == said
