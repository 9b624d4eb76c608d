"""What the soak calls: functions of every temper, their sizes, and their answers in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BATCHES, SEQ_LENS, WIDTH = (1, 2, 3, 5, 8, 9, 12), (3, 8, 11, 16, 30, 32, 40), 3
MIX = {"dense": 10, "reduced": 10, "untraceable": 1, "uncompilable": 3, "of_one": 6}
"""How often each function is called, of thirty."""


def dense(scale, x):
    """A layer of every position by itself."""
    return jnp.tanh(x * scale) + x


def reduced(scale, x):
    """A sum over the real positions; the padding is zero."""
    return {"sum": (x * scale).sum(axis=1), "rows": x[:, 0]}


def untraceable(scale, x):
    """A function that can only run eagerly."""
    return x * float(scale) if float(x.sum()) >= 0 else -x * float(scale)


def uncompilable(scale, x):
    """A function that does not compile for some batches."""
    if isinstance(x, jax.core.Tracer) and x.shape[0] in (2, 5):
        return jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    return x * scale


def of_one(inputs):
    """A function of one pytree, for the specification's calls."""
    return {"sum": (inputs["x"] * inputs["scale"]).sum(axis=1)}


BUCKETED = (dense, reduced, untraceable, uncompilable)


def expected(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """The answers, in NumPy."""
    if name == "dense":
        return {"": np.tanh(x * 2) + x}
    if name == "untraceable":
        return {"": x * 2 if x.sum() >= 0 else -x * 2}
    if name == "uncompilable":
        return {"": x * 2}
    total = {"sum": (x * 2).sum(axis=1)}
    return total if name == "of_one" else {**total, "rows": x[:, 0]}


def run_eagerly_once() -> None:
    """Compiles the operations of eager calls, which JAX keeps for good, before the clock."""
    for batch in BATCHES:
        for seq in SEQ_LENS:
            x = jnp.asarray(np.ones((batch, seq, WIDTH), np.float32))
            for function in BUCKETED:
                function(np.float32(2), x)
            of_one({"x": x, "scale": np.float32(2)})
