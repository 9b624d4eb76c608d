"""decide(): the mode table, row by row."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import (
    Bucket,
    BucketOverflowError,
    CaptureError,
    CUDAGraphConfig,
    CUDAGraphMode,
    CUDAGraphRegistry,
    InputShapeError,
    PaddingLeakError,
    SealedError,
)
from cudagraph_jax.dispatch.decision import Decision, Holdings, Reason, decide
from tests.helpers.functions import double

CAPTURE, REPLAY, NONE, DISABLED = (
    CUDAGraphMode.CAPTURE,
    CUDAGraphMode.REPLAY,
    CUDAGraphMode.NONE,
    CUDAGraphMode.DISABLED,
)
OWN, LARGER = Bucket(4, 8), Bucket(8, 16)
INSIDE, OUTSIDE = Bucket(3, 7), Bucket(300, 7)
FAILED, LEAKS = CaptureError("no luck"), PaddingLeakError("row 1 moves")


@pytest.fixture(scope="module")
def entries():
    """A captured bucket of the requests' own size, and a larger one."""
    registry = CUDAGraphRegistry(CUDAGraphConfig(warmup_iterations=0))
    return {
        size: registry.capture(size.batch_size, size.seq_len, double, tuple(size))
        for size in (OWN, LARGER, OUTSIDE)
    }


def decided(entries, mode, sizes, *, held=(), failed=None, queues=True, **options) -> Decision:
    config = CUDAGraphConfig(capture_sizes=(4, 8), capture_seq_lens=(8, 16), **options)
    own = {size: entries[size] for size in held if size != LARGER}
    holdings = Holdings(
        find=own.get,
        find_larger=lambda: entries[LARGER] if LARGER in held else None,
        failed=lambda bucket: failed or None,
        queues=lambda bucket: queues,
    )
    return decide(config, mode, sizes, ("batch", "seq"), holdings)


