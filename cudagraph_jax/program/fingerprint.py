"""By what a function is known to a store without being traced, and arrays to other processes."""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import functools
import hashlib
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    EllipsisType,
    FunctionType,
    MappingProxyType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax.errors import CaptureError
from cudagraph_jax.program.function_ref import FunctionRef

_UNSURE = "?"
_DEEPEST = 100
_BUILT_IN = (BuiltinFunctionType, MethodWrapperType, WrapperDescriptorType, MethodDescriptorType)
_VERSIONED = frozenset({"jax", "jaxlib"})
"""Packages whose globals are not read: their versions are part of what identifies an executable."""
_WRAPPERS = frozenset({"PjitFunction", "_lru_cache_wrapper"})
"""Kinds of callable objects that do what they wrap, and nothing else: `jax.jit`'s and a cache's."""
_REDUCED = (sys.stdlib_module_names | {"numpy"}) - {"itertools"}
"""Packages whose objects are pickled as all that they are; those of itertools warn of it."""


class Fingerprint(NamedTuple):
    """What stands for a function's code and constants.

    Attributes:
        given: What its author calls this version of them.
        source: The function itself, which is read when a store is asked for it.
        places: Where the arguments of a call stand in its signature.
    """

    given: str
    source: Source
    places: tuple[int, ...] = ()

    @property
    def function(self) -> str:
        """Where the function is defined."""
        return self.source.where

    @property
    def code(self) -> str:
        """A hash of what the function does and holds; see `Source`."""
        return self.source.read[0]

    @property
    def unsure(self) -> Callable[..., object] | None:
        """The function, where it holds something that the hash does not see; else None."""
        return self.source.function if self.source.read[1] else None

    def is_taken(self) -> bool:
        """Whether another function of this process, alive, cannot be told from this one."""
        if self.unsure is None:
            return False
        key, own = (self.given, self.function, self.code), self.source.reference
        known = _claimed.setdefault(key, own)
        if known.is_gone:
            known = _claimed[key] = own
        return known != own


