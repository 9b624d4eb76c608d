"""Several processes that would not do the same: refused on all of them, and told in a stated time.

Without the guard a process got NaN or wrong numbers, all of them died of a signal, or one waited
for ever.
"""

from __future__ import annotations

import pytest

from tests.helpers.jobs import ran

# Each process of a job compiles for itself.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job():
    """What the two processes of the job say, with two devices each."""
    ended = ran("job_misuse.py", devices=2)
    for process in ended:
        assert process.status == 0, process.stderr
        assert process.said["end"]
        assert "Exception ignored" not in process.stderr
        assert process.said["devices"] == 4
    return [process.said for process in ended]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("configuration", "capture_sizes is [1, 4] on process 0 and [1, 5] on process 1"),
        ("function", "function is"),
        ("unreadable", 'unpad="none" or "padded"'),
        ("sizes", "sizes is 3x5 on process 0 and 4x5 on process 1"),
        ("data", "data is"),
        ("buckets", "sizes is 1x5 on process 0 and 2x5 on process 1"),
        ("order", "process 0 is at a call of embed, but process 1 at a call of head"),
        ("eager", "embed at 9x5 spans several processes"),
        ("eager miss", "embed at 3x5 spans several processes"),
        ("background", "captures in the background"),
        ("eviction", "max_graphs=1"),
        ("replan", "plan_buckets"),
        ("replay", "call the function itself"),
        ("threads", "is called by the threads MainThread and second"),
        ("batcher", "cudagraph_jax.distributed.lead"),
        ("first data", "data is"),
        ("second data", "data is"),
        ("second sizes", "sizes is 3x5 on process 0 and 4x5 on process 1"),
        ("spread eagerly", "squares at 9x5 spans several processes"),
        ("spread batcher", "cudagraph_jax.distributed.lead"),
        ("led with another", "capture_sizes is [1, 4] on process 0 and [1, 5] on process 1"),
        ("wrong side", "cudagraph_jax.distributed."),
        ("outside alone", "outcome is BucketOverflowError: batch=9"),
        ("eager alone", "sizes is 9x5 on process 0 and 3x5 on process 1"),
        ("bad input alone", "outcome is ready on process 0 and InputShapeError: ids"),
        ("bad call alone", "outcome is ready on process 0 and InputShapeError: embed(weights"),
        ("sealed alone", "decision is NONE, bucket 4x8, miss"),
        ("thread alone", "outcome is ready on process 0 and DistributedError: embed"),
        ("piece alone", "in pieces: CAPTURE, bucket 1x8"),
        ("sealed warm-up", "mode is CAPTURE on process 0 and REPLAY on process 1"),
        ("example of other sizes", "sizes is 1x3 on process 0 and 2x3 on process 1"),
        ("example of other data", "the warm-up of embed is not the same everywhere: data is"),
        ("example alone", "outcome is ready on process 0 and InputShapeError: ids has"),
        ("room alone", "where it has failed (ConfigError"),
        ("trace alone", "outcome is ready on process 0 and CaptureError"),
        ("trace alone in a call", "outcome is ready on process 0 and CaptureError"),
        ("no room for a door", "outcome is OSError: [Errno 24] Too many open files on process 0"),
        ("both lead", "ready on process 0 and DistributedError: process 1 cannot lead"),
        ("nothing passed", "ready on process 0 and ConfigError: embed passes 1 argument"),
        ("code in a call", "function is"),
        ("code led", "function is"),
        ("padding in a call", "padding is"),
        ("padding led", "pad_values is"),
        ("side in a call", "axes is"),
        ("side led", "pad_side is"),
        ("value of a parameter", "parameter [0]['b'] is float32[16, 8]"),
        ("dtype of a parameter", "and int64[16, 8]"),
        ("place of a parameter", "parameter [0] is float32[16, 8], P"),
        ("another function", "decision is REPLAY, bucket 4x8, exact on process 0 and CAPTURE"),
        ("another program", "program is number"),
        ("another model led", "structure is"),
        ("padded sizes", "sizes is 3x5 on process 0 and 4x5 on process 1"),
        ("padded data", "data is"),
        ("padded badly alone", "outcome is ready on process 0 and InputShapeError: ids"),
    ],
)
def test_misuse_is_refused_everywhere(job, name, words):
    """Both processes raise the same error, which names what differs, or what to do instead."""
    for said in job:
        kind, text = said[name]
        assert kind == "DistributedError", text
        assert words in text
    if name != "wrong side":
        assert job[0][name] == job[1][name]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("outside alike", "BucketOverflowError", "batch=9"),
        ("bad input alike", "InputShapeError", "float64"),
        ("chained to another place", "InputShapeError", "but it lies on other devices, or is cut"),
        ("chained to another grid", "InputShapeError", "and the bucket takes [4, 16, 8]"),
        ("to be padded", "InputShapeError", "but it is [4, 5], and the bucket takes [4, 8]"),
        ("to be padded ahead", "InputShapeError", "but it is [4, 5], and the bucket takes [4, 8]"),
        ("parameters elsewhere", "InputShapeError", "weights lies on NamedSharding"),
        ("warmed up with them", "InputShapeError", "weights lies on NamedSharding"),
        ("debug_mode led", "DistributedError", "prove the padding in one process"),
        ("trace alike", "CaptureError", "ValueError: nowhere"),
    ],
)
def test_what_all_refuse_alike(job, name, kind, words):
    """Each raises its own error, as it would without the others."""
    for said in job:
        assert said[name][0] == kind
        assert words in said[name][1]


def test_an_array_that_is_deleted_on_one_process_alone(job):
    """Who has it deleted is told so, and the other one that it waits for nobody."""
    assert job[0]["deleted alone"][0] == "DistributedError"
    assert "outcome is ready on process 0 and RuntimeError" in job[0]["deleted alone"][1]
    assert job[1]["deleted alone"][0] == "InputShapeError"
    assert "is deleted" in job[1]["deleted alone"][1]


def test_the_job_goes_on(job):
    """What is right is answered, before and after what is refused."""
    for said in job:
        right = (
            "a call",
            "a call after them",
            "a call behind what is refused",
            "captured when asked for",
            "in pieces",
        )
        for name in (
            *right,
            "of its own size",
            "spread",
            "padded ahead",
            "moved explicitly on one alone",
            "chained",
            "of models",
            "taken as it is",
            "a last call",
        ):
            assert said[name] is True
        assert said["left on the device"]


def test_what_spans_no_processes_is_left_alone(job):
    """A function of one process's own arrays captures in the background, and calls as it likes."""
    assert all(said["alone"] for said in job)


def test_a_process_that_does_not_call(job):
    """Who waits for it is told which one within the stated time, and so is who comes too late."""
    kind, text = job[0]["absent"]
    assert kind == "DistributedError"
    assert "process 1 did not come within 0.5 s" in text
    assert job[0]["absent for"] < 10
    assert job[1]["late"][0] == "DistributedError"


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("warm-up", "outcome is DistributedError: a run of squares 2x4 does not end here: Capture"),
        ("call", "squares at 2x4 spans several processes and failed on this one (RuntimeError"),
    ],
)
def test_a_run_that_fails(fails, words):
    """On one process in a warm-up or on all in a call: none is left in it, nor runs it eagerly."""
    ended = ran("job_broken.py", fails)
    for process in ended:
        assert process.status == 0, process.stderr
        for name in ("fails", "then"):
            kind, text = process.said[name]
            assert kind == "DistributedError", text
            assert words in text
            assert "start them again" in text or name == "fails"
            assert process.said[f"{name} after"] < (30 if name == "fails" else 0.5)
