"""`jax.transfer_guard("disallow")`: what `jit` allows is allowed, what it refuses is refused."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit

CONFIG = CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(8, 16), warmup_iterations=1)
SHAPES = [(3, 5), (4, 8), (1, 16)]


@pytest.fixture(params=["host", "device", "none"])
def unpad(request):
    return request.param


@pytest.fixture(params=[CONFIG, dataclasses.replace(CONFIG, debug_mode=True)])
def config(request):
    return request.param


@pytest.mark.parametrize("is_warm", [False, True])
def test_jax_arrays(unpad, config, is_warm):
    """JAX arrays are padded, masked, trimmed, captured and warmed up with under the guard."""

    def masked(scale, x, y, *, mask):
        return jnp.where(mask, x, 0) * scale + y["y"]

    call = bucket_jit(
        masked,
        in_axes=(None, "batch seq", "batch seq"),
        mask_argname="mask",
        unpad=unpad,
        config=config,
    )
    given = [
        (jnp.float32(2), jnp.full(shape, 3.0), {"y": jnp.full(shape, 1.0)}) for shape in SHAPES
    ]
    with jax.transfer_guard("disallow"):
        if is_warm:
            call.warmup(*given[0], progress=False)
        for arguments in given * 2:
            answer = call(*arguments)
            rows, columns = arguments[1].shape
            assert np.all(jax.device_get(answer)[:rows, :columns] == 7)


def test_donated_arrays():
    """A donated array that is padded is used up under the guard as well."""
    call = bucket_jit(lambda x: x + 1, in_axes="batch seq", donate_argnums=0, config=CONFIG)
    for shape in (*SHAPES, *SHAPES):
        x = jnp.zeros(shape)
        with jax.transfer_guard("disallow"):
            assert np.all(call(x) == 1)
        assert x.is_deleted()


def test_pieces():
    """A batch is cut into pieces and joined under the guard."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), on_overflow="split")
    call = bucket_jit(lambda x: x * x, in_axes="batch _", config=config)
    x = jnp.ones((11, 3))
    with jax.transfer_guard("disallow"):
        assert np.all(call(x) == 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_numpy_arrays_are_refused_as_under_jit(shape):
    """A NumPy array of the caller's is an implicit transfer, whether it is padded or not."""
    call = bucket_jit(lambda x, y: x + y, in_axes="batch seq", config=CONFIG)
    x, y = np.ones(shape, np.float32), jnp.ones(shape)
    np.testing.assert_array_equal(call(x, y), 2 * x)
    captured = call.registry.num_graphs
    for arguments in ((x, y), (y, x)):
        with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError) as caught:
            call(*arguments)
        assert "Disallowed host-to-device transfer" in str(caught.value)
    assert call.registry.num_graphs == captured
    np.testing.assert_array_equal(call(x, y), 2 * x)


def test_masks_that_may_not_be_put_on_the_device():
    """A route that cannot be made leaves nothing half made, and the next one is."""
    call = bucket_jit(
        lambda x, *, mask: x * mask, in_axes="batch seq", mask_argname="mask", config=CONFIG
    )
    x = np.ones((4, 8), np.float32)
    call.warmup(x, progress=False)
    with (
        jax.transfer_guard("disallow_explicit"),
        pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"),
    ):
        call(x)
    gc.collect()  # what fails in a `__del__` fails the test
    np.testing.assert_array_equal(call(x), x)
