"""SingleFlightLRU: each value made once, the least recently used dropped first."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cudagraph_jax import CaptureError, InputShapeError, PaddingLeakError
from cudagraph_jax._base.lru import SingleFlightLRU
from cudagraph_jax.capture.registry import ERRORS
from tests.helpers.signals import SignalAt, under_signals

keys = st.sampled_from("abcdef")


@dataclass
class Value:
    """A value that knows when it was used last."""

    key: str
    weight: int
    used: int
    borrowed: int = 0


def cache_of(max_items=None, max_weight=None, on_drop=lambda values: None):
    return SingleFlightLRU(
        errors=ERRORS,
        last_used=lambda value: value.used,
        weight=lambda value: value.weight,
        borrows=lambda value: value.borrowed,
        max_items=max_items,
        max_weight=max_weight,
        on_drop=on_drop,
    )


class Cache(RuleBasedStateMachine):
    """Whatever is asked in whatever order, the cache is the model: a list in order of use."""

    @initialize(max_items=st.none() | st.integers(1, 3), max_weight=st.none() | st.integers(1, 12))
    def start(self, max_items, max_weight):
        self.clock = itertools.count()
        self.max_items, self.max_weight = max_items, max_weight
        self.dropped: list[Value] = []
        self.expected_drops: list[Value] = []
        self.evictions = 0
        self.model: list[Value] = []
        self.cache = cache_of(max_items, max_weight, self.dropped.extend)

    def find(self, key):
        return next((value for value in self.model if value.key == key), None)

    @rule(key=keys, weight=st.integers(0, 6))
    def make(self, key, weight):
        held = self.find(key)
        value = Value(key, weight, next(self.clock))
        if held is None and self.max_weight is not None and weight > self.max_weight:
            with pytest.raises(
                CaptureError, match=f"more than the whole budget of {self.max_weight}"
            ):
                self.cache.get_or_make(key, lambda: value)
            return
        made = self.cache.get_or_make(key, lambda: value)
        assert made.is_new == (held is None)
        assert made.value is (value if held is None else held)
        if held is None:
            self.make_room(weight)
            self.model.append(value)

    def make_room(self, weight):
        while self.model and (
            (self.max_items is not None and len(self.model) >= self.max_items)
            or (
                self.max_weight is not None
                and sum(value.weight for value in self.model) + weight > self.max_weight
            )
        ):
            oldest = min(self.model, key=lambda value: value.used)
            self.model.remove(oldest)
            self.expected_drops.append(oldest)
            self.evictions += 1

    @rule(key=keys)
    def use(self, key):
        value = self.cache.values.get(key)
        assert value is self.find(key)
        assert (key in self.cache) == (value is not None)
        if value is not None:
            value.used = next(self.clock)

    @rule(key=keys)
    def fail(self, key):
        if self.find(key) is None:
            with pytest.raises(ZeroDivisionError):
                self.cache.get_or_make(key, lambda: 1 // 0)

    @rule(key=keys)
    def pop(self, key):
        held = self.find(key)
        assert self.cache.pop(key) is held
        if held is not None:
            self.model.remove(held)
            self.expected_drops.append(held)

    @rule()
    def clear(self):
        self.cache.clear()
        self.expected_drops += self.model
        self.model = []

    @invariant()
    def same(self):
        assert [value for _, value in self.cache.items()] == self.model
        assert [key for key, _ in self.cache.items()] == [value.key for value in self.model]
        assert len(self.cache) == len(self.model)
        assert self.dropped == self.expected_drops
        assert self.cache.evictions == self.evictions


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30)


def test_one_flight_for_64_threads():
    """64 threads that ask for one key at once get the value that one of them made."""
    cache = cache_of()
    gate = threading.Barrier(64)
    made = []

    def make():
        made.append(Value("a", 0, 0))
        return made[-1]

    def ask(_):
        gate.wait()
        return cache.get_or_make("a", make)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert len(made) == 1
    assert all(answer.value is made[0] for answer in answers)
    assert sum(answer.is_new for answer in answers) == 1


class Announced:
    """A key that tells when it was looked up; all of them are the same key."""

    def __init__(self):
        self.lookups = 0
        self.looked_up = threading.Condition()

    def __eq__(self, other):
        return isinstance(other, Announced)

    def __hash__(self):
        with self.looked_up:
            self.lookups += 1
            self.looked_up.notify_all()
        return 1

    def __str__(self):
        return "the key"

    def until_waiting(self):
        """Returns when the value and the flight were both looked up, under the cache's lock."""
        with self.looked_up:
            self.looked_up.wait_for(lambda: self.lookups >= 2)


@pytest.mark.parametrize(
    "error",
    [ValueError("no luck"), KeyboardInterrupt(), SystemExit(2)],
    ids=lambda error: type(error).__name__,
)
def test_a_dying_maker_wakes_its_waiters(error):
    """Whatever ends the maker, also Ctrl-C, those who wait get a CaptureError with that cause."""
    cache = cache_of()
    leading, waiting = Announced(), Announced()
    outcome = []

    def wait_for_it():
        try:
            cache.get_or_make(waiting, lambda: Value("waiter's own", 0, 0))
        except CaptureError as failure:
            outcome.append(failure)

    waiter = threading.Thread(target=wait_for_it)

    def make():
        waiter.start()
        waiting.until_waiting()
        raise error

    with pytest.raises(type(error)):
        cache.get_or_make(leading, make)
    waiter.join()
    assert outcome[0].__cause__ is error
    assert type(error).__name__ in str(outcome[0])
    assert len(cache) == 0
    assert cache.get_or_make(leading, lambda: Value("again", 0, 0)).is_new


