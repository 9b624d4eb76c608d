"""By what a function is known to a store without being traced."""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Callable, Iterator
from operator import attrgetter
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    WrapperDescriptorType,
)
from typing import NamedTuple

from cudagraph_jax.graphs.written import written

_UNSURE = "?"
_BUILT_IN = (BuiltinFunctionType, WrapperDescriptorType, MethodDescriptorType)


class Fingerprint(NamedTuple):
    """What stands for a function's code and constants.

    Attributes:
        given: What its author calls this version of them.
        function: Where the function is defined.
        code: A hash of its own bytecode, of its defaults, and of what it closes over as far as that
            can be written. It notices edits that the author forgot to name, but sees neither what
            the function calls by a global name nor arrays on a device.
        unsure: The function, where it holds something that the hash does not see; else None.
        places: Where the arguments of a call stand in its signature.
    """

    given: str
    function: str
    code: str
    unsure: Callable[..., object] | None = None
    places: tuple[int, ...] = ()

    def is_taken(self) -> bool:
        """Whether another function of this process, alive, cannot be told from this one."""
        if self.unsure is None:
            return False
        known = _claimed.setdefault(self[:3], self.unsure)
        return not (known is self.unsure or known == self.unsure)


# Of the whole process, since each function may have a manager and a store of its own.
_claimed: weakref.WeakValueDictionary[tuple[object, ...], Callable[..., object]]
_claimed = weakref.WeakValueDictionary()


def fingerprint_of(function: Callable[..., object], given: str) -> Fingerprint:
    """The fingerprint of `function`, whose author calls it `given`."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    where = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
    parts = list(_parts(function, set()))
    code = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Fingerprint(given, where, code, function if _UNSURE in parts else None)


def _parts(value: object, seen: set[int]) -> Iterator[str]:
    """What a value does and holds, without where it stands."""
    if isinstance(value, CodeType):
        yield value.co_code.hex()
        yield repr((value.co_names, value.co_varnames))
        for constant in value.co_consts:
            yield from _parts(constant, seen)
    elif not callable(value) or isinstance(value, type):
        yield written(value) or _UNSURE
    elif id(value) in seen:
        yield "again"
    else:
        seen.add(id(value))
        for held in _held(value):
            yield from _parts(held, seen)


def _held(function: Callable[..., object]) -> Iterator[object]:
    """What a function consists of."""
    if isinstance(function, FunctionType):
        yield function.__code__
        yield from function.__defaults__ or ()
        yield from sorted((function.__kwdefaults__ or {}).items())
        yield from map(_content, function.__closure__ or ())
    elif isinstance(function, functools.partial):
        yield function.func
        yield from function.args
        yield from sorted(function.keywords.items())
    elif isinstance(function, MethodType):
        yield function.__func__
        yield _data(function.__self__)
    elif isinstance(function, _BUILT_IN):
        yield f"{getattr(function, '__module__', '')} {function.__qualname__}"
    elif hasattr(function, "__wrapped__"):
        yield function.__wrapped__
    else:
        yield attrgetter("__call__")(type(function))
        yield _data(function)


def _data(value: object) -> object:
    """Somebody's own object as text; else what has no text, since its code is looked at already."""
    return written(value) or object()


def _content(cell: CellType) -> object:
    """What a closure's cell holds; None while it is empty."""
    try:
        found: object = cell.cell_contents
    except ValueError:
        return None
    return found
