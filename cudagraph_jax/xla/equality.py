"""When two values of an argument are one to a program that has one of them for a constant."""

from __future__ import annotations

import dataclasses
import enum
import functools
import weakref
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from types import BuiltinFunctionType, EllipsisType, FunctionType

import jax
import numpy as np

_EQUAL = frozenset({int, str, bool, bytes, type(None), EllipsisType})
"""Kinds of which equal values are one, if both are of that kind."""
_UNCHANGING = (jax.Array, FunctionType, BuiltinFunctionType, type, enum.Enum, np.dtype)
"""Kinds whose objects are what they were when a program was made; others can be changed."""


def kind_of(value: object) -> object:
    """What equal values may differ in and do not trace alike: types at every depth, and bits.

    1, 1.0 and True are equal, and so are 0.0 and -0.0, alone and in tuples.
    """
    kind: type = type(value)
    if kind in _EQUAL:
        return kind
    if kind in (float, complex):
        return kind, repr(value)
    if isinstance(value, np.generic):
        return kind, value.dtype, value.tobytes()
    if isinstance(value, tuple):
        return kind, *map(kind_of, value)
    if isinstance(value, frozenset):
        return kind, frozenset([(kind_of(item), item) for item in value])
    fields = _compared(kind)
    return kind if fields is None else _kind_by_fields(value, fields)


_Fields = Callable[[object], tuple[object, ...]]
_by_fields: dict[int, tuple[weakref.ref[object], object]] = {}


def _kind_by_fields(value: object, fields: _Fields) -> object:
    """That of a frozen dataclass, read once: of eight fields it would be 3 µs of each call."""
    key = id(value)
    known = _by_fields.get(key)
    if known is not None and known[0]() is value:
        return known[1]
    kind = (type(value), *map(kind_of, fields(value)))
    with suppress(TypeError):  # with slots it may have no weak references
        _by_fields[key] = weakref.ref(value, lambda _: _by_fields.pop(key, None)), kind
    return kind


@functools.lru_cache(256)
def _compared(kind: type) -> _Fields | None:
    """What takes the fields out of a frozen dataclass by which two are equal; None for others."""
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not (params.frozen and params.eq):
        return None
    names = [field.name for field in dataclasses.fields(kind) if field.compare]
    return attrgetter(*names, "__class__") if names else None


def are_one(value: object, default: object) -> bool:
    """Whether a value is a default for certain, as it was when a program took it for a constant.

    Numbers and texts are, also of NumPy and in tuples, if they are equal to the last bit and of one
    type, and an array of JAX is itself. What can be changed in place, as a NumPy array or a dict,
    is no constant, even the same object.
    """
    if type(value) is not type(default):
        return False
    if isinstance(value, tuple) and isinstance(default, tuple) and not hasattr(value, "__dict__"):
        return len(value) == len(default) and all(map(are_one, value, default))
    if type(value) in _EQUAL or type(value) in (float, complex):
        return repr(value) == repr(default)
    if isinstance(value, np.generic):
        return kind_of(value) == kind_of(default)
    return value is default and isinstance(value, _UNCHANGING)
