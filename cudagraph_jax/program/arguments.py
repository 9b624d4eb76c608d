"""What a call passes through, and the compiled function would take for something else."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, SequenceKey

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.program.call import Args, Call, is_array, is_key, is_weak
from cudagraph_jax.program.padded import Padded, is_padded
from cudagraph_jax.shapes.pytrees import ArgumentLeaves, PyTree, leaves_of_arguments
from cudagraph_jax.xla.settings import ASKED, MESH


class Nested(NamedTuple):
    """A number within an argument that is a pytree.

    Attributes:
        place: The argument: its position, or its keyword.
        path: The way from there, through lists and dictionaries; None where it is another.
        leaf: Which of the argument's leaves it is.
        is_weak: Whether it is weak.
    """

    place: int | str
    path: tuple[Any, ...] | None
    leaf: int
    is_weak: bool

    def reach(self, value: PyTree) -> PyTree:
        """The number in `value`, another argument of the same structure."""
        if self.path is None:
            return jax.tree.leaves(value)[self.leaf]
        for key in self.path:
            value = value[key]
        return value


class Numbers(NamedTuple):
    """The numbers that a call passes through: the compiled function does not tell weak ones apart.

    Attributes:
        args: Position of each number among the arguments, and whether it is weak.
        kwargs: Keyword of each, likewise.
        nested: Those in pytrees.
    """

    args: tuple[tuple[int, bool], ...] = ()
    kwargs: tuple[tuple[str, bool], ...] = ()
    nested: tuple[Nested, ...] = ()

    def agree(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> bool:
        """Whether the numbers of another call are weak where these are."""
        return (
            all(
                position < len(args) and is_weak(args[position]) == weak
                for position, weak in self.args
            )
            and all(is_weak(kwargs.get(name)) == weak for name, weak in self.kwargs)
            and all(_agrees(number, args, kwargs) for number in self.nested)
        )


def _agrees(number: Nested, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> bool:
    place = number.place
    try:
        value = args[place] if isinstance(place, int) else kwargs[place]
        return is_weak(number.reach(value)) == number.is_weak
    except (LookupError, AttributeError, TypeError):
        return False  # another structure


def _index(key: SequenceKey | DictKey) -> Any:
    return key.idx if isinstance(key, SequenceKey) else key.key


def leading_leaf(tree: PyTree) -> object:
    """The array that says which sizes a pytree has: a NumPy one if it holds any, else the first.

    JAX narrows NumPy's 64-bit floats silently, so that those are looked at.
    """
    leaves = jax.tree.leaves(tree)
    if np.ndarray in map(type, leaves):
        return next(leaf for leaf in leaves if type(leaf) is np.ndarray)
    return leaves[0] if leaves else None


Dtypes = tuple[np.dtype[np.generic], ...]
"""Of NumPy arrays that the compiled function takes without losing digits."""


def commitments(arrays: Sequence[object]) -> tuple[bool | None, ...]:
    """Which arrays were put where they are on purpose; nothing where that is no matter.

    Where there are several devices, or a mesh, JAX compiles how it cuts an array that lies on one
    of them by chance, and one in NumPy it cuts on the host.
    """
    return tuple(map(_is_committed, arrays)) if MESH in ASKED else ()


def _is_committed(array: object) -> bool | None:
    """Whether an array of JAX's was put where it is on purpose; None of NumPy's, and of tracers."""
    is_placed = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    return array.committed if is_placed else None  # type: ignore[attr-defined]  # an array of JAX's


class ArgumentPlaces:
    """Which positional arguments of a function are passed through, and which carry axes.

    Args:
        in_axes: As `BucketedFunction.in_axes`.

    Attributes:
        entries: One for each argument; None: one for all of them.
        passed: How many are passed through.
    """

    def __init__(self, in_axes: PyTree) -> None:
        self.entries = in_axes if isinstance(in_axes, tuple | list) else None
        self.passed = sum(map(is_passed, self.entries or ()))

    def joined(self, passed: Args, own: Args) -> Args:
        """All arguments of a call, in their order, as many as there are.

        Raises:
            InputShapeError: One is missing in front of what is passed through.
        """
        if self.entries is None:
            return own
        shared, rest = list(passed), list(own)
        found: list[PyTree] = []
        for entry in self.entries:
            if not is_passed(entry) and not rest:
                break
            found.append((shared if is_passed(entry) else rest).pop(0))
        if shared:
            raise InputShapeError(
                f"{len(own)} arguments are given, and another one stands in front of what is "
                "passed through: give all of them but for those that are passed through"
            )
        return (*found, *rest)

    def parted(self, args: Args) -> tuple[Args, Args]:
        """Of all arguments of a call those that are passed through, and the others."""
        if self.entries is None:
            return (), args
        pairs = list(zip(self.entries, args, strict=True))
        shared = tuple(arg for entry, arg in pairs if is_passed(entry))
        return shared, tuple(arg for entry, arg in pairs if not is_passed(entry))


def is_passed(entry: PyTree) -> bool:
    """Whether an entry of `in_axes` names no axes."""
    return not jax.tree.leaves(entry)


class ArgumentChecks(NamedTuple):
    """What a call's arguments must be, that the compiled function itself does not see to.

    Attributes:
        numbers: The numbers among them.
        arrays: The place of each argument that is an array or a number itself, its position or its
            keyword, and its dtypes.
        others: The positional ones, but for that whose shape finds the route (`Declarations.lead`).
        kinds: The types, beside that of NumPy's arrays, which need no second look.
    """

    numbers: Numbers
    arrays: tuple[tuple[int | str, Dtypes], ...]
    others: tuple[tuple[int, Dtypes], ...]
    kinds: frozenset[type]

    def accept(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> bool:
        """Whether the compiled function may be called with other arguments of the same shapes."""
        for place, dtypes in self.arrays:
            value: Any
            if not isinstance(place, str):
                value = args[place] if place < len(args) else None
            else:
                value = kwargs.get(place)
            if (kind := type(value)) in self.kinds:
                continue
            if kind is not np.ndarray:
                # Of a `Padded` the dtype is part of what its route is found by.
                if isinstance(value, np.generic | Padded):
                    continue
                if not (isinstance(value, np.ndarray) and is_array(value)):
                    return False
            if value.dtype not in dtypes:
                return False
        return self.numbers.agree(args, kwargs)


def checks_of(call: Call) -> ArgumentChecks:
    """What the arguments of the calls of a program must be, of which `call` is one."""
    args, kwargs = leaves_of_arguments(call.variant.structure)
    places: dict[int | str, ArgumentLeaves] = dict(enumerate(args))
    places.update(kwargs)
    arrays = {place: leaves.indices[0] for place, leaves in places.items() if leaves.is_array}
    positions = [place for place in arrays if isinstance(place, int)]
    keys = {type(call.leaves[index]) for index in arrays.values() if is_key(call.leaves[index])}
    accepted = {
        place: _same_digits(call.variant.leaves[index].dtype) for place, index in arrays.items()
    }
    return ArgumentChecks(
        _numbers(call, arrays),
        tuple(accepted.items()),
        tuple((place, accepted[place]) for place in positions if place != call.declared.lead),
        frozenset({int, float, complex, bool, device_array_type(), *keys}),
    )


def _same_digits(dtype: np.dtype[np.generic]) -> Dtypes:
    """The dtypes that JAX computes with in `dtype` and loses no digits of."""
    wide = [np.dtype(kind) for kind in (np.int64, np.uint64)]
    return (dtype, *(kind for kind in wide if jax.dtypes.canonicalize_dtype(kind) == dtype != kind))


@functools.cache
def device_array_type() -> type:
    """The class of JAX's arrays, as opposed to tracers and keys."""
    with jax.transfer_guard("allow"):
        return type(jax.device_put(np.zeros(())))


