"""How a call is written, and its arguments in the one order that a function's programs have."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.program.call import Statics
from cudagraph_jax.shapes.pytrees import PyTree

Pick = Callable[[Sequence[PyTree]], tuple[PyTree, ...]]

ALL: Pick = itemgetter(slice(None))
"""Takes all arguments."""


class Bound(NamedTuple):
    """The arguments of one call, in the one order that the function's programs have.

    Attributes:
        form: How the call was written.
        args: The positional arguments without the static ones.
        kwargs: The keyword-only arguments, likewise.
        statics: The static arguments.
    """

    form: Form
    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]
    statics: Statics


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """One way to write a call: which of its values, counted from the left, goes where.

    Attributes:
        args: Indices of the positional arguments without the static ones.
        names: Their names.
        places: Where each stands in the function's signature.
        kwargs: Names and indices of the keyword-only arguments.
        statics: Names and indices of the static arguments.
        static_places: Where the positional ones of those stand in the signature.
    """

    args: tuple[int, ...]
    names: tuple[str, ...]
    places: tuple[int, ...]
    kwargs: tuple[tuple[str, int], ...]
    statics: tuple[tuple[str, int], ...]
    static_places: tuple[tuple[int, str], ...]

    @property
    def plain(self) -> bool:
        """Whether a call is its positional arguments and nothing else."""
        in_order = tuple(range(len(self.args)))
        return self.args == self.places == in_order and not (self.kwargs or self.statics)

    def bind(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> Bound:
        """The arguments of a call that is written like this.

        Raises:
            InputShapeError: A static argument cannot be hashed.
        """
        values = (*args, *kwargs.values())
        return Bound(
            self,
            tuple([values[index] for index in self.args]),
            {name: values[index] for name, index in self.kwargs},
            tuple([_static(name, values[index]) for name, index in self.statics]),
        )


def unbound(function: Callable[..., PyTree], bound: Bound) -> Callable[..., PyTree]:
    """`function` as one of `bound.args` and `bound.kwargs`, with the static values filled in.

    Arguments are given by position as far as the call has all of them, then by name.
    """
    form = bound.form
    statics = {name: value for name, _, value in bound.statics}
    if not statics and form.places == tuple(range(len(form.places))):
        return function
    at = dict(zip(form.places, range(len(form.places)), strict=True))
    static_at = dict(form.static_places)
    leading = 0
    while leading in at or leading in static_at:
        leading += 1
    named = {
        name: index
        for name, place, index in zip(form.names, form.places, range(len(form.places)), strict=True)
        if place >= leading
    }
    statics_by_name = {
        name: value
        for name, value in statics.items()
        if all(known != name or place >= leading for place, known in form.static_places)
    }

    def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
        first = [
            args[at[place]] if place in at else statics[static_at[place]]
            for place in range(leading)
        ]
        behind = {name: args[index] for name, index in named.items()}
        return function(*first, **behind, **statics_by_name, **kwargs)

    return call


def _static(name: str, value: object) -> tuple[str, type, Hashable]:
    try:
        hash(value)
    except TypeError:
        raise InputShapeError(
            f"static argument {name} is a {type(value).__name__}, which cannot be hashed: "
            "pass a tuple or another immutable value, or leave it out of static_argnames"
        ) from None
    # The type too: 1, 1.0 and True are equal, but do not trace alike.
    return (name, type(value), value)


def picker(places: Sequence[int]) -> Pick:
    """What takes the arguments at `places` out of a tuple of arguments."""
    if tuple(places) == tuple(range(places[0], places[-1] + 1)):
        # A slice bears with arguments that are left out at the end.
        return itemgetter(slice(places[0], places[-1] + 1))
    return itemgetter(*places)
