"""Jobs beside their caller: their answers, who looks on, and when they are left behind."""

from __future__ import annotations

import itertools
import threading

import pytest

from cudagraph_jax._base.worker import GRACE_S, Background, LeftBehindError, run_aside
from tests.helpers.processes import said_by

PATIENCE_S = 60


def aside(job, **options):
    return run_aside(job, name="test", **options)


def test_the_caller_gets_what_the_job_gives():
    """The answer, or what the job raised, comes back from another thread."""
    assert aside(threading.get_ident) != threading.get_ident()

    def fail():
        raise TimeoutError("the job's own")

    with pytest.raises(TimeoutError, match="the job's own"):
        aside(fail)


def test_the_caller_looks_on():
    """While the job goes on the caller is told for how long, by the clock."""
    enough = threading.Event()
    seen: list[float] = []

    def look(seconds):
        seen.append(seconds)
        if len(seen) == 2:
            enough.set()

    ticks = itertools.count(step=10)
    aside(lambda: enough.wait(PATIENCE_S), looks_on=look, clock=lambda: float(next(ticks)))
    assert seen[:2] == [10, 20]


def test_an_interrupt_ends_the_wait():
    """What the caller's signal handlers raise reaches it, although the job goes on."""
    end = threading.Event()

    def interrupt(seconds):
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            aside(lambda: end.wait(PATIENCE_S), looks_on=interrupt)
    finally:
        end.set()


def test_closing_leaves_a_job_behind():
    """A worker that is closed waits for what it runs aside a little, and then no longer."""
    worker, begun, end = Background("test"), threading.Event(), threading.Event()
    ticks = itertools.count(step=GRACE_S)
    left: list[LeftBehindError] = []

    def go_on():
        begun.set()
        end.wait(PATIENCE_S)

    def job():
        try:
            aside(go_on, clock=lambda: float(next(ticks)))
        except LeftBehindError as error:
            left.append(error)

    try:
        worker.submit("a", job)
        assert begun.wait(PATIENCE_S)
        worker.close()
        assert len(left) == 1
    finally:
        end.set()


def test_without_threads_the_caller_does_it():
    """Where no thread can be started the job is done all the same."""

    class Fragile(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    assert aside(threading.get_ident, thread=Fragile) == threading.get_ident()


def test_the_process_ends_when_a_compile_has_ended():
    """A thread that is within XLA while Python ends takes the process down, so it is waited for."""
    assert said_by("""
        import threading
        from types import SimpleNamespace

        from cudagraph_jax._base import worker

        def job():
            begun.set()
            threading.Event().wait(1.2)  # longer than the end waits for what may never end
            print("ended")

        def ask_to_end():
            raise SystemExit

        begun = threading.Event()
        worker.time = SimpleNamespace(monotonic=ask_to_end)  # a signal comes meanwhile
        try:
            with worker.daemons(1, name="compile") as begin:
                begin(job)
                begun.wait()
        except SystemExit:
            print("interrupted")
    """).split() == ["interrupted", "ended"]
