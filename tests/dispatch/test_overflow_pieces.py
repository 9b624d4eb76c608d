"""Pieces of a split batch: decided once for each size, compiled never after seal()."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import bucket_jit, no_compiles
from tests.helpers.faults import Interrupted, by_bucket_jit, managed
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

SPLIT = dataclasses.replace(GRID, on_overflow="split")
WARM: dict[str, Any] = {}


def several(x):
    return {"twice": x * 2, "sum": x.sum(1), "turned": x.T}


def warm(unpad):
    """One function an `unpad`, so that the grid is compiled once for all examples."""
    if unpad not in WARM:
        WARM[unpad] = bucket_jit(several, in_axes=("batch seq",), unpad=unpad, config=SPLIT)
        WARM[unpad].warmup(floats(0, 4, 5), progress=False)
        WARM[unpad].seal()
    return WARM[unpad]


@given(
    unpad=st.sampled_from(["host", "device", "none"]),
    batch=st.integers(5, 23),
    seq=st.integers(1, 5),
    on_device=st.booleans(),
)
@settings(max_examples=40)
def test_no_size_compiles_after_sealing(unpad, batch, seq, on_device):
    """Cutting, padding, trimming and joining compile nothing, whatever `unpad` and the sizes."""
    function, x = warm(unpad), floats(batch, batch, seq)
    given_array = jax.device_put(x) if on_device else x
    with no_compiles():
        found = function(given_array)
    kind = np.ndarray if unpad == "host" else jax.Array
    assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(found))
    arrays = jax.tree.map(np.asarray, found)
    if unpad == "none":
        arrays["twice"] = arrays["twice"][:batch, :seq]
        arrays["turned"] = arrays["turned"][:seq, :batch]
        arrays["sum"] = arrays["sum"][:batch]
    assert_close(arrays, {"twice": x * 2, "sum": x.sum(1), "turned": x.T})
    assert stats_of(function)["eager_calls"] == 0


@pytest.mark.parametrize("unpad", ["device", "none"])
def test_keys_can_be_joined(unpad):
    """Outputs that NumPy cannot hold, such as PRNG keys, are joined all the same."""

    def keys(seeds):
        return jax.vmap(jax.random.key)(seeds), seeds

    function = bucket_jit(keys, in_axes=("batch",), unpad=unpad, config=SPLIT)
    seeds = np.arange(9, dtype=np.uint32)
    found: Any = function(seeds)
    expected = jax.random.key_data(keys(jnp.asarray(seeds))[0])
    assert_close(np.asarray(jax.random.key_data(found[0]))[:9], np.asarray(expected), 0)
    assert_close(np.asarray(found[1])[:9], seeds, 0)


@pytest.mark.parametrize(("rows", "distinct"), [(8, 1), (40, 1), (9, 2), (41, 2), (7, 2)])
def test_each_size_of_piece_is_decided_once(rows, distinct):
    """However many pieces there are, their buckets are looked up once for each distinct size."""
    registry = Interrupted(SPLIT)
    manager = managed(SPLIT, registry=registry)
    function: Any = by_bucket_jit(manager, double)
    function.warmup(floats(0, 4, 5), progress=False)
    x = floats(0, rows, 5)
    function(x)
    registry.lookups = 0
    assert_close(function(x), x * 2)
    # The call's own size, then what each piece does before anything is cut, and when it is.
    assert registry.lookups == 1 + 2 * distinct
    assert stats_of(manager)["pieces"] == 2 * -(-rows // 4)


@pytest.mark.parametrize("unpad", ["host", "device", "none", "padded"])
def test_outputs_that_jax_has_in_numpy(unpad):
    """Such are those of float0: they are cut and joined as they come, whole or in pieces."""
    slope = jax.grad(lambda ids: 1.0, allow_int=True)
    function = bucket_jit(slope, in_axes="batch seq", unpad=unpad, config=SPLIT)
    for rows in (2, 3, 7):
        found = np.asarray(function(np.ones((rows, 4), np.int32)))
        assert found.dtype == jax.dtypes.float0
        assert unpad == "none" or found.shape == (rows, 4)
