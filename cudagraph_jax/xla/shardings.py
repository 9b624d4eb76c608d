"""Shardings over a mesh: what an array of some shape can have of one, and which sizes fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from cudagraph_jax.config import DEFAULT_CAPTURE_SIZES, CUDAGraphConfig
from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.shapes.axes import AxisPattern, LeafAxes, Length
from cudagraph_jax.shapes.ladder import Ladder
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix, for_positions, is_declaration

_FIELDS = {"batch": "capture_sizes", "seq": "capture_seq_lens"}


def checked_shardings(in_shardings: PyTree) -> PyTree:
    """`in_shardings`, a pytree prefix of `NamedSharding` over one mesh, and None.

    Raises:
        ConfigError: An entry is something else, or of another mesh than the one before.
    """
    meshes: list[Mesh] = []
    for entry in jax.tree.leaves(in_shardings, is_leaf=_is_spec):
        if not isinstance(entry, NamedSharding) or not isinstance(entry.mesh, Mesh):
            raise ConfigError(
                f"in_shardings has the entry {entry!r}: use None, or a NamedSharding over a mesh "
                'of devices, as jax.sharding.NamedSharding(mesh, PartitionSpec("data"))'
            )
        meshes.append(entry.mesh)
        if entry.mesh != meshes[0]:
            raise ConfigError(
                f"in_shardings has two meshes, {meshes[0]} and {entry.mesh}: one program runs on "
                "one, so make all shardings with the same"
            )
    return in_shardings


def _is_spec(entry: object) -> bool:
    return isinstance(entry, PartitionSpec)


def is_spread(sharding: Sharding | None) -> bool:
    """Whether it is over several devices."""
    return sharding is not None and len(sharding.device_set) > 1


def is_cut(sharding: Sharding | None) -> bool:
    """Whether an array is in parts over several devices, and not whole on each."""
    return sharding is not None and is_spread(sharding) and not sharding.is_fully_replicated


def is_foreign(sharding: object) -> bool:
    """Whether devices of other processes take part in it."""
    try:
        return not getattr(sharding, "is_fully_addressable", True)
    except ValueError:  # it names no devices
        return False


def is_readable(array: jax.Array) -> bool:
    """Whether this process can read all of it."""
    return array.is_fully_addressable or array.is_fully_replicated


def put(array: PyTree, home: Sharding | None) -> jax.Array:
    """An array where it is wanted, or on the default device; now, also while a function is traced.

    Where several processes share that, each puts its own part there: `jax.device_put` would have
    all of them compare the whole first, at a moment at which others may be at something else.
    """
    with jax.ensure_compile_time_eval():
        if home is None or not is_foreign(home) or is_foreign(getattr(array, "sharding", None)):
            placed: jax.Array = jax.device_put(array, home)
            return placed
        whole = jax.device_get(array)
        own = [
            jax.device_put(whole[index], SingleDeviceSharding(device, memory_kind=home.memory_kind))
            for device, index in home.addressable_devices_indices_map(whole.shape).items()
        ]
        return jax.make_array_from_single_device_arrays(whole.shape, home, own)


def parts(sharding: Sharding | None) -> tuple[int, ...]:
    """Into how many parts each dimension is cut, the first ones; nothing where nobody says."""
    if not isinstance(sharding, NamedSharding):
        return ()
    return tuple(_parts(entry, sharding.mesh.shape) for entry in sharding.spec)


def _parts(entry: object, mesh: Mapping[str, int]) -> int:
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh[name] for name in names if isinstance(name, str))


S = TypeVar("S", bound=Sharding | None)


def dividing(sharding: S, shape: Sequence[int]) -> S:
    """What an array of `shape` can have of a sharding: dimensions that it divides are cut.

    JAX has no array whose parts differ in size. One that is left whole is right, if slower.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    fits = [size % count == 0 for size, count in zip(shape, parts(sharding), strict=False)]
    if all(fits):
        return sharding
    kept = [entry if fit else None for entry, fit in zip(sharding.spec, fits, strict=False)]
    cut = NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)
    return cast(S, cut)