@pytest.mark.parametrize(
    "error", [PaddingLeakError("the padding leaks"), InputShapeError("the shape is wrong")]
)
def test_an_error_of_this_package_reaches_its_waiters_as_it_is(error):
    """Those who wait for a failed capture get its class and attributes, in an own object."""
    cache = cache_of()
    leading, waiting = Announced(), Announced()
    outcome = []

    def wait_for_it():
        try:
            cache.get_or_make(waiting, lambda: Value("waiter's own", 0, 0))
        except type(error) as failure:
            outcome.append(failure)

    waiter = threading.Thread(target=wait_for_it)

    def make():
        waiter.start()
        waiting.until_waiting()
        raise error

    with pytest.raises(type(error), match=str(error)):
        cache.get_or_make(leading, make)
    waiter.join()
    assert outcome[0] is not error
    assert (str(outcome[0]), vars(outcome[0])) == (str(error), vars(error))


def test_recursion_is_an_error():
    """A maker that asks for its own key gets an error instead of waiting for itself."""
    cache = cache_of()
    with pytest.raises(CaptureError, match="making a asked for a itself: break the recursion"):
        cache.get_or_make("a", lambda: cache.get_or_make("a", lambda: Value("a", 0, 0)).value)
    assert len(cache) == 0


def test_a_maker_may_ask_for_another_key():
    """Making one value may make another."""
    cache = cache_of()
    cache.get_or_make("a", lambda: cache.get_or_make("b", lambda: Value("b", 0, 0)).value)
    assert [key for key, _ in cache.items()] == ["b", "a"]


def test_clear_during_a_flight_does_not_keep_the_value():
    """A value made while the cache was cleared goes to its caller and is not kept."""
    cache = cache_of()
    inner = []

    def make():
        cache.clear()
        inner.append(cache.get_or_make("a", lambda: Value("second", 0, 0)))
        return Value("first", 0, 0)

    outer = cache.get_or_make("a", make)
    assert (outer.value.key, outer.is_new) == ("first", True)
    assert inner[0].is_new
    assert cache.values.get("a") is inner[0].value


def test_an_oversized_value_is_told_to_its_waiters():
    """A value beyond the whole budget is an error for its maker and displaces nobody."""
    cache = cache_of(max_weight=10)
    cache.get_or_make("small", lambda: Value("small", 4, 0))
    with pytest.raises(CaptureError, match="needs 1,000 bytes, more than the whole budget of 10"):
        cache.get_or_make("big", lambda: Value("big", 1000, 0))
    assert [key for key, _ in cache.items()] == ["small"]
    assert cache.evictions == 0


def test_only_what_a_limit_drops_is_evicted():
    """on_evict gets what had to leave because of a limit, and not what was taken out."""
    evicted: list[str] = []
    cache: SingleFlightLRU[str, str] = SingleFlightLRU(
        errors=ERRORS, last_used=ord, max_items=2, on_evict=evicted.extend
    )
    for key in "abc":
        cache.get_or_make(key, partial(str, key))
    cache.pop("b")
    cache.clear()
    assert evicted == ["a"]


def test_errors_describe_keys_in_the_callers_words():
    """What is too large, is asked for by its own maker, or dies under its waiters is named well."""
    cache: SingleFlightLRU[Any, Value] = SingleFlightLRU(
        errors=ERRORS,
        last_used=lambda value: value.used,
        weight=lambda value: value.weight,
        max_weight=10,
        describe=lambda key: "embed at 8x1",
    )
    with pytest.raises(CaptureError, match=r"^embed at 8x1 needs 1,000 bytes") as caught:
        cache.get_or_make("big", lambda: Value("big", 1000, 0))
    assert caught.value.stage == "budget"
    with pytest.raises(CaptureError, match=r"^making embed at 8x1 asked for embed at 8x1 itself"):
        cache.get_or_make("a", lambda: cache.get_or_make("a", lambda: Value("a", 0, 0)).value)
    leading, waiting = Announced(), Announced()
    outcome: list[str] = []

    def wait_for_it():
        with pytest.raises(CaptureError) as failure:
            cache.get_or_make(waiting, lambda: Value("waiter's own", 0, 0))
        outcome.append(str(failure.value))

    waiter = threading.Thread(target=wait_for_it)

    def make():
        waiter.start()
        waiting.until_waiting()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_make(leading, make)
    waiter.join()
    assert outcome == ["embed at 8x1 was not made: KeyboardInterrupt in another thread"]


def test_one_value_alone_is_taken_out():
    """What another thread has put in the place of a value stays, whenever it came."""
    for number in itertools.count():
        dropped: list[Value] = []
        cache = cache_of(on_drop=dropped.extend)
        old, new = Value("old", 0, 0), Value("new", 0, 0)
        cache.get_or_make("a", lambda old=old: old)
        put = partial(cache.put_all, {"a": new}, generation=0)
        trace = SignalAt(put, number=number, files=("/_base/lru.py",))
        assert under_signals(trace, partial(cache.pop_only, "a", old)) is None
        assert cache.values.get("a") is (new if trace.points > number else None)
        if trace.points <= number:
            break
    assert not cache.pop_only("a", old)
    assert dropped == [old]
