"""What a profile of replays shows is told in words, as text, HTML and JSON."""

from __future__ import annotations

import json

import pytest

from cudagraph_jax import Bucket
from cudagraph_jax.report.replay_profile import ArgumentMoves, BucketReplays, ReplayProfile
from tests.helpers.snapshots import ACTING, HOSTILE, SHOWN


def replays(executed=0, updated=0, recorded=0, *, name="step", number=100, arguments=()):
    return BucketReplays(
        name=name,
        bucket=Bucket(8, 128),
        graph_id=3,
        replays=number,
        executed=executed,
        updated=updated,
        recorded=recorded,
        arguments=tuple(arguments),
    )


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ((200, 0, 0), "replaying"),
        ((200, 100, 0), "updated in traffic"),
        ((200, 0, 1), "recorded in traffic"),
        ((99, 0, 0), "not in each replay"),
        ((0, 0, 0), "no command buffer ran"),
        ((0, 1, 1), "no command buffer ran"),
    ],
)
def test_replaying_needs_evidence(counts, shown):
    """Only executions without updates and records are called replaying."""
    bucket = replays(*counts)
    assert bucket.shown == shown
    assert bucket.is_replaying == (shown == "replaying")
    text = str(ReplayProfile("gpu", (bucket,)))
    assert text.splitlines()[1].split()[:3] == ["8x128", "step", "100"]
    assert text.splitlines()[1].endswith(shown)


def test_arguments_that_moved():
    """What lay elsewhere is named, with how often; what lay still is not."""
    arguments = [
        ArgumentMoves("cache['k']", 99),
        ArgumentMoves("params[0]", 0),
        ArgumentMoves("ids", None),
    ]
    text = str(ReplayProfile("gpu", (replays(100, 99, arguments=arguments),)))
    assert "cache['k']  99 of 99 times" in text
    assert "ids         not known: it comes from the host, or is sharded" in text
    assert "params" not in text


def test_what_is_not_shown_is_said():
    """A CPU, a profile without command buffers, an empty one, and strays have a line each."""
    assert "no command buffers on cpu" in str(ReplayProfile("cpu", (replays(),)))
    without = str(ReplayProfile("gpu", (replays(),)))
    assert "xla_enable_command_buffers_during_profiling" in without
    assert "Nothing was replayed" in str(ReplayProfile("gpu", ()))
    assert "3 events of command buffers" in str(ReplayProfile("gpu", (replays(1),), 3))
    assert "\n\n" not in str(ReplayProfile("gpu", (replays(1),)))


def test_html_and_json():
    """Both say the same, and names are escaped."""
    arguments = [ArgumentMoves(HOSTILE, 1)]
    profile = ReplayProfile("gpu", (replays(0, 1, name=HOSTILE, arguments=arguments),), 1)
    html = profile._repr_html_()
    assert "<script>" not in html
    assert "updated" in html
    assert "1 event of" in html
    record = json.loads(json.dumps(profile.to_dict()))
    assert record["buckets"][0]["bucket"] == [8, 128]
    assert record["buckets"][0]["updated"] == 1
    assert record["unattributed"] == 1
    assert repr(profile) == "ReplayProfile(1 bucket on gpu, 0 replaying)"
    assert SHOWN in str(ReplayProfile("gpu", (replays(1, name=ACTING),)))
