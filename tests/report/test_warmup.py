"""What a warm-up did."""

from cudagraph_jax.report.warmup import BucketWarmup, WarmupReport
from cudagraph_jax.shapes.ladder import Bucket

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
    """The text is the repr above a row for each bucket."""
    assert str(REPORT).split("\n") == [
        repr(REPORT),
        "bucket  status    capture ms  memory bytes  error",
        "8x64    captured  120         1,048,576",
        "4x64    captured  81",
        "2x64    failed    0                         no <script>",
        "1x64    present   0           2,048",
    ]


def test_html():
    """The HTML has the same cells, escaped."""
    html = REPORT._repr_html_()
    assert html.startswith(f"<table><caption>{REPORT!r}</caption>")
    assert "<td>2x64</td><td>failed</td><td>0</td><td></td><td>no &lt;script&gt;</td>" in html
    assert "<script>" not in html