class Source:
    """The code and the constants of a function.

    They are its bytecode, its defaults and attributes, what it closes over, and what it reads of
    its module by a global name; the same of what it calls by such a name, unless that is known as
    another package's: by its own name there. They notice edits that the author forgot to name. What
    a name leads to and cannot be written makes them unsure: objects of somebody's own classes, and
    arrays on a device. Not seen is what is reached by an attribute (of a module, a class, or such
    an object).

    Args:
        function: Read once, and late: globals may be defined below it. Held weakly.

    Attributes:
        reference: What the function is known by.
        where: Where it is defined.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self.reference = FunctionRef(function)
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        self.where = _name(inner)

    def __repr__(self) -> str:
        return f"Source({self.where})"

    @property
    def function(self) -> Callable[..., object] | None:
        """The function; None where it is gone."""
        return self.reference.function

    @functools.cached_property
    def read(self) -> tuple[str, bool]:
        """A hash of them, and whether there is something that it does not see."""
        function = self.function
        if function is None:
            raise CaptureError(f"the function {self.where} is gone: keep it", stage="trace")
        parts = list(_Reader().parts(function))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16], _UNSURE in parts


# Of the whole process, since each function may have a manager and a store of its own. One that is
# gone claims nothing: in a notebook the next version of a cell has its name.
_claimed: weakref.WeakValueDictionary[tuple[object, ...], FunctionRef]
_claimed = weakref.WeakValueDictionary()


def fingerprint_of(function: Callable[..., object], given: str) -> Fingerprint:
    """The fingerprint of `function`, whose author calls it `given`."""
    return Fingerprint(given, Source(function))


class _Reader:
    """Writes what functions do and hold, without where they stand; each of them once.

    The text is different for what is different: lists have their lengths, and what was met before
    is told by its place in the order of meeting.
    """

    def __init__(self) -> None:
        # With the objects, so that no other one has an id of theirs.
        self._seen: dict[int, tuple[int, object]] = {}
        self._depth = 0
        # Not by recursion: chains of calls through a package are long.
        self._called: deque[object] = deque()

    def parts(self, value: object) -> Iterator[str]:
        """The text of a function, and of those that it calls by a global name; or of a value."""
        self._called.append(value)
        while self._called:
            yield from self._parts(self._called.popleft())

    def _parts(self, value: object) -> Iterator[str]:
        if isinstance(value, CodeType):
            yield value.co_code.hex()
            yield repr((value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars))
            yield from self._all("code", value.co_consts)
        elif id(value) in self._seen:
            yield f"again {self._seen[id(value)][0]}"
        elif callable(value) and not isinstance(value, type):
            if _home(value) in _VERSIONED:
                yield f"calls {_name(value)}"
                return
            self._meet(value)
            yield from self._all("function", list(_held(value)))
            if isinstance(value, FunctionType):
                yield from self._read(value)
        elif (text := _text(value)) is not None:
            yield text
        elif (items := _items(value)) is not None:
            self._meet(value)
            yield from self._all(_name(type(value)), items)
        else:
            yield _UNSURE

    def _all(self, what: str, values: Sequence[object]) -> Iterator[str]:
        yield f"{what} {len(values)}"
        self._depth += 1
        for value in values:
            if self._depth < _DEEPEST:
                yield from self._parts(value)
            else:
                yield _UNSURE
        self._depth -= 1

    def _meet(self, value: object) -> None:
        self._seen[id(value)] = (len(self._seen), value)

    def _read(self, function: FunctionType) -> Iterator[str]:
        """What a function reads by a global name."""
        space = function.__globals__
        if _package(space.get("__name__")) in _VERSIONED:
            return
        for name in sorted(_names(function.__code__)):
            value = space.get(name)
            if name not in space or isinstance(value, ModuleType):
                continue
            if isinstance(value, type):
                yield f"{name} is {_name(value)}"
            elif not callable(value):
                yield f"{name} is"
                yield from self._parts(value)
            else:
                yield f"{name} calls {_name(value)}"
                if _home(value) in (None, _package(space.get("__name__"))):
                    self._called.append(value)


def _names(code: CodeType) -> set[str]:
    """The global names that some code may read; attributes have such names, too."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _home(value: object) -> str | None:
    """The package that has a callable under its own name; None where none has.

    The names alone say nothing: a wrapper has those of what it wraps, or of `functools`.
    """
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        return None
    return _package(module) if _named(module, name) is value else None


def _named(module: str, qualified: str) -> object:
    """What a module has under a name; None where there is nothing."""
    found: object = sys.modules.get(module)
    for name in qualified.split("."):
        found = getattr(found, name, None)
    return found


def _package(module: object) -> str:
    return module.partition(".")[0] if isinstance(module, str) else ""


def _name(value: object) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _text(value: object) -> str | None:
    try:
        return written(value)
    except RuntimeError:  # it holds itself, or another thread changes it
        return None


def _items(value: object) -> Sequence[object] | None:
    """What a container holds that has no text itself, such as a list of functions; else None."""
    # Of these kinds alone: a subclass may hold more than its items.
    if type(value) in (dict, MappingProxyType) and isinstance(value, Mapping):
        return [part for item in list(value.items()) for part in item]
    if type(value) in (tuple, list) and isinstance(value, tuple | list):
        return list(value)
    return _reduced(value)


def _reduced(value: object) -> Sequence[object] | None:
    """What an object of Python's or NumPy's own classes is made of anew; None where it is not."""
    kind = type(value)
    # The order of a set is another one in each process, and an object() is only itself.
    if _package(kind.__module__) not in _REDUCED or kind in (set, frozenset, object):
        return None
    try:
        reduce = copyreg.dispatch_table.get(kind)
        reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(reduced, str):
            return None  # a name, which does not say what it leads to
        make, args, state, items, pairs = (*reduced, None, None, None)[:5]
        return [_name(make), args, state, list(items or ()), list(pairs or ())]
    except Exception:  # a lock, a generator, one that another thread changes: nothing can be read
        return None


