"""The kit tries rows of their own lengths in one call."""

from typing import Any

import numpy as np
import pytest

from cudagraph_jax import ConfigError, CUDAGraphConfig, bucket_jit
from cudagraph_jax.testing import assert_batching_preserves, assert_bucketing_preserves
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import examples

FEW = examples(15, thorough=30)
WEIGHTS = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)


@by_numpy
def attend(weights, ids, *, mask):
    """A softmax over each row's own tokens, and the mean of them."""
    x = weights[ids]
    mixed = softmax(xp(x).where(mask[:, None, :], x @ x.swapaxes(1, 2), -1e30)) @ x
    return {"tokens": mixed, "mean": (mixed * mask[..., None]).sum(1) / mask.sum(1)[:, None]}


def test_a_model_of_own_masks():
    """A model that goes by each row's mask is right in any company."""
    assert_batching_preserves(
        attend,
        in_axes=(None, "batch seq"),
        example=(WEIGHTS, np.ones((1, 1), np.int32)),
        values=(None, (0, 9)),
        mask_argname="mask",
        settings=FEW,
    )


@by_numpy
def first_count(x, *, mask):
    return (x * mask).sum(1) / mask[0].sum()


@by_numpy
def longest_count(x, *, mask):
    return (x * mask).sum(1) / mask.sum(1).max()


@by_numpy
def one_end(x, *, mask):
    return x[:, mask[0].sum() - 1]


@pytest.mark.parametrize("mistake", [first_count, longest_count, one_end])
def test_a_mistake_that_rectangles_do_not_show(mistake):
    """What one row's mask says of all others is found, and told; rectangles do not find it."""
    options: dict[str, Any] = {"in_axes": "batch seq", "mask_argname": "mask", "settings": FEW}
    assert_bucketing_preserves(mistake, **options)
    with pytest.raises(AssertionError, match="another answer in company than alone") as error:
        assert_batching_preserves(mistake, **options)
    assert f"{mistake.__name__} gives a row" in str(error.value)
    assert "go by each row's own part of the mask" in str(error.value)
    assert "rows=" in error.value.__notes__[0]


def test_lengths_of_rows_and_named_axes():
    """Lengths that are given go with their row, as do sizes of further axes and either side."""

    @by_numpy
    def means(x, lengths):
        real = xp(x).arange(x.shape[1]) < lengths[:, None]
        return (x * real).sum(1) / lengths

    @by_numpy
    def pairs(src, tgt, *, src_mask):
        return xp(src).einsum("bs,bt->bts", xp(src).where(src_mask, src, 0), tgt)

    assert_batching_preserves(
        means,
        in_axes=("batch seq", "batch"),
        dtypes=("float32", "int32"),
        values=(None, "lengths"),
        settings=FEW,
    )
    assert_batching_preserves(
        pairs,
        in_axes=("batch src", "batch tgt"),
        mask_argname={"src_mask": "batch src"},
        pad_side=("left", "right"),
        settings=FEW,
    )


def test_where_lengths_are_not_padded():
    """Where each length is a bucket of its own, rows that share a call have one length."""
    config = CUDAGraphConfig(capture_sizes=(1, 4))
    assert_batching_preserves(
        by_numpy(lambda x: x.mean(1)), in_axes="batch seq", config=config, settings=FEW
    )


def test_what_cannot_be_batched():
    """A function without rows is refused, as by the batcher itself."""
    bucketed = bucket_jit(
        lambda x, y: (x + 1, y),
        in_axes=("batch seq", "seq"),
        config=CUDAGraphConfig(capture_sizes=(1, 2), capture_seq_lens=(4,)),
    )
    with pytest.raises(ConfigError, match="no row for each item"):
        assert_batching_preserves(bucketed, example=(np.ones((1, 2)), np.ones(2)))


def test_indices_go_with_their_row():
    """An array of positions is lowered with the row that it points into, and 0 stays 0."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 4), capture_seq_lens=(4, 8), capture_axes={"src": (4, 8)}
    )
    assert_batching_preserves(
        by_numpy(lambda x, at: xp(x).take_along_axis(x, at, 1)),
        in_axes=("batch seq", "batch src"),
        dtypes=(None, "int32"),
        values=(None, "positions"),
        config=config,
        settings=FEW,
    )


def test_where_no_rows_share_a_call():
    """A grid in which nothing would be tried is refused; what padding is enough for is told so."""
    with pytest.raises(ConfigError, match="let no two rows share a call"):
        assert_batching_preserves(
            first_count, in_axes="batch seq", config=CUDAGraphConfig(capture_sizes=(1,))
        )
    with pytest.raises(AssertionError, match="assert_bucketing_preserves says why"):
        assert_batching_preserves(by_numpy(lambda x: x.mean(1)), in_axes="batch seq", settings=FEW)
