"""JAX's settings of one thread: part of what a function computes, as in `jax.jit`'s own key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

# Those that change what a function computes, and that JAX lets a thread set for itself. A mesh
# (`jax.set_mesh`) is none of them: give shardings that name theirs.
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

Settings = tuple[object, ...]
"""The values of all of them, in one order; hashable."""


def current_settings() -> Settings:
    """The settings of this thread."""
    return tuple([state.value for state in _STATES])


def with_device(settings: Settings, device: jax.Device) -> Settings:
    """`settings` with `device` in the place of a default one that is not named."""
    return (device, *settings[1:])


def setting_differences(one: Settings, other: Settings) -> list[str]:
    """Which of them differ, in words."""
    pairs = zip(_NAMES, one, other, strict=False)  # of a call that was described without any
    return [f"jax_{name}={value!r}, not {own!r}" for name, value, own in pairs if value != own]


class ThreadSettings:
    """The settings of the thread that makes it, such as those of `jax.default_matmul_precision`."""

    def __init__(self) -> None:
        self.values = current_settings()
        self.always_read = (DEVICE.value, PRECISION.value, X64.value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Has this thread trace as that one would have."""
        current = current_settings()
        with ExitStack() as stack:
            for state, value, own in zip(_STATES, self.values, current, strict=True):
                if value != own:
                    stack.enter_context(state(value))
            yield
