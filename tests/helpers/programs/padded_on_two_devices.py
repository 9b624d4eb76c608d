"""Run by test_devices.py: a `Padded` stays on its devices, and is right wherever it is moved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cudagraph_jax import CUDAGraphConfig, Padded, bucket_jit, no_compiles

CONFIG = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(8,), warmup_iterations=1)
FIRST, SECOND = jax.devices()
MESH = Mesh(np.array([FIRST, SECOND]), ("model",))
SHARDED = NamedSharding(MESH, PartitionSpec(None, "model"))
W = np.arange(12, dtype=np.float32).reshape(3, 4)


def project(w, x):
    return x[..., None] * w[0] + 1  # the padding is no zeros


def total(w, h):
    return (h @ w.T).sum(1)


def made():
    first = bucket_jit(project, in_axes=(None, "batch seq"), unpad="padded", config=CONFIG)
    second = bucket_jit(total, in_axes=(None, "batch seq _"), config=CONFIG)
    return first, second


def check(second, w, padded, x, way):
    assert way in second.explain(w, padded).reason, second.explain(w, padded).reason
    expected = total(W, np.asarray(project(W, np.asarray(x))))
    for _ in range(2):
        np.testing.assert_allclose(second(w, padded), expected, rtol=1e-5)


def on_each():
    """Chains on either device, whose outputs of the same sizes are given to the same function."""
    first, second = made()
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    weights = [jax.device_put(W, place) for place in (FIRST, SECOND, SHARDED)]
    for w in weights * 2:
        padded = first(w, x)
        assert padded.array.sharding.device_set == w.sharding.device_set
        check(second, w, padded, x, "on the device")
        with no_compiles():
            second(w, first(w, x))


def moved():
    """What was moved is not given to what is compiled for where it was."""
    first, second = made()
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    here, there = (jax.device_put(W, device) for device in (FIRST, SECOND))
    padded = first(here, x)
    check(second, here, padded, x, "on the device")
    away = jax.device_put(padded, SECOND)
    assert isinstance(away, Padded)
    check(second, there, away, x, "nothing is compiled that fills its padding")
    check(second, there, first(there, x), x, "on the device")
    check(second, there, away, x, "nothing is compiled that fills its padding")
    check(second, here, jax.device_put(away, FIRST), x, "on the device")


def ahead():
    """What is padded ahead stays on the device of the array."""
    _, second = made()
    h = jax.device_put(jnp.ones((3, 5, 4)), SECOND)
    w = jax.device_put(W, SECOND)
    padded = second.pad(w, h)[1]
    assert padded.array.devices() == {SECOND}
    np.testing.assert_allclose(second(w, padded), second(w, h))
    assert second.registry.num_graphs == 1


if __name__ == "__main__":
    on_each()
    moved()
    ahead()
    print("padded on both devices")
