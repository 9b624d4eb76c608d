"""What was declared for a function's arguments, bound to the arguments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import jax

from cudagraph_jax._base.checks import nearest
from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.program.advice import can_be_hashed, static_advice
from cudagraph_jax.program.call import Declarations, Statics
from cudagraph_jax.shapes.axes import AxisPattern
from cudagraph_jax.shapes.pad_sides import padded_on_sides
from cudagraph_jax.shapes.padding import ANY, EDGE, UNCHOSEN, PadValue
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix, for_positions, is_declaration
from cudagraph_jax.xla.equality import are_one, kind_of
from cudagraph_jax.xla.shardings import checked_shardings, declared_multiples, shardings_of

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_STARRED = inspect.Parameter.VAR_POSITIONAL


class Binder:
    """Binds calls of one function.

    Args:
        function: The function.
        name: What errors call it.
        in_axes: A pytree prefix of the positional arguments: specifications or None.
        pad_values: A pytree prefix of scalars, `"edge"` or `"any"`.
        pad_side: A pytree prefix of `"right"` or `"left"`.
        in_shardings: A pytree prefix of `NamedSharding` or None.
        static_argnames: Names of the arguments that select a program of their own.
        donate_argnums: Positions of the arguments whose buffers may be taken over.
        masks: The keywords that are not the caller's to give.

    Attributes:
        name: As given.
        in_axes: As given, with an `AxisPattern` for each specification.
        pad_values: As given, with `UNCHOSEN` for each None.
        in_shardings: As given.
        static_argnames: As given.
        donate_argnums: As given.

    Raises:
        ConfigError: One of these does not fit the function.
    """

    def __init__(
        self,
        function: Callable[..., PyTree],
        *,
        name: str,
        in_axes: PyTree,
        pad_values: PyTree,
        pad_side: PyTree,
        in_shardings: PyTree,
        static_argnames: Sequence[str],
        donate_argnums: Sequence[int],
        masks: Sequence[str],
    ) -> None:
        self.name = name
        patterns = jax.tree.map(_pattern, in_axes, is_leaf=is_declaration)
        self.in_axes = padded_on_sides(patterns, pad_side)
        self.pad_values = jax.tree.map(_pad_value, pad_values, is_leaf=is_declaration)
        self.in_shardings = checked_shardings(in_shardings)
        self.static_argnames = frozenset(static_argnames)
        self.donate_argnums = tuple(donate_argnums)
        if not self.bucketed_places:
            raise ConfigError(
                f"in_axes={in_axes!r} names no axis, such as batch or seq: name the dimensions "
                'that vary, such as "batch seq"'
            )
        signature = _signature(function, name)
        self._masks = tuple(masks)
        self._check_names(signature)
        self._signature = signature.replace(
            parameters=[
                parameter
                for parameter in signature.parameters.values()
                if parameter.name not in self._masks
            ]
        )
        self._check_places()
        self._defaults = {
            name: parameter.default
            for name, parameter in self._signature.parameters.items()
            if parameter.default is not parameter.empty
        }

    def form(self, count: int, keywords: Sequence[str]) -> Form:
        """The form of a call with `count` positional arguments and these keywords.

        Raises:
            InputShapeError: An argument is missing or unknown.
        """
        for name in set(self._masks).intersection(keywords):
            raise InputShapeError(
                f"{self.name}() got {name!r}, which bucket_jit builds itself "
                "(mask_argname): leave it out"
            )
        self.check_keywords(keywords)
        named = {keyword: count + index for index, keyword in enumerate(keywords)}
        try:
            bound = self._signature.bind(*range(count), **named)
        except TypeError as error:
            raise self._not_callable(str(error)) from None
        first = count + len(keywords)
        defaults = self._static_defaults(bound.arguments)
        given = {**bound.arguments, **{name: first + i for i, name in enumerate(defaults)}}
        ordered = {name: given[name] for name in self._signature.parameters if name in given}
        return self._sorted(ordered, tuple(defaults.values()))

    def _static_defaults(self, given: Mapping[str, object]) -> dict[str, Hashable]:
        """The defaults of the static arguments that a call leaves out.

        They are filled in, so that a default that is written out selects the same program.
        """
        found: dict[str, Hashable] = {}
        has_gap = False
        for name, parameter in self._signature.parameters.items():
            if name in given:
                continue
            default = self._defaults.get(name, parameter.empty)
            is_static = name in self.static_argnames and default is not parameter.empty
            # Behind a gap nothing can be filled in by position; what has no hash is no key.
            is_behind = has_gap and parameter.kind is parameter.POSITIONAL_ONLY
            if is_static and not is_behind and can_be_hashed(default):
                found[name] = default
            has_gap = has_gap or name not in found
        return found

    @property
    def has_defaults(self) -> bool:
        """Whether an argument that is not static may be left out."""
        return not self.static_argnames.issuperset(self._defaults)

    def rewritten(self, bound: BoundCall, form: Form) -> BoundCall | None:
        """The same call, written as `form` is: with defaults filled in and left out.

        Returns:
            The call; None where `form` leaves out another value than the default, or asks for one
            that the call has not.
        """
        given = {**dict(zip(bound.form.names, bound.args, strict=True)), **bound.kwargs}
        asked = (*form.names, *(name for name, _ in form.kwargs))
        left_out = [name for name in given if name not in asked]
        filled_in = [name for name in asked if name not in given]
        is_same = (
            len(given)
            == len(bound.args) + len(bound.kwargs)  # or a keyword is called like an `x, /`
            and [name for name, _ in form.statics] == [name for name, _, _ in bound.statics]
            and all(name in self._defaults for name in (*left_out, *filled_in))
            and all(are_one(given[name], self._defaults[name]) for name in left_out)
        )
        if not is_same:
            return None
        values = {**self._defaults, **given}
        kwargs = {name: values[name] for name, _ in form.kwargs}
        return BoundCall(form, tuple(values[name] for name in form.names), kwargs, bound.statics)

    def check_keywords(self, keywords: Iterable[str], *, options: Sequence[str] = ()) -> None:
        """Raises unless the function has an argument for each keyword.

        Args:
            keywords: Those of a call.
            options: Those that are no arguments of the function, for the nearest one.

        Raises:
            InputShapeError: It has none; the nearest one is named.
        """
        parameters = self._signature.parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
        known = [parameter.name for parameter in parameters]
        for keyword in keywords:
            if keyword not in known:
                raise self._not_callable(
                    f"got an unexpected keyword argument {keyword!r}: "
                    + nearest(keyword, [*known, *options])
                )

    def _not_callable(self, why: str) -> InputShapeError:
        if self.is_method:
            why += ": it is a method: its object is the first argument"
        elif self._masks:
            why += f" ({' and '.join(self._masks)} not given by callers)"
        return InputShapeError(f"{self.name}{self._signature} cannot be called like this: {why}")

    @property
    def is_method(self) -> bool:
        """Whether its first argument is an object's `self`."""
        first = next(iter(self._signature.parameters.values()), None)
        return first is not None and first.name == "self" and first.kind in _POSITIONAL

    def declared(self, bound: BoundCall) -> Declarations:
        """What was declared for the leaves of a call's positional arguments.

        Raises:
            InputShapeError: `in_axes` or `pad_values` do not have the arguments' structure.
            ConfigError: `in_shardings` do not.
        """
        form = bound.form
        count = max(form.places, default=-1) + 1
        axes = for_positions(self.in_axes, count, name="in_axes")
        pads = for_positions(self.pad_values, count, name="pad_values")
        patterns: list[AxisPattern | None] = []
        values: list[PadValue] = []
        try:
            for name, place, arg in zip(form.names, form.places, bound.args, strict=True):
                patterns += broadcast_prefix(axes[place], arg, name=f"in_axes of {name}")
                values += broadcast_prefix(pads[place], arg, name=f"pad_values of {name}")
        except InputShapeError as error:
            raise InputShapeError(self._by_name_advice(bound) or str(error)) from None
        return Declarations(
            patterns,
            values,
            form.names,
            lead=form.places.index(self.lead) if self.lead in form.places else None,
            spares_numbers=not self.has_entries,
            shardings=shardings_of(self.in_shardings, form.names, form.places, bound.args),
        )

    def _by_name_advice(self, bound: BoundCall) -> str:
        """What to write instead of an option that names the arguments; empty where none does."""
        names = bound.form.names
        for option, prefix in self._prefixes:
            if not isinstance(prefix, dict) or prefix.keys().isdisjoint(names):
                continue
            if not all(isinstance(arg, dict) for arg in bound.args):
                return (
                    f"{option}={prefix!r} is a dict, which stands for an argument that is one: "
                    "give one entry for each positional argument, "
                    f"{option}={tuple(map(prefix.get, names))!r}"
                )
        return ""

    @property
    def _prefixes(self) -> tuple[tuple[str, PyTree], ...]:
        return ("in_axes", self.in_axes), ("pad_values", self.pad_values)

    @property
    def multiples(self) -> dict[str, int]:
        """What sizes have to be multiples of, as far as the declarations tell; see `in_shardings`.

        Raises:
            ConfigError: A sharding has more dimensions than its argument.
        """
        return declared_multiples(self.in_axes, self.in_shardings)

    @property
    def has_entries(self) -> bool:
        """Whether `in_axes` has an entry for each argument, not one for all of them."""
        return isinstance(self.in_axes, tuple | list)

    @property
    def _entries(self) -> Sequence[PyTree]:
        return self.in_axes if self.has_entries else (self.in_axes,)

    @property
    def bucketed_places(self) -> tuple[int, ...]:
        """The positions of the entries of `in_axes` that name a size."""
        return tuple(place for place, prefix in enumerate(self._entries) if _buckets(prefix))

    @property
    def lead(self) -> int:
        """The position of an argument that carries all the sizes there are; -1 if none does.

        Where one entry stands for all arguments it is the first, unless that is a number.
        """
        sizes = {name for prefix in self._entries for name in _size_names(prefix)}
        leads = (
            place
            for place, prefix in enumerate(self._entries)
            if isinstance(prefix, AxisPattern) and set(_size_names(prefix)) == sizes
        )
        return next(leads, -1)

    def bucketed(self, form: Form) -> tuple[int, ...]:
        """The indices, in the calls of one form, of arguments that may carry a size."""
        known = self.bucketed_places
        return tuple(
            i for i, place in enumerate(form.places) if not self.has_entries or place in known
        )

    def donated(self, form: Form) -> tuple[int, ...]:
        """The positions of the donated arguments among `form.args`."""
        return tuple(
            index for index, place in enumerate(form.places) if place in self.donate_argnums
        )

    def _sorted(self, given: Mapping[str, Any], defaults: tuple[Hashable, ...]) -> Form:
        args: list[tuple[int, str, int]] = []
        kwargs: list[tuple[str, int]] = []
        statics: list[tuple[str, int]] = []
        static_places: list[tuple[int, str]] = []
        for name, value in given.items():
            kind = self._signature.parameters[name].kind
            place = self._place(name)
            if name in self.static_argnames:
                statics.append((name, value))
                static_places += [(place, name)] if kind in _POSITIONAL else []
            elif kind in _POSITIONAL:
                args.append((place, name, value))
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                args += [(place + n, f"{name}[{n}]", item) for n, item in enumerate(value)]
            elif kind is inspect.Parameter.VAR_KEYWORD:
                for key, item in sorted(value.items()):
                    (statics if key in self.static_argnames else kwargs).append((key, item))
            else:
                kwargs.append((name, value))
        indices = tuple(index for _, _, index in args)
        places = tuple(place for place, _, _ in args)
        return Form(
            args=indices,
            names=tuple(name for _, name, _ in args),
            places=places,
            kwargs=tuple(kwargs),
            statics=tuple(statics),
            static_places=tuple(static_places),
            defaults=defaults,
            plain=indices == places == tuple(range(len(args))) and not (kwargs or statics),
        )

    def _place(self, name: str) -> int:
        return list(self._signature.parameters).index(name)

    def _check_names(self, signature: inspect.Signature) -> None:
        known = signature.parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
        for name in (*self.static_argnames, *self._masks):
            if name not in known and not takes_any:
                raise ConfigError(
                    f"{self.name}{signature} has no argument {name!r}: name one that it has"
                )
        for name in self.static_argnames.intersection(self._masks):
            raise ConfigError(f"{name!r} is both mask_argname and static: choose one")
        names = list(known)
        for name in self.static_argnames & set(names):
            place = names.index(name)
            for option, entries in (("in_axes", self.in_axes), ("in_shardings", self.in_shardings)):
                given = entries[place : place + 1] if isinstance(entries, tuple | list) else ()
                if jax.tree.leaves(given):
                    raise ConfigError(
                        f"{option} has an entry for {name!r}, which is static: give None for it"
                    )
        for mask in set(self._masks).intersection(known):
            self._check_mask(mask, signature)

    def _check_mask(self, mask: str, signature: inspect.Signature) -> None:
        """Raises unless the parameter `mask` can be given by keyword, beside arrays."""
        known = signature.parameters
        if known[mask].kind not in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        ):
            raise ConfigError(
                f"mask_argname={mask!r} cannot be given by keyword to {self.name}{signature}: make "
                f"it a keyword argument, as (x, *, {mask})"
            )
        others = [name for name in known if name not in self._masks]
        if not any(known[name].kind in (*_POSITIONAL, _STARRED) for name in others):
            raise ConfigError(
                f"mask_argname={mask!r} leaves {self.name}{signature} no array to take, since "
                "callers do not give it: name the argument that takes the mask"
            )
        names = list(known)
        behind = [name for name in names[names.index(mask) + 1 :] if name in others]
        if any(known[name].kind in _POSITIONAL for name in behind):
            raise ConfigError(
                f"mask_argname={mask!r} stands before {behind[0]!r} in "
                f"{self.name}{signature}: put it behind the positional arguments"
            )

    def _check_places(self) -> None:
        """Raises unless all that is declared by position is of positional arguments."""
        signature, count = self._signature, len(self._signature.parameters)
        for place in self.donate_argnums:
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < count:
                raise ConfigError(
                    f"donate_argnums has {place!r}, but {self.name}{signature} has {count} "
                    "arguments: give positions of those"
                )
            self._check_place("donate_argnums", place)
        variadic = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
        most = count + len(self._masks)
        for option, prefix in (*self._prefixes, ("in_shardings", self.in_shardings)):
            if not isinstance(prefix, tuple | list):
                continue
            if len(prefix) > most and not variadic:
                raise ConfigError(
                    f"{option} has {len(prefix)} entries, but {self.name}{signature} has {count} "
                    "arguments: give one entry for each positional argument"
                )
            for place, entry in enumerate(prefix):
                if any(leaf is not UNCHOSEN for leaf in jax.tree.leaves(entry)):
                    self._check_place(option, place)

    def _check_place(self, option: str, place: int) -> None:
        parameters = list(self._signature.parameters.values())
        kinds = [parameter.kind for parameter in parameters]
        if inspect.Parameter.VAR_POSITIONAL in kinds[: place + 1]:
            return
        if place >= len(parameters):
            raise ConfigError(
                f"{option} has an entry for {' and '.join(self._masks)}, which bucket_jit builds "
                "itself (mask_argname): leave the entry out"
            )
        if kinds[place] not in _POSITIONAL:
            stars = "**" if kinds[place] is inspect.Parameter.VAR_KEYWORD else ""
            raise ConfigError(
                f"{option} has an entry for '{stars}{parameters[place].name}', which is passed by "
                f"keyword to {self.name}{self._signature}: make it positional, since keywords are "
                "passed through as they are; what says which elements are real can be named in "
                "mask_argname instead"
            )


