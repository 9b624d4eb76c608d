"""debug_mode: `compare_where="mask"` leaves out what the caller's own masks leave out."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphWarning, PaddingLeakError, bucket_jit
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import as_a_whole
from tests.helpers.functions import assert_close, floats

ALL = CUDAGraphConfig(
    capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0, debug_mode=True
)
WHERE_TRUE = dataclasses.replace(ALL, compare_where="mask")
LENGTHS = np.array([3, 5, 2])
MASK = np.arange(5) < LENGTHS[:, None]
FEATURES, TOKENS = "batch seq _", "batch seq"
X = floats(0, 3, 5, 4)


@by_numpy
def encoded(x, mask):
    """Attention under a mask of queries and keys: a query that is none sees all keys alike."""
    allowed = (mask[:, :, None] != 0) & (mask[:, None, :] != 0)
    scores = x @ x.swapaxes(1, 2)
    return softmax(xp(x).where(allowed, scores, jnp.finfo(scores.dtype).min)) @ x


@by_numpy
def totals(x, mask):
    """Of rows and of positions: for those of which something is real."""
    each = encoded(x, mask)
    total = xp(x).where(mask[..., None] != 0, each, 0)
    return {
        "each": each.swapaxes(0, 1),
        "rows": total.sum(axis=1),
        "positions": total.sum(axis=(0, 2)),
        "all": total.sum(),
    }


def bucketed(function, config, **options):
    options = {"in_axes": (FEATURES, TOKENS), **options}
    return bucket_jit(function, config=config, **options)


def refusal(function, *args):
    with pytest.raises(PaddingLeakError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.float32])
def test_padded_queries(dtype):
    """Rows of padded queries differ; the message says so, and its advice is accepted."""
    mask = MASK.astype(dtype)
    message = refusal(bucketed(encoded, ALL), X, mask)
    assert "the padding changes only what a mask leaves out (the batch is padded from 3" in message
    assert "it differs only where mask is false" in message
    assert 'set compare_where="mask"' in message
    found = bucketed(encoded, WHERE_TRUE)(X, mask)
    expected = np.asarray(encoded(X, mask))
    assert_close(found[MASK], expected[MASK])


def test_flax():
    """What flax.nnx makes of a mask of tokens is accepted where the mask is true."""
    nnx = pytest.importorskip("flax.nnx")

    @as_a_whole
    def attended(x, mask):
        heads = x[:, :, None]
        allowed = nnx.make_attention_mask(mask, mask, dtype=bool)
        return nnx.dot_product_attention(heads, heads, heads, mask=allowed)[:, :, 0]

    assert "differs only where mask is false" in refusal(bucketed(attended, ALL), X, MASK)
    found = bucketed(attended, WHERE_TRUE)(X, MASK)
    expected = np.asarray(attended(jnp.asarray(X), jnp.asarray(MASK)))
    assert_close(found[MASK], expected[MASK])


def test_the_other_advice():
    """A function that leaves the padding out there, too, is accepted as it is."""

    @by_numpy
    def cleared(x, mask):
        return xp(x).where(mask[..., None], encoded(x, mask), 0)

    found = bucketed(cleared, ALL)(X, MASK)
    assert_close(found, np.asarray(cleared(X, MASK)))


def test_outputs_of_every_axes():
    """Rows and positions are compared where anything of them is real, and totals as a whole."""
    mask = MASK.copy()
    mask[1] = False
    message = refusal(bucketed(totals, ALL), X, mask)
    assert "output ['each']" in message
    bucketed(totals, WHERE_TRUE)(X, mask)

    for leaky, name in [
        (lambda x, mask: encoded(x, mask).sum(axis=1), "the output[0, "),
        (lambda x, mask: encoded(x, mask).sum(axis=(0, 2)), "the output["),
        (lambda x, mask: encoded(x, mask).sum(), "the output[]"),
    ]:
        message = refusal(bucketed(by_numpy(leaky), WHERE_TRUE), X, mask)
        assert name in message
        assert "the padding changes the real rows" in message


def test_leaks_into_what_is_real_are_caught():
    """Where the mask is true nothing is forgiven."""

    @by_numpy
    def leaky(x, mask):
        return encoded(x, mask) + x.mean(axis=1, keepdims=True)

    for config in (ALL, WHERE_TRUE):
        message = refusal(bucketed(leaky, config), X, MASK)
        assert "the padding changes the real rows" in message
        assert "compare_where" not in message


def test_inverted_masks():
    """A mask that is padded with 1 is true where there is padding."""

    @by_numpy
    def inverted(x, is_padding):
        return encoded(x, ~is_padding)

    options = {"pad_values": (0, True)}
    assert "where is_padding is false" not in refusal(bucketed(inverted, ALL), X, ~MASK)
    message = refusal(bucketed(inverted, ALL, pad_values=(0, True)), X, ~MASK)
    assert "only what a mask leaves out" in message
    bucketed(inverted, WHERE_TRUE, **options)(X, ~MASK)


def test_masks_in_a_pytree():
    """A mask inside of an argument is found, and named."""

    @by_numpy
    def model(inputs):
        return encoded(inputs["x"], inputs["mask"])

    inputs = {"x": X, "mask": MASK}
    axes = ({"x": FEATURES, "mask": TOKENS},)
    assert "where inputs['mask'] is false" in refusal(bucketed(model, ALL, in_axes=axes), inputs)
    bucketed(model, WHERE_TRUE, in_axes=axes)(inputs)


def test_functions_of_one_axis():
    """A mask of rows alone says which rows are compared."""

    @by_numpy
    def model(x, real):
        weights = xp(x).where(real, x, 0) / xp(x).where(real, x, 0).sum()
        return xp(x).where(real, weights, x.mean())

    config = dataclasses.replace(ALL, capture_seq_lens=None)
    args = np.abs(floats(0, 3)), np.array([True, True, False])
    options = {"in_axes": ("batch", "batch")}
    assert "only what a mask leaves out" in refusal(bucketed(model, config, **options), *args)
    config = dataclasses.replace(config, compare_where="mask")
    bucketed(model, config, **options)(*args)


def test_masks_of_two_axes_apart():
    """Bools of the batch and bools of the sequence leave out rows and positions."""

    @by_numpy
    def model(x, rows, positions):
        real = rows[:, None] & positions
        return xp(x).where(real, x, x.mean())

    args = X[..., 0], np.array([True, False, True]), np.array([True, True, False, True, False])
    options = {"in_axes": (TOKENS, "batch", "seq")}
    assert "where rows or positions is false" in refusal(bucketed(model, ALL, **options), *args)
    bucketed(model, WHERE_TRUE, **options)(*args)


def test_the_librarys_mask_says_that_all_is_real():
    """With `mask_argname`, or without any mask, every real element is compared."""

    @by_numpy
    def model(x, *, mask):
        return encoded(x, mask)

    centred = by_numpy(lambda x: x - x.mean(axis=1, keepdims=True))
    options = {"in_axes": (FEATURES,)}
    for config in (ALL, WHERE_TRUE):
        found = bucketed(model, config, mask_argname="mask", **options)(X)
        expected = encoded(X, np.ones((3, 5), bool))
        assert_close(found, np.asarray(expected))
        assert "changes the real rows" in refusal(bucketed(centred, config, **options), X)


def test_masks_that_leave_nothing_to_compare():
    """Masks of which no element is true together prove nothing, which is said."""

    def model(x, mask, is_padding):
        return encoded(x, mask & ~is_padding)

    function = bucketed(model, WHERE_TRUE, in_axes=(FEATURES, TOKENS, TOKENS))
    with pytest.warns(CUDAGraphWarning, match="no element is true in mask and is_padding"):
        function(X, MASK, ~MASK)
    options = {"in_axes": (FEATURES, TOKENS, TOKENS), "pad_values": (0, False, True)}
    bucketed(model, WHERE_TRUE, **options)(X, MASK, ~MASK)
