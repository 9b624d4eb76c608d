"""Checks of single values, each with an error that says what to give instead."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import ParamSpec, TypeVar

from cudagraph_jax.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def positive_size(value: object, *, name: str) -> int:
    """`value` as an int of 1 or more.

    Raises:
        ConfigError: `value` is no integer (a bool is none), or below 1.
    """
    return _integer(value, name, minimum=1, kind="size")


def waiting_time(name: str, value: object) -> float:
    """A time to wait, in whatever unit, as a number of 0 or more.

    Raises:
        ConfigError: It is none.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:  # type: ignore[operator]
        raise ConfigError(f"{name}={value!r:.80} is no time to wait: give a number of 0 or more")
    return float(value)  # type: ignore[arg-type]


def require_bool(name: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r:.80} is not a bool: give True or False")


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises `ConfigError`, with the nearest choice, unless `value` is one of `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={value!r:.80} is unknown: {nearest(value, choices)}")


def count(name: str, value: object) -> int:
    """`value` as an int of 0 or more; `ConfigError` otherwise."""
    return _integer(value, name, minimum=0, kind="count")


def _integer(value: object, name: str, *, minimum: int, kind: str) -> int:
    remedy = f"give a {kind} of {minimum} or more"
    if isinstance(value, bool):
        raise ConfigError(f"{name}={value} is not an integer: {remedy}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # index() itself says what fits
    except TypeError:
        raise ConfigError(f"{name}={value!r:.80} is not an integer: {remedy}") from None
    if number < minimum:
        raise ConfigError(f"{name}={number} is below {minimum}: {remedy}")
    return number


def nearest(value: object, known: Sequence[str]) -> str:
    """The end of an error message: the known name that `value` may have meant, or all of them."""
    close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    choices = ", ".join(known)
    return f"did you mean {close[0]!r}? ({choices})" if close else f"choose one of {choices}"


_DEFERRED = (
    (
        inspect.iscoroutinefunction,
        "an async function, whose calls give a coroutine: give a plain function, and call what is "
        "made of it inside the async one (await asyncio.to_thread(...) keeps the event loop free)",
    ),
    (
        inspect.isasyncgenfunction,
        "an async generator function, whose calls give no arrays: give a plain function that "
        "returns them, and iterate outside of it",
    ),
    (
        inspect.isgeneratorfunction,
        "a generator function, whose calls give a generator: give a plain function that returns "
        "its arrays, as a tuple or stacked, instead of yielding them",
    ),
)


def require_arrays_from(name: str, function: object) -> None:
    """Raises `ConfigError` if calls of `function` give coroutines or generators, no arrays."""
    called = _called(function)
    for is_deferred, what in _DEFERRED:
        if is_deferred(function) or is_deferred(called):
            raise ConfigError(f"{name}={function!r:.80} is {what}")


def _called(function: object) -> object:
    """The Python function that a call of `function` runs, as far as it can be seen."""
    while callable(function):
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.isfunction(function) or inspect.ismethod(function):
            return function
        elif inspect.isfunction(type(function).__call__):
            return type(function).__call__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__  # of a class in C: jax.jit, functools.cache
        else:
            break
    return function


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword that a function has no argument for: as in Python a `TypeError`, too."""


def require_arguments(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises, with the nearest keyword, unless `name` knows all that are given.

    Raises:
        UnknownArgumentError: It does not know one.
    """
    for keyword in given:
        if keyword not in known:
            raise UnknownArgumentError(
                f"{name}() has no argument {keyword!r}: {nearest(keyword, known)}"
            )


def names_nearest(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose error for a keyword that it has not names the nearest one."""
    parameters = list(inspect.signature(function).parameters.values())
    known = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name != "self"]
    shown = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        require_arguments(shown, kwargs, known)
        return function(*args, **kwargs)

    return checked


def made_by_nearest(cls: type[T]) -> type[T]:
    """`cls`, whose constructor is `names_nearest`, as of a dataclass, which writes its own."""
    cls.__init__ = names_nearest(vars(cls)["__init__"])  # type: ignore[method-assign]  # it is one
    return cls