def _buckets(prefix: PyTree) -> bool:
    patterns = (leaf for leaf in jax.tree.leaves(prefix) if isinstance(leaf, AxisPattern))
    return any(pattern.lengths for pattern in patterns)


def _size_names(prefix: PyTree) -> list[str]:
    """The axes whose sizes the patterns of a prefix tell."""
    patterns = [leaf for leaf in jax.tree.leaves(prefix) if isinstance(leaf, AxisPattern)]
    return [length.axis for pattern in patterns for length in pattern.lengths if length.tells_size]


def _signature(function: Callable[..., PyTree], name: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{name} has no signature that Python can see: wrap it in a function of your own"
        ) from None


def _pattern(spec: object) -> AxisPattern | None:
    if spec is None or isinstance(spec, AxisPattern):
        return spec
    if isinstance(spec, str):
        pattern = AxisPattern.parse(spec)
        if sum(length.axis == "batch" for length in pattern.lengths) > 1:
            raise ConfigError(
                f"in_axes has the entry {spec!r}: an argument has one row for each of the batch, "
                "in one dimension; call the other one by the name of an axis of its own"
            )
        return pattern
    raise ConfigError(f'in_axes has the entry {spec!r}: use None, or names such as "batch seq ..."')


_PAD_VALUES = 'use numbers, "edge", or "any" where the function ignores whatever it is'


