"""The mask of a function with one of the two axes has that axis alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit

SQUARES = np.arange(1, 6, dtype=np.float32) ** 2


def masked_sum(x, *, mask):
    """As it is written for a vector: a mask of another rank would broadcast."""
    return jnp.where(mask, x, 0).sum()


@pytest.mark.parametrize("debug_mode", [False, True])
@pytest.mark.parametrize("axis", ["batch", "seq"])
def test_a_vector(axis, debug_mode):
    """The mask of rows, or of positions, is a vector: padded, exact, eager and under `jit`."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 4, 8), capture_seq_lens=(1, 4, 8), debug_mode=debug_mode
    )
    call = bucket_jit(masked_sum, in_axes=axis, mask_argname="mask", config=config)
    for n in (1, 3, 4, 5):
        for _ in range(2):
            assert call(SQUARES[:n]) == SQUARES[:n].sum()
            assert jax.jit(call)(SQUARES[:n]) == SQUARES[:n].sum()
    eager = bucket_jit(
        masked_sum, in_axes=axis, mask_argname="mask", config=CUDAGraphConfig.disabled()
    )
    assert eager(SQUARES) == SQUARES.sum()


@pytest.mark.parametrize("axis", ["batch", "seq"])
def test_a_warm_up(axis):
    """Runs without a request have the same mask."""
    config = CUDAGraphConfig(capture_sizes=(4, 8), capture_seq_lens=(4, 8))
    call = bucket_jit(masked_sum, in_axes=axis, mask_argname="mask", config=config)
    assert call.warmup(SQUARES[:3], progress=False).captured == 2
    assert call(SQUARES) == SQUARES.sum()
    assert call.explain(SQUARES).mode.name == "REPLAY"


def test_pieces():
    """A batch in pieces has a mask of rows for each."""
    config = CUDAGraphConfig(capture_sizes=(2, 4), on_overflow="split")
    call = bucket_jit(
        lambda x, *, mask: jnp.where(mask, x, 0) * 2,
        in_axes="batch",
        mask_argname="mask",
        config=config,
    )
    x = np.arange(11, dtype=np.float32)
    np.testing.assert_array_equal(call(x), x * 2)


def test_from_a_store(tmp_path):
    """So has what another process stored under a fingerprint."""
    for _ in range(2):
        call = bucket_jit(
            masked_sum,
            in_axes="batch",
            mask_argname="mask",
            config=CUDAGraphConfig(capture_sizes=(4, 8)),
            store=tmp_path / "store",
            fingerprint="v1",
        )
        assert call(SQUARES) == SQUARES.sum()
    assert call.stats()["store"]["hits"] == 1
