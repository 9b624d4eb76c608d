"""Padding in, trimming out: pad values, masks, unpad and donation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import ConfigError, CUDAGraphConfig, InputShapeError, bucket_jit, no_compiles
from tests.helpers.functions import GRID, assert_close, floats, tokens

sizes = st.tuples(st.integers(1, 4), st.integers(1, 5))


def padded_by_hand(x, shape, value):
    """Reference: repeats the edges or fills with `value`, element by element."""
    out = np.empty(shape, x.dtype)
    for b in range(shape[0]):
        for s in range(shape[1]):
            inside = b < x.shape[0] and s < x.shape[1]
            if inside or value == "edge":
                out[b, s] = x[min(b, x.shape[0] - 1), min(s, x.shape[1] - 1)]
            else:
                out[b, s] = value
    return out


@pytest.fixture(scope="module", params=[0, -1.5, float("nan"), float("inf"), 3, True, "edge"])
def identity(request):
    value = request.param
    function = bucket_jit(
        lambda x, y: (x, y),
        in_axes=("batch seq", "batch seq"),
        pad_values=(value, 0),
        unpad="none",
        config=GRID,
    )
    return value, function


@settings(max_examples=15)
@given(size=sizes, seed=st.integers(0, 99), device=st.booleans())
def test_padding_is_what_was_asked_for(identity, size, seed, device):
    """Every element outside the real corner is the pad value, or the nearest real element."""
    value, function = identity
    x = floats(seed, *size)
    found, other = function(jnp.asarray(x) if device else x, x)
    bucket = GRID.bucket_for(*size)
    np.testing.assert_array_equal(found, padded_by_hand(x, bucket, value))
    np.testing.assert_array_equal(other, padded_by_hand(x, bucket, 0))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.bool_, jnp.bfloat16, np.complex64])
def test_edge_padding_in_any_dtype(dtype):
    """Edge padding repeats elements of any dtype."""
    function = bucket_jit(
        lambda x: x, in_axes=("batch seq",), pad_values="edge", unpad="none", config=GRID
    )
    x = tokens(0, 2, 3).astype(dtype)
    np.testing.assert_array_equal(function(x), padded_by_hand(x, (3, 5), "edge"))


def test_edge_padding_along_other_axes():
    """Edge padding follows the declared axes, wherever they are."""
    function = bucket_jit(
        lambda x: x, in_axes=("_ seq batch",), pad_values="edge", unpad="none", config=GRID
    )
    x = floats(0, 2, 4, 3)[:, :, :2]
    expected = np.pad(x, ((0, 0), (0, 1), (0, 1)), mode="edge")
    np.testing.assert_array_equal(function(x), expected)


def test_pad_values_are_a_prefix():
    """Each leaf has the pad value that was declared for it or for the tree above it."""
    function = bucket_jit(
        lambda tree, x: (tree, x),
        in_axes=({"a": "batch", "b": ("batch", "batch")}, "batch"),
        pad_values=({"a": 7, "b": (8, "edge")}, 9),
        unpad="none",
        config=GRID,
    )
    x = np.array([1.0, 2.0], np.float32)
    tree, other = function({"a": x, "b": (x, x)}, x)
    assert [float(leaf[2]) for leaf in (tree["a"], *tree["b"], other)] == [7, 8, 2, 9]


@settings(max_examples=20)
@given(size=sizes)
def test_the_mask_is_true_where_elements_are_real(masked, size):
    """The mask has the bucket's shape and is True in exactly the real corner."""
    mask = np.asarray(masked(floats(0, *size)))
    expected = np.zeros(GRID.bucket_for(*size), bool)
    expected[: size[0], : size[1]] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.fixture(scope="module")
def masked():
    return bucket_jit(
        lambda x, *, mask: mask,
        in_axes=("batch seq",),
        mask_argname="mask",
        unpad="none",
        config=GRID,
    )


def test_the_mask_of_a_function_without_a_sequence():
    """Without a sequence the mask is bool[batch]."""
    function: Any = bucket_jit(
        lambda x, mask: (x * mask[:, None], mask),
        in_axes=("batch _",),
        mask_argname="mask",
        unpad="none",
        config=GRID,
    )
    _, mask = function(floats(0, 2, 3))
    np.testing.assert_array_equal(mask, [True, True, False])


