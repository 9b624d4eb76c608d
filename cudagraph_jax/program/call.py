"""One call, described: its sizes, the axes of its arrays, and the variant of its program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.program.advice import bucketed_advice, passed_advice
from cudagraph_jax.program.fingerprint import Fingerprint
from cudagraph_jax.program.function_ref import FunctionRef
from cudagraph_jax.program.padded import Padded, flatten_arguments, is_padded, without_padding
from cudagraph_jax.shapes.axes import (
    PASS_THROUGH,
    AxisPattern,
    Leaf,
    LeafAxes,
    Shape,
    carried_axes,
    side,
    sizes_of,
)
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Index, PadValue, check_pad_value
from cudagraph_jax.shapes.pytrees import (
    PyTree,
    leaf_names,
    leaves_of_arguments,
    unflatten_shapes,
)
from cudagraph_jax.xla.settings import Settings, current_settings, default_device, with_device
from cudagraph_jax.xla.shardings import is_foreign, misfit, settled
from cudagraph_jax.xla.stages import Wholes

Args = tuple[PyTree, ...]
Statics = tuple[tuple[str, object, Hashable], ...]
Pattern = AxisPattern | LeafAxes | None
"""The axes of a leaf: as they were declared, as known, or None where it is passed through."""


class Declarations(NamedTuple):
    """How the leaves of a call's positional arguments were declared, in their order.

    Attributes:
        patterns: The pattern of each leaf.
        pad_values: What each leaf is padded with.
        argument_names: What errors call the arguments.
        bare: Which leaves of a whole call are arguments themselves; None: not worked out yet.
        lead: The position of the argument whose shape finds the route of a call; None: all do.
        shardings: Where each leaf is put, wherever it comes from; nothing where none is declared.
        usual: Where those go that were not put anywhere on purpose, as a warm-up had them.
        spares_numbers: Whether one pattern stands for all arguments: such as are numbers, which
            have no dimensions that it could name, are passed through.
    """

    patterns: Sequence[Pattern]
    pad_values: Sequence[PadValue]
    argument_names: Sequence[str]
    bare: Sequence[bool] | None = None
    lead: int | None = None
    spares_numbers: bool = False
    shardings: Sequence[NamedSharding | None] = ()
    usual: Sequence[Sharding | None] = ()


class Mask(NamedTuple):
    """A mask of what is real, which a function takes under a keyword.

    Attributes:
        name: The keyword.
        axes: Its dimensions, by the axes that they follow; None: all that the arguments carry.
    """

    name: str
    axes: tuple[str, ...] | None = None

    def shape(self, carried: Sequence[str], sizes: Bucket) -> Shape:
        """Its shape in a call of `sizes`, whose arguments carry these axes.

        Raises:
            InputShapeError: None of them carries an axis of it.
        """
        axes = carried if self.axes is None else self.axes
        for axis in axes:
            if axis not in carried:
                raise InputShapeError(
                    f"the mask {self.name} is over {axis!r}, which no argument of this call "
                    "carries: give the argument that does"
                )
        return tuple(map(sizes.size, axes))

    def real(self, carried: Sequence[str], sizes: Bucket, left: Collection[str]) -> Index:
        """Where it is True in a bucket, with the axes whose padding stands on the left."""
        axes = carried if self.axes is None else self.axes
        return tuple(side(sizes.size(axis), left=axis in left) for axis in axes)


@dataclass(frozen=True, slots=True)
class Target:
    """The function of a call, and what is asked of its outputs.

    Attributes:
        function: Takes the program's arguments.
        name: What profiles and messages call it.
        unpad: A pytree prefix of `Unpad` for the outputs.
        out_axes: A pytree prefix of axis patterns for the outputs; None: they are found.
        donate_argnums: Positions of the arguments whose buffers may be taken over.
        masks: What it takes to tell real elements from padding.
        fingerprint: What its code and constants are known by; None: by what they lower to.
        single_input: Whether it takes one pytree (the specification's calls).
        output_shapes: What it is expected to give at a call's own sizes, which is checked before
            a bucket is compiled; None: anything.
        wholes: The programs by which it runs where no bucket serves it, and not operation by
            operation.
    """

    function: Callable[..., PyTree]
    name: str
    unpad: PyTree = "host"
    out_axes: PyTree = None
    donate_argnums: tuple[int, ...] = ()
    masks: tuple[Mask, ...] = ()
    fingerprint: Fingerprint | None = None
    single_input: bool = False
    output_shapes: PyTree = None
    wholes: Wholes = field(default_factory=Wholes, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Call:
    """One call as the manager sees it.

    Attributes:
        args: The positional arguments without the static ones.
        kwargs: The keyword arguments, likewise; they are passed through.
        leaves: The arrays of `args`, then those of `kwargs`.
        axes: The axes of each of them.
        declared: What was declared for those of `args`.
        sizes: The call's.
        variant: What identifies its program.
        target: Its function, and what is asked of the outputs.
    """

    args: Args
    kwargs: dict[str, PyTree]
    leaves: tuple[object, ...]
    axes: tuple[LeafAxes, ...]
    declared: Declarations
    sizes: Bucket
    variant: Variant
    target: Target

    @property
    def carried(self) -> tuple[str, ...]:
        """The axes whose sizes any array carries."""
        return carried_axes(self.axes)


def describe_call(
    function: FunctionRef,
    args: Args,
    kwargs: Mapping[str, PyTree],
    *,
    declared: Declarations,
    target: Target,
    statics: Statics = (),
    places: tuple[int, ...] = (),
    flat: tuple[list[PyTree], jax.tree_util.PyTreeDef] | None = None,
) -> Call:
    """The description of one call.

    Args:
        function: What the function is known by.
        args: Its positional arguments: arrays or `jax.ShapeDtypeStruct`.
        kwargs: Its keyword arguments.
        declared: The declarations for the leaves of `args`.
        target: The function, and what is asked of its outputs.
        statics: The static arguments.
        places: Where the arguments stand in the function's signature.
        flat: The leaves and the structure of `(args, kwargs)`, where they are known.

    Raises:
        InputShapeError: An array does not fit its axes, disagrees with another one about a size,
            or has a dtype that would not survive.
    """
    leaves, structure = flatten_arguments((args, dict(kwargs))) if flat is None else flat
    count = len(declared.patterns)
    undeclared = len(leaves) - count
    if any(map(is_padded, leaves[count:])):  # of keyword arguments, which no route looks into
        leaves = [*leaves[:count], *map(without_padding, leaves[count:])]
        _, kwargs = jax.tree.unflatten(structure, leaves)
    patterns: list[Pattern] = [*declared.patterns, *[None] * undeclared]
    pads = [*declared.pad_values, *[0] * undeclared]
    bare = bare_leaves(structure) if declared.bare is None else declared.bare
    if declared.spares_numbers:
        patterns = _without_numbers(patterns, leaves, bare)
    try:
        described = _describe_leaves(leaves, patterns, pads, [""] * len(leaves), bare)
    except InputShapeError:
        # Names cost a second walk, so only the error, which is raised again here, has them.
        names = argument_leaf_names(declared.argument_names, args, kwargs)
        described = _describe_leaves(leaves, patterns, pads, names, bare)
    sizes, axes, abstract = described
    if declared.shardings or declared.usual:
        abstract = _put(abstract, declared, args)
    settings = with_device(current_settings(), default_device())
    variant = Variant(function, target.name, structure, abstract, statics, places, settings)
    return Call(args, dict(kwargs), tuple(leaves), axes, declared, sizes, variant, target)


def _put(
    leaves: Sequence[AbstractLeaf], declared: Declarations, args: Args
) -> tuple[AbstractLeaf, ...]:
    """The leaves where they are declared to be, or where those of the warm-up were.

    Raises:
        ConfigError: One cannot be there.
    """
    own, shapes = [leaf.sharding for leaf in leaves], [leaf.shape for leaf in leaves]
    homes = settled(own, declared.usual, shapes)
    for index, declaration in enumerate(declared.shardings):
        if declaration is not None and (problem := misfit(declaration, leaves[index].shape)):
            name = leaf_names(declared.argument_names, args, is_leaf=is_padded)[index]
            raise ConfigError(f"{name} {problem}")
        homes[index] = declaration or homes[index]
    return tuple(
        leaf if leaf.sharding is home else replace(leaf, sharding=home)
        for leaf, home in zip(leaves, homes, strict=True)
    )


def refuse_abstract(call: Call) -> None:
    """Raises unless all leaves of `call` are values.

    Raises:
        InputShapeError: One is a `jax.ShapeDtypeStruct`.
    """
    for index, leaf in enumerate(call.leaves):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            names = argument_leaf_names(call.declared.argument_names, call.args, call.kwargs)
            raise InputShapeError(
                f"{names[index]} is a jax.ShapeDtypeStruct, which has no values: "
                "pass an array (warmup and explain take shapes alone)"
            )


def argument_leaf_names(
    argument_names: Sequence[str], args: Args, kwargs: Mapping[str, PyTree]
) -> list[str]:
    """What errors call each leaf of `(args, kwargs)`, in the order in which JAX flattens them."""
    ordered = dict(sorted(kwargs.items()))
    values = (*args, *ordered.values())
    return leaf_names((*argument_names, *ordered), values, is_leaf=is_padded)


def abstract_call(call: Call, *, unknown: Sequence[object] | None = None) -> Call:
    """`call` with shapes for its arrays, so that holding it keeps none of them alive.

    Scalars stay: they cost nothing, and a loop may never end without theirs.

    Args:
        call: The call.
        unknown: Leaves in the place of those that `call` has as shapes alone.
    """
    leaves: tuple[Any, ...] = tuple(map(_abstract, call.leaves))
    if unknown is not None:
        leaves = tuple(
            before if isinstance(given, jax.ShapeDtypeStruct) else leaf
            for given, leaf, before in zip(call.leaves, leaves, unknown, strict=True)
        )
    args, kwargs = unflatten_shapes(call.variant.structure, leaves)
    return replace(call, args=args, kwargs=kwargs, leaves=leaves)


def _abstract(leaf: object) -> object:
    leaf = without_padding(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    if isinstance(leaf, np.ndarray | jax.Array | Padded) and leaf.ndim:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def traced_sizes(args: Args, declared: Declarations) -> tuple[tuple[str, ...], Bucket]:
    """The axes that arguments carry among which are tracers, and their sizes.

    Raises:
        InputShapeError: An array does not fit its axes, or disagrees with another one.
    """
    names = leaf_names(declared.argument_names, args)
    values, structure = jax.tree.flatten((args, {}))
    patterns = declared.patterns
    if declared.spares_numbers:
        patterns = _without_numbers(patterns, values, bare_leaves(structure))
    leaves = [
        Leaf(name, _axes(leaf, pattern, name), leaf.shape)
        for leaf, pattern, name in zip(values, patterns, names, strict=True)
        if pattern is not None
    ]
    return carried_axes(leaf.axes for leaf in leaves), sizes_of(leaves)


def _without_numbers(
    patterns: Sequence[Pattern], leaves: Sequence[object], bare: Sequence[bool]
) -> list[Pattern]:
    """`patterns` with None for each argument that is a number, unless it would be for all."""
    spared: list[Pattern] = [
        None if is_bare and is_number(leaf) else pattern
        for pattern, leaf, is_bare in zip(patterns, leaves, bare, strict=True)
    ]
    return spared if any(pattern is not None for pattern in spared) else list(patterns)


def is_number(leaf: object) -> bool:
    """Whether it is a Python or NumPy number, or an array without dimensions."""
    return isinstance(leaf, int | float | complex) or getattr(leaf, "shape", None) == ()


def bare_leaves(structure: jax.tree_util.PyTreeDef) -> list[bool]:
    """Which leaves of a call are arguments themselves, in the order in which JAX flattens them."""
    args, kwargs = leaves_of_arguments(structure)
    return [leaf.is_array for leaf in (*args, *kwargs.values()) for _ in leaf.indices]


def _describe_leaves(
    leaves: Sequence[object],
    patterns: Sequence[Pattern],
    pads: Sequence[PadValue],
    names: Sequence[str],
    bare: Sequence[bool],
) -> tuple[Bucket, tuple[LeafAxes, ...], tuple[AbstractLeaf, ...]]:
    all_axes: list[LeafAxes] = []
    abstract: list[AbstractLeaf] = []
    sized: list[Leaf] = []
    for leaf, pattern, pad, name, is_bare in zip(leaves, patterns, pads, names, bare, strict=True):
        axes = _axes(leaf, pattern, name)
        all_axes.append(axes)
        if axes.passes_through:
            abstract.append(abstract_passed(leaf, name=name, is_bare=is_bare))
            continue
        described = abstract_bucketed(leaf, axes, name=name)
        check_pad_value(pad, described.dtype, name=name)
        abstract.append(described)
        sized.append(Leaf(name, axes, leaf.shape))  # type: ignore[attr-defined]  # an array now
    return sizes_of(sized), tuple(all_axes), tuple(abstract)


def _axes(leaf: object, pattern: Pattern, name: str) -> LeafAxes:
    if pattern is None:
        return PASS_THROUGH
    if isinstance(pattern, LeafAxes):
        ndim = len(getattr(leaf, "shape", ()))
        if ndim <= max((place for place, _ in pattern.dims), default=-1):
            raise InputShapeError(f"{name} has {ndim} dimension(s), too few for its axes {pattern}")
        return pattern
    # What is no array at all is refused by abstract_bucketed, in better words than "0 dimensions".
    ndim = len(leaf.shape) if hasattr(leaf, "shape") else pattern.min_ndim
    return pattern.resolve(ndim, name=name)


OpenShape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class AbstractLeaf:
    """One array as all buckets of a program see it.

    Attributes:
        shape: Its dimensions; None where the bucket's sizes go.
        dtype: The dtype that JAX computes with.
        weak_type: Whether it is a number whose dtype gives way to others', such as a Python
            float. Arrays with dimensions are taken for strong ones.
        sharding: Where it was put on purpose; None: on the default device.
    """

    shape: OpenShape
    dtype: np.dtype[np.generic]
    weak_type: bool = False
    sharding: Sharding | None = None

    def __str__(self) -> str:
        sizes = ",".join("·" if size is None else str(size) for size in self.shape)
        return f"{self.dtype}[{sizes}]"

    @property
    def placed(self) -> str:
        """The same, with whether it is weak, and where it was put on purpose."""
        weak = " weak" if self.weak_type else ""
        return f"{self}{weak}" if self.sharding is None else f"{self}{weak} {self.sharding!r}"


@dataclass(frozen=True, slots=True)
class Variant:
    """The identity of a program beside its bucket; hashable.

    Attributes:
        function: What the function is known by.
        name: The function's name.
        structure: The pytree of the arguments.
        leaves: Their arrays.
        statics: The static arguments: name, kind and value.
        places: Where the arguments stand in the function's signature.
        settings: JAX's settings of the thread that calls.
    """

    function: FunctionRef
    name: str
    structure: jax.tree_util.PyTreeDef
    leaves: tuple[AbstractLeaf, ...]
    statics: Statics = ()
    places: tuple[int, ...] = ()
    settings: Settings = ()
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        key = (
            *(self.function.identity, self.structure, self.leaves, self.statics),
            *(self.places, self.settings),
        )
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        shown = [str(leaf) for leaf in self.leaves[-4:]]
        if len(self.leaves) > len(shown):
            shown.insert(0, f"{len(self.leaves) - len(shown)} more")
        shown += [f"{name}={value!r}" for name, _, value in self.statics]
        return f"{self.name}({', '.join(shown)})"


def abstract_bucketed(value: object, axes: LeafAxes, *, name: str) -> AbstractLeaf:
    """The abstract form of an array that carries a size.

    Raises:
        InputShapeError: `value` is no NumPy or JAX array, or of a dtype that would not survive.
    """
    _refuse_masked(value, name)
    if not isinstance(value, np.ndarray | jax.Array | Padded | jax.ShapeDtypeStruct):
        raise InputShapeError(
            f"{name} is of type {type(value).__name__}, not an array, but its axes are bucketed: "
            + bucketed_advice(value, name=name)
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise InputShapeError(
            f"{name} holds PRNG keys, which NumPy cannot pad: pass jax.random.key_data of them, "
            "or pass a single key through (None in in_axes)"
        )
    if isinstance(value, Padded):
        value.layout.check(value.array.shape, name=name)
    dtype = computed_dtype(value.dtype, name=name)
    return AbstractLeaf(axes.open(value.shape), dtype, sharding=placement(value))


def abstract_passed(value: object, *, name: str, is_bare: bool = True) -> AbstractLeaf:
    """The abstract form of what is passed through.

    Args:
        value: An array or a number.
        name: What errors call it.
        is_bare: Whether it is an argument itself. JAX converts what a pytree holds, as under
            `jit`: to look for float64 among the parameters of every call costs more than the call.

    Raises:
        InputShapeError: `value` is nothing that JAX computes with, float64 while x64 is off, or
            an integer that none of JAX's holds.
    """
    _refuse_masked(value, name)
    value = without_padding(value)
    if is_padded(value):
        raise InputShapeError(
            f"{name} is a Padded, of which a function may take the padding for real where it is "
            f"passed through: name its axes in in_axes, or pass numpy.asarray({name}), or "
            f"{name}.array with the padding"
        )
    if is_bare and isinstance(value, np.ndarray):
        computed_dtype(value.dtype, name=name)
    elif not fits_integers(value):
        integers = np.dtype(jax.dtypes.canonicalize_dtype(np.int64))
        raise InputShapeError(
            f"{name}={value} does not fit into {integers}, the integers that JAX computes with: "
            f"pass float({name}) where its digits do not matter"
            + ("" if integers == np.int64 else ", or turn jax_enable_x64 on")
        )
    try:
        abstract = jax.typeof(value)
    except (TypeError, ValueError):  # the latter for what has __jax_array__, or a dtype unknown
        if isinstance(value, np.generic | np.ndarray):
            computed_dtype(value.dtype, name=name)
        raise InputShapeError(
            f"{name} is a {type(value).__name__}, which is no JAX type: "
            + passed_advice(value, name=name)
        ) from None
    weak = not abstract.shape and is_weak(value)
    return AbstractLeaf(abstract.shape, abstract.dtype, weak, placement(value))


def is_array(value: object) -> bool:
    """Whether it is an array that JAX takes whole: a masked one loses its mask."""
    return isinstance(value, np.ndarray | jax.Array) and not isinstance(value, np.ma.MaskedArray)


def _refuse_masked(value: object, name: str) -> None:
    if isinstance(value, np.ma.MaskedArray):
        raise InputShapeError(
            f"{name} is a numpy.ma.MaskedArray, whose mask JAX does not know: pass "
            f"{name}.filled(value), and the mask as an argument of its own"
        )


def fits_integers(value: object) -> bool:
    """Whether JAX's integers can hold a Python number; whatever is no `int` does not ask for it."""
    if not isinstance(value, int) or isinstance(value, bool):
        return True
    limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(np.int64))  # type: ignore[no-untyped-call]
    return int(limits.min) <= value <= int(limits.max)


