"""Padding on the left, as text generation has it: what is real stands at the end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax import ConfigError, CUDAGraphConfig, InputShapeError, bucket_jit, no_compiles
from tests.helpers.functions import floats

CONFIG = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), warmup_iterations=1)
SIZES = [(1, 1), (1, 16), (3, 5), (4, 8), (4, 9)]


def next_token(ids, *, mask):
    """The last token's score of each row, after causal means; and positions counted by the mask."""
    positions = jnp.cumsum(mask, 1) - 1
    total = jnp.cumsum(jnp.where(mask, ids, 0), 1)
    mean = total / jnp.maximum(positions + 1, 1)
    return mean[:, -1], mean, jnp.where(mask, positions, 0)


@pytest.fixture(scope="module")
def generator():
    function = bucket_jit(
        next_token, in_axes="batch seq", mask_argname="mask", pad_side="left", config=CONFIG
    )
    function.warmup(floats(0, 1, 3), progress=False)
    return function


@given(st.integers(1, 4), st.integers(1, 16))
def test_the_last_token_is_the_last(generator, batch, seq):
    """What reads the last position reads a real one, and outputs are cut on the left."""
    ids = floats(batch + 10 * seq, batch, seq)
    # By NumPy: JAX would compile each operation for each size.
    positions = np.broadcast_to(np.arange(seq), ids.shape)
    mean = np.cumsum(ids, 1) / (positions + 1)
    expected = mean[:, -1], mean, positions
    with no_compiles():
        found = generator(ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("unpad", ["host", "device"])
@pytest.mark.parametrize("shape", SIZES)
def test_lengths_that_follow_are_cut_on_the_left(shape, unpad):
    """So are outputs of one less, or of twice the length, and those that `out_axes` names."""
    x = floats(0, *shape)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (lambda x: x[:, 1:] - x[:, :-1], {}),
        (lambda x: x[:, 1:] - x[:, :-1], {"out_axes": "batch seq-1"}),
        (lambda x: x[:, -4:], {}),
        (lambda x: jnp.repeat(x, 2, axis=1), {}),
        (lambda x: x * 2, {"out_axes": "batch seq"}),
        (lambda x: jnp.einsum("bs,bt->bst", x, x), {}),
        (lambda x: {"all": x, "rows": x[:, -1]}, {}),
    ]
    for function, options in cases:
        call = bucket_jit(
            function, in_axes="batch seq", pad_side="left", unpad=unpad, config=CONFIG, **options
        )
        for _ in range(2):
            jax.tree.map(np.testing.assert_allclose, call(x), function(x))


