"""PRNG keys among the donated arguments: a run without a request uses none of the caller's up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.capture.capturer import Capturer
from cudagraph_jax.program.call import is_key
from cudagraph_jax.program.donation import copied_key

CONFIG = CUDAGraphConfig(capture_sizes=(2, 4), warmup_iterations=2)


def sample(state, x):
    key, draw = jax.random.split(state["key"])
    return {"key": key, "step": state["step"] + 1}, x + jax.random.normal(draw, x.shape[1:])


def fresh():
    return {"key": jax.random.key(0), "step": jnp.zeros((), jnp.int32)}


def sampling(**options):
    config = CUDAGraphConfig(**{**CONFIG.to_dict(), **options})
    return bucket_jit(
        sample,
        in_axes=(None, "batch _"),
        donate_argnums=0,
        unpad=({"key": "none", "step": "none"}, "host"),
        config=config,
    )


def assert_samples(function, x, calls=3):
    state, expected = fresh(), fresh()
    for _ in range(calls):
        state, found = function(state, x)
        expected, wanted = sample(expected, x)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_warm_up_uses_no_key_up():
    """The example's key lives on, and serves."""
    function, state, x = sampling(), fresh(), np.zeros((2, 3), np.float32)
    assert function.warmup(state, x, progress=False).captured == 2
    assert not state["key"].is_deleted()
    function(state, x)
    assert state["key"].is_deleted()
    assert_samples(function, x)


@pytest.mark.parametrize(
    "options", [{"on_miss": "background"}, {"debug_mode": True}, {"on_miss": "capture"}]
)
def test_captured_from_a_request(options):
    """A capture for a request leaves the request its key."""
    function, x = sampling(**options), np.zeros((2, 3), np.float32)
    assert_samples(function, x, calls=2)
    function.manager.wait()
    assert_samples(function, x)
    assert function.registry.num_graphs == 1
    assert function.stats()["failed_buckets"] == 0


def test_sealed_where_graphs_are_recorded_again():
    """What is run again has a key of its own, whatever became of the requests' keys."""
    function, x = sampling(), np.zeros((2, 3), np.float32)
    assert_samples(function, x)
    capturer = Capturer(function.registry, captures_evict=lambda: True)
    capturer.record_again()
    assert capturer.recorded_again == 1
    assert function.registry.num_graphs == 1


def test_shapes_of_keys_do_not_break_others():
    """A warm-up that raises for want of a key leaves nothing that breaks what comes later."""
    function, x = sampling(), np.zeros((2, 3), np.float32)
    shapes = jax.eval_shape(fresh)
    with pytest.raises(TypeError, match="give the key itself"):
        function.warmup(shapes, x, progress=False)
    capturer = Capturer(function.registry, captures_evict=lambda: True)
    capturer.record_again()
    assert_samples(function, x)


@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize("rows", [9, 4])
def test_split(rows):
    """Each piece draws from a copy of the key that the call gave."""
    function = bucket_jit(
        lambda state, x: sample(state, x)[1],
        in_axes=(None, "batch _"),
        donate_argnums=0,
        config=CUDAGraphConfig(capture_sizes=(2, 4), on_overflow="split"),
    )
    x = np.zeros((rows, 3), np.float32)
    np.testing.assert_allclose(function(fresh(), x), sample(fresh(), x)[1], rtol=1e-6)


def test_copies():
    """A copy draws the same, and lives on when the key does not."""
    key = jax.random.key(3, impl="rbg")
    copy = copied_key(key)
    assert is_key(copy)
    assert not is_key(jnp.zeros(2))
    drawn = jax.random.normal(key, (3,))
    key.delete()
    np.testing.assert_array_equal(jax.random.normal(copy, (3,)), drawn)
