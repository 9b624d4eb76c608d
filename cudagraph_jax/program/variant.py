"""What distinguishes two programs of the same bucket: function, dtypes, other dimensions."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.axes import LeafAxes

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


@dataclass(frozen=True, slots=True)
class Variant:
    """The identity of a program beside its bucket; hashable.

    Attributes:
        function: The function, or what stands for it; compared by equality.
        name: The function's name.
        structure: The pytree of the arguments.
        leaves: Their arrays.
        statics: The static arguments: name, type and value.
    """

    function: Hashable
    name: str
    structure: jax.tree_util.PyTreeDef
    leaves: tuple[AbstractLeaf, ...]
    statics: tuple[tuple[str, type, Hashable], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        key = (self.function, self.structure, self.leaves, self.statics)
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
    """The abstract form of an array that carries the batch or the sequence.

    Raises:
        InputShapeError: `value` is no NumPy or JAX array, or of a dtype that would not survive.
    """
    if not isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        raise InputShapeError(
            f"{name} is of type {type(value).__name__}, not an array, but its axes are bucketed: "
            "pass a NumPy or JAX array (numpy.asarray makes one)"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise InputShapeError(
            f"{name} holds PRNG keys, which NumPy cannot pad: pass jax.random.key_data of them, "
            "or pass a single key through (None in in_axes)"
        )
    dtype = computed_dtype(value.dtype, name=name)
    return AbstractLeaf(axes.open(value.shape), dtype, sharding=placement(value))


def abstract_passed(value: object, *, name: str) -> AbstractLeaf:
    """The abstract form of an argument that is passed through.

    Raises:
        InputShapeError: `value` is nothing that JAX computes with, or float64 while x64 is off.
    """
    if isinstance(value, np.ndarray):
        computed_dtype(value.dtype, name=name)
    try:
        abstract = jax.typeof(value)
    except TypeError:
        raise InputShapeError(
            f"{name} is a {type(value).__name__}, which is no JAX type: "
            "pass an array or a number, or name the argument in static_argnames"
        ) from None
    weak = not abstract.shape and is_weak(value)
    return AbstractLeaf(abstract.shape, abstract.dtype, weak, placement(value))


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


def default_device() -> jax.Device:
    """The device of arrays that were not put anywhere on purpose."""
    # A jax.Device, a platform name, or None: the first device of the default backend.
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # not in JAX's stubs
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