STEPS = {
    "stride": (lambda x: x[:, ::2], "batch (seq+1)//2"),
    "windows": (
        lambda x: x[:, : x.shape[1] // 3 * 3].reshape(len(x), -1, 3).sum(2),
        "batch seq//3",
    ),
    "whole pairs": (lambda x: x[:, : x.shape[1] // 2 * 2], None),
    "even ones": (lambda x: x.reshape(len(x), -1, 2).sum(2), "batch seq//2"),
    "rows beside": (lambda x: {"rows": x[:, -1], "half": x[:, ::2]}, None),
}


@pytest.mark.parametrize("is_declared", [False, True])
@pytest.mark.parametrize(("function", "out_axes"), STEPS.values(), ids=STEPS)
def test_steps_over_padding_in_front(function, out_axes, is_declared):
    """Strides and windows, which start at the padding, are refused at any size, or not cut."""
    options = {"out_axes": out_axes} if is_declared else {}
    for seq in (8, 6, 5):
        call = bucket_jit(function, in_axes="batch seq", pad_side="left", config=CONFIG, **options)
        with pytest.raises(InputShapeError, match=r"in steps.*is padded on the left.*pad_side"):
            call(floats(0, 3, seq))
    whole = bucket_jit(function, in_axes="batch seq", pad_side="left", unpad="none", config=CONFIG)
    right = bucket_jit(function, in_axes="batch seq", config=CONFIG, **options)
    x = floats(0, 4, 8)
    for served in (whole, right):
        jax.tree.map(np.testing.assert_allclose, served(x), function(x))


@pytest.mark.parametrize("pad", [0, 7, "edge"])
def test_what_stands_in_front(pad):
    """The padding of the sequence is in front of the row, that of the batch behind the others."""
    call = bucket_jit(
        lambda x: x + 0,
        in_axes="batch seq",
        pad_side="left",
        pad_values=pad,
        unpad="none",
        config=CONFIG,
    )
    found = call(np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32))
    expected = np.full((4, 8), 0 if pad == "edge" else pad, np.float32)
    expected[:3, -3:] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    if pad == "edge":
        expected[3] = expected[2]
        expected[:, :5] = expected[:, 5:6]
    np.testing.assert_array_equal(found, expected)


def test_sides_by_argument():
    """An encoder padded on the right, and a decoder padded on the left."""
    config = CUDAGraphConfig(
        capture_sizes=(2,), capture_axes={"src": (8,), "tgt": (4, 8)}, warmup_iterations=0
    )
    function = bucket_jit(
        lambda source, target: (source[:, 0] + target[:, -1], source * 2, target * 3),
        in_axes=("batch src", "batch tgt"),
        pad_side=("right", "left"),
        config=config,
    )
    source, target = floats(0, 2, 5), floats(1, 2, 3)
    first, twice, thrice = function(source, target)
    np.testing.assert_allclose(first, source[:, 0] + target[:, -1], rtol=1e-6)
    np.testing.assert_allclose(twice, source * 2, rtol=1e-6)
    np.testing.assert_allclose(thrice, target * 3, rtol=1e-6)


def test_pieces_are_cut_on_the_left():
    """A batch larger than every bucket is joined from pieces that are padded on the left."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(8,), on_overflow="split")
    x = floats(0, 5, 3)
    for unpad in ("host", "device"):
        call = bucket_jit(
            lambda x: (x * 2, x[:, -1]),
            in_axes="batch seq",
            pad_side="left",
            unpad=unpad,
            config=config,
        )
        jax.tree.map(np.testing.assert_allclose, call(x), (x * 2, x[:, -1]))


def test_a_restart_keeps_the_side(tmp_path):
    """The side is part of what identifies an executable, and of what is stored of its outputs."""
    x = floats(0, 2, 3)
    for side in ("left", "right", "left"):
        call = bucket_jit(
            lambda x: (x * 2, x[:, -1]),
            in_axes="batch seq",
            pad_side=side,
            config=CONFIG,
            store=tmp_path,
            fingerprint="v1",
        )
        doubled, last = call(x)
        np.testing.assert_allclose(doubled, x * 2, rtol=1e-6)
        np.testing.assert_allclose(last, x[:, -1] if side == "left" else np.zeros(2))
    assert call.stats()["registry"]["load_count"] == 1


def test_debug_mode():
    """What is right with padding on the left is accepted, and what is not is refused."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(8,), debug_mode=True)
    x = floats(0, 2, 5)
    last = bucket_jit(lambda x: x[:, -1], in_axes="batch seq", pad_side="left", config=config)
    np.testing.assert_allclose(last(x), x[:, -1])
    first = bucket_jit(lambda x: x[:, 0], in_axes="batch seq", pad_side="left", config=config)
    with pytest.raises(Exception, match="the sequence is padded from"):
        first(x)


@pytest.mark.parametrize(
    ("in_axes", "pad_side", "message"),
    [
        ("batch seq", "middle", 'use "right" or "left"'),
        (("batch seq", "batch"), ("right", "left"), "rows are added at its end"),
        (("batch seq", "batch seq"), ("left", "right"), "give both one side"),
        (("batch seq",), ("left", "left"), "has not the structure"),
        ("batch seq", ("left",), "has not the structure"),
    ],
)
def test_sides_that_do_not_fit(in_axes, pad_side, message):
    """A side that is none, of a batch, or different ones of one axis are refused at decoration."""
    with pytest.raises(ConfigError, match=message):
        bucket_jit(lambda x, y=None: x, in_axes=in_axes, pad_side=pad_side, config=CONFIG)
