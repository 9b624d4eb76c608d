"""Values as text that is the same in every process, and different for what is different."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import sys
from collections.abc import Iterable
from types import EllipsisType

import jax
import numpy as np

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
        return None if None in inner else f"{kind.__name__}{sorted(map(str, inner))}"
    if kind is dict and isinstance(value, dict):
        return _bracketed("dict", [part for item in value.items() for part in item])
    return _of_a_class(value, kind)


def imported(kind: type) -> str | None:
    """The name of a class by which it can be imported; None where it has none."""
    found: object = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return f"{kind.__module__}.{kind.__qualname__}" if found is kind else None


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
    return f"{name}({own}, {fields}, {children})"


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
    return None if None in inner else f"{name}{inner}"
