"""Heat maps: numbers first, shades behind them."""

from cudagraph_jax.report.heatmap import Cell, HeatMap
from tests.helpers.html_reader import Reader

MAP = HeatMap(
    kind="hits",
    title="Hits <of> all",
    axes=("batch", "seq"),
    rows=(1, 128),
    columns=(16, 1024),
    cells={
        (1, 16): Cell("0", 0, "1x16: 0 replays"),
        (1, 1024): Cell("12.3k", 4, '1x1024: 12,345 "replays"'),
        (128, 1024): Cell("7", 1, "128x1024: 7 replays"),
    },
    legend=[(0, "0"), (1, "up to 7"), (4, "up to 12.3k")],
    note="Left out: 3 < 4.",
)


def test_text():
    """The text has a line for each batch size, a shade behind each number, a key and a note."""
    assert MAP.text().split("\n") == [
        "Hits <of> all",
        "batch \\ seq_len 16   1024",
        "              1 0  12.3k▓",
        "            128        7·",
        "Shades: 0  · up to 7  ▓ up to 12.3k; blank: not captured.",
        "Left out: 3 < 4.",
    ]


def test_html():
    """The HTML has the same numbers in a table, in full where one points at a cell."""
    reader = Reader(MAP.html())
    assert reader.all("caption") == ["Hits <of> all"]
    assert reader.all("th") == ["batch \\ seq_len", "16", "1024", "1", "128"]
    assert reader.all("td") == ["0", "12.3k", "", "7"]
    assert reader.titles == [cell.words for cell in MAP.cells.values()]
    assert reader.all("span") == ["0", "up to 7", "up to 12.3k"]
    assert "Left out: 3 < 4." in reader.all("p")


def test_html_has_a_shade_for_every_cell_and_its_legend():
    """A cell and its entry in the legend have the same class, under the class of their map."""
    html = MAP.html()
    assert html.count('class="l4"') == 2
    assert 'class="heat hits"' in html
    assert 'class="legend hits"' in html