def several(x):
    return {"rows": jnp.sum(x, 1), "each": (x, x * 2), "scale": jnp.float32(3)}


def test_unpad_host():
    """`"host"` gives read-only NumPy arrays of the real sizes, and compiles nothing."""
    function = bucket_jit(several, in_axes=("batch seq",), config=GRID)
    function.warmup(floats(0, 1, 1), progress=False)
    for size in [(2, 4), (3, 5)]:
        with no_compiles():
            found = function(floats(0, *size))
        assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}
        assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(found))
        assert_close(found, jax.jit(several)(floats(0, *size)))


def test_unpad_device():
    """`"device"` gives JAX arrays of the real sizes."""
    function = bucket_jit(several, in_axes=("batch seq",), unpad="device", config=GRID)
    for size in [(2, 4), (3, 5), (2, 4), (9, 9), (0, 3)]:
        found = function(floats(0, *size))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
        assert_close(found, jax.jit(several)(floats(0, *size)))


def test_unpad_none():
    """`"none"` gives the bucket's own JAX arrays."""
    function = bucket_jit(several, in_axes=("batch seq",), unpad="none", config=GRID)
    for _ in range(2):
        found = function(floats(0, 2, 4))
        assert found["rows"].shape == (3,)
        assert found["each"][0].shape == (3, 5)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("size", [(2, 4), (3, 5), (9, 9)], ids=["padded", "exact", "eager"])
def test_unpad_is_a_prefix(size):
    """Each output is handed out as declared for it, or for the tree above it."""
    function = bucket_jit(
        several,
        in_axes=("batch seq",),
        unpad={"rows": "host", "each": ("none", "device"), "scale": "host"},
        config=GRID,
    )
    x = floats(0, *size)
    for _ in range(2):
        found = function(x)
        assert isinstance(found["rows"], np.ndarray)
        assert isinstance(found["scale"], np.ndarray)
        assert isinstance(found["each"][0], jax.Array)
        assert isinstance(found["each"][1], jax.Array)
        assert_close(found["rows"], x.sum(1))
        assert found["each"][0].shape == (GRID.bucket_for(*size) if size != (9, 9) else size)
        assert found["each"][1].shape == size


def test_unpad_that_does_not_match_the_outputs():
    """unpad of another structure than the outputs is an error that says so."""
    function = bucket_jit(several, in_axes=("batch seq",), unpad={"rows": "host"}, config=GRID)
    with pytest.raises(InputShapeError, match="unpad"):
        function(floats(0, 2, 4))


def test_out_axes_are_a_prefix():
    """Declared axes are used as they are; None marks an output that follows neither size."""
    function = bucket_jit(
        several,
        in_axes=("batch seq",),
        out_axes={"rows": "batch", "each": "batch seq", "scale": None},
        config=GRID,
    )
    for size in [(2, 4), (3, 5), (2, 4)]:
        assert_close(function(floats(0, *size)), jax.jit(several)(floats(0, *size)))


def test_out_axes_that_do_not_match():
    """out_axes of another structure or rank are errors that name the output."""
    wrong_tree = bucket_jit(several, in_axes="batch seq", out_axes={"rows": "batch"}, config=GRID)
    with pytest.raises(InputShapeError, match="out_axes"):
        wrong_tree(floats(0, 2, 4))
    wrong_rank = bucket_jit(lambda x: x[0], in_axes="batch seq", out_axes="batch seq", config=GRID)
    with pytest.raises(InputShapeError, match=r"the output has 1 dimension"):
        wrong_rank(floats(0, 2, 4))
    with pytest.raises(ConfigError, match="choose one of batch, seq"):
        bucket_jit(several, in_axes="batch seq", out_axes="rows", config=GRID)


def test_out_axes_for_a_function_that_takes_few_sizes():
    """A function that takes one size alone needs out_axes, which is told with its own error."""
    weights = floats(1, 5)

    def fixed(x):
        return x * weights

    config = CUDAGraphConfig(capture_sizes=(4,), warmup_iterations=0)
    refused = (
        r"takes no second seq size \(cannot trace fixed: .*ncompatible shapes.*\): declare out_axes"
    )
    with pytest.raises(InputShapeError, match=refused):
        bucket_jit(fixed, in_axes=("batch seq",), config=config)(floats(0, 3, 5))
    declared = bucket_jit(fixed, in_axes=("batch seq",), out_axes="batch seq", config=config)
    assert_close(declared(floats(0, 3, 5)), floats(0, 3, 5) * weights)