BEHIND = {"on_miss": "background"}
TABLE: list[tuple[CUDAGraphMode, Bucket, dict[str, Any], CUDAGraphMode, Reason]] = [
    # Captured: its own bucket, exactly or padded.
    (CAPTURE, OWN, {"held": (OWN,)}, REPLAY, Reason.EXACT),
    (CAPTURE, INSIDE, {"held": (OWN,)}, REPLAY, Reason.PADDED),
    (CAPTURE, OUTSIDE, {"held": (OUTSIDE,)}, REPLAY, Reason.EXACT),
    (REPLAY, OWN, {"held": (OWN,)}, REPLAY, Reason.EXACT),
    (REPLAY, INSIDE, {"held": (OWN,)}, REPLAY, Reason.PADDED),
    (REPLAY, OUTSIDE, {"held": (OUTSIDE,)}, REPLAY, Reason.EXACT),
    (NONE, INSIDE, {"held": (OWN,)}, NONE, Reason.PAUSED),
    (DISABLED, INSIDE, {"held": (OWN,)}, DISABLED, Reason.DISABLED),
    # Not captured, inside the limits.
    (CAPTURE, INSIDE, {}, CAPTURE, Reason.MISS),
    (CAPTURE, INSIDE, {"held": (LARGER,)}, CAPTURE, Reason.MISS),
    (CAPTURE, INSIDE, {"on_miss": "eager"}, NONE, Reason.MISS),
    (CAPTURE, INSIDE, {"failed": FAILED}, NONE, Reason.FAILED),
    (REPLAY, INSIDE, {"held": (LARGER,)}, REPLAY, Reason.LARGER),
    (REPLAY, INSIDE, {"held": (LARGER,), "on_miss": "error"}, REPLAY, Reason.LARGER),
    (REPLAY, INSIDE, {}, NONE, Reason.SEALED),
    (REPLAY, INSIDE, {"on_miss": "eager"}, NONE, Reason.SEALED),
    (NONE, INSIDE, {}, NONE, Reason.PAUSED),
    (NONE, INSIDE, {"on_miss": "error"}, NONE, Reason.PAUSED),
    (DISABLED, INSIDE, {}, DISABLED, Reason.DISABLED),
    (CAPTURE, INSIDE, {"failed": FAILED, "on_miss": "eager"}, NONE, Reason.FAILED),
    (REPLAY, INSIDE, {"failed": LEAKS}, NONE, Reason.SEALED),
    # In the background meanwhile.
    (CAPTURE, INSIDE, BEHIND, NONE, Reason.QUEUED),
    (CAPTURE, INSIDE, {**BEHIND, "held": (LARGER,)}, REPLAY, Reason.LARGER),
    (CAPTURE, INSIDE, {**BEHIND, "queues": False}, NONE, Reason.REFUSED),
    (CAPTURE, INSIDE, {**BEHIND, "queues": False, "held": (LARGER,)}, REPLAY, Reason.LARGER),
    (CAPTURE, INSIDE, {**BEHIND, "failed": FAILED}, NONE, Reason.FAILED),
    (CAPTURE, INSIDE, {**BEHIND, "failed": FAILED, "held": (LARGER,)}, REPLAY, Reason.LARGER),
    # Outside the limits.
    (CAPTURE, OUTSIDE, {}, NONE, Reason.OVERFLOW),
    (REPLAY, OUTSIDE, {}, NONE, Reason.OVERFLOW),
    (NONE, OUTSIDE, {"on_overflow": "error"}, NONE, Reason.PAUSED),
    (DISABLED, OUTSIDE, {"on_overflow": "error"}, DISABLED, Reason.DISABLED),
    # Nothing at all.
    (CAPTURE, Bucket(0, 7), {}, NONE, Reason.EMPTY),
    (REPLAY, Bucket(3, 0), {"on_miss": "error", "on_overflow": "error"}, NONE, Reason.EMPTY),
    # Inputs that may not be copied.
    (CAPTURE, OWN, {"cudagraph_copy_inputs": False}, CAPTURE, Reason.MISS),
    (CAPTURE, OWN, {"cudagraph_copy_inputs": False, "held": (OWN,)}, REPLAY, Reason.EXACT),
    (REPLAY, OWN, {"cudagraph_copy_inputs": False, "held": (LARGER,)}, NONE, Reason.SEALED),
]


@pytest.mark.parametrize(("mode", "sizes", "given_options", "expected", "reason"), TABLE, ids=str)
def test_mode_table(entries, mode, sizes, given_options, expected, reason):
    """Every row and column of the mode table, with each policy."""
    decision = decided(entries, mode, sizes, **given_options)
    assert (decision.mode, decision.reason, decision.error) == (expected, reason, None)
    assert (decision.entry is not None) == (expected is REPLAY)
    if decision.entry is not None:
        assert decision.bucket == decision.entry.bucket
        assert decision.fit.value == reason.value


