"""Rows of their own lengths in one call: whether each gets the answer that it gets alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import Batcher, CUDAGraphConfig, PaddingLeakError, bucket_jit
from tests.helpers.by_numpy import by_numpy, softmax, xp
from tests.helpers.examples import as_a_whole

GRID: dict[str, Any] = {"capture_sizes": (1, 4), "capture_seq_lens": (4, 8), "warmup_iterations": 0}
ROWS = [np.arange(1, n + 1, dtype=np.float32) for n in (5, 1, 8, 3)]


@by_numpy
def own_mean(x, *, mask):
    return (x * mask).sum(1) / mask.sum(1)


@by_numpy
def mean_by_the_first(x, *, mask):
    return (x * mask).sum(1) / mask[0].sum()


@by_numpy
def mean_by_the_longest(x, *, mask):
    return (x * mask).sum(1) / mask.sum(1).max()


@by_numpy
def last_by_the_first(x, *, mask):
    return x[:, mask[0].sum() - 1]


WRONG = [mean_by_the_first, mean_by_the_longest, last_by_the_first]


def served(function, **options):
    bucketed = bucket_jit(
        function,
        in_axes="batch seq",
        mask_argname="mask",
        config=CUDAGraphConfig(**GRID, **options),
    )
    bucketed.warmup(np.ones((1, 5), np.float32), progress=False)
    return bucketed


def test_a_function_of_own_masks():
    """In debug_mode rows that may share calls do so, and get the answers that they get alone."""
    with Batcher(served(own_mean, debug_mode=True)) as batcher:
        answers = batcher.map(ROWS)
    np.testing.assert_allclose(answers, [row.mean() for row in ROWS], rtol=1e-6)


@pytest.mark.parametrize("function", WRONG)
def test_what_is_right_for_a_rectangle_alone(function):
    """A function that takes one row's mask for all is refused by debug_mode before it answers."""
    with (
        Batcher(served(function, debug_mode=True)) as batcher,
        pytest.raises(PaddingLeakError, match="another answer in company than alone") as error,
    ):
        batcher.submit(ROWS[0])
    assert "go by each row's own part of the mask" in str(error.value)
    assert batcher.stats()["items"]["refused"] == 1


def test_without_debug_mode_nothing_is_tried():
    """The trial takes eager runs, which only debug_mode is worth."""
    with Batcher(served(mean_by_the_first)) as batcher:
        assert batcher.submit(ROWS[0]).result() == pytest.approx(3)


def test_buckets_that_are_captured_later():
    """A bucket that is captured while items come is tried, too, before it is used."""
    calls = {"whole": True}

    @by_numpy
    def model(x, *, mask):
        count = mask.sum(1) if calls["whole"] else mask[0].sum()
        return (x * mask).sum(1) / count

    bucketed = served(model, debug_mode=True)
    with Batcher(bucketed) as batcher:
        assert batcher.submit(ROWS[0]).result() == pytest.approx(3)
        calls["whole"] = False
        bucketed.registry.remove(4, 8)
        bucketed(np.ones((4, 5), np.float32))
        with pytest.raises(PaddingLeakError, match="in the bucket 4x8"):
            batcher.submit(ROWS[0]).result()


@by_numpy
def centred(x, *, mask):
    return x - xp(x).where(mask, x, 0).sum(0) / mask.sum(0).clip(1)


@by_numpy
def centred_by_all(x, *, mask):
    return x - xp(x).where(mask, x, 0).sum() / mask.sum()


@by_numpy
def below_the_largest(x, *, mask):
    return x - xp(x).where(mask, x, -9).max(0)


@by_numpy
def shares(x, *, mask):
    return softmax(xp(x).where(mask, x, -np.inf), axis=0)


@pytest.mark.parametrize("function", [centred, centred_by_all, below_the_largest, shares])
def test_statistics_over_the_rows(function):
    """A mean, maximum or softmax over the rows is refused, whatever the first item holds."""
    bucketed = served(function, debug_mode=True)
    for item in (ROWS[0], np.zeros(6), np.full(1, 3.0)):
        with (
            Batcher(bucketed) as batcher,
            pytest.raises(PaddingLeakError, match="no mean, maximum or softmax go over the rows"),
        ):
            batcher.submit(item.astype(np.float32))


