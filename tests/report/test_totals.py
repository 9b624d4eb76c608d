"""What all calls and captures add up to."""

import json

from cudagraph_jax.report.summary import alerts, headline, tiles, totals, troubles
from tests.helpers.html_reader import Reader
from tests.helpers.snapshots import HOSTILE, graph, manager_stats, registry_stats

BUSY = manager_stats(
    graph(4, 64, 3),
    calls=10,
    misses=2,
    replays={"exact": 1, "padded": 2, "larger": 0},
    captures=1,
    splits=1,
    splits_by_reason={"overflow": 1},
    pieces=4,
    eager_calls=4,
    eager_by_reason={"miss": 1, "overflow": 3},
    errors_by_reason={"input": 1},
    failed_buckets=1,
    real_elements=700,
    padded_elements=300,
    waste=0.3,
)


def test_headline():
    """The figures that say whether all is well."""
    assert headline(BUSY) == [
        ("graphs", "1"),
        ("mode", "capture"),
        ("calls", "10"),
        ("hit rate", "40.0%"),
        ("waste", "30.0%"),
        ("compiling", "0.01 s"),
    ]


def test_nothing_is_a_dash():
    """Before the first call there is neither a hit rate nor waste."""
    assert ("hit rate", "–") in headline(manager_stats())
    assert ("waste", "–") in headline(manager_stats())
    assert ("waste", "–") in totals(manager_stats())


def test_totals():
    """Every count is there, with its reasons."""
    assert totals(BUSY) == [
        ("mode", "capture"),
        ("calls", "10"),
        ("hits", "3 (exact 1, padded 2)"),
        ("hit rate", "40.0%"),
        ("misses", "2"),
        ("captures in a call", "1"),
        ("split calls", "1 (overflow 1), in 4 pieces"),
        ("eager calls", "4 (miss 1, overflow 3)"),
        ("errors", "1 (input 1)"),
        ("waste", "30.0%: 300 of 1,000 computed elements were padding"),
        ("waiting for capture", "0"),
        ("failed buckets", "1"),
        ("graphs", "1 held, 1 evicted"),
        ("memory", "2,048 bytes"),
        ("captures", "1"),
        ("compiling", "0.01 s in all, 13 ms each"),
        ("replays", "3"),
        ("replaying", "0.75 ms in all, 0.250 ms each"),
    ]


def test_replays_that_were_not():
    """Without a replay there is no time that it took."""
    assert ("replaying", "–") in totals(manager_stats())


def test_registry_alone():
    """A registry knows of captures and replays, not of calls."""
    stats = {"registry": registry_stats({"4x64": graph(4, 64, 3)})}
    assert headline(stats) == [("graphs", "1"), ("replays", "3"), ("compiling", "0.01 s")]
    assert totals(stats) == totals(BUSY)[-6:]
    assert troubles(stats) == []


def test_troubles():
    """What failed is said in sentences; without failures there are none."""
    assert troubles(BUSY) == [
        "1 bucket could not be captured; calls of that size run eagerly.",
        "1 call ended in an error: input 1.",
    ]
    assert troubles(manager_stats()) == []


def test_switched_off():
    """A manager that is switched off says so."""
    assert totals(manager_stats(mode="disabled", enabled=False))[0] == (
        "mode",
        "disabled (switched off)",
    )


def test_html():
    """Tiles and alerts show any text as it is."""
    reader = Reader(tiles([(HOSTILE, "1"), ("b", HOSTILE)]) + alerts([HOSTILE]))
    assert reader.all("dt", "dd", "p") == [HOSTILE, "1", "b", HOSTILE, HOSTILE]


def test_survives_json():
    """Statistics that were kept as JSON are shown just as well."""
    assert totals(json.loads(json.dumps(BUSY))) == totals(BUSY)
