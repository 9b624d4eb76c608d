"""What functions are known by to what may outlive them: programs, graphs, failures, routes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from cudagraph_jax.errors import CaptureError


class Holder:
    """Keeps a function for its owner, and for nobody else."""

    __slots__ = ("__weakref__", "function")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class FunctionRef:
    """A function that may go, unless somebody else holds it; it can be called while it is there.

    References to one function are equal, also when it is gone; a later function at its place in
    memory is another one. A bound method is its object's. A function that is equal to others, or
    that cannot be referred to weakly, is kept: an equal one may come at any time.

    Args:
        function: The function, or the `Holder` of one.

    Attributes:
        identity: The same for equal references, and rarely for others: their hash.
    """

    __slots__ = ("__weakref__", "_inner", "_kept", "_referent", "identity")

    def __init__(self, function: Callable[..., Any] | Holder) -> None:
        is_method = isinstance(function, MethodType)
        owner: Any = function.__self__ if isinstance(function, MethodType) else function
        self._inner = function.__func__ if isinstance(function, MethodType) else None
        self._kept: Any = None
        self._referent: weakref.ref[Any] | None = None
        if is_method or _is_only_itself(function):
            try:
                # Without a callback Python gives one object for all references to one owner.
                self._referent = weakref.ref(owner)
            except TypeError:
                self._kept = function
        else:
            self._kept = function
        self.identity = hash((id(owner), self._inner)) if self._kept is None else _hash(function)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """What the function gives.

        Raises:
            CaptureError: It is gone.
        """
        function = self.function
        if function is None:
            raise CaptureError(
                "the function is gone, and its graph alone is left: keep a reference to the "
                "function for as long as it may be compiled",
                stage="trace",
            )
        return function(*args, **kwargs)

    @property
    def function(self) -> Callable[..., Any] | None:
        """The function; None where it is gone."""
        if self._referent is None:
            return self._kept  # type: ignore[no-any-return]
        owner = self._referent()
        if owner is None:
            return None
        if self._inner is not None:
            return MethodType(self._inner, owner)
        return owner.function if isinstance(owner, Holder) else owner

    @property
    def is_gone(self) -> bool:
        """Whether nobody can call it any more."""
        return self._referent is not None and self._referent() is None

    def when_gone(self, tell: Callable[[], None]) -> object:
        """Calls `tell` once the function is gone, while what this gives is kept."""
        owner = None if self._referent is None else self._referent()

        def gone(_: object, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
            # At its end the interpreter empties modules, and what `tell` needs may be gone before.
            if not is_finalizing():
                tell()

        return None if owner is None else weakref.ref(owner, gone)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FunctionRef):
            return NotImplemented
        if self._referent is not None:
            return self._referent is other._referent and self._inner == other._inner
        if other._referent is not None:
            return False
        if self._kept is other._kept:
            return True
        return not _is_only_itself(self._kept) and bool(self._kept == other._kept)

    def __hash__(self) -> int:
        return self.identity


def _is_only_itself(function: object) -> bool:
    """Whether no other object is the same function, as for all that cannot be hashed."""
    kind = type(function)
    if kind.__eq__ is object.__eq__ or kind.__hash__ is None:
        return True
    try:
        hash(function)
    except TypeError:  # a module whose hash is that of its arrays, say
        return True
    return False


def _hash(function: object) -> int:
    return id(function) if _is_only_itself(function) else hash(function)
