"""The model of the demo, read once, and one that is small enough to compile often."""

import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig
from cudagraph_jax.demo import Encoder
from cudagraph_jax.demo.bert.model import Dense, Layer, Norm, Params


@pytest.fixture(scope="session")
def config():
    """Four buckets, which take seconds to capture."""
    return CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(64, 256), warmup_iterations=0)


@pytest.fixture(scope="session")
def short():
    """Four buckets that hold the first passages, of up to 22 tokens."""
    return CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(16, 32), warmup_iterations=0)


@pytest.fixture(scope="session")
def encoder(config):
    return Encoder(config)


@pytest.fixture(scope="session")
def tiny_params():
    """Weights of one layer with 24 hidden units and 50 tokens."""
    random = np.random.default_rng(0)

    def array(*shape):
        return random.normal(size=shape).astype(np.float32)

    def dense(inputs, outputs):
        return Dense(array(inputs, outputs), array(outputs))

    norm = Norm(array(24), array(24))
    square = dense(24, 24)
    layer = Layer(square, square, square, square, norm, dense(24, 48), dense(48, 24), norm)
    return Params(array(50, 24), array(512, 24), norm, (layer,))