@pytest.mark.parametrize("item", [[5, 2, 7], [4, 4, 4], [9]], ids=str)
def test_statistics_over_the_rows_of_ids(item):
    """Ids of the other rows are the item's own, or smaller ones, so that each is valid."""
    most = max(item)

    @by_numpy
    def off_by_the_mean(ids, *, mask):
        values = xp(ids).where((ids >= 1) & (ids <= most), ids, np.nan) * mask
        return values - values.sum(0) / mask.sum(0).clip(1)

    bucketed = served(off_by_the_mean, debug_mode=True)
    bucketed.warmup(np.ones((1, 5), np.int32), progress=False)
    with Batcher(bucketed) as batcher, pytest.raises(PaddingLeakError) as error:
        batcher.submit(np.array(item, np.int32))
    assert "is nan" not in str(error.value)


def test_statistics_over_rows_of_one_size():
    """Where items have no length the rows differ in their values alone, and are tried as well."""
    bucketed = bucket_jit(
        by_numpy(lambda x, *, mask: x - xp(x).where(mask[:, None], x, 0).sum(0) / mask.sum()),
        in_axes="batch _",
        mask_argname="mask",
        config=CUDAGraphConfig(capture_sizes=(1, 4), debug_mode=True),
    )
    bucketed.warmup(np.ones((1, 3), np.float32), progress=False)
    with Batcher(bucketed) as batcher, pytest.raises(PaddingLeakError, match="in company"):
        batcher.submit(np.ones(3, np.float32))


def test_values_at_which_a_loop_ends():
    """No row has a 0 that is no padding of the item's own: a loop may not end there."""

    @as_a_whole
    def halvings(x, real, *, mask):
        def live(n):
            return (n != 1) & real & mask

        def halved(state):
            n, steps = state
            return jnp.where(live(n), n // 2, n), steps + live(n)

        state = (x, jnp.zeros_like(x))
        return jax.lax.while_loop(lambda state: jnp.any(live(state[0])), halved, state)[1]

    bucketed = bucket_jit(
        halvings,
        in_axes="batch seq",
        mask_argname="mask",
        config=CUDAGraphConfig(**GRID, debug_mode=True),
    )
    bucketed.warmup(np.ones((1, 5), np.int32), np.ones((1, 5), np.bool_), progress=False)
    for item in ([1, 1, 1], [5, 5], [1, 9, 4], [6, 3, 0, 0]):
        row = np.array(item, np.int32)
        with Batcher(bucketed) as batcher:
            found = batcher.submit(row, row != 0).result()
        assert found.tolist() == [max(0, n.bit_length() - 1) for n in item]


def test_items_with_masks_lengths_and_sorted_values_of_their_own():
    """What is right for each row alone is not refused: each row's arrays are such as items have."""

    @as_a_whole
    def model(ids, mask, edges, length):
        ends = jnp.clip(length[:, None], 1) - 1
        places = jax.vmap(jnp.searchsorted)(edges, ids.astype(jnp.float32))
        total = jnp.where(mask, places, 0).sum(1) / mask.sum(1)
        return total + jnp.take_along_axis(ids, ends, 1)[:, 0]

    bucketed = bucket_jit(
        model,
        in_axes=("batch seq", "batch seq", "batch _", "batch"),
        config=CUDAGraphConfig(**GRID, debug_mode=True),
    )
    ids, mask = np.array([3, 1, 4, 1, 5], np.int32), np.arange(5) < 3
    edges = np.array([0.5, 2, 4.5], np.float32)
    items = [(ids, mask, edges, np.int32(3)), (ids[:2], np.ones(2, np.bool_), edges, np.int32(2))]
    bucketed.warmup(*(np.stack([array]) for array in items[0]), progress=False)
    for item in items:
        with Batcher(bucketed) as batcher:
            alone = model(*(np.stack([array]) for array in item))[0]
            assert batcher.submit(*item).result() == pytest.approx(alone)