def is_weak(number: object) -> bool:
    """Whether the dtype of a number gives way to that of the arrays it meets."""
    return type(number) in (int, float, complex) or bool(getattr(number, "weak_type", False))


def computed_dtype(dtype: np.dtype[np.generic], *, name: str) -> np.dtype[np.generic]:
    """The dtype that JAX computes with: 64-bit integers become 32-bit ones while x64 is off.

    Raises:
        InputShapeError: A 64-bit float or complex while x64 is off, whose digits would be lost, or
            a dtype that JAX does not have.
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    if not (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
        raise InputShapeError(
            f"{name} has dtype {dtype}, which JAX does not have: convert it to numbers first"
        )
    native = dtype.newbyteorder("=")
    if native != dtype or native.itemsize > (
        16 if np.issubdtype(native, np.complexfloating) else 8
    ):
        widest = np.complex128 if np.issubdtype(native, np.complexfloating) else np.float64
        near = jax.dtypes.canonicalize_dtype(
            min(native, np.dtype(widest), key=attrgetter("itemsize"))
        )
        raise InputShapeError(
            f"{name} has dtype {dtype}, which JAX does not have (another order of bytes, or more "
            f"of them): pass {name}.astype(numpy.{near})"
        )
    computed = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    if computed != dtype and np.issubdtype(dtype, np.inexact):
        raise InputShapeError(
            f"{name} has dtype {dtype}, but x64 is off and JAX would compute in {computed}: "
            f"pass {name}.astype(numpy.{computed}), or turn jax_enable_x64 on"
        )
    return computed


def placement(value: object) -> Sharding | None:
    """The sharding of an array that was put somewhere on purpose, else None.

    The default device is no such purpose: a call with arrays there and one with NumPy arrays are
    the same program.
    """
    value = value.array if isinstance(value, Padded) else value
    on_purpose = isinstance(value, jax.ShapeDtypeStruct) or (
        isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.committed
    )
    sharding: Sharding | None = getattr(value, "sharding", None) if on_purpose else None
    if not isinstance(sharding, SingleDeviceSharding):
        return sharding
    device = next(iter(sharding.device_set))
    default = default_device()
    same_memory = sharding.memory_kind in (None, default.default_memory().kind)
    return None if device == default and same_memory else sharding


def spans_processes(leaves: Iterable[AbstractLeaf]) -> bool:
    """Whether an array is on the devices of several processes, so that all of them have to call."""
    return jax.process_count() > 1 and any(is_foreign(leaf.sharding) for leaf in leaves)


def is_key(leaf: object) -> TypeGuard[jax.Array]:
    """Whether it is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def has_tracers(*trees: PyTree) -> bool:
    """Whether a JAX transformation is under way over any of these arguments."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))
