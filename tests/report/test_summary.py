"""Statistics for a terminal and for a notebook."""

import pytest
from hypothesis import given

from cudagraph_jax import CUDAGraphManager, CUDAGraphRegistry
from cudagraph_jax.report.summary import stats_html, stats_text
from tests.helpers.html_reader import Reader
from tests.helpers.snapshots import HOSTILE, STATS, graph, manager_stats, registry_stats

TOTALS = """\
mode                 capture
calls                3
hits                 3 (exact 3)
hit rate             100.0%
misses               0
captures in a call   0
split calls          0, in 0 pieces
eager calls          0
errors               0
waste                –
waiting for capture  0
failed buckets       0
graphs               1 held, 1 evicted
memory               2,048 bytes
captures             1
compiling            0.01 s in all, 13 ms each
replays              3
replaying            0.75 ms in all, 0.250 ms each"""


MAPS = [
    """\
Hits: how often each bucket was replayed
batch \\ seq_len 64
              4 3▓
Shades: 0  ░ up to 1  ▒ up to 2  ▓ up to 3; blank: not captured.""",
    """\
Waste: the part of each bucket's work that was padding
batch \\ seq_len   64
              4 25%░
Shades: 0% to 5%  · 5% to 15%  ░ 15% to 30%  ▒ 30% to 50%  ▓ 50% to 100%; blank: not captured.""",
]


def test_text():
    """Totals, both heat maps and the table of buckets."""
    assert stats_text("embed", manager_stats(graph(4, 64, 3, 0.25))).split("\n\n") == [
        f"embed\n{TOTALS}",
        *MAPS,
        "bucket  replays  waste  mean ms  capture ms  memory bytes  state   function\n"
        "4x64          3  25.0%    0.250          13     1,234,567  warmed  embed(float32[·,·])",
    ]


def test_text_of_troubles():
    """What failed stands at the top."""
    lines = stats_text("embed", manager_stats(failed_buckets=2)).split("\n")
    assert lines[0] == "embed"
    assert lines[1] == "2 buckets could not be captured; calls of that size run eagerly."


def test_without_graphs():
    """Before the first capture there are totals and a sentence."""
    assert stats_text("embed", manager_stats()).endswith("\n\nNo bucket is captured yet.")
    assert "No bucket is captured yet." in Reader(stats_html("embed", manager_stats())).all("p")


def test_registry_alone():
    """A registry's own statistics are shown by the same functions."""
    stats = registry_stats({"4x64": graph(4, 64, 3)})
    assert stats_text("registry", stats).startswith("registry\ngraphs")
    assert Reader(stats_html("registry", stats)).all("dd") == ["1", "3", "0.01 s"]


def test_html():
    """The short form for notebooks has figures, troubles and the buckets used most."""
    stats = manager_stats(graph(4, 64, 3, variant=HOSTILE), errors_by_reason={HOSTILE: 1})
    html = stats_html(HOSTILE, stats)
    reader = Reader(html)
    assert reader.all("b") == [HOSTILE]
    assert f"1 call ended in an error: {HOSTILE} 1." in reader.all("p")
    assert HOSTILE in reader.all("td")
    assert "heat " not in html.partition("</style>")[2]


def test_html_stays_short():
    """Of thousands of buckets a notebook shows a few."""
    stats = manager_stats(*[graph(batch, 64) for batch in range(1, 3000)])
    html = stats_html("embed", stats)
    assert len(Reader(html).all("tr")) < 50
    assert len(html) < 20_000


@given(STATS)
def test_any_snapshot_as_text(stats):
    """Any statistics can be rendered, and the text has the number of every bucket."""
    lines = stats_text("f", stats).split("\n")
    for key, record in stats["registry"]["graphs"].items():
        assert any(line.split()[:2] == [key, f"{record['replay_count']:,}"] for line in lines)


@given(STATS)
def test_any_snapshot_as_html(stats):
    """Any statistics give well-formed HTML, in which names are only text."""
    reader = Reader(stats_html(HOSTILE, stats))
    assert reader.all("b") == [HOSTILE]
    shown = sorted(stats["registry"]["graphs"].values(), key=lambda record: -record["replay_count"])
    assert f"{shown[0]['replay_count']:,}" in reader.all("td") if shown else True


@pytest.mark.parametrize("holder", [CUDAGraphRegistry(), CUDAGraphManager()])
def test_shown_by_stats(holder):
    """What has statistics is shown by them in a notebook, under the name of its class."""
    assert holder._repr_html_() == stats_html(type(holder).__name__, holder.stats())
