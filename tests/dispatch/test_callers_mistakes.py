"""A mistake of a caller's costs its own call alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, InputShapeError, bucket_jit

CONFIG = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0)


def add(x, y):
    return x + y, x - y


def twice():
    x = jnp.ones((4, 8))
    return x, x


def used_up():
    x, y = jnp.ones((4, 8)), jnp.ones((4, 8))
    x.delete()
    return x, y


@pytest.mark.parametrize("mistake", [twice, used_up])
@pytest.mark.parametrize("is_first", [True, False])
def test_arrays_that_cannot_be_donated(mistake, is_first):
    """One array donated twice, or gone, is an error; the bucket stays, and serves."""
    call = bucket_jit(add, in_axes="batch seq", donate_argnums=(0, 1), config=CONFIG)
    if not is_first:
        call(jnp.ones((4, 8)), jnp.ones((4, 8)))
    errors = InputShapeError if mistake is used_up else (RuntimeError, ValueError)
    with pytest.raises(errors, match=r"donate|deleted"):
        call(*mistake())
    total, _ = call(jnp.ones((4, 8)), jnp.ones((4, 8)))
    assert np.all(total == 2)
    counts = call.stats()["registry"]
    assert counts["num_graphs"] == counts["capture_count"] == 1
    assert call.explain(jnp.ones((4, 8)), jnp.ones((4, 8))).mode.name == "REPLAY"


def test_an_error_of_the_functions_own():
    """What a callback raises for one call's values is raised; the bucket stays."""

    def refuse(x):
        if np.any(x < 0):
            raise ValueError("negative")

    def checked(x):
        jax.debug.callback(refuse, x, ordered=True)
        return x * 2

    call = bucket_jit(checked, in_axes="batch seq", config=CONFIG)

    def negative():
        jax.block_until_ready(call(np.full((3, 5), -1, np.float32)))
        jax.effects_barrier()

    with pytest.raises(Exception, match="negative"):
        negative()
    assert np.all(call(np.ones((3, 5), np.float32)) == 2)
    assert call.registry.num_graphs == 1


def test_a_warm_up_without_an_example():
    """A warm-up that is given nothing says what it takes, and captures nothing."""
    call = bucket_jit(add, in_axes="batch seq", config=CONFIG)
    with pytest.raises(InputShapeError, match=r"warmup\(\) of add has no example: give the arg"):
        call.warmup()
    assert call.stats()["registry"]["num_graphs"] == 0
