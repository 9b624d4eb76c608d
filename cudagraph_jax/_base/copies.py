"""Objects that belong to one process: their copies are themselves, and pickle refuses them."""

from __future__ import annotations

import sys
from typing import NoReturn, TypeVar

from cudagraph_jax.errors import UnpicklableError

T = TypeVar("T")

_REMEDY = "make it in the worker, where its module is imported or the worker is set up"


def belongs_to_process(cls: type[T]) -> type[T]:
    """Has `copy` give the instance itself, as it does for functions, and `pickle` raise.

    So a model that holds one can be copied, and both copies share what is compiled. A class that
    pickles in a way of its own keeps its `__reduce__`.

    Raises:
        UnpicklableError: Of pickling.
    """

    def same(self: T) -> T:
        return self

    def same_within(self: T, memo: dict[int, object]) -> T:
        return self

    def refuse(self: T) -> NoReturn:
        raise UnpicklableError(
            f"cannot pickle {self!r}: compiled code, locks and threads stay in their process: "
            + _REMEDY
        )

    members = {"__copy__": same, "__deepcopy__": same_within}
    if "__reduce__" not in vars(cls):
        members["__reduce__"] = refuse
    for name, method in members.items():
        setattr(cls, name, method)
    return cls


def global_name(instance: object) -> str:
    """The name by which other processes find `instance` in its module, for `__reduce__`.

    Raises:
        UnpicklableError: It is no global of its module.
    """
    module = sys.modules.get(instance.__module__)
    known = {} if module is None else dict(vars(module))
    own, *attributes = getattr(instance, "__qualname__", "").split(".")
    found = known.get(own)
    for attribute in attributes:
        found = getattr(found, attribute, None)
    if found is instance:
        return ".".join((own, *attributes))
    # As of `embed = bucket_jit(plain_embed, ...)`, whose function has another name.
    for name, value in known.items():
        if value is instance:
            return name
    raise UnpicklableError(
        f"cannot pickle {instance!r}: it is no global of {instance.__module__}, where another "
        f"process would look for it: {_REMEDY}, or decorate the function at module level"
    )
