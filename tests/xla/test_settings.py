"""What another thread captures is traced with the settings of the thread that asked for it."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import jax
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.xla.settings import ThreadSettings
from tests.helpers.functions import GRID

CONFIG = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4,), on_miss="background")


def test_applied_in_another_thread():
    """The other thread has them inside the block, and its own afterwards."""
    usual = jax.config.values["jax_default_matmul_precision"]
    with jax.default_matmul_precision("high"), jax.default_prng_impl("rbg"):
        settings = ThreadSettings()
    seen = []

    def work():
        for block in (nullcontext(), settings.applied(), nullcontext()):
            with block:
                seen.append(jax.config.values["jax_default_matmul_precision"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [usual, "high", usual]


def test_random_numbers_of_a_background_capture():
    """The kind of random numbers is that of the request."""
    function = bucket_jit(
        lambda seed, x: x + jax.random.uniform(jax.random.key(seed), (1, 1)),
        in_axes=(None, "batch seq"),
        config=CONFIG,
    )
    x, seed = np.zeros((1, 4), np.float32), np.int32(7)
    with jax.default_prng_impl("rbg"):
        expected = jax.random.uniform(jax.random.key(7), (1, 1))[0, 0]
        for _ in range(2):
            np.testing.assert_array_equal(function(seed, x), x + expected)
            function.manager.wait()
    assert function.registry.num_graphs == 1


@pytest.mark.parametrize("how", ["background", "replan"])
def test_precision(how):
    """Products are as precise as the request asked for, also in a grid that is planned later."""
    function = bucket_jit(
        lambda w, x: x @ w,
        in_axes=(None, "batch _"),
        config=CONFIG if how == "background" else GRID,
    )
    with jax.default_matmul_precision("high"):
        function(np.ones((3, 3), np.float32), np.ones((2, 3), np.float32))
    if how == "replan":
        function.replan(max_graphs=2, headroom=0.0)
    function.manager.wait()
    entries = function.registry.entries()
    assert entries
    for entry in entries:
        assert "operand_precision={high,high}" in str(entry.executable.call.as_text())


def test_x64():
    """A background capture under `enable_x64` is served."""
    function = bucket_jit(lambda x: x / 3, in_axes="batch seq", config=CONFIG)
    x = np.ones((1, 4), np.float64)
    with jax.enable_x64(True):
        for _ in range(3):
            found = function(x)
            function.manager.wait()
            np.testing.assert_array_equal(found, x / 3)
            assert found.dtype == np.float64
    assert function.stats()["hits"] == 2
