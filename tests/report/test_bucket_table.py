"""The table of captured buckets."""

from cudagraph_jax.report.tables import NONE_YET, buckets_html, buckets_text
from tests.helpers.html_reader import Reader
from tests.helpers.snapshots import HOSTILE, graph, manager_stats

STATS = manager_stats(
    graph(2, 64, memory_bytes=None, capture_time_ms=1200.4),
    graph(4, 64, 1000, 0.25),
    graph(4, 64, 7, variant=HOSTILE),
)


def test_text():
    """A line for each bucket, the most replayed first; what is not known is blank or a dash."""
    assert buckets_text(STATS).split("\n") == [
        "bucket  replays  waste  mean ms  capture ms  memory bytes  state   function",
        "4x64      1,000  25.0%    0.250          13     1,234,567  warmed  embed(float32[·,·])",
        f"4x64#2        7   0.0%    0.250          13     1,234,567  warmed  {HOSTILE}",
        "2x64          0      –        –       1,200                warmed  embed(float32[·,·])",
    ]


def test_html():
    """The HTML has the same cells, and any function's name as it is."""
    cells = Reader(buckets_html(STATS, most=3)).all("td")
    assert cells[8:16] == ["4x64#2", "7", "0.0%", "0.250", "13", "1,234,567", "warmed", HOSTILE]
    assert len(cells) == 24


def test_html_is_capped():
    """Of many buckets the most replayed are shown, and it is said what was left out."""
    reader = Reader(buckets_html(STATS, most=1))
    assert reader.all("td")[0] == "4x64"
    assert len(reader.all("td")) == 8
    assert reader.all("p") == ["Shown: 1 most replayed bucket. Left out: 2 buckets with 7 replays."]


def test_none_yet():
    """Before the first capture it says so."""
    assert buckets_text(manager_stats()) == NONE_YET
    assert Reader(buckets_html(manager_stats(), most=3)).all("p") == [NONE_YET]
