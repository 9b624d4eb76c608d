"""Copies and pickles: a copy shares what is compiled, and another process makes its own."""

import copy
import pickle

import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphManager,
    UnpicklableError,
    bucket_jit,
)
from cudagraph_jax.demo.encoder import Encoder
from tests.helpers.functions import GRID, double, floats

CONFIG = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4,), warmup_iterations=0)


@bucket_jit(in_axes="batch seq", config=CONFIG)
def decorated(x):
    return x + 1


renamed = bucket_jit(lambda x: x - 1, in_axes="batch seq", config=CONFIG)


class Model:
    """A model as users write them."""

    @bucket_jit(in_axes=(None, "batch seq"), config=CONFIG)
    def scaled(self, x):
        return x

    def __init__(self):
        self.weights = np.ones(3, np.float32)
        self.manager = CUDAGraphManager(GRID)
        self.double = bucket_jit(double, in_axes="batch seq", manager=self.manager)


def owners():
    """Everything that holds compiled code."""
    model = Model()
    model.double(floats(0, 2, 3))
    (entry,) = model.manager.registry.entries()
    return [model.double, model.manager, model.manager.registry, entry]


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("index", range(4))
def test_a_copy_is_the_thing_itself(make_copy, index):
    """A copy shares what is compiled, as a copied function does."""
    owner = owners()[index]
    assert make_copy(owner) is owner


def test_a_model_can_be_copied():
    """A deep copy of an object that holds bucketed functions has its own arrays and serves on."""
    model = Model()
    x = floats(0, 2, 3)
    expected = model.double(x)
    other = copy.deepcopy(model)
    assert other.weights is not model.weights
    assert np.array_equal(other.double(x), expected)
    assert model.double.registry.capture_count == 1


def test_a_copied_encoder_is_the_encoder_itself():
    """The demo's encoder is copied and pickled as what it holds."""
    encoder = object.__new__(Encoder)
    assert copy.deepcopy(encoder) is encoder
    with pytest.raises(UnpicklableError, match="make it in the worker"):
        pickle.dumps(encoder)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [decorated, renamed, Model.scaled])
def test_a_global_function_is_pickled_by_reference(function, protocol):
    """A bucketed function of a module is found again by its name, as a function is."""
    data = pickle.dumps(function, protocol)
    assert pickle.loads(data) is function
    assert len(data) < 200


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_what_belongs_to_this_process_is_not_pickled(index, protocol):
    """Pickling it, or a model that holds it, says to make it in the worker."""
    owner = owners()[index]
    for pickled in (owner, {"model": [owner]}):
        with pytest.raises(UnpicklableError, match="make it in the worker") as raised:
            pickle.dumps(pickled, protocol)
        assert {TypeError, CUDAGraphError} < set(type(raised.value).__mro__)


def test_a_local_function_is_not_pickled():
    """A function that no module has by name says so, with what to do."""

    def local(x):
        return x

    with pytest.raises(UnpicklableError, match=r"no global of tests\.dispatch.*at module level"):
        pickle.dumps(bucket_jit(local, in_axes="batch", config=CONFIG))
