"""PRNG keys, which NumPy cannot hold."""

from __future__ import annotations

from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


def is_key(leaf: object) -> TypeGuard[jax.Array]:
    """Whether it is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def copied_key(key: jax.Array) -> jax.Array:
    """The same key in another buffer, which a run may use up."""
    with jax.ensure_compile_time_eval():
        data = jax.device_put(np.array(jax.random.key_data(key)))
        copy: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
        return copy