def _pad_value(value: object) -> PadValue:
    if value is None:
        return UNCHOSEN
    if isinstance(value, str) and value not in (EDGE, ANY):
        raise ConfigError(f"pad_values has {value!r}: {_PAD_VALUES}")
    if isinstance(value, bool | int | float | complex | str):
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        return item()  # type: ignore[no-any-return]  # a NumPy or JAX scalar's Python number
    raise ConfigError(f"pad_values has {value!r}: {_PAD_VALUES}")


Pick = Callable[[Sequence[PyTree]], tuple[PyTree, ...]]


class BoundCall(NamedTuple):
    """The arguments of one call, in the one order that the function's programs have.

    Attributes:
        form: How the call was written.
        args: The positional arguments without the static ones.
        kwargs: Those that are passed by keyword, likewise: keyword-only ones and `**kwargs`.
        statics: The name, the kind and the value of each static argument.
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
        kwargs: Names and indices of those that are passed by keyword.
        statics: Names and indices of the static arguments.
        static_places: Where the positional ones of those stand in the signature.
        defaults: Those of static arguments that are left out, counted behind the call's values.
        plain: Whether a call is its positional arguments and nothing else.
    """

    args: tuple[int, ...]
    names: tuple[str, ...]
    places: tuple[int, ...]
    kwargs: tuple[tuple[str, int], ...]
    statics: tuple[tuple[str, int], ...]
    static_places: tuple[tuple[int, str], ...]
    defaults: tuple[Hashable, ...]
    plain: bool

    @property
    def given(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """The names of what it gives by position and by keyword, the static ones apart."""
        return self.names, frozenset(name for name, _ in self.kwargs)

    def bind(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> BoundCall:
        """The arguments of a call that is written like this.

        Raises:
            InputShapeError: A static argument cannot be hashed.
        """
        values = (*args, *kwargs.values(), *self.defaults)
        return BoundCall(
            self,
            tuple([values[index] for index in self.args]),
            {name: values[index] for name, index in self.kwargs},
            tuple([_static(name, values[index]) for name, index in self.statics]),
        )


def unbound(function: Callable[..., PyTree], bound: BoundCall) -> Callable[..., PyTree]:
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


def _static(name: str, value: object) -> tuple[str, object, Hashable]:
    if not can_be_hashed(value):
        raise InputShapeError(
            f"static argument {name} is a {type(value).__name__}, which cannot be hashed: "
            + static_advice(value)
        )
    return (name, kind_of(value), value)


def picker(places: Sequence[int]) -> Pick:
    """What takes the arguments at `places` out of a tuple of arguments."""
    if tuple(places) == tuple(range(places[0], places[-1] + 1)):
        # A slice bears with arguments that are left out at the end.
        return itemgetter(slice(places[0], places[-1] + 1))
    return itemgetter(*places)
