"""Rows of their own lengths in one call: whether each gets the answer that it gets alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import Batcher, CUDAGraphConfig, PaddingLeakError, bucket_jit

GRID: dict[str, Any] = {"capture_sizes": (1, 4), "capture_seq_lens": (4, 8), "warmup_iterations": 0}
ROWS = [np.arange(1, n + 1, dtype=np.float32) for n in (5, 1, 8, 3)]


def own_mean(x, *, mask):
    return jnp.sum(x * mask, axis=1) / jnp.sum(mask, axis=1)


def mean_by_the_first(x, *, mask):
    return jnp.sum(x * mask, axis=1) / jnp.sum(mask[0])


def mean_by_the_longest(x, *, mask):
    return jnp.sum(x * mask, axis=1) / jnp.max(jnp.sum(mask, axis=1))


def last_by_the_first(x, *, mask):
    return x[:, jnp.sum(mask[0]) - 1]


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

    def model(x, *, mask):
        count = jnp.sum(mask, axis=1) if calls["whole"] else jnp.sum(mask[0])
        return jnp.sum(x * mask, axis=1) / count

    bucketed = served(model, debug_mode=True)
    with Batcher(bucketed) as batcher:
        assert batcher.submit(ROWS[0]).result() == pytest.approx(3)
        calls["whole"] = False
        bucketed.registry.remove(4, 8)
        bucketed(np.ones((4, 5), np.float32))
        with pytest.raises(PaddingLeakError, match="in the bucket 4x8"):
            batcher.submit(ROWS[0]).result()
