"""What to do about arguments that cannot be taken: the second half of the errors that say so."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from cudagraph_jax._base.text import error_text
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket

_METHOD = (
    "decorating a method leaves the object an argument: write self.f = bucket_jit(self.f, ...) "
    'where the object is made, or declare None for it and name it: static_argnames="self"'
)


def bucketed_advice(value: object, *, name: str) -> str:
    """What to pass in the place of `value`, whose axes are bucketed and which is no array."""
    if name == "self":
        return _METHOD
    if isinstance(value, Mapping):
        return f"pass dict({name}), whose arrays are padded one by one"
    if isinstance(value, int | float | complex):
        if of_list := re.fullmatch(r"(.+?)(\[\d+\])+", name):
            dtype = ", numpy.float32" if isinstance(value, float) else ""
            return f"pass numpy.asarray({of_list[1]}{dtype})"
        return (
            "pass a NumPy or JAX array, or give None for it in in_axes to pass the number through"
        )
    return _converted(value, name) or "pass a NumPy or JAX array"


def passed_advice(value: object, *, name: str) -> str:
    """What to pass in the place of `value`, which is passed through and no JAX type."""
    argument = _argument(name)
    if name == "self":
        return _METHOD
    if isinstance(value, Mapping):
        return f"pass dict({name})"
    if converted := _converted(value, name):
        return converted
    if argument != name:
        return _parted(argument)
    if can_be_hashed(value):
        return "pass an array or a number, or name the argument in static_argnames"
    return (
        "pass an array or a number, or have the function close over it (a lambda or "
        "functools.partial); static_argnames does not take it, as it cannot be hashed"
    )


def _argument(name: str) -> str:
    """The argument that a leaf is of: `params` of `params['w'][0]`."""
    return re.split(r"[.\[]", name, maxsplit=1)[0]


def _parted(argument: str) -> str:
    return (
        f"pass the arrays alone in {argument}, and have the function close over the rest "
        f"(equinox.partition({argument}, equinox.is_array) splits a model like that)"
    )


def _converted(value: object, name: str) -> str:
    """What makes an array of `value`; empty where nothing is known to."""
    if hasattr(value, "__jax_array__"):  # of which NumPy makes an array of objects
        return f"pass jax.numpy.asarray({name})"
    if hasattr(value, "__array__") or isinstance(value, memoryview | array | range):
        return f"pass numpy.asarray({name})"
    return f"pass numpy.from_dlpack({name})" if hasattr(value, "__dlpack__") else ""


def static_advice(value: object) -> str:
    """What to do about a static argument that cannot be hashed."""
    leaves = jax.tree.leaves(value)
    if all(isinstance(leaf, np.ndarray | jax.Array | np.generic) for leaf in leaves) and leaves:
        return (
            "leave it out of static_argnames: arrays are arguments of the program. None for it in "
            'in_axes, such as in_axes=(None, "batch seq"), passes through all that it holds'
        )
    if isinstance(value, list | set | dict | bytearray):
        return "pass a tuple or another immutable value"
    return (
        "have the function close over it (a lambda or functools.partial), or pass its arrays as "
        "an argument (equinox.partition splits a model like that)"
    )


def trace_advice(
    error: BaseException | None,
    leaves: Iterable[tuple[str, object, LeafAxes]],
    *,
    sizes: Bucket,
    bucket: Bucket,
) -> str | None:
    """Why a function that takes arrays of `sizes` may not be traced at `bucket`; None: no idea.

    Args:
        error: What tracing raised.
        leaves: Name, value and axes of each leaf of a call.
        sizes: The call's.
        bucket: Where it cannot be traced.
    """
    passed = [(name, leaf) for name, leaf, axes in leaves if axes.passes_through]
    ragged = {size for size, padded in zip(sizes, bucket, strict=True) if size != padded}
    unpadded = [
        f"{name} {shape}"
        for name, leaf in passed
        if ragged.intersection(shape := tuple(getattr(leaf, "shape", ())))
    ]
    if _wants_a_value(error):
        numbers = [name for name, leaf in passed if isinstance(leaf, bool | int | float)]
        bare = [name for name in numbers if _argument(name) == name]
        if numbers:
            remedy = "name that in static_argnames" if bare else _parted(_argument(numbers[0]))
            return f"If it decides by the value of {_listed(bare or numbers)}, {remedy}"
    elif unpadded:
        return (
            f"It gets {_listed(unpadded)} as passed, not padded to {bucket}: give what has the "
            "call's sizes axes in in_axes (which keyword-only arguments have not: make them "
            "positional), or name a mask in mask_argname, to have it built"
        )
    return None


def _wants_a_value(error: BaseException | None) -> bool:
    """Whether JAX had no value, since it traces; it has no one class for this."""
    classes = (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    )
    return isinstance(error, classes) or (error is not None and "concrete" in error_text(error))


def _listed(names: Sequence[str]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def can_be_hashed(value: object) -> bool:
    """Whether it may be a key, and so a static argument."""
    try:
        hash(value)
    except (TypeError, ValueError):  # the latter for a memoryview that can be written to
        return False
    return True
