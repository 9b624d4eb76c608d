"""Journal and Ledger: no replay is lost or counted twice."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import Bucket
from cudagraph_jax.graphs.journal import Fit, Journal, Ledger, ReplayTotals, Request

BUCKET = Bucket(4, 8)

records = st.lists(
    st.tuples(
        st.integers(0, 10**9),
        st.builds(
            Request,
            st.builds(Bucket, st.integers(1, 4), st.integers(1, 8)),
            st.sampled_from(Fit),
        ),
    ),
    max_size=12,
)


def sums(written):
    """What `written` adds up to, one record after the other."""
    fits = [fit for _, (_, fit) in written]
    return ReplayTotals(
        exact=fits.count(Fit.EXACT),
        padded=fits.count(Fit.PADDED),
        larger=fits.count(Fit.LARGER),
        pieces=fits.count(Fit.PIECE),
        time_ns=sum(elapsed for elapsed, _ in written),
        real_elements=sum(sizes.elements for _, (sizes, _) in written),
        computed_elements=len(written) * BUCKET.elements,
    )


@settings(max_examples=50)
@given(written=records, read_after=st.integers(0, 20))
def test_totals_are_the_sum_of_the_records(written, read_after):
    """Totals are the sum of all records, whenever they were read in between."""
    ledger = Ledger()
    journal = Journal(BUCKET, ledger)
    for index, record in enumerate(written):
        journal.append(record)
        if index == read_after:
            assert journal.totals() == sums(written[: index + 1])
    assert journal.totals() == ledger.totals() == sums(written)


@settings(max_examples=20)
@given(batches=st.lists(st.tuples(records, st.booleans()), max_size=4))
def test_the_ledger_outlives_its_journals(batches):
    """The ledger's sum is that of all journals, also of those that are gone, read or unread."""
    ledger = Ledger()
    kept = []
    for written, keep in batches:
        journal = Journal(BUCKET, ledger)
        for record in written:
            journal.append(record)
        if keep:
            kept.append(journal)
        del journal
        ledger.totals()
    gc.collect()
    expected = sums([record for written, _ in batches for record in written])
    assert ledger.totals() == ledger.totals() == expected


@settings(max_examples=30)
@given(st.lists(records, max_size=4))
def test_totals_add_up(parts):
    """The sum of totals is the total of the concatenation."""
    added = sum((sums(part) for part in parts), ReplayTotals())
    assert added == sums([record for part in parts for record in part])
    assert added.replays == sum(map(len, parts))


def test_waste():
    """Waste is the part of the computed elements that was padding, 0 before the first replay."""
    assert ReplayTotals().waste == 0
    assert ReplayTotals(padded=1, real_elements=8, computed_elements=32).waste == 0.75


def test_counts_are_exact_under_threads():
    """Writers, readers and dying journals at once lose nothing."""
    ledger = Ledger()
    shared = [Journal(BUCKET, ledger)]
    writers, each = 8, 2000
    record = (3, Request(Bucket(2, 4), Fit.PADDED))
    gate = threading.Barrier(writers)

    def write(_):
        gate.wait()
        for index in range(each):
            shared[0].append(record)
            if index % 100 == 0:
                own = Journal(BUCKET, ledger)
                own.append(record)
                del own
                ledger.totals()

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    assert shared[0].totals() == sums([record] * (writers * each))
    total = writers * (each + each // 100)
    assert ledger.totals() == sums([record] * total)
    shared.clear()
    gc.collect()
    assert ledger.totals() == sums([record] * total)
