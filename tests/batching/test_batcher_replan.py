"""Another grid in the place of the one that a batcher composes from, while items go on."""

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import Batcher, BucketPlan, ConfigError, CUDAGraphConfig, SealedError, bucket_jit
from cudagraph_jax.errors import CUDAGraphError, CUDAGraphWarning
from cudagraph_jax.testing import assert_no_compiles
from tests.helpers.functions import double, floats

POWERS = CUDAGraphConfig(
    capture_sizes=(1, 2, 8), capture_seq_lens=(16, 32), warmup_iterations=4, on_miss="error"
)


WEIGHTS = floats(7, 512, 512) / 22


def layers(weights, x):
    """A function whose calls cost by their elements: six layers of every position by itself."""
    hidden = x[..., None] * weights[0]
    for _ in range(6):
        hidden = jnp.tanh(hidden @ weights)
    return hidden.sum(-1)


@pytest.fixture
def layered():
    function = bucket_jit(layers, in_axes=(None, "batch seq"), config=POWERS)
    function.warmup(WEIGHTS, floats(0, 1, 3), progress=False)
    return function


alone = jax.jit(layers)


def assert_answers(rows, answers):
    for row, answer in zip(rows, answers, strict=True):
        np.testing.assert_allclose(answer, alone(WEIGHTS, row[None])[0], rtol=1e-4, atol=1e-4)


class Asked:
    """A clock that does something when a worker asks it for the time, once after so often."""

    def __init__(self, times, action):
        self._left, self._action, self.is_armed = times, action, False

    def __call__(self):
        if self.is_armed and threading.current_thread() is not threading.main_thread():
            self._left -= 1
            if self._left == 0:
                self._action()
        return time.perf_counter()


@pytest.mark.parametrize("times", range(1, 10))
def test_buckets_that_go_while_a_call_is_composed(times):
    """A call runs in the bucket that was chosen for it, although the registry has dropped it."""
    config = dataclasses.replace(POWERS, capture_sizes=(1,), max_capture_batch_size=None)
    function = bucket_jit(double, in_axes="batch seq", config=config)
    function.warmup(floats(0, 1, 3), progress=False)
    clock = Asked(times, lambda: function.registry.remove(1, 16))
    row = floats(1, 3)
    with Batcher(function, clock=clock) as batcher:
        batcher.submit(floats(0, 20)).result()
        clock.is_armed = True
        np.testing.assert_array_equal(batcher.submit(row).result(60), row * 2)


def real_part(batcher, rows):
    """The real part of what is computed for these rows."""
    before = batcher.stats()
    assert_answers(rows, batcher.map(rows))
    after = batcher.stats()
    real, computed = (after[name] - before[name] for name in ("real_elements", "computed_elements"))
    return real / computed


def skewed(count):
    """Rows of 9, and a few of 30."""
    return [floats(seed, 30 if seed % 8 == 7 else 9) for seed in range(count)]


def test_the_grid_follows_the_items(layered):
    """After a re-plan the same rows compute less, in the buckets of the plan and no others."""
    with Batcher(layered, WEIGHTS, max_waiting=64) as batcher:
        before = real_part(batcher, skewed(96))
        plan = batcher.replan(max_graphs=9, capture_sizes=(1, 2, 8))
        assert isinstance(plan, BucketPlan)
        assert {entry.bucket for entry in layered.registry.entries()} == set(plan.buckets())
        assert plan.requests == 96
        assert plan.seq_lens[-1] == 32  # what fits still does
        assert real_part(batcher, skewed(96)) > 1.1 * before
        assert batcher.stats()["items"]["failed"] == 0


def test_items_are_answered_meanwhile(layered):
    """Whatever comes while the new grid is captured and put in place is answered, and right."""
    rows: list[np.ndarray] = skewed(64)
    answers: list[list[np.ndarray]] = []
    with Batcher(layered, WEIGHTS, max_waiting=64) as batcher:
        batcher.map(rows)
        planned = threading.Thread(target=batcher.replan, kwargs={"max_graphs": 4})
        planned.start()
        while planned.is_alive() or not answers:
            answers.append(batcher.map(rows))
        answers.append(batcher.map(rows))
        items = batcher.stats()["items"]
    assert items["answered"] == 64 * (len(answers) + 1) == sum(items.values())
    for each in answers:
        assert_answers(rows, each)
    assert layered.manager.config.capture_seq_lens != POWERS.capture_seq_lens


def test_the_lengths_that_came_last():
    """A plan is made from the last thousands of items, also from those that were not answered."""
    function = bucket_jit(double, in_axes="batch seq", config=POWERS)
    function.warmup(floats(0, 1, 3), progress=False)
    with Batcher(function) as batcher:
        batcher.submit(floats(0, 3)).cancel()
        batcher.map([floats(0, 20)] * (1 << 14))
        plan = batcher.replan(max_graphs=2, headroom=0.0, capture_sizes=(1, 4))
    assert (plan.batch_sizes, plan.seq_lens, plan.requests) == ((1, 4), (20,), 1 << 14)


