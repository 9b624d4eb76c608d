"""Events of command buffers belong to the replay that they lie in."""

from __future__ import annotations

import threading

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.xla.profile import Event, attribute, read_events

OWN, OTHER = 1, 2


def replay(graph_id, start, end, *, line="main", watcher=OWN):
    stats = {"watcher": watcher, "graph_id": graph_id}
    return Event(line, "replay f 1x1", start, end, stats)


def command(kind, start, *, line="main"):
    return Event(line, f"command_buffer::{kind}", start, start + 1, {})


def counted(events, watcher=OWN):
    shown, strays = attribute(events, watcher=watcher)
    return {number: (found.replays, dict(found.counts)) for number, found in shown.items()}, strays


def test_inside_a_replay():
    """What lies in a replay is its own, what lies between two is nobody's."""
    events = [
        command("execute", 25),
        command("record", 2),
        replay(7, 0, 10),
        command("execute", 4),
        command("initialize", 1),
        replay(8, 10, 20),
        command("update", 11),
        command("execute", 13),
        command("record_for_va_remapping", 15),
        command("unknown", 16),
        Event("main", "execute", 17, 18, {}),
    ]
    shown, strays = counted(events)
    assert shown == {
        7: (1, {"recorded": 2, "executed": 1}),
        8: (1, {"updated": 1, "executed": 1, "recorded": 1}),
    }
    assert strays == 1


def test_threads_overlap():
    """Each thread has its own replays."""
    events = [
        replay(7, 0, 10, line="a"),
        replay(8, 1, 9, line="b"),
        command("execute", 2, line="a"),
        command("update", 3, line="b"),
        command("execute", 4, line="c"),
    ]
    assert counted(events) == ({7: (1, {"executed": 1}), 8: (1, {"updated": 1})}, 1)


def test_work_that_is_handed_over():
    """A worker's events belong to the replay that gave it the work, also at third hand."""
    begin, end = "ThreadpoolListener::StartRegion", "ThreadpoolListener::StopRegion"
    record = "ThreadpoolListener::Record"
    events = [
        replay(7, 0, 10),
        Event("main", record, 1, 1, {"_pt": 15, "_p": 3}),
        replay(8, 10, 20),
        Event("main", record, 11, 11, {"_pt": 15, "_p": 4}),
        Event("worker", begin, 12, 12, {"_ct": 15, "_c": 3}),
        command("execute", 13, line="worker"),
        Event("worker", record, 14, 14, {"_pt": 15, "_p": 5}),
        Event("worker", end, 16, 16, {}),
        command("execute", 17, line="worker"),
        Event("worker", begin, 18, 18, {"_ct": 15, "_c": 4}),
        command("update", 19, line="worker"),
        Event("worker", end, 21, 21, {}),
        Event("other", begin, 22, 22, {"_ct": 15, "_c": 5}),
        command("record", 23, line="other"),
    ]
    shown, strays = counted(events)
    assert shown == {7: (1, {"executed": 1, "recorded": 1}), 8: (1, {"updated": 1})}
    assert strays == 1


def test_one_entry_alone():
    """Where one entry alone was replayed, what other threads did meanwhile is its own."""
    events = [
        replay(7, 0, 10),
        replay(7, 10, 20),
        command("execute", 5, line="worker"),
        command("execute", 25, line="worker"),
    ]
    assert counted(events) == ({7: (2, {"executed": 1})}, 1)


def test_another_registry():
    """Replays of another registry do not count, even under the same number."""
    events = [replay(7, 0, 10), replay(7, 10, 20, watcher=OTHER), command("update", 11)]
    assert counted(events) == ({7: (1, {})}, 0)
    assert counted(events, OTHER) == ({7: (1, {"updated": 1})}, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from([7, 8, None]), st.sampled_from(["execute", "update", "record"])),
        min_size=1,
    ),
    st.randoms(),
)
def test_nothing_is_lost(steps, random):
    """Whatever the order in which they are read, all are counted once."""
    events = []
    for number, (graph_id, kind) in enumerate(steps):
        if graph_id is not None:
            events.append(replay(graph_id, 10 * number, 10 * number + 9))
        events.append(command(kind, 10 * number + 1))
    random.shuffle(events)
    shown, strays = attribute(events, watcher=OWN)
    assert sum(found.counts.total() for found in shown.values()) + strays == len(steps)
    assert sum(found.replays for found in shown.values()) == sum(
        graph_id is not None for graph_id, _ in steps
    )


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_real_profile(tmp_path, in_thread):
    """Annotations that JAX's profiler wrote are read as what they are."""

    def run(graph_id):
        with (
            jax.profiler.TraceAnnotation("replay f 1x1", watcher=OWN, graph_id=graph_id),
            jax.profiler.TraceAnnotation("command_buffer::execute", num_commands=3),
        ):
            pass

    jax.profiler.start_trace(tmp_path)
    run(7)
    if in_thread:
        thread = threading.Thread(target=run, args=(8,))
        thread.start()
        thread.join()
    else:
        run(8)
    jax.profiler.stop_trace()
    assert counted(read_events(tmp_path)) == (
        {7: (1, {"executed": 1}), 8: (1, {"executed": 1})},
        0,
    )
