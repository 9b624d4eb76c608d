"""What somebody reads who made a mistake in a function of their own."""

import traceback
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

import cudagraph_jax
from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, bucket_jit

GRID = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(8,))
X = np.ones((3, 5), np.float32)


def mistaken(x):
    return jnp.dot(x, jnp.ones((7, 2)))


def by_bucket_jit(config):
    return bucket_jit(mistaken, in_axes="batch seq", config=config)


def by_manager(config):
    manager = CUDAGraphManager(config)
    return lambda x: manager.execute_or_capture(3, 5, mistaken, x)


def raised_by(call):
    with pytest.raises(TypeError) as caught:
        call(X)
    return caught.value


@pytest.mark.parametrize("door", [by_bucket_jit, by_manager])
@pytest.mark.parametrize("policy", ["capture", "background", "eager"])
def test_a_mistake_is_all_that_is_shown(door, policy):
    """One traceback, of the mistake: nothing was being handled, and no frame stands twice."""
    error = raised_by(door(CUDAGraphConfig(**{**GRID.to_dict(), "on_miss": policy})))
    assert error.__context__ is None
    text = "".join(traceback.format_exception(error))
    assert text.count("Traceback (most recent call last)") == 1
    assert "KeyError" not in text
    package = cudagraph_jax.__path__[0]
    frames = [
        (frame.filename, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(package)
    ]
    assert max(Counter(frames).values()) == 1
    assert "mistaken" in text


def test_a_call_of_another_dtype_shows_its_mistake_alone():
    """A refusal of the compiled function is not what a mistake is shown behind."""

    def strict(scale, x):
        if scale.ndim:
            raise ValueError("scale is a number")
        return x * scale

    bucketed = bucket_jit(strict, in_axes=(None, "batch seq"), config=GRID)
    bucketed(jnp.float32(2), jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="scale is a number") as caught:
        bucketed(jnp.ones(3), jnp.ones((2, 8)))
    assert caught.value.__context__ is None
