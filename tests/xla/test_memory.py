"""Memory of an executable: what it keeps, what a run borrows, what it closes over."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cudagraph_jax.xla.memory import Memory, closed_over_bytes, memory_of, pool_bytes

SPEC = jax.ShapeDtypeStruct((64, 64), np.float32)
W = jnp.ones((64, 64))


def traced(function):
    return jax.jit(function).trace(SPEC)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ W,
        lambda x: x @ np.ones((64, 64), np.float32),
        lambda x: x @ W + W,
        lambda x: jax.jit(lambda y: y @ W)(x) + W,
        lambda x: lax.scan(lambda c, _: (c + W, None), x, None, length=3)[0],
        lambda x: lax.cond(x.sum() > 0, lambda y: y + W, lambda y: y - W, x),
        lambda x: lax.while_loop(lambda c: c.sum() < 0, lambda c: c + W, x),
        jax.vmap(lambda row: row @ W),
        jax.grad(lambda x: (x @ W).sum()),
        jax.checkpoint(lambda x: x @ W),
    ],
)
def test_each_array_that_is_closed_over_counts_once(function):
    """An array that is no argument is counted once, however deep and however often it is used."""
    assert closed_over_bytes(traced(function).jaxpr) == W.nbytes


def test_what_is_made_or_given_is_not_closed_over():
    """Arguments, numbers, and arrays that the traced function makes itself do not count."""
    assert closed_over_bytes(traced(lambda x: x * 2.0 + jnp.ones((64, 64))).jaxpr) == 0


def test_code_that_is_not_reported_is_estimated():
    """A program counts some hundred kilobytes, more for more operations, and its constants."""

    def memory(function):
        stage = traced(function)
        held = memory_of(stage.lower().compile(), closed_over_bytes=closed_over_bytes(stage.jaxpr))
        assert held is not None
        return held

    def deep(x):
        for _ in range(20):
            x = jnp.sin(x) @ x + jnp.cumsum(x, axis=0)
        return x

    small, large, closing = memory(jnp.sin), memory(deep), memory(lambda x: jnp.sin(x) + W)
    assert 2**18 < small.kept_bytes < 2**20
    assert large.kept_bytes > 2 * small.kept_bytes
    assert closing.kept_bytes >= small.kept_bytes + W.nbytes
    assert (small.closed_over_bytes, closing.closed_over_bytes) == (0, W.nbytes)


def test_a_peak_on_a_cpu_has_no_temporary_memory():
    """What XLA reports as the peak on a CPU is less than what a run takes, so it is not used."""
    wide = jax.ShapeDtypeStruct((1 << 18,), np.float32)
    compiled = (
        jax.jit(lambda x: lax.scan(lambda c, by: (c + 1, c * by), x, jnp.arange(16.0))[1].sum())
        .lower(wide)
        .compile()
    )
    if jax.default_backend() != "cpu":
        pytest.skip("on a GPU the peak includes temporary memory")
    report, held = compiled.memory_analysis(), memory_of(compiled)
    assert report is not None
    assert held is not None
    assert held.temporary_bytes >= 2**24 > 4 * report.peak_memory_in_bytes


def test_a_pool_holds_all_code_and_the_largest_temporary_memory():
    """Together executables take all that they keep, and what one run borrows at most."""
    assert pool_bytes([Memory(1, 10), None, Memory(2, 30), Memory(4)]) == 7 + 30
    assert pool_bytes([]) == 0