@pytest.mark.parametrize(
    ("mode", "sizes", "given_options", "error", "said"),
    [
        (CAPTURE, INSIDE, {"on_miss": "error"}, SealedError, "bucket 4x8 is not captured"),
        (REPLAY, INSIDE, {"on_miss": "error"}, SealedError, "sealed: warm it up before"),
        (
            CAPTURE,
            INSIDE,
            {"on_miss": "error", "failed": FAILED},
            SealedError,
            r"4x8 could not be captured \(no luck\).*reset\(\)",
        ),
        (CAPTURE, INSIDE, {"failed": LEAKS}, PaddingLeakError, "row 1 moves"),
        (CAPTURE, INSIDE, {**BEHIND, "failed": LEAKS}, PaddingLeakError, "row 1 moves"),
        (
            CAPTURE,
            OUTSIDE,
            {"on_overflow": "exact", "failed": LEAKS},
            PaddingLeakError,
            "row 1 moves",
        ),
        (
            CAPTURE,
            OUTSIDE,
            {"on_overflow": "error"},
            BucketOverflowError,
            "batch=300 is larger than the largest bucket, 8",
        ),
        (
            REPLAY,
            Bucket(9, 17),
            {"on_overflow": "error"},
            BucketOverflowError,
            "batch=9 .* and seq_len=17 is larger than the largest bucket, 16",
        ),
        (
            CAPTURE,
            INSIDE,
            {"cudagraph_copy_inputs": False, "held": (OWN,)},
            InputShapeError,
            r"pad them to \(4, 8\)",
        ),
        (
            REPLAY,
            INSIDE,
            {"cudagraph_copy_inputs": False, "held": (LARGER,)},
            InputShapeError,
            r"\(3, 7\), not a bucket's shape",
        ),
    ],
)
def test_errors(entries, mode, sizes, given_options, error, said):
    """What a policy turns into an error says which size, and what to do."""
    decision = decided(entries, mode, sizes, **given_options)
    assert decision.mode is NONE
    assert decision.entry is None
    assert type(decision.error) is error
    assert re.search(said, str(decision.error))


@settings(max_examples=200)
@given(
    mode=st.sampled_from(CUDAGraphMode),
    sizes=st.builds(Bucket, st.integers(0, 12), st.integers(0, 20)),
    held=st.sets(st.sampled_from([OWN, LARGER])),
    failed=st.sampled_from([None, FAILED, LEAKS]),
    options=st.fixed_dictionaries(
        {
            "on_miss": st.sampled_from(["capture", "background", "eager", "error"]),
            "on_overflow": st.sampled_from(["eager", "error"]),
            "cudagraph_copy_inputs": st.booleans(),
        }
    ),
)
def test_what_always_holds(entries, mode, sizes, held, failed, options):
    """No capture unless allowed and inside the limits; no replay that does not hold the call."""
    decision = decided(entries, mode, sizes, held=tuple(held), failed=failed, **options)
    inside = 1 <= sizes.batch_size <= 8 and 1 <= sizes.seq_len <= 16
    if decision.mode is CAPTURE:
        assert mode is CAPTURE
        assert inside
        assert options["on_miss"] == "capture"
        assert decision.bucket == CUDAGraphConfig(
            capture_sizes=(4, 8), capture_seq_lens=(8, 16)
        ).bucket_for(*sizes)
    if decision.mode is REPLAY:
        assert decision.entry is not None
        assert mode in (CAPTURE, REPLAY)
        assert decision.entry.batch_size >= sizes.batch_size
        assert decision.entry.seq_len >= sizes.seq_len
        assert options["cudagraph_copy_inputs"] or decision.entry.bucket == sizes
    if decision.error is not None:
        assert mode in (CAPTURE, REPLAY)
        assert 0 not in sizes
    if mode in (NONE, DISABLED):
        assert decision.mode is mode


@pytest.mark.parametrize(
    ("held", "failed", "queues", "passing", "queued"),
    [
        ((), None, True, False, True),
        ((), None, False, False, False),
        ((LARGER,), None, True, True, True),
        ((LARGER,), None, False, True, False),
        ((LARGER,), FAILED, True, True, False),
        ((OWN,), None, True, False, False),
    ],
)
def test_what_may_change(entries, held, failed, queues, passing, queued):
    """A larger bucket serves for now alone while the call's own is queued, failed or refused."""
    decision = decided(entries, CAPTURE, INSIDE, held=held, failed=failed, queues=queues, **BEHIND)
    assert (decision.is_passing, decision.in_background) == (passing, queued)


def test_a_leak_is_raised_anew(entries):
    """Each call raises a leak of its own: one object in many threads would mix their traces."""
    errors = [decided(entries, CAPTURE, INSIDE, failed=LEAKS).error for _ in range(2)]
    assert errors[0] is not errors[1]
    assert LEAKS not in errors
