"""All that is known of a manager at one moment."""

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given

from cudagraph_jax._base.files import ReportError
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.report.report import Report
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.examples import examples
from tests.helpers.html_reader import Reader
from tests.helpers.snapshots import HOSTILE, STATS, graph, manager_stats

CONFIG = CUDAGraphConfig(
    capture_sizes=(1, 4), capture_seq_lens=(16, 64), compiler_options={"xla_a": "1", "xla_b": "<2>"}
)
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def report(stats, **more):
    return Report(**{"name": "cache", "made_at": AT, "stats": stats, "config": CONFIG, **more})


FULL = report(
    manager_stats(graph(4, 64, 3, 0.25), graph(1, 16), failed_buckets=1),
    environment={"jax": "0.12", "backend": "cpu: 1 × cpu"},
    sizes={Bucket(3, 57): 3},
    failures=[("1x64", "embed", "no < memory")],
)
HEADINGS = [
    "Failures",
    "Hits and waste",
    "Buckets",
    "Most asked sizes",
    "Totals",
    "Configuration",
    "Environment",
]


def test_repr():
    """The repr is one line."""
    assert repr(FULL) == "Report(cache, 2 graphs, 2026-01-02 03:04:05+00:00)"


def test_text():
    """The text has everything, each part under a title."""
    parts = str(FULL).split("\n\n")
    assert parts[0].startswith("cache, 2026-01-02 03:04:05+00:00\n1 bucket could not be captured")
    assert [part.split("\n")[0].partition(":")[0] for part in parts[1:]] == [
        "Hits",
        "Waste",
        "bucket  replays  waste  mean ms  capture ms  memory bytes  state   function",
        "Most asked sizes",
        "Failures",
        "Configuration",
        "Environment",
    ]
    assert parts[-3] == "Failures\nbucket  function  error\n1x64    embed     no < memory"
    assert parts[-1] == "Environment\njax      0.12\nbackend  cpu: 1 × cpu"
    assert "compiler_options        xla_a=1, xla_b=<2>\n" in parts[-2]
    assert "capture_sizes           1, 4\n" in parts[-2]
    assert "max_graphs              none\n" in parts[-2]


def test_html():
    """The page has the same parts, what failed before all others."""
    reader = Reader(FULL.html())
    assert reader.all("title", "h1") == ["cache, 2026-01-02 03:04:05+00:00", "cache"]
    assert reader.all("h2") == HEADINGS
    cells = reader.all("td")
    for cell in ("no < memory", "57", "1, 4", "xla_a=1, xla_b=<2>", "0.12", "33.2%"):
        assert cell in cells
    assert len([caption for caption in reader.all("caption") if ": " in caption]) == 2


def test_html_asks_for_nothing_from_elsewhere():
    """No address and no script is in the page, nor in what a notebook shows."""
    for html in (FULL.html(), FULL._repr_html_()):
        assert not re.search(r"https?:|//|url\(|@import|<script|src=|href=|onload", html)


def test_notebook():
    """A notebook shows the same fragments without a page around them."""
    reader = Reader(FULL._repr_html_())
    assert reader.all("h2") == HEADINGS
    assert reader.all("html", "body", "title") == []


def test_empty():
    """Before the first capture there are no maps, and no empty parts."""
    reader = Reader(report(manager_stats()).html())
    assert reader.all("h2") == ["Buckets", "Totals", "Configuration"]
    assert "No bucket is captured yet." in str(report(manager_stats()))


def test_thousands_of_buckets():
    """A page of thousands of buckets stays small, and the text still has every one."""
    many = report(manager_stats(*[graph(batch, 64 * batch) for batch in range(1, 4000)]))
    assert len(many.html()) < 200_000
    assert "Left out: 3,975 buckets with 0 replays." in many.html()
    assert "\n3999x255936 " in str(many)


@examples(40, thorough=100)
@given(STATS)
def test_any_snapshot(stats):
    """Any statistics and names give a well-formed page in which names are only text."""
    made = report(
        stats,
        name=HOSTILE,
        environment={HOSTILE: HOSTILE},
        failures=[("1x1", HOSTILE, HOSTILE)],
        sizes={Bucket(1, 1): 2},
    )
    reader = Reader(made.html())
    assert reader.all("h1") == [HOSTILE]
    assert reader.all("td").count(HOSTILE) >= 3
    assert str(made)
    shown = reader.all("td")
    for record in stats["registry"]["graphs"].values():
        assert f"{record['replay_count']:,}" in shown


def test_save(tmp_path):
    """The file holds the page; where it cannot be written the error says what to do."""
    assert FULL.save(tmp_path / "a.html").read_text(encoding="utf-8") == FULL.html()
    with pytest.raises(ReportError, match="make the folder first"):
        FULL.save(tmp_path / "missing" / "a.html")
