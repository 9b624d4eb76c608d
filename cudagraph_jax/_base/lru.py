"""A cache that computes each missing value once and drops the least recently used first."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

from cudagraph_jax._base.fork import forkable_lock

K = TypeVar("K")
V = TypeVar("V")


class Cached(NamedTuple, Generic[V]):
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
        self.done = threading.Event()
        self.value: V | None = None
        self.error: BaseException | None = None


class SingleFlightLRU(Generic[K, V]):
    """Values by key, each made once however many threads ask for it.

    Values are made outside the lock. Which one was used last is asked of the values themselves,
    so that a reader who holds a value can mark its use without coming back here.

    Args:
        last_used: When a value was used last, on any scale that grows.
        weight: What a value counts against `max_weight`.
        borrows: What it needs besides while it is used, and gives back: of all values only the
            largest counts.
        max_items: How many values are kept; None: any number.
        max_weight: The most that the weights and the largest of what is borrowed may add up to;
            None: anything.
        on_drop: Called outside the lock after values have left, whatever the reason.
        on_evict: Called likewise, with those that had to leave because of a limit.
        describe: What errors call a key.
        errors: What is raised.

    Attributes:
        values: What is held, for look-ups that mark nothing as used; not to be changed.
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
        self._lock = forkable_lock()
        self.values: dict[K, V] = {}
        self._flights: dict[K, _Flight[V]] = {}
        self._evictions = 0
        self._generation = 0

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
        with self._lock:
            self._evictions = 0

    def get(self, key: K) -> V | None:
        """The value of `key`, or None; marks nothing as used."""
        return self.values.get(key)

    def items(self) -> list[tuple[K, V]]:
        """A snapshot of all keys and values, oldest first."""
        with self._lock:
            return list(self.values.items())

    def get_or_make(self, key: K, make: Callable[[], V]) -> Cached[V]:
        """The value of `key`, made by `make` where it is absent.

        One caller makes it; the others wait for that one. A value made while the cache was cleared
        is given to its callers and not kept.

        Raises:
            Exception: To those who waited, when the maker failed, and to a `make` that asks for its
                own key; see `Errors`. The maker gets its own error.
        """
        own: _Flight[V] = _Flight()
        with self._landing(key, own):
            with self._lock:
                if key in self.values:
                    return Cached(self.values[key], is_new=False)
                flight = self._flights.setdefault(key, own)
            if flight is not own:
                return Cached(self._wait(key, flight), is_new=False)
            own.value = make()
            self._admit(key, own, own.value)
            return Cached(own.value, is_new=True)

    def is_making(self, key: K) -> bool:
        """Whether the value of `key` is in the making."""
        return key in self._flights

    @property
    def generation(self) -> int:
        """How often it was cleared."""
        return self._generation

    def put_all(self, values: Mapping[K, V], *, generation: int) -> bool:
        """Holds values that were made elsewhere, unless it was cleared since `generation`.

        Limits are left to the caller.
        """
        with self._lock:
            if self._generation != generation:
                return False
            self.values.update(values)
            return True

    def pop(self, key: K) -> V | None:
        """Takes the value of `key` out; None if absent."""
        with self._lock:
            value = self.values.pop(key, None)
        if value is not None:
            self._on_drop([value])
        return value

    def clear(self) -> None:
        """Takes every value out; what is in the making is not kept either."""
        with self._lock:
            self._generation += 1
            dropped = list(self.values.values())
            self.values.clear()
            self._flights.clear()
        self._on_drop(dropped)

    def _wait(self, key: K, flight: _Flight[V]) -> V:
        if flight.owner == threading.get_ident():
            name = self._describe(key)
            raise self._errors.not_made(
                f"making {name} asked for {name} itself: break the recursion"
            )
        flight.done.wait()
        if isinstance(flight.error, self._errors.shared):
            # A copy: raising one object in many threads would mix their tracebacks.
            raise copy.copy(flight.error) from flight.error.__cause__
        if flight.error is not None:
            kind = type(flight.error).__name__
            raise self._errors.not_made(
                f"{self._describe(key)} was not made: {kind} in another thread"
            ) from flight.error
        assert flight.value is not None  # set before `done`, unless there was an error
        return flight.value

    @contextmanager
    def _landing(self, key: K, flight: _Flight[V]) -> Iterator[None]:
        """Ends `flight` and wakes its waiters, also after a KeyboardInterrupt.

        It is entered before anybody can know of the flight: an interrupt may leave none behind.
        """
        try:
            yield
        except BaseException as error:
            flight.error = error
            raise
        finally:
            try:
                self._land(key, flight)
            except BaseException:  # the second of two interrupts
                self._land(key, flight)
                raise

    def _land(self, key: K, flight: _Flight[V]) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
        flight.done.set()

    def _admit(self, key: K, flight: _Flight[V], value: V) -> None:
        weight = self._weight(value) + self._borrows(value)
        if self._max_weight is not None and weight > self._max_weight:
            raise self._errors.too_heavy(self._describe(key), weight, self._max_weight)
        with self._lock:
            if self._flights.get(key) is not flight:
                return
            dropped = self._make_room(value)
            self.values[key] = value
        if dropped:
            self._on_drop(dropped)
            self._on_evict(dropped)

    def _make_room(self, new: V) -> list[V]:
        dropped: list[V] = []
        while self.values and not self._fit([*self.values.values(), new]):
            oldest = min(self.values, key=lambda key: self._last_used(self.values[key]))
            dropped.append(self.values.pop(oldest))
        self._evictions += len(dropped)
        return dropped

    def _fit(self, values: Collection[V]) -> bool:
        """Whether `values` may be held together."""
        if self._max_items is not None and len(values) > self._max_items:
            return False
        if self._max_weight is None:
            return True
        return sum(map(self._weight, values)) + max(map(self._borrows, values)) <= self._max_weight
