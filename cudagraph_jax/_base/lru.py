"""A cache that computes each missing value once and drops the least recently used first."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Generic, NamedTuple, TypeVar

from cudagraph_jax._base.changes import Changes

K = TypeVar("K")
V = TypeVar("V")


class CacheItem(NamedTuple, Generic[V]):
    """The outcome of `get_or_make`.

    Attributes:
        value: The cached value.
        is_new: Whether this very call made it.
    """

    value: V
    is_new: bool


class Errors(NamedTuple):
    """What a cache raises.

    Attributes:
        shared: Errors of makers that those who wait get as they are.
        not_made: Makes what they get of any other one, and of a recursion, from its text.
        too_heavy: Makes what is raised for one value above the limit, from the name of its key, its
            weight and the limit.
    """

    shared: type[Exception]
    not_made: Callable[[str], Exception]
    too_heavy: Callable[[str, int, int], Exception]


class _Flight(Generic[V]):
    """One value in the making, and those who wait for it."""

    def __init__(self) -> None:
        self.owner = threading.get_ident()
        self.is_done = False
        self.changes = Changes()
        self.value: V | None = None
        self.error: BaseException | None = None


class _Contents(NamedTuple, Generic[K, V]):
    """What is held, and what is in the making; clearing begins with another one."""

    values: dict[K, V]
    flights: dict[K, _Flight[V]]


class SingleFlightLRU(Generic[K, V]):
    """Values by key, each made once however many threads ask for it.

    Which one was used last is asked of the values themselves, so that a reader who holds a value
    can mark its use without coming back here. There is no lock: see `changes`.

    Args:
        last_used: When a value was used last, on any scale that grows.
        weight: What a value counts against `max_weight`.
        borrows: What it needs besides while it is used, and gives back: of all values only the
            largest counts.
        max_items: How many values are kept; None: any number.
        max_weight: The most that the weights and the largest of what is borrowed may add up to;
            None: anything.
        on_drop: Called after values have left, whatever the reason.
        on_evict: Called likewise, with those that had to leave because of a limit.
        describe: What errors call a key.
        errors: What is raised.
    """

    def __init__(
        self,
        *,
        last_used: Callable[[V], float],
        weight: Callable[[V], int] = lambda value: 0,
        borrows: Callable[[V], int] = lambda value: 0,
        max_items: int | None = None,
        max_weight: int | None = None,
        on_drop: Callable[[list[V]], None] = lambda values: None,
        on_evict: Callable[[list[V]], None] = lambda values: None,
        describe: Callable[[K], str] = str,
        errors: Errors,
    ) -> None:
        self._last_used = last_used
        self._weight = weight
        self._borrows = borrows
        self._max_items = max_items
        self._max_weight = max_weight
        self._on_drop = on_drop
        self._on_evict = on_evict
        self._describe = describe
        self._errors = errors
        self._contents: _Contents[K, V] = _Contents({}, {})
        self._evictions = 0
        self._generation = 0

    @property
    def values(self) -> Mapping[K, V]:
        """What is held, for look-ups that mark nothing as used."""
        return self._contents.values

    def __len__(self) -> int:
        return len(self.values)

    def __contains__(self, key: K) -> bool:
        return key in self.values

    @property
    def evictions(self) -> int:
        """How many values had to leave because of `max_items` or `max_weight`."""
        return self._evictions

    def forget_evictions(self) -> None:
        """Counts evictions from zero again."""
        self._evictions = 0

    def items(self) -> list[tuple[K, V]]:
        """A snapshot of all keys and values, oldest first."""
        return list(self.values.items())

    def get_or_make(self, key: K, make: Callable[[], V]) -> CacheItem[V]:
        """The value of `key`, made by `make` where it is absent.

        One caller makes it; the others wait for that one. A value made while the cache was cleared
        is given to its callers and not kept.

        Raises:
            Exception: To those who waited, when the maker failed, and to a `make` that asks for its
                own key; see `Errors`. The maker gets its own error.
        """
        contents, own = self._contents, _Flight[V]()
        try:
            # In this order: who has landed by now has left the value.
            flight = contents.flights.setdefault(key, own)
            if (held := contents.values.get(key)) is not None:
                own.value = held
                return CacheItem(held, is_new=False)
            if flight is not own:
                return CacheItem(self._wait(key, flight), is_new=False)
            own.value = make()
            self._admit(key, own.value, contents)
            return CacheItem(own.value, is_new=True)
        except BaseException as error:
            own.error = error
            raise
        finally:
            # By no context manager of Python's: an interrupt on the way into its exit skips that.
            try:
                _land(key, own, contents.flights)
            except BaseException:  # one of two interrupts
                _land(key, own, contents.flights)
                raise

    def is_making(self, key: K) -> bool:
        """Whether the value of `key` is in the making."""
        return key in self._contents.flights

    def is_making_here(self, key: K) -> bool:
        """Whether this thread makes the value of `key`, and does something else meanwhile."""
        flight = self._contents.flights.get(key)
        return flight is not None and flight.owner == threading.get_ident()

    @property
    def makes_here(self) -> bool:
        """Whether this thread makes any value, which others may wait for."""
        own = threading.get_ident()
        return any(flight.owner == own for flight in list(self._contents.flights.values()))

    @property
    def generation(self) -> int:
        """How often it was cleared."""
        return self._generation

    def put_all(self, values: Mapping[K, V], *, generation: int) -> bool:
        """Holds values that were made elsewhere, unless it was cleared since `generation`.

        Limits are left to the caller.
        """
        contents = self._contents
        if self._generation != generation:
            return False
        contents.values.update(values)  # into what was there before, if it is cleared by now
        return True

    def pop(self, key: K) -> V | None:
        """Takes the value of `key` out; None if absent."""
        value = self._contents.values.pop(key, None)
        if value is not None:
            self._on_drop([value])
        return value

    def pop_only(self, key: K, value: V) -> bool:
        """Takes `value` out, and no other that `key` has by now; whether it was there."""
        values = self._contents.values
        if values.get(key) is not value:
            return False
        if (taken := values.pop(key, value)) is not value:
            values.setdefault(key, taken)  # made in between
            return False
        self._on_drop([value])
        return True

    def clear(self) -> None:
        """Takes every value out; what is in the making is not kept either."""
        self._generation += 1
        before, self._contents = self._contents, _Contents({}, {})
        self._on_drop(list(before.values.values()))

    def _wait(self, key: K, flight: _Flight[V]) -> V:
        if flight.owner == threading.get_ident():
            name = self._describe(key)
            raise self._errors.not_made(
                f"making {name} asked for {name} itself: break the recursion"
            )
        flight.changes.wait_for(lambda: flight.is_done)
        if isinstance(flight.error, self._errors.shared):
            # A copy: raising one object in many threads would mix their tracebacks.
            raise copy.copy(flight.error) from flight.error.__cause__
        if flight.error is not None:
            kind = type(flight.error).__name__
            raise self._errors.not_made(
                f"{self._describe(key)} was not made: {kind} in another thread"
            ) from flight.error
        assert flight.value is not None  # set before it was done, unless there was an error
        return flight.value

    def _admit(self, key: K, value: V, contents: _Contents[K, V]) -> None:
        weight = self._weight(value) + self._borrows(value)
        if self._max_weight is not None and weight > self._max_weight:
            raise self._errors.too_heavy(self._describe(key), weight, self._max_weight)
        dropped: list[V] = []
        try:
            contents.values[key] = value
            while (oldest := self._surplus(contents.values)) is not None:
                # Of those who find the same surplus, one takes it out.
                if (left := contents.values.pop(oldest, None)) is not None:
                    dropped.append(left)
                    self._evictions += 1
        finally:
            if dropped:
                self._on_drop(dropped)
        if dropped:
            self._on_evict(dropped)

    def _surplus(self, values: Mapping[K, V]) -> K | None:
        """The key of what has to leave next because of a limit; never what came last."""
        held = list(values.items())
        if len(held) < 2 or self._fit([value for _, value in held]):
            return None
        return min(held[:-1], key=lambda item: self._last_used(item[1]))[0]

    def _fit(self, values: Collection[V]) -> bool:
        """Whether `values` may be held together."""
        if self._max_items is not None and len(values) > self._max_items:
            return False
        if self._max_weight is None:
            return True
        return sum(map(self._weight, values)) + max(map(self._borrows, values)) <= self._max_weight


def _land(key: K, flight: _Flight[V], flights: dict[K, _Flight[V]]) -> None:
    """Ends a flight, and wakes those who wait for it."""
    if flights.get(key) is flight:
        flights.pop(key, None)
    flight.is_done = True
    flight.changes.tell()
