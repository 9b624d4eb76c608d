"""What happens to a new grid while it is being captured."""

from __future__ import annotations

import dataclasses
import functools
import threading

import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphManager,
    CUDAGraphWarning,
    bucket_jit,
    no_compiles,
)
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.functions import assert_close, floats

POWERS = CUDAGraphConfig(capture_sizes=(4, 8), capture_seq_lens=(16, 32), warmup_iterations=1)
SLOW = 20
"""A sequence length whose capture waits until the test lets it go on."""


def assert_set(event: threading.Event) -> None:
    """Waits for `event`."""
    assert event.wait(60)


class Held:
    """A function whose captures at `SLOW` wait, and its manager."""

    def __init__(self, config: CUDAGraphConfig = POWERS, *, at: int = SLOW) -> None:
        self.at = at
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.manager = CUDAGraphManager(config)
        self.function = bucket_jit(self.doubled, in_axes=("batch seq",), manager=self.manager)
        self.other = bucket_jit(lambda x: x + 1, in_axes=("batch seq",), manager=self.manager)
        self.function.warmup(floats(0, 1, 1), progress=False)
        self.manager.registry.sizes.add(Bucket(3, SLOW), 9)

    def doubled(self, x):
        if x.shape == (3, self.at):
            self.entered.set()
            assert self.go_on.wait(60)
        return x * 2

    def replan(self) -> None:
        """Begins a re-plan to the single bucket 3x20, and returns while that is traced."""
        self.function.replan(max_graphs=1, headroom=0.0)
        assert self.entered.wait(60)

    def finish(self) -> None:
        self.go_on.set()
        self.manager.wait()

    @property
    def held(self) -> list[tuple[int, int]]:
        return sorted(entry.key for entry in self.manager.registry.entries())


def test_a_warm_up_meanwhile():
    """A function that is warmed up while a re-plan captures gets the new grid, too."""
    held = Held()
    held.replan()
    held.other.warmup(floats(0, 1, 1), progress=False)
    held.finish()
    assert held.held == [(3, 20), (3, 20)]
    with no_compiles():
        assert_close(held.other(floats(0, 2, 9)), floats(0, 2, 9) + 1)


def test_a_warm_up_across_the_change():
    """A warm-up that is under way when the grid changes captures the new one."""
    held = Held()
    held.go_on.set()

    def change(number, total, bucket):
        if held.manager.config == POWERS:
            held.function.replan(max_graphs=1, headroom=0.0)
            held.manager.wait()

    report = held.other.warmup(floats(0, 1, 1), progress=change)
    assert [record.bucket for record in report.buckets] == [(3, 20)]
    assert held.held == [(3, 20), (3, 20)]


def test_background_captures_that_wait():
    """What was queued for the old grid is not captured after the change."""
    held = Held(dataclasses.replace(POWERS, on_miss="background", max_graphs=5))
    held.manager.registry.clear()
    held.function(floats(0, 3, 8))
    held.manager.wait()
    held.replan()
    for batch, seq in ((2, 9), (1, 30), (2, 3)):
        assert_close(held.function(floats(0, batch, seq)), floats(0, batch, seq) * 2)
    held.finish()
    assert held.held == [(3, 20)]
    assert held.manager.stats()["evictions"] == 0


def test_a_capture_across_the_change():
    """A request's own capture of the old grid is not kept when the grid has changed meanwhile."""
    held = Held(at=30)
    held.manager.registry.clear()
    held.function(floats(0, 1, 8))
    held.manager.registry.sizes.clear()
    held.manager.registry.sizes.add(Bucket(2, 20), 9)
    config = held.manager.config
    slow = bucket_jit(held.doubled, in_axes=("batch seq",), manager=held.manager)
    held.manager.registry.config = dataclasses.replace(
        config,
        capture_sizes=(3,),
        capture_seq_lens=(30,),
        max_capture_batch_size=None,
        max_capture_seq_len=None,
    )
    worker = threading.Thread(target=slow, args=(floats(0, 2, 9),))
    worker.start()
    assert held.entered.wait(60)
    held.function.replan(max_graphs=1, headroom=0.0)
    held.manager.wait()
    held.go_on.set()
    worker.join(60)
    assert (3, 30) not in held.held


def test_a_capture_decided_before_the_change(monkeypatch):
    """A bucket that was decided on the old grid, and captured on the new one, is not kept."""
    config = CUDAGraphConfig(capture_sizes=(4, 8, 16), warmup_iterations=0)
    function = bucket_jit(lambda x: x * 2, in_axes=("batch _",), config=config)
    for rows in (3, 7):
        function(floats(0, rows, 4))
    manager = function.manager
    capturer = manager.dispatcher.capturer
    capture = capturer.capture

    def replan_and_capture(*args, **options):
        manager.replan(max_graphs=2, headroom=0.0)
        manager.wait()
        return capture(*args, **options)

    monkeypatch.setattr(capturer, "capture", replan_and_capture)
    assert_close(function(floats(0, 15, 4)), floats(0, 15, 4) * 2)
    assert manager.config.capture_sizes == (3, 7)
    assert {entry.batch_size for entry in manager.registry.entries()} == {3, 7}


