"""Functions that NumPy runs where JAX does not trace them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests.helpers.examples import IS_THOROUGH


def by_numpy(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function with NumPy arrays where it is not traced; thoroughly it is run as it is.

    By JAX each operation of a plain function, or the whole of it, is compiled for every size, which
    takes most of the time of a test that has many. What is written for both takes `xp(x)` for
    `jax.numpy`.
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return fn(*args, **kwargs)
        args, kwargs = jax.tree.map(np.asarray, (args, kwargs))
        with np.errstate(all="ignore"):  # as in JAX, 0 / 0 is no reason to complain
            return jax.tree.map(_as_jax_has_it, fn(*args, **kwargs))

    return fn if IS_THOROUGH else run


def _as_jax_has_it(output: Any) -> np.ndarray:
    """With 32 bits where NumPy, unlike JAX, takes 64 for a sum or a quotient of integers."""
    return np.asarray(output, jax.dtypes.canonicalize_dtype(np.asarray(output).dtype))


def xp(x: Any) -> Any:
    """`jax.numpy` or `numpy`, of which the array is."""
    return x.__array_namespace__()


def softmax(scores: Any, axis: int = -1) -> Any:
    """`jax.nn.softmax`, of NumPy's arrays as well."""
    weights = xp(scores).exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)