def test_costs_that_nobody_measured():
    """Without runs in the warm-up a plan goes by elements."""
    config = CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(8,), warmup_iterations=0)
    function = bucket_jit(double, in_axes="batch seq", config=config)
    function.warmup(floats(0, 1, 3), progress=False)
    with Batcher(function) as batcher:
        batcher.submit(floats(0, 5)).result()
        assert batcher.replan().buckets() == ((1, 8),)


def test_what_cannot_be_planned(layered):
    """Without items, in a sealed manager and with options that do not exist nothing changes."""
    with Batcher(layered, WEIGHTS) as batcher:
        with pytest.raises(ConfigError, match="no items came yet"):
            batcher.replan()
        batcher.map(skewed(8))
        with pytest.raises(ConfigError, match="max_graphs=0"):
            batcher.replan(max_graphs=0)
        with pytest.raises(TypeError, match="headroom"):
            batcher.replan(head_room=3)  # type: ignore[call-arg]
        layered.seal()
        with pytest.raises(SealedError):
            batcher.replan()
    assert layered.manager.config == POWERS


def test_lengths_that_are_not_padded():
    """Where each length is a bucket of its own there is no grid of lengths to plan."""
    function = bucket_jit(double, in_axes="batch seq", config=CUDAGraphConfig(capture_sizes=(1,)))
    function.warmup(floats(0, 1, 3), progress=False)
    with Batcher(function) as batcher:
        batcher.submit(floats(0, 3)).result()
        with pytest.raises(ConfigError, match="capture_seq_lens"):
            batcher.replan()


def test_a_grid_that_cannot_be_captured_leaves_the_old_one(layered):
    """If the new grid fails that is an error, and items are answered as before."""

    def picky(x):
        if x.shape[1] == 20:
            raise ValueError("no twenty")
        return x * 2

    function = bucket_jit(picky, in_axes="batch seq", config=POWERS)
    function.warmup(floats(0, 1, 3), progress=False)
    with Batcher(function) as batcher:
        batcher.submit(floats(0, 20)).result()
        with (
            pytest.warns(CUDAGraphWarning, match="the old grid stays: .*no twenty"),
            pytest.raises(CUDAGraphError, match="is not in place"),
        ):
            batcher.replan(headroom=0.0)
        np.testing.assert_array_equal(batcher.submit(floats(0, 20)).result(), floats(0, 20) * 2)
    assert function.manager.config == POWERS


def test_several_axes():
    """A grid of two named axes follows the items that came: each gets its own answer from it, and
    nothing compiles in a request."""
    grid = CUDAGraphConfig(
        capture_sizes=(1, 4), capture_axes={"height": (16, 32), "width": (16, 32)}, on_miss="error"
    )
    function = bucket_jit(
        lambda image, *, mask: (image * 2, jnp.sum(image * mask, axis=(1, 2))),
        in_axes="batch height width",
        mask_argname="mask",
        config=grid,
    )
    function.warmup(floats(0, 1, 3, 3), progress=False)
    sizes = [(30, 3), (4, 28), (9, 9), (29, 2)] * 12
    images = [floats(seed, *size) for seed, size in enumerate(sizes)]

    def assert_own_answers():
        with assert_no_compiles():
            answers = batcher.map(images)
        for image, (doubled, total) in zip(images, answers, strict=True):
            np.testing.assert_array_equal(doubled, image * 2)
            np.testing.assert_allclose(total, image.sum(), rtol=1e-4, atol=1e-4)

    with Batcher(function) as batcher:
        assert_own_answers()
        plan = batcher.replan(
            cost=lambda rows, height, width: 1 + rows * height * width,
            headroom=0.0,
            multiples={"height": 2},
        )
        assert plan.axes == ("batch", "height", "width")
        assert plan.num_graphs <= 8
        assert (plan.sizes["height"][-1], plan.sizes["width"][-1]) == (30, 28)
        assert {entry.bucket for entry in function.registry.entries()} == set(plan.buckets())
        assert_own_answers()
        measured = batcher.replan(headroom={"height": 30, "width": 64})
        assert measured.sizes["width"][-1] == 64
        assert batcher.submit(floats(0, 8, 60)).result()[0].shape == (8, 60)
        assert_own_answers()


def test_axes_that_items_have_not():
    """A batcher of a manager whose grid has further axes says that it cannot plan those."""
    config = CUDAGraphConfig(
        capture_sizes=(1,), capture_seq_lens=(8,), capture_axes={"height": (4,)}
    )
    function = bucket_jit(double, in_axes="batch seq", config=config)
    function.warmup(floats(0, 1, 3), progress=False)
    with Batcher(function) as batcher:
        batcher.submit(floats(0, 3)).result()
        with pytest.raises(ConfigError, match="capture_axes has 'height', and items of double"):
            batcher.replan()
