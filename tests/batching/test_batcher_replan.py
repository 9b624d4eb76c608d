"""Another grid in the place of the one that a batcher composes from, while items go on."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import Batcher, CUDAGraphConfig, bucket_jit
from tests.helpers.functions import floats

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


def assert_answers(rows, answers):
    alone = jax.jit(layers)
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
def test_buckets_that_go_while_a_call_is_composed(layered, times):
    """A call runs in the bucket that was chosen for it, although the registry has dropped it."""
    clock = Asked(times, lambda: layered.registry.remove(1, 16))
    row = floats(1, 3)
    with Batcher(layered, WEIGHTS, clock=clock) as batcher:
        batcher.submit(floats(0, 20)).result()
        clock.is_armed = True
        assert_answers([row], [batcher.submit(row).result(60)])