def test_outputs_that_need_no_array():
    """None and empty trees among the outputs stay what they are."""
    function = bucket_jit(lambda x: (None, (), {"x": x}), in_axes=("batch",), config=GRID)
    for size in (2, 3, 2):
        assert_close(function(floats(0, size)), (None, (), {"x": floats(0, size)}))


def test_prng_keys_as_outputs():
    """A PRNG key cannot be a NumPy array: the error says what to ask for."""

    def split(x):
        return x, jax.random.split(jax.random.key(0))

    with pytest.raises(InputShapeError, match="PRNG key"):
        bucket_jit(split, in_axes=("batch",), config=GRID)(floats(0, 2))
    function = bucket_jit(split, in_axes=("batch",), unpad=("host", "device"), config=GRID)
    assert function(floats(0, 2))[1].shape == (2,)


def advance(state, x):
    return jax.tree.map(lambda leaf: leaf + x, state)


@pytest.mark.parametrize("size", [(3, 5), (2, 4)], ids=["exact", "padded"])
@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_donated_arrays_are_gone(size, by_name):
    """Donated device arrays are deleted after every call, whether they were padded or not."""
    function = bucket_jit(
        advance,
        in_axes=("batch seq", "batch seq"),
        donate_argnums=0,
        unpad="device",
        config=GRID,
    )
    x = floats(1, *size)
    for _ in range(3):
        state = {"a": jnp.asarray(floats(0, *size)), "b": jnp.asarray(floats(2, *size))}
        found = function(state=state, x=x) if by_name else function(state, x)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert_close(found, {"a": floats(0, *size) + x, "b": floats(2, *size) + x})


def test_donated_host_arrays_stay():
    """NumPy arrays are the caller's, donated or not."""
    function = bucket_jit(
        advance, in_axes=("batch seq", "batch seq"), donate_argnums=[0], config=GRID
    )
    for size in [(3, 5), (2, 4)]:
        state, x = floats(0, *size), floats(1, *size)
        for _ in range(2):
            assert_close(function(state, x), floats(0, *size) + x)
        np.testing.assert_array_equal(state, floats(0, *size))


def test_donation_and_warmup():
    """Warm-up does not consume the example arguments."""
    function = bucket_jit(
        advance, in_axes=("batch seq", "batch seq"), donate_argnums=0, config=GRID
    )
    state, x = jnp.asarray(floats(0, 3, 5)), floats(1, 3, 5)
    function.warmup(state, x, progress=False)
    assert not state.is_deleted()
    assert_close(function(state, x), floats(0, 3, 5) + x)
    assert state.is_deleted()


def test_a_deleted_array_is_an_error():
    """An array that was donated before is an error, not an eager run of something else."""
    function = bucket_jit(
        advance, in_axes=("batch seq", "batch seq"), donate_argnums=0, config=GRID
    )
    for size in [(3, 5), (2, 4)]:
        state, x = jnp.asarray(floats(0, *size)), floats(1, *size)
        function(state, x)
        for _ in range(2):
            with pytest.raises(
                InputShapeError, match=r"^state is deleted, .*donated to an earlier"
            ):
                function(state, x)
    outcomes = function.stats()["errors_by_reason"]
    assert sum(outcomes.values()) == 4


def test_deleted_arrays_however_a_call_is_served():
    """Also by keyword, in a pytree, eagerly, or as parameters the error names the array."""
    function = bucket_jit(
        lambda params, x: x * params["w"], in_axes=(None, "batch seq"), config=GRID
    )
    params = {"w": jnp.ones(())}
    calls = [floats(0, 3, 5), floats(0, 2, 4), floats(0, 99, 5)]
    for x in calls:
        function(params, x)
    params["w"].delete()
    for x in calls:
        for call in (lambda x=x: function(params, x), lambda x=x: function(params, x=x)):
            with pytest.raises(InputShapeError, match=r"^params\['w'\] is deleted"):
                call()
    closed = jnp.ones(())
    closed.delete()
    with pytest.raises(RuntimeError, match="been deleted"):
        bucket_jit(lambda x: x * closed, in_axes="batch seq", config=GRID)(floats(0, 2, 4))
