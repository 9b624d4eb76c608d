"""Signal handlers that use what they interrupt, at any point of it."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, bucket_jit
from tests.helpers.examples import IS_THOROUGH
from tests.helpers.functions import assert_close, floats, stats_of
from tests.helpers.processes import said_by
from tests.helpers.signals import SignalAt, elsewhere, under_signals

X = floats(0, 2, 4)
CONFIG = CUDAGraphConfig(
    capture_sizes=(2, 4), capture_seq_lens=(4, 8), warmup_iterations=1, max_graphs=3
)


OURS = ("/cudagraph_jax/",)
"""JAX itself refuses the first run of an executable in the middle of its first run."""


def served(**options):
    manager = CUDAGraphManager(CONFIG)
    return manager, bucket_jit(lambda x: x * 2, in_axes="batch seq", manager=manager, **options)


def requests(function, handled):
    """Hits, misses, evictions, and sums of what is counted."""
    sizes = [(2, 4), (2, 4), (1, 3), (4, 4), (3, 7), (2, 8), (2, 4)]
    for batch, seq in sizes:
        x = floats(0, batch, seq)
        assert_close(function(x), x * 2)
    handled()
    return len(sizes)


HANDLERS = {
    "stats": lambda manager, function: manager.stats(),
    "registry": lambda manager, function: manager.registry.stats(),
    "sizes": lambda manager, function: manager.sizes(),
    "report": lambda manager, function: str(manager.report()),
    "wait": lambda manager, function: manager.wait(),
    "explain": lambda manager, function: function.explain(X),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_a_handler_reads_at_any_point(name):
    """Whatever it interrupts, a handler that reads returns, and every call is counted once.

    Usually it comes the first two times that a step is reached: reports take a millisecond each.
    """
    manager, function = served()

    handled = 0

    def handle():
        nonlocal handled
        handled += 1
        HANDLERS[name](manager, function)

    trace = SignalAt(handle, most=None if IS_THOROUGH else 2)
    calls: list[int] = []
    error = under_signals(trace, lambda: calls.append(requests(function, manager.stats)))
    assert error is None, error
    assert handled > 500
    stats = stats_of(manager)
    assert stats["calls"] == calls[0]
    assert sum(manager.sizes().values()) == calls[0]
    assert stats["registry"]["num_graphs"] == 3


@pytest.mark.parametrize("mode", ["bucket_jit", "specification"])
def test_a_handler_calls_the_function_at_any_point(mode):
    """A call in the middle of another one, also of its own capture, is answered and counted."""
    manager, function = served()

    def double(x):
        return x * 2

    def call(x):
        if mode == "bucket_jit":
            return function(x)
        return manager.execute_or_capture(*x.shape, double, x)

    handled: list[np.ndarray] = []
    trace = SignalAt(lambda: handled.append(call(X)), files=OURS)
    calls: list[int] = []
    error = under_signals(trace, lambda: calls.append(requests(call, manager.stats)))
    assert error is None, error
    for answer in handled:
        assert not isinstance(answer, jax.core.Tracer)
        np.testing.assert_array_equal(answer, X * 2)
    stats = stats_of(manager)
    assert stats["calls"] == calls[0] + len(handled)
    assert stats["failed_buckets"] == 0
    assert sum(manager.sizes().values()) == stats["calls"]


def at_each_point(act, manager_of, *, files=OURS):
    """Calls `act` at one point of a first call after the other, each with a new manager."""

    def called(act, number):
        manager = manager_of()
        function = bucket_jit(lambda x: x * 2, in_axes="batch seq", manager=manager)
        trace = SignalAt(partial(act, manager, function), number=number, files=files)
        assert under_signals(trace, partial(function, X)) is None
        return trace.points, manager, function

    # Counted without a handler: one that calls the function leaves the call next to nothing to do.
    points, *_ = called(lambda manager, function: None, 0)
    assert points > 300
    for number in range(0, points, 29 if IS_THOROUGH else 97):
        reached, manager, function = called(act, number)
        if reached > number:  # what is known by now takes fewer steps
            yield manager, function


def one_bucket(policy="capture"):
    return CUDAGraphManager(
        CUDAGraphConfig(
            capture_sizes=(2,), capture_seq_lens=(4,), on_miss=policy, warmup_iterations=1
        )
    )


def test_a_handler_calls_what_is_being_captured():
    """A handler in the middle of a capture gets its answer eagerly, and harms nothing."""
    answers: list[np.ndarray] = []
    in_the_middle = 0
    for manager, function in at_each_point(lambda _, f: answers.append(f(X)), one_bucket):
        stats = stats_of(manager)
        assert stats["calls"] == 2
        assert stats["failed_buckets"] == 0
        assert stats["registry"]["num_graphs"] == 1
        in_the_middle += stats["eager_by_reason"] == {"queued": 1}
        assert_close(function(X), X * 2)
    assert in_the_middle > 3
    for answer in answers:
        assert_close(answer, X * 2)


@pytest.mark.parametrize("policy", ["capture", "background"])
@pytest.mark.parametrize("name", ["close", "seal", "reset", "wait"])
def test_a_handler_ends_at_any_point(name, policy):
    """A handler that ends what it interrupts returns, at each point of a call and its capture."""

    def act(manager, function):
        getattr(manager, name)()

    for manager, function in at_each_point(act, partial(one_bucket, policy)):
        elsewhere(manager.wait)
        assert_close(elsewhere(partial(function, X)), X * 2)
        elsewhere(manager.seal)
        elsewhere(manager.close)


def test_real_signals():
    """A process whose timer reads, and waits for the background, all the time answers and ends."""
    said = said_by(
        """
        import signal, sys
        import jax
        import numpy as np
        from cudagraph_jax import CUDAGraphConfig, bucket_jit

        config = CUDAGraphConfig(
            capture_sizes=(1, 2, 4), capture_seq_lens=(4, 8, 16), on_miss="background",
            warmup_iterations=1, max_graphs=6,
        )
        function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=config)
        handled = []

        def handle(*_):
            function.stats(), function.manager.sizes(), function.manager.report()
            if len(handled) % 5 == 0:
                function.manager.wait()
            handled.append(1)
            if len(handled) < 100:  # again, once this one has ended
                signal.setitimer(signal.ITIMER_REAL, 0.001)

        function.manager.report()  # imports what it needs
        # And what JAX lowers with: who interrupts that import has Python's lock of a module taken,
        # which the background waits for.
        jax.numpy.zeros(1) * 2
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        calls = 0
        while len(handled) < 100:
            calls += 1
            x = np.full((1 + calls % 4, 1 + calls % 16), calls, np.float32)
            assert (function(x) == 2 * calls).all()
        function.manager.wait()
        stats = function.stats()
        assert stats["calls"] == calls, (stats, calls)
        assert sum(function.manager.sizes().values()) == stats["calls"]
        print("ended")
        """
    )
    assert said == "ended\n"


def test_first_calls_share_one_program():
    """Whatever comes in the middle of a first call, there is one program for all of them."""
    for number in itertools.count():
        manager, function = served()
        call, program_of = function.describe(X), manager.dispatcher.capturer.program_of
        programs: list[object] = []

        def first_call(call=call, program_of=program_of, programs=programs):
            programs.append(program_of(call))

        trace = SignalAt(first_call, number=number, files=("/capturer.py", "/weakref.py"))
        assert under_signals(trace, first_call) is None
        assert all(program is programs[0] for program in programs)
        if trace.points <= number:
            break
    assert number > 8