def _held(function: Callable[..., object]) -> Iterator[object]:
    """What a function consists of."""
    if isinstance(function, FunctionType):
        yield function.__code__
        yield from function.__defaults__ or ()
        yield from sorted((function.__kwdefaults__ or {}).items())
        yield from map(_content, function.__closure__ or ())
        yield from _attributes(function)
    elif isinstance(function, functools.partial):
        yield function.func
        yield from function.args
        yield from sorted(function.keywords.items())
    elif isinstance(function, MethodType):
        yield function.__func__
        owner = function.__self__
        yield _data(owner) if callable(owner) else owner
    elif isinstance(function, _BUILT_IN):
        yield f"{getattr(function, '__module__', '')} {function.__qualname__}"
        owner = getattr(function, "__self__", None)
        yield None if isinstance(owner, ModuleType) else owner
    elif hasattr(function, "__wrapped__") and type(function).__name__ in _WRAPPERS:
        yield function.__wrapped__
        yield from _attributes(function)
    elif hasattr(function, "__wrapped__") and _home(type(function)) in _VERSIONED:
        yield _name(type(function))  # such as `jax.custom_vjp`'s: a function and its rules
        yield function.__wrapped__
        yield from _attributes(function)
    elif (parts := _reduced(function)) is not None:
        yield from parts
    else:
        yield attrgetter("__call__")(type(function))
        yield _data(function)


def _attributes(function: Callable[..., object]) -> list[tuple[str, object]]:
    """What somebody has set on a function, and JAX on what it wraps; not what is said about it."""
    return sorted(
        item
        for item in vars(function).items()
        if not item[0].startswith("__") and item[0] not in _ABOUT
    )


_ABOUT = frozenset({"_fun", "_jit_info", "cache_parameters"})
"""What `jax.jit` and a cache set on what they give, beside the names and the wrapped function."""


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


# Stores know functions by these texts: no shorter, or all that was stored before is not found.
_LONGEST = 2**18
_PLAIN = (type(None), EllipsisType, bool, int, float, complex, str, bytes)


def written(value: object) -> str | None:
    """`value` as text; None where another process could not be sure to mean the same.

    Subclasses of plain types and of dataclasses may hold more than they show, and classes that
    cannot be imported may share their names: these have no text.
    """
    kind = type(value)
    if kind in _PLAIN:
        return f"{kind.__name__} {value!r}"
    if isinstance(value, np.dtype | np.generic):
        return f"{kind.__name__} {value!r}"
    if kind is np.ndarray and isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"array {value.dtype} {value.shape} {digest}"
    if isinstance(value, type):
        return imported(value)
    if kind in (tuple, list) and isinstance(value, tuple | list):
        return _bracketed(kind.__name__, value)
    if kind in (set, frozenset) and isinstance(value, set | frozenset):
        inner = [written(item) for item in value]
        return None if None in inner else f"{kind.__name__}{_listed(sorted(map(str, inner)))}"
    if kind is dict and isinstance(value, dict):
        return _bracketed("dict", [part for item in value.items() for part in item])
    return _of_a_class(value, kind)


def comparable(value: object) -> str:
    """What of a value is the same in all processes that have it, as text: `written`, if it can be.

    Else it is its name, or that of its class, and a hash of what `Source` sees of a function: not
    where it stands, which is another place in each process.
    """
    if (text := _text(value)) is not None:
        return text
    seen = "\0".join(_Reader().parts(value))
    return f"{_name(value if callable(value) else type(value))} {_hash_of(seen).hex()}"