def test_a_refused_plan_leaves_the_one_before():
    """Where the queue has no place for another plan, the one that waits is still captured."""
    held = Held()
    held.go_on.set()
    background, blocked = held.manager.dispatcher.capturer.background, threading.Event()
    background.submit("busy", functools.partial(assert_set, blocked))
    plan = held.function.replan(max_graphs=1, headroom=0.0)
    filler = 0
    while background.submit(filler, lambda: None):
        filler += 1
    with pytest.raises(CUDAGraphError, match="its queue is full"):
        held.function.replan(max_graphs=4, headroom=0.0)
    blocked.set()
    held.manager.wait()
    assert held.manager.config.buckets() == plan.buckets()


def test_exact_buckets_leave_for_the_grid():
    """Buckets outside the grid leave, the least recently used first, so that max_graphs holds."""
    config = dataclasses.replace(
        POWERS, capture_sizes=(1, 2), capture_seq_lens=(8,), max_graphs=4, on_overflow="exact"
    )
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)
    for batch, seq in ((2, 50), (2, 40), (1, 3), (2, 4), (1, 3)):
        function(floats(0, batch, seq))
    function.replan(max_graphs=3, headroom=0.0, max_seq_len=8)
    function.manager.wait()
    stats = function.stats()["registry"]
    assert stats["num_graphs"] <= 4
    assert function.registry.has(2, 40)
    assert set(function.manager.config.buckets()) <= {e.bucket for e in function.registry.entries()}


@pytest.mark.parametrize("drop", ["clear", "reset"])
def test_dropped_meanwhile(drop):
    """After `clear()` or `reset()` the grid that was being captured is not put in place."""
    held = Held()
    with pytest.warns(CUDAGraphWarning, match="dropped meanwhile, by clear"):  # noqa: PT031
        held.replan()
        (held.manager.registry.clear if drop == "clear" else held.manager.reset)()
        held.finish()
    assert held.held == []
    assert held.manager.config == POWERS


def test_a_removed_bucket_is_captured_again():
    """A bucket of both grids that is removed meanwhile is there after the change."""
    held = Held()
    held.manager.registry.sizes.clear()
    held.manager.registry.sizes.add(Bucket(3, SLOW), 9)
    held.manager.registry.sizes.add(Bucket(8, 32), 9)
    held.function.replan(max_graphs=4, headroom=0.0)
    assert held.entered.wait(60)
    assert held.manager.registry.remove(8, 32)
    held.finish()
    assert (8, 32) in held.held
    assert set(held.held) == set(held.manager.config.buckets())


@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_plan_that_waits_is_dropped_aloud(end):
    """A re-plan that was still queued when the manager was closed or reset warns."""
    held = Held()
    blocked = threading.Event()
    held.manager.dispatcher.capturer.background.submit(
        "busy", functools.partial(assert_set, blocked)
    )
    held.function.replan(max_graphs=1, headroom=0.0)
    # The job under way ends when what waits has been dropped.
    held.manager.dispatcher.capturer.background.submit("last", lambda: None, dropped=blocked.set)
    with pytest.warns(CUDAGraphWarning, match="closed or reset before it was captured"):  # noqa: PT031
        getattr(held.manager, end)()
        held.manager.wait()
    assert held.manager.config == POWERS


def test_the_newest_plan_wins():
    """Of plans that wait, the last one asked for is the grid, also one asked for before."""
    held = Held()
    held.go_on.set()
    blocked = threading.Event()
    held.manager.dispatcher.capturer.background.submit(
        "busy", functools.partial(assert_set, blocked)
    )
    held.manager.registry.sizes.add(Bucket(8, 32), 9)
    plans = [held.function.replan(max_graphs=graphs, headroom=0.0) for graphs in (4, 1, 4)]
    blocked.set()
    held.manager.wait()
    assert held.manager.config.buckets() == plans[-1].buckets() == plans[0].buckets()
    assert held.held == sorted(map(tuple, plans[-1].buckets()))


def test_any_error_is_told():
    """Also what is no error of this package leaves the old grid with a warning."""

    def leaving(x):
        if x.shape[1] == 20:
            raise SystemExit("out")
        return x * 2

    function = bucket_jit(leaving, in_axes=("batch seq",), config=POWERS)
    function.warmup(floats(0, 1, 1), progress=False)
    function.registry.sizes.add(Bucket(3, 20))
    with pytest.warns(CUDAGraphWarning, match="the old grid stays"):  # noqa: PT031
        function.replan(max_graphs=1, headroom=0.0)
        function.manager.wait()
    assert function.manager.config == POWERS


def test_entries_of_before_a_reset_count_nowhere():
    """Reading an entry that somebody kept over a reset adds nothing to the sizes."""
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=POWERS)
    for _ in range(3):
        function(floats(0, 2, 8))
    entry = function.registry.get(2, 8)
    function.manager.reset()
    assert entry is not None
    assert entry.replay_count == 2
    assert function.manager.sizes() == {}
    assert np.asarray(function(floats(0, 2, 8))).shape == (2, 8)
