"""Process 0 decides for all: answers are right from any thread, and nothing hangs whoever ends."""

from __future__ import annotations

import pytest

from tests.helpers.examples import IS_THOROUGH
from tests.helpers.jobs import ran

# A job of several processes compiles in each of them, and waits for one that falls silent.
pytestmark = pytest.mark.slow

CALLS = 1000 if IS_THOROUGH else 400


def said_by_leader(ended):
    """What the leader said, if it came to its end."""
    assert ended[0].status == 0, ended[0].stderr
    assert ended[0].said["end"]
    return ended[0].said


@pytest.fixture(scope="module")
def job():
    """Two processes, many calls, and everything that a caller may do wrong."""
    ended = ran("job_led.py", CALLS, "closed")
    said_by_leader(ended)
    assert ended[1].status == 0, ended[1].stderr
    return [process.said for process in ended]


def test_random_calls_from_four_threads(job):
    """None is wrong, nothing is compiled for them, and the other process runs them all."""
    assert job[0]["wrong"] == 0
    assert job[0]["compiled"] == 4
    assert job[1]["replays"] >= CALLS
    assert job[1]["followed"] == ["nothing", ""]
    assert job[0]["repr"] == "Led(embed, 2 processes)"


def test_a_bucket_that_is_not_captured(job):
    """All processes capture it when process 0 is asked for it, once."""
    assert job[0]["asked for"] == [True, True]
    assert job[0]["captured"] == [1, 1]
    assert job[1]["captured"] == [1, 2]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("bad input", "InputShapeError", "ids"),
        ("bad dtype", "InputShapeError", "float64"),
        ("too large", "DistributedError", "has no bucket and would run eagerly"),
        ("own size", "InputShapeError", "ValueError: not three"),
        ("away", "InputShapeError", "weights lies on"),
        ("no room", "DistributedError", "max_graphs=1"),
        ("reset", "DistributedError", "leave the block of lead"),
        ("cleared", "DistributedError", "leave the block of lead"),
        ("removed", "DistributedError", "leave the block of lead"),
        ("padded by itself", "DistributedError", "call what lead gave"),
        ("spread by itself", "DistributedError", "process 0 decides for all of them"),
        ("itself", "DistributedError", "call what lead gave"),
        ("update", "DistributedError", "is led with what it passes through"),
        ("after", "DistributedError", "lead it again"),
    ],
)
def test_a_mistake_is_its_callers_alone(job, name, kind, words):
    """It is raised on the leader, nobody is told, and the job goes on."""
    assert job[0][name][0] == kind
    assert words in job[0][name][1]
    assert job[0]["left"] == ["nothing", ""]
    assert job[1].get(name, ["nothing", ""]) == ["nothing", ""]


def test_a_call_behind_what_is_refused(job):
    """It is answered."""
    assert job[0]["another size"] == [3, 2, 8]


def test_calls_that_nobody_leads_after_it(job):
    """When it is closed, the processes make calls of their own again."""
    for said in job:
        assert said["unled is right"]


def test_a_batcher_of_a_led_function(job):
    """Single rows are composed on the leader, and answered by all processes together."""
    assert job[0]["batched"] == [True] * 30


@pytest.mark.parametrize(
    ("ending", "processes", "calls", "words"),
    [
        ("killed", 4, 40, "process 3"),
        ("raised", 2, 40, "process 1 says"),
        ("stopped", 2, 40, ""),
    ],
)
def test_another_process_ends(ending, processes, calls, words):
    """It dies, raises or stands still: the leader raises in time, and refuses further calls."""
    stuck = processes - 1 if ending == "stopped" else None
    ended = ran("job_led.py", calls, ending, processes=processes, stuck=stuck)
    said = said_by_leader(ended)
    assert said["wrong"] == 0
    kind, text = said["failed"]
    assert kind == "DistributedError", text
    assert words in text
    assert said["failed after"] < 15
    assert said["again"][0] == "DistributedError"
    assert said["again after"] < 0.5
    assert said["left"] == said["after"] == said["again"]
    for process in ended[1:-1]:
        assert process.said["followed"][0] == "DistributedError"
    for process in ended[:-1]:  # each knows without asking the others
        assert "start them again" in process.said["unled"][1]
        assert process.said["unled after"] < 0.5


@pytest.mark.parametrize("ending", ["leader killed", "leader stopped"])
def test_the_leader_ends(ending):
    """It dies or stands still, perhaps within a call: who follows raises in time."""
    ended = ran("job_led.py", 40, ending, stuck=0)
    kind, text = ended[1].said["followed"]
    assert kind == "DistributedError", text
    within_a_call = ending == "leader stopped" and "a call has not ended in time" in text
    assert "process 0" in text or within_a_call