def imported(kind: type) -> str | None:
    """The name of a class by which it can be imported; None where it has none."""
    return (
        f"{kind.__module__}.{kind.__qualname__}"
        if _named(kind.__module__, kind.__qualname__) is kind
        else None
    )


def written_structure(structure: jax.tree_util.PyTreeDef) -> str | None:
    """A pytree's structure as text; None where a node's own data has none."""
    node = structure.node_data()
    if node is None:
        return "*"
    kind, data = node
    if kind is type(None):
        return "None"
    name, own = imported(kind), written(data)
    children = [written_structure(child) for child in structure.children()]
    fields = written(getattr(kind, "_fields", None))
    if name is None or own is None or fields is None or None in children:
        return None
    return f"{name}({own}, {fields}, {_listed(map(str, children))})"


def comparable_structure(structure: jax.tree_util.PyTreeDef) -> str:
    """A pytree's structure as text, with what is `comparable` of its nodes' own data."""
    node = structure.node_data()
    if node is None:
        return "*"
    children = ", ".join(map(comparable_structure, structure.children()))
    return f"{_name(node[0])}({comparable(node[1])}, [{children}])"


def _of_a_class(value: object, kind: type) -> str | None:
    name = imported(kind)
    if name is None:
        return None
    if isinstance(value, enum.Enum):
        return _bracketed(f"{name}.{value.name}", [value.value])
    own = set(getattr(value, "__dict__", ()))
    if isinstance(value, tuple) and hasattr(kind, "_fields") and not own:
        return _bracketed(name, value)
    if dataclasses.is_dataclass(value) and "__dataclass_params__" in vars(kind):
        fields = [field.name for field in dataclasses.fields(value)]
        if own <= set(fields):
            return _bracketed(name, [getattr(value, field) for field in fields])
    return None


def _bracketed(name: str, items: Iterable[object]) -> str | None:
    inner = [written(item) for item in items]
    return None if None in inner else f"{name}{_listed(map(str, inner))}"


def _listed(texts: Iterable[str]) -> str:
    """The texts, as Python writes a list of them; of a very long one its hash.

    Each list around a text doubles the backslashes in it.
    """
    return str([text if len(text) <= _LONGEST else _hash_of(text).hex() for text in texts])


def digest_of(values: Sequence[object]) -> str:
    """A hash of what must be equal on all processes; of arrays that lie on several, what they are.

    It reads 1 GB/s, an array of JAX once, and waits for those that are being computed.
    """
    found = hashlib.blake2b(digest_size=_DIGEST)
    for value in values:
        found.update(_DIGESTS.of(value) if isinstance(value, jax.Array) else _hashed(value))
    return found.hexdigest()


class _Digests:
    """The hashes of arrays of JAX, which do not change, for as long as these live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[jax.Array], bytes]] = {}

    def of(self, array: jax.Array) -> bytes:
        """The hash of one.

        Raises:
            RuntimeError: It is deleted, and only here, perhaps.
        """
        if array.is_deleted():
            raise RuntimeError("an array has been deleted")
        key = id(array)
        known = self._known.get(key)
        if known is not None and known[0]() is array:
            return known[1]
        digest = _hashed(array)
        self._known[key] = weakref.ref(array, lambda _: self._known.pop(key, None)), digest
        return digest


_DIGEST = 12
_DIGESTS = _Digests()


def _hashed(value: object) -> bytes:
    if isinstance(value, jax.Array):
        if not value.is_fully_addressable:
            return _hash_of(f"{value.dtype}{value.shape}{value.sharding}")
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.extended)
        value = jax.random.key_data(value) if is_key else value
    array = np.asarray(value)
    if array.dtype.hasobject:
        return _hash_of(comparable(value))
    return _hash_of(f"{array.dtype}{array.shape}", array.tobytes())


def _hash_of(about: str, data: bytes = b"") -> bytes:
    return hashlib.blake2b(about.encode() + b"\0" + data, digest_size=_DIGEST).digest()
