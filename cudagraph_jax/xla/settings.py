"""JAX's settings of one thread: part of what a function computes, as in `jax.jit`'s own key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    Mesh,
    PartitionSpec,
    get_abstract_mesh,
    get_mesh,
    use_abstract_mesh,
)

# Those that change what a function computes, and that JAX lets a thread set for itself; the mesh of
# `jax.set_mesh`, which is no option of JAX's, comes behind them.
_NAMES = (
    "default_device",
    "default_matmul_precision",
    "default_prng_impl",
    "enable_custom_prng",
    "enable_x64",
    "legacy_prng_key",
    "numpy_dtype_promotion",
    "numpy_rank_promotion",
    "softmax_custom_jvp",
    "threefry_partitionable",
)
# Read by every call, so by the shortest way: 25 ns each; `jax.config.jax_enable_x64` takes 50.
_STATES: tuple[Any, ...] = tuple(getattr(jax, name) for name in _NAMES)
DEVICE, PRECISION, X64 = (
    _STATES[_NAMES.index(name)]
    for name in ("default_device", "default_matmul_precision", "enable_x64")
)


MESH = "mesh"
ASKED: set[object] = set()
"""Why a hit asks what its thread is about, which takes 0.06 us: no hit does while this is empty.

`MESH`: with several devices, or after a mesh. So in a process of one device hits under its very
first mesh are not told apart until one is decided anew. That one program is on the same device, and
its values are the same, unless the function asks for the mesh itself. A thread's number: while it
is within a function that runs eagerly.
"""


Settings = tuple[object, ...]
"""The values of all of them, in one order; hashable."""


def current_settings() -> Settings:
    """The settings of this thread."""
    return (*[state.value for state in _STATES], current_mesh())


def current_mesh() -> Mesh | AbstractMesh | None:
    """The mesh of this thread, as `jax.set_mesh` has it; without devices where it has none."""
    abstract = get_abstract_mesh()
    if abstract.empty:
        return None
    ASKED.add(MESH)
    try:
        mesh = get_mesh()
    except ValueError:  # JAX does not tell it within a trace
        return _traced_mesh(abstract)
    return abstract if mesh.empty else mesh


def _traced_mesh(abstract: AbstractMesh) -> Mesh | AbstractMesh:
    """The mesh of this thread within a trace: where JAX puts an array on all of its devices."""
    if jax.process_count() > 1 or abstract.are_all_axes_manual:
        return abstract  # such an array is every process's, and none has one within `shard_map`
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        try:
            sharding = jax.device_put(np.zeros(()), PartitionSpec()).sharding
        except ValueError:  # of `use_abstract_mesh`, which has no devices
            return abstract
    mesh: object = getattr(sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) and mesh.abstract_mesh == abstract else abstract


def mesh_of(settings: Settings) -> Mesh | None:
    """The mesh of devices among these settings."""
    mesh = settings[-1] if settings else None
    return mesh if isinstance(mesh, Mesh) else None


def default_device() -> jax.Device:
    """The device of arrays that were not put anywhere on purpose."""
    # A jax.Device, a platform name, or None: the first device of the default backend.
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # not in JAX's stubs
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def with_device(settings: Settings, device: jax.Device) -> Settings:
    """`settings` with `device` in the place of a default one that is not named."""
    return (device, *settings[1:])


def setting_differences(one: Settings, other: Settings) -> list[str]:
    """Which of them differ, in words."""
    names = (*(f"jax_{name}" for name in _NAMES), "mesh")
    pairs = zip(names, one, other, strict=False)  # of a call that was described without any
    return [f"{name}={value!r}, not {own!r}" for name, value, own in pairs if value != own]


class ThreadSettings:
    """The settings of the thread that makes it, its mesh and its matrix precision among them.

    Attributes:
        values: All of them.
        always_read: The device, the precision, whether x64 is on, and the mesh without its devices.
    """

    def __init__(self) -> None:
        if jax.device_count() > 1:  # before there is anything to hit: a program has its settings
            ASKED.add(MESH)
        self.values = current_settings()
        self.always_read = (DEVICE.value, PRECISION.value, X64.value, get_abstract_mesh())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Has this thread trace as that one would have."""
        current = current_settings()
        with ExitStack() as stack:
            for state, value, own in zip(_STATES, self.values, current, strict=False):
                if value != own:
                    stack.enter_context(state(value))
            if (mesh := self.values[-1]) != current[-1]:
                use: Any = use_abstract_mesh if isinstance(mesh, AbstractMesh) else jax.set_mesh
                stack.enter_context(use(mesh))
            yield


def refuse_not_finite(error: BaseException, what: str) -> None:
    """Raises what `jax.jit` raises where `jax.debug_nans` or `jax.debug_infs` stops a call.

    Compiled functions raise another class, which JAX does not show: it is known by its name.

    Args:
        error: What a run raised.
        what: What ran.

    Raises:
        FloatingPointError: An output is not finite.
    """
    if type(error).__name__ == "InternalFloatingPointError":
        raise FloatingPointError(
            f"an output of {what} is not finite ({', '.join(map(str, error.args))}), be it in its "
            "padding alone: the same call under jax.disable_jit() is not padded, and names the "
            "operation"
        ) from error
