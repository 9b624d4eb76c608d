"""What a run costs: measured where somebody waits for its outputs, and nowhere else."""

from __future__ import annotations

import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.graphs.replay_counts import Fit, Journal, Ledger, Request
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.functions import double, floats, stats_of

BUCKET = Bucket(4, 8)
CONFIG = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,))


class Owner:
    """What lives as long as a journal."""


def replay(tally, times, seconds):
    for _ in range(times):
        tally.seconds += seconds
        next(tally.count)


def test_the_least_run_of_a_warm_up():
    """Of the runs without a request the first ones load code: the least is what a run costs."""
    owner = Owner()
    journal = Journal(BUCKET, Ledger(), owner)
    costs = [journal.cost_ms]
    for seconds in (2.0, 0.25, 0.5):
        journal.add_idle_run(seconds)
        costs.append(journal.cost_ms)
    assert (costs, journal.idle_runs) == ([None, 2000.0, 250.0, 250.0], 3)


def test_calls_that_wait_refresh_it():
    """Calls that wait take over from the warm-up, the newest counting most."""
    owner = Owner()
    journal = Journal(BUCKET, Ledger(), owner)
    journal.add_idle_run(1.0)
    tally = journal.open(Request(BUCKET, Fit.EXACT), waits=True)
    replay(tally, 3, 0.2)
    assert journal.cost_ms == pytest.approx(400.0)  # (1 + 3 * 0.2) / 4
    assert journal.cost_ms == pytest.approx(400.0)  # and nothing new
    replay(tally, 1000, 0.1)
    assert journal.cost_ms == pytest.approx(100.0, rel=0.02)
    replay(tally, 1000, 0.3)
    assert journal.cost_ms == pytest.approx(300.0, rel=0.03)


def test_one_slow_call_does_not_move_it_far():
    """After many calls a single one that took long weighs as one of 33."""
    owner = Owner()
    journal = Journal(BUCKET, Ledger(), owner)
    tally = journal.open(Request(BUCKET, Fit.EXACT), waits=True)
    replay(tally, 500, 0.1)
    assert journal.cost_ms == pytest.approx(100.0)
    replay(tally, 1, 3.4)
    assert journal.cost_ms == pytest.approx(200.0)


def test_times_to_dispatch_are_left_out():
    """Calls that wait for nothing change no cost, and make none."""
    owner = Owner()
    journal = Journal(BUCKET, Ledger(), owner)
    replay(journal.open(Request(BUCKET, Fit.EXACT)), 10, 0.001)
    assert journal.cost_ms is None
    assert journal.totals().exact == 10


@pytest.mark.parametrize("unpad", ["none", "device"])
def test_outputs_on_the_device_are_not_waited_for(unpad):
    """The cost of a bucket whose outputs stay on the device is that of its warm-up."""
    function = bucket_jit(double, in_axes=("batch seq",), unpad=unpad, config=CONFIG)
    function(floats(0, 4, 8))
    (entry,) = function.registry.entries()
    assert entry.cost_ms is None
    function.warmup(floats(0, 4, 8), progress=False)
    measured = entry.cost_ms
    assert measured is not None
    assert measured > 0
    for _ in range(5):
        function(floats(0, 4, 8))
    assert entry.cost_ms == measured
    assert stats_of(function)["registry"]["graphs"]["4x8"]["cost_ms"] == measured


def test_outputs_on_the_host_are_waited_for():
    """Each call whose outputs are NumPy arrays refreshes the cost of its bucket."""
    function = bucket_jit(double, in_axes=("batch seq",), config=CONFIG)
    function.warmup(floats(0, 4, 8), progress=False)
    (entry,) = function.registry.entries()
    measured = entry.cost_ms
    function(floats(0, 3, 5))
    assert entry.cost_ms not in (None, measured)