def _numbers(call: Call, arrays: Mapping[int | str, int]) -> Numbers:
    """The numbers among the arguments of `call`, and in them."""
    leaves = call.variant.leaves
    weak = {
        place: leaves[index].weak_type for place, index in arrays.items() if not leaves[index].shape
    }
    args, kwargs = leaves_of_arguments(call.variant.structure)
    offsets = [
        offset for argument in (*args, *kwargs.values()) for offset in range(len(argument.indices))
    ]
    nested = [
        Nested(place, path, offset, leaf.weak_type)
        for (place, path), offset, leaf in zip(_paths(call), offsets, leaves, strict=True)
        if place not in arrays and not leaf.shape and not _is_extended(leaf.dtype)
    ]
    return Numbers(
        tuple((place, is_weak) for place, is_weak in weak.items() if isinstance(place, int)),
        tuple((place, is_weak) for place, is_weak in weak.items() if isinstance(place, str)),
        tuple(nested),
    )


def _is_extended(dtype: np.dtype[np.generic]) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.extended))


def _paths(call: Call) -> list[tuple[int | str, tuple[Any, ...] | None]]:
    """The argument of each leaf, and the way from there where that is one of keys and indices."""
    arguments = (call.args, call.kwargs)
    paths = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_padded)[0]
    return [
        (
            _index(path[1]),
            tuple(map(_index, path[2:]))
            if all(isinstance(key, SequenceKey | DictKey) for key in path[2:])
            else None,
        )
        for path, _ in paths
    ]
