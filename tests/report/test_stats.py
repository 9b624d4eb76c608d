"""Statistics as tables."""

from cudagraph_jax.report.stats import stats_html, stats_text

GRAPHS = {
    "4x64": {
        "variant": "int32[_, _] <script>",
        "capture_time_ms": 12.6,
        "memory_bytes": 1234567,
        "replay_count": 3,
        "avg_replay_time_ms": 0.12345,
        "waste": 0.25,
    },
    "8x64": {
        "variant": "",
        "capture_time_ms": 0.2,
        "memory_bytes": None,
        "replay_count": 0,
        "avg_replay_time_ms": 0.0,
        "waste": 0.0,
    },
}


def stats(graphs):
    return {
        "mode": "capture",
        "calls": 5,
        "hits": 3,
        "misses": 1,
        "eager_calls": 2,
        "waste": 0.125,
        "registry": {"graphs": graphs},
    }


TITLE = (
    "embed: mode capture, 5 calls, 3 hits, 1 misses, 2 eager, "
    "12.5% of computed elements were padding"
)


def test_text():
    """A line of totals, and a row for each bucket; what the compiler does not report is blank."""
    assert stats_text("embed", stats(GRAPHS)).split("\n") == [
        TITLE,
        "bucket  variant               capture ms  memory bytes  replays  mean ms  waste",
        "4x64    int32[_, _] <script>  13          1,234,567     3        0.123    25.0%",
        "8x64                          0                         0        0.000    0.0%",
    ]


def test_text_without_graphs():
    """Without any bucket the totals stand alone."""
    assert stats_text("embed", stats({})).strip() == TITLE


def test_html():
    """The HTML has the same cells, escaped."""
    html = stats_html("<b>", stats(GRAPHS))
    assert html.startswith(f"<table><caption>&lt;b&gt;{TITLE.removeprefix('embed')}</caption>")
    assert "<td>int32[_, _] &lt;script&gt;</td><td>13</td><td>1,234,567</td>" in html
    assert "<script>" not in html
    assert html.count("<tr>") == 3
