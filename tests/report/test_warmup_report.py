"""What a warm-up did."""

from cudagraph_jax.report.warmup_report import BucketWarmup, WarmupReport
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.html_reader import Reader
from tests.helpers.snapshots import ACTING, HOSTILE, SHOWN

FAILED = BucketWarmup(Bucket(2, 64), "failed", error="no <script>")
REPORT = WarmupReport(
    "embed",
    (
        BucketWarmup(Bucket(8, 64), "captured", capture_time_ms=120.4, memory_bytes=1048576),
        BucketWarmup(Bucket(4, 64), "captured", capture_time_ms=80.6),
        FAILED,
        BucketWarmup(Bucket(1, 64), "present", memory_bytes=2048),
    ),
    total_ms=1234.56,
)


def test_counts():
    """A report counts what was captured now, and lists what failed."""
    assert REPORT.captured == 2
    assert REPORT.failed == (FAILED,)


def test_repr():
    """The repr counts each status in one line."""
    assert repr(REPORT) == "WarmupReport(embed: 2 captured, 1 failed, 1 present, 1235 ms)"
    assert repr(WarmupReport("embed", (), 0.0)) == "WarmupReport(embed: no buckets, 0 ms)"


def test_text():
    """The text is the repr, each failure with its error, and a row for each bucket."""
    assert str(REPORT).split("\n") == [
        repr(REPORT),
        "FAILED 2x64: no <script>",
        "bucket  status    capture ms  memory bytes",
        "8x64    captured         120     1,048,576",
        "4x64    captured          81",
        "2x64    failed             –",
        "1x64    present            –         2,048",
    ]
    assert str(WarmupReport("embed", (), 0.0)) == "WarmupReport(embed: no buckets, 0 ms)"


def test_html():
    """The HTML has times and memory at the top, then the failures, then all others."""
    reader = Reader(REPORT._repr_html_())
    assert reader.all("b") == ["Warm-up of embed"]
    assert reader.all("dt") == [
        "captured", "present before", "failed", "in all", "of it compiling", "memory bytes",
    ]  # fmt: skip
    assert reader.all("dd") == ["2", "1", "1", "1.23 s", "0.20 s", "1,050,624"]
    assert "1 bucket failed; calls of that size run eagerly." in reader.all("p")
    cells = reader.all("td")
    assert cells[:5] == ["2x64", "failed", "–", "", "no <script>"]
    assert cells[5:9] == ["8x64", "captured", "120", "1,048,576"]


def test_html_without_failures():
    """Where all went well there is nothing to be alarmed of."""
    report = WarmupReport("embed", REPORT.buckets[:2], 1.0)
    assert 'class="alert"' not in report._repr_html_()


def test_html_of_a_large_grid():
    """Of a large grid the failures and a hundred buckets in all are shown."""
    grid = tuple(BucketWarmup(Bucket(batch, 64), "captured") for batch in range(1, 3000))
    reader = Reader(WarmupReport("embed", (*grid, FAILED), 1.0)._repr_html_())
    assert len(reader.all("tr")) == 101
    assert reader.all("td")[0] == "2x64"
    assert "2,900 more buckets not shown." in reader.all("p")


def test_hostile_names():
    """Names and errors are only text, on one line each."""
    failed = BucketWarmup(Bucket(2, 64), "failed", error=f"{HOSTILE}\n{ACTING}")
    report = WarmupReport(f"{HOSTILE}{ACTING}", (failed,), 1.0)
    reader = Reader(report._repr_html_())
    assert reader.all("b") == [f"Warm-up of {HOSTILE}{SHOWN}"]
    assert reader.all("td")[-1] == f"{HOSTILE}\n{SHOWN}"
    assert len(str(report).split("\n")) == 4
    assert repr(report) == f"WarmupReport({HOSTILE}{SHOWN}: 1 failed, 1 ms)"
    for text in (str(report), report._repr_html_()):
        assert not set(ACTING) & set(text) - set("[31m")
