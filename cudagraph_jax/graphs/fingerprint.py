"""By what a function is known to a store without being traced."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import NamedTuple

import numpy as np


class Fingerprint(NamedTuple):
    """What stands for a function's code and constants.

    Attributes:
        given: What its author calls this version of them.
        function: Where the function is defined.
        code: A hash of its own bytecode, which notices an edit that the author forgot to name. It
            does not see what the function calls.
        places: Where the arguments of a call stand in its signature.
    """

    given: str
    function: str
    code: str
    places: tuple[int, ...] = ()


def fingerprint_of(function: Callable[..., object], given: str) -> Fingerprint:
    """The fingerprint of `function`, whose author calls it `given`."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    where = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner))}"
    code = getattr(inner, "__code__", None)
    digest = hashlib.sha256()
    for part in _parts(code) if isinstance(code, CodeType) else ():
        digest.update(part.encode())
    return Fingerprint(given, where, digest.hexdigest()[:16])


def written(value: object) -> str | None:
    """`value` as text that is the same in every process; None where there is none."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.dtype):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, enum.Enum):
        return f"{_named(type(value))}.{value.name}"
    if isinstance(value, type):
        return _named(value)
    if isinstance(value, tuple | list):
        return _bracketed(type(value), value)
    if isinstance(value, frozenset | set):
        inner = [written(item) for item in value]
        return None if None in inner else f"{_named(type(value))}{sorted(map(str, inner))}"
    if isinstance(value, dict):
        return _bracketed(dict, [part for item in value.items() for part in item])
    if dataclasses.is_dataclass(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return _bracketed(type(value), fields)
    return None


def _bracketed(kind: type, items: Iterable[object]) -> str | None:
    inner = [written(item) for item in items]
    return None if None in inner else f"{_named(kind)}{inner}"


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _parts(code: CodeType) -> Iterator[str]:
    """What a function does, without where it stands."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
        else:
            yield str(written(constant))
