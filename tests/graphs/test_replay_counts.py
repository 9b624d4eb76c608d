"""Tally, Journal and Ledger: no replay is lost or counted twice."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import Bucket
from cudagraph_jax.graphs.replay_counts import Fit, Journal, Ledger, ReplayTotals, Request

BUCKET = Bucket(4, 8)

requests = st.builds(
    Request,
    st.builds(Bucket, st.integers(1, 4), st.integers(1, 8)),
    st.sampled_from(Fit),
)
written = st.lists(st.tuples(requests, st.integers(0, 5)), max_size=6)


def replay(tally, times):
    """What the hot path does, `times` times."""
    for _ in range(times):
        tally.used_at += 1.0
        tally.seconds += 0.5
        next(tally.count)


def sums(counted):
    """What replays of these requests add up to."""
    counts = dict.fromkeys(Fit, 0)
    for request, times in counted:
        counts[request.fit] += times
    replays = sum(counts.values())
    return ReplayTotals(
        exact=counts[Fit.EXACT],
        padded=counts[Fit.PADDED],
        larger=counts[Fit.LARGER],
        pieces=counts[Fit.PIECE],
        seconds=0.5 * replays,
        real_elements=sum(request.sizes.elements * times for request, times in counted),
        computed_elements=replays * BUCKET.elements,
    )


class Owner:
    """Stands for an executable."""


@settings(max_examples=50)
@given(counted=written, reads=st.integers(0, 3))
def test_totals_are_the_sum_of_the_replays(counted, reads):
    """Totals are the sum of all replays, however often they were read in between."""
    ledger, owner = Ledger(), Owner()
    journal = Journal(BUCKET, ledger, owner)
    for index, (request, times) in enumerate(counted):
        replay(journal.open(request), times)
        for _ in range(reads):
            assert journal.totals() == sums(counted[: index + 1])
    assert journal.totals() == ledger.totals() == sums(counted)


@settings(max_examples=30)
@given(parts=st.lists(st.tuples(written, st.booleans(), st.booleans()), max_size=4))
def test_the_ledger_outlives_its_journals(parts):
    """The ledger's sum is that of all tallies and journals, also of those that are over."""
    ledger = Ledger()
    kept: list[object] = []
    for counted, keep_owner, close in parts:
        owner = Owner()
        journal = Journal(BUCKET, ledger, owner)
        for request, times in counted:
            tally = journal.open(request)
            replay(tally, times)
            tally.is_open = not close
        if keep_owner:
            kept.append(owner)
        del journal, owner
        ledger.totals()
    expected = sums([item for counted, _, _ in parts for item in counted])
    assert ledger.totals() == ledger.totals() == expected


def test_what_is_over_is_let_go():
    """Closed tallies, and journals whose entry is gone, are added up and freed."""
    ledger, owner = Ledger(), Owner()
    journal = Journal(BUCKET, ledger, owner)
    request = Request(BUCKET, Fit.EXACT)
    for _ in range(5000):
        tally = journal.open(request)
        next(tally.count)
        tally.is_open = False
    assert journal.totals().exact == 5000
    assert not journal.is_over
    gone = weakref.ref(journal)
    del owner, journal
    assert ledger.totals().exact == 5000
    gc.collect()
    assert gone() is None
    assert ledger.totals().exact == 5000


@settings(max_examples=30)
@given(st.lists(written, max_size=4))
def test_totals_add_up(parts):
    """The sum of totals is the total of the concatenation."""
    added = sum((sums(part) for part in parts), ReplayTotals())
    assert added == sums([item for part in parts for item in part])
    assert added.replays == added.calls + added.pieces


def test_waste():
    """Waste is the part of the computed elements that was padding, 0 before the first replay."""
    assert ReplayTotals().waste == 0
    assert ReplayTotals(padded=1, real_elements=8, computed_elements=32).waste == 0.75


def test_last_use():
    """A journal was last used when the last of its tallies was, also of those that are closed."""
    owner = Owner()
    journal = Journal(BUCKET, Ledger(), owner)
    began = journal.last_used()
    tally = journal.open(Request(BUCKET, Fit.EXACT))
    assert journal.last_used() == began
    tally.used_at = began + 5
    assert journal.last_used() == began + 5
    tally.is_open = False
    journal.totals()
    assert journal.last_used() == began + 5


def test_counts_are_exact_under_threads():
    """Writers, readers, closing tallies and ending journals at once lose nothing."""
    ledger, owner = Ledger(), Owner()
    journal = Journal(BUCKET, ledger, owner)
    request = Request(Bucket(2, 4), Fit.PADDED)
    shared = journal.open(request)
    writers, each = 8, 2000
    gate = threading.Barrier(writers)

    def write(_):
        gate.wait()
        for index in range(each):
            next(shared.count)
            if index % 100 == 0:
                mine = Owner()
                for opened in (journal.open(request), Journal(BUCKET, ledger, mine).open(request)):
                    next(opened.count)
                    opened.is_open = False
                del mine
                ledger.totals()

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    assert journal.totals().padded == writers * (each + each // 100)
    assert ledger.totals().padded == writers * (each + 2 * each // 100)