def along(sharding: Sharding | None, places: Sequence[int]) -> NamedSharding | None:
    """How an array of these dimensions of another one is cut; None where that is over no mesh."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = dict(enumerate(sharding.spec))
    entries = [spec.get(place) for place in places]
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def settled(
    own: Sequence[Sharding | None],
    usual: Sequence[Sharding | None],
    shapes: Sequence[Sequence[int | None]],
) -> list[Sharding | None]:
    """Where arrays go: where they are on purpose, else where others like them were.

    Not so beside arrays on other devices than those: one program runs on the same. Nor can one be
    there that has fewer dimensions than the others had.

    Args:
        own: Where each was put on purpose.
        usual: Where those were that were warmed up with.
        shapes: Their shapes; None where the sizes of a bucket go.
    """
    homes = [sharding.device_set for sharding in usual if sharding is not None]
    known = [sharding for sharding in own if sharding is not None]
    if not homes or any(sharding.device_set not in homes for sharding in known):
        return list(own)
    return [
        first or (second if len(parts(second)) <= len(shape) else None)
        for first, second, shape in zip(own, usual, shapes, strict=True)
    ]


def misfit(sharding: NamedSharding, shape: Sequence[int | None]) -> str:
    """Why no array of `shape` can have a sharding, for an error; empty where one can.

    Args:
        sharding: What is declared for it.
        shape: The array's; None where the sizes of a bucket go.
    """
    if len(sharding.spec) > len(shape):
        return (
            f"has {len(shape)} dimension(s), but in_shardings have {sharding.spec} for it, which "
            f"is of {len(sharding.spec)}: shorten it, or give None for what is not sharded"
        )
    for place, (size, count) in enumerate(zip(shape, parts(sharding), strict=False)):
        if size is not None and size % count:
            return (
                f"has {size} in dimension {place}, which in_shardings cut into {count} parts: "
                "leave that dimension whole (None in its PartitionSpec)"
            )
    return ""


def shardings_of(
    in_shardings: PyTree, names: Sequence[str], places: Sequence[int], args: Sequence[PyTree]
) -> Sequence[NamedSharding | None]:
    """What is declared for each leaf of a call's positional arguments; nothing where none is.

    Args:
        in_shardings: A pytree prefix of them.
        names: What errors call each argument.
        places: Where each stands in the function's signature.
        args: The arguments.

    Raises:
        ConfigError: The prefix does not have their structure.
    """
    if in_shardings is None:
        return ()
    found: list[NamedSharding | None] = []
    try:
        entries = for_positions(in_shardings, max(places, default=-1) + 1, name="in_shardings")
        for name, place, arg in zip(names, places, args, strict=True):
            found += broadcast_prefix(entries[place], arg, name=f"in_shardings of {name}")
    except InputShapeError as error:
        raise ConfigError(str(error)) from None
    return found if any(found) else ()


def declared_multiples(in_axes: PyTree, in_shardings: PyTree) -> dict[str, int]:
    """What the sizes of a grid are to be multiples of, as far as the declarations tell.

    Args:
        in_axes: A pytree prefix of patterns and None.
        in_shardings: One of shardings and None.

    Raises:
        ConfigError: There are more or fewer of the one than of the other, or a sharding has more
            dimensions than its pattern.
    """
    counts = [len(p) for p in (in_axes, in_shardings) if isinstance(p, tuple | list)]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"in_axes has {counts[0]} entries, and in_shardings {counts[1]}: give one of each for "
            "each argument (None for what is not placed)"
        )
    known: list[tuple[LeafAxes, Sharding]] = []
    for pattern, sharding in _pairs(in_axes, in_shardings):
        if pattern is None or sharding is None:
            continue
        if pattern.after is None and (problem := misfit(sharding, [None] * pattern.min_ndim)):
            raise ConfigError(f"an array of in_axes={pattern!r} {problem}")
        dims = enumerate(pattern.before)
        axes = LeafAxes(tuple((place, length) for place, length in dims if length is not None))
        known.append((axes, sharding))
    return multiples_of(known)


def _pairs(
    in_axes: PyTree, in_shardings: PyTree
) -> Iterable[tuple[AxisPattern | None, NamedSharding | None]]:
    """What stands together in two prefixes; nothing where only a call shows it."""
    if is_declaration(in_axes):
        return [(in_axes, leaf) for leaf in jax.tree.leaves(in_shardings)]
    if is_declaration(in_shardings):
        return [(leaf, in_shardings) for leaf in jax.tree.leaves(in_axes)]
    if isinstance(in_axes, tuple | list) and isinstance(in_shardings, tuple | list):
        nested = zip(in_axes, in_shardings, strict=False)
        return [pair for entries in nested for pair in _pairs(*entries)]
    if isinstance(in_axes, dict) and isinstance(in_shardings, dict):
        shared = in_axes.keys() & in_shardings.keys()
        return [pair for key in shared for pair in _pairs(in_axes[key], in_shardings[key])]
    return []


def multiples_of(arrays: Iterable[tuple[LeafAxes, Sharding | None]]) -> dict[str, int]:
    """What each size has to be a multiple of, so that all these arrays are cut as they say."""
    found: dict[str, int] = {}
    for axes, sharding in arrays:
        counts = dict(enumerate(parts(sharding)))
        for place, length in axes.dims:
            if (multiple := _multiple(length, counts.get(place, 1))) > 1:
                found[length.axis] = math.lcm(found.get(length.axis, 1), multiple)
    return found


def _multiple(length: Length, count: int) -> int:
    """The least size whose multiples make a length divisible; 1 where none does, as of seq+1."""

    def extent(size: int) -> int:
        return (size * length.times + length.before) // length.over + length.plus

    whole = count * length.over
    sizes = range(1, whole + 1)
    return next(
        (n for n in sizes if not any(extent(n * times) % count for times in range(1, whole + 1))), 1
    )


def divided_grid(config: CUDAGraphConfig, multiples: Mapping[str, int]) -> CUDAGraphConfig:
    """`config`, whose batch sizes, if nobody chose them, are rounded up to what the mesh asks for.

    Raises:
        ConfigError: A limit that was chosen is below the largest of them.
    """
    multiple = multiples.get("batch", 1)
    if multiple == 1 or config.capture_sizes != DEFAULT_CAPTURE_SIZES:
        return config
    sizes, largest = DEFAULT_CAPTURE_SIZES.rounded(multiple), config.max_batch_size
    if DEFAULT_CAPTURE_SIZES.max < largest < sizes.max:
        raise ConfigError(
            f"max_capture_batch_size={largest} is below {sizes.max}, the largest of the default "
            f"capture_sizes where the mesh cuts batch into {multiple} parts: give {sizes.max} or "
            f"more, or capture_sizes of your own, as multiples of {multiple}"
        )
    return replace(config, capture_sizes=sizes, max_capture_batch_size=max(largest, sizes.max))


def check_grid(config: CUDAGraphConfig, multiples: Mapping[str, int]) -> None:
    """Raises unless all sizes of the grid are multiples of what the mesh asks for.

    Raises:
        ConfigError: One is not; the message has those to give instead.
    """
    for axis, multiple in multiples.items():
        ladder = config.ladder(axis)
        wrong = [size for size in ladder or () if size % multiple]
        if ladder is None or not wrong:
            continue
        name = _FIELDS.get(axis, f"capture_axes[{axis!r}]")
        raise ConfigError(
            f"{name}={tuple(ladder)} has {', '.join(map(str, wrong))}, but the mesh cuts {axis} "
            f"into {multiple} parts: give multiples of {multiple}, as "
            f"{name}={tuple(Ladder(ladder).rounded(multiple))}"
        )
