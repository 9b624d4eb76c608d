"""JAX's settings of one thread, for what another thread traces in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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


class ThreadSettings:
    """The settings of the thread that makes it, such as those of `jax.default_matmul_precision`."""

    def __init__(self) -> None:
        self._values = _current()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Has this thread trace as that one would have."""
        current = _current()
        with ExitStack() as stack:
            for name, value in self._values.items():
                if value != current[name]:
                    stack.enter_context(getattr(jax, name)(value))
            yield


def _current() -> dict[str, object]:
    return {name: getattr(jax.config, f"jax_{name}") for name in _NAMES}
