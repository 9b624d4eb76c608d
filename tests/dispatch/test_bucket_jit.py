"""`bucket_jit`: options that do not fit are refused, and what is declared is held to."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphWarning,
    InputShapeError,
    bucket_jit,
)
from tests.helpers.functions import assert_close, floats

SMALL = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=1)


def masked(x, mask, y):
    """A function whose mask stands before another argument."""
    return x * mask + y


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"manager": SMALL}, "is no CUDAGraphManager: give one"),
        ({"config": {}}, "is no CUDAGraphConfig: make one"),
        ({"donate_argnums": "x"}, "donate_argnums has 'x': give int values"),
        ({"donate_argnums": 7}, "donate_argnums has 7, but masked"),
        ({"static_argnames": 5}, "static_argnames has 5: give str values"),
        ({"static_argnames": "x"}, "in_axes has an entry for 'x', which is static"),
        ({"mask_argname": "mask"}, "stands before 'y'"),
        ({"static_argnames": "mask", "mask_argname": "mask"}, "both mask_argname and static"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_options_that_do_not_fit(options, said):
    """Options that do not fit the function, or each other, are refused when it is declared."""
    with pytest.raises(ConfigError, match=said):
        bucket_jit(masked, in_axes=("batch seq", None, None), **options)


@pytest.mark.parametrize(
    ("function", "out_axes"),
    [(lambda x: x.sum(1), "seq"), (lambda x: x.T, "batch seq"), (lambda x: x.sum(), "batch")],
    ids=["seq", "transposed", "scalar"],
)
def test_declared_out_axes_are_held_to(function, out_axes):
    """Axes that an output does not have are an error, and never a wrong trim."""
    bucketed = bucket_jit(function, in_axes="batch seq", out_axes=out_axes, config=SMALL)
    with pytest.raises(InputShapeError, match="output"):
        bucketed(floats(0, 3, 7))
    assert bucketed.registry.num_graphs == 0


def test_a_failure_keeps_no_arrays_alive():
    """What is remembered of a failed capture does not hold the arguments of its call."""

    def branching(weights, x):
        return x * 2 if weights.sum() > 0 else x

    bucketed = bucket_jit(branching, in_axes=(None, "batch seq"), config=SMALL)
    weights = jnp.ones((3,))
    gone = weakref.ref(weights)
    with pytest.warns(CUDAGraphWarning, match="cannot trace"):
        bucketed(weights, floats(0, 2, 2))
    del weights
    gc.collect()
    assert gone() is None
    assert bucketed.stats()["failed_buckets"] == 1


def test_clear_during_the_first_capture():
    """What is captured while the registry is cleared is given out, and not kept by any route."""
    tracing, cleared = threading.Event(), threading.Event()

    def slow(x):
        tracing.set()
        assert cleared.wait(60)
        return x * 2

    bucketed: Any = bucket_jit(slow, in_axes="batch seq", config=SMALL)
    x = floats(0, 3, 7)
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(bucketed(x)))
    caller.start()
    assert tracing.wait(60)
    bucketed.registry.clear()
    cleared.set()
    caller.join(60)
    assert_close(answers[0], x * 2)
    assert bucketed.registry.num_graphs == 0
    assert_close(bucketed(x), x * 2)
    assert bucketed.registry.num_graphs == 1
    assert bucketed.stats()["captures"] == 2


@pytest.mark.parametrize("size", [3.0, "a", None, True, -1])
def test_sizes_that_are_none(size):
    """The specification's calls refuse a batch that is no integer, and count the call."""
    manager = CUDAGraphManager(SMALL)
    with pytest.raises(InputShapeError, match="batch_size="):
        manager.execute_or_capture(size, 2, jnp.tanh, np.ones((2, 2), np.float32))
    with pytest.raises(InputShapeError, match="batch_size="):
        manager.registry.capture(size, 2, jnp.tanh, (2, 2))
    assert manager.stats()["errors_by_reason"] == {"input": 1}
