"""Arguments of bucketed functions, drawn at the sizes that a configuration allows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from cudagraph_jax import CUDAGraphConfig, InputShapeError, bucket_jit
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.testing import configs, inputs
from cudagraph_jax.testing.inputs import small_grid
from tests.helpers.examples import examples

PARAMS = {"w": jnp.ones((3, 2)), "scale": 0.5}
X = jax.ShapeDtypeStruct((7, 9, 3), np.float32)
IDS = np.zeros((2, 2), np.int16)


def simplest(strategy: st.SearchStrategy[Any]) -> Any:
    return find(strategy, lambda _: True)


@given(inputs(("batch seq ...", "seq batch", "_ batch")))
def test_arrays_for_axes(args):
    """Without an example each entry is an array of float32, all of them at one size."""
    x, transposed, other = args
    batch, seq, width = x.shape
    assert small_grid("batch seq").should_use_cudagraph(batch, seq)
    assert (width, transposed.shape, other.shape) == (3, (seq, batch), (3, batch))
    assert {(type(array), array.dtype) for array in args} == {(np.ndarray, np.dtype(np.float32))}


@given(inputs({"x": "batch seq", "rest": ["batch", "seq"]}))
def test_pytrees(args):
    """A single entry is one argument, and a pytree of axes a pytree of arrays."""
    (tree,) = args
    batch, seq = tree["x"].shape
    assert [leaf.shape for leaf in tree["rest"]] == [(batch,), (seq,)]


@examples(40, thorough=100)
@given(st.data(), configs())
def test_sizes_of_a_configuration(data, config):
    """Whatever the configuration, the sizes are inside its limits, and inside narrower ones."""
    (x,) = data.draw(inputs(("batch seq",), config=config))
    assert config.should_use_cudagraph(*x.shape)
    (small,) = data.draw(inputs(("batch seq",), config=config, max_batch_size=2, max_seq_len=3))
    assert small.shape[0] <= 2
    assert small.shape[1] <= 3


@given(inputs((None, "batch seq ...", {"ids": "batch seq"}), example=(PARAMS, X, {"ids": IDS})))
def test_examples(args):
    """An example gives pytrees, dtypes and other dimensions; what is passed through is itself."""
    params, x, tree = args
    assert params["w"] is PARAMS["w"]
    assert params["scale"] == 0.5
    assert tree["ids"].shape == x.shape[:2]
    assert x.shape[2] == 3
    assert (x.dtype, tree["ids"].dtype) == (np.float32, np.int16)


@given(inputs("batch seq", example=(IDS, 2.0)))
def test_numbers_beside_one_string(args):
    """One string for all arguments means arrays: a number is itself, as in the call."""
    ids, number = args
    assert (ids.ndim, ids.dtype, number) == (2, np.int16, 2.0)


def test_abstract_parameters():
    """A passed-through argument without values gets some, at its own shape."""
    weights, x = simplest(inputs((None, "batch seq ..."), example=(X, X)))
    assert weights.shape == (7, 9, 3)
    assert x.shape == (1, 1, 3)


@given(
    inputs(
        {"x": "batch seq", "rest": ["batch seq", "batch"]},
        dtypes={"x": "bfloat16", "rest": "int32"},
        values={"x": None, "rest": [(5, 7), "lengths"]},
    )
)
def test_declarations_are_prefixes(args):
    """dtypes and values are pytree prefixes: one for an array, or for all below it."""
    tree = args[0]
    ids, lengths = tree["rest"]
    assert (tree["x"].dtype, ids.dtype, lengths.dtype) == (jnp.bfloat16, np.int32, np.int32)
    assert set(np.unique(ids)) <= {5, 6, 7}
    assert (lengths <= tree["x"].shape[1]).all()


@given(inputs(("batch", "batch"), dtypes="int32", values=(3, 4)))
def test_one_declaration_for_all(args):
    """A single dtype or range is that of all arguments."""
    for array in args:
        assert array.dtype == np.int32
        assert set(np.unique(array)) <= {3, 4}


def test_wide_dtypes():
    """A dtype that JAX would narrow is drawn narrow."""
    assert simplest(inputs(("batch",), dtypes="float64"))[0].dtype == np.float32


@given(inputs((None, "batch seq ..."), example=(PARAMS, X)))
def test_functions_take_them(args):
    """What is drawn for a function's own axes is what the function takes."""
    assert FUNCTION(*args).shape == (*args[1].shape[:2], 2)


FUNCTION = bucket_jit(
    lambda params, x: x @ params["w"] * params["scale"],
    in_axes=(None, "batch seq ..."),
    config=CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0),
)


@pytest.mark.parametrize(
    ("in_axes", "options", "message"),
    [
        ((None, "batch"), {}, "in_axes has the entry None, whose argument is passed through"),
        (("batch",), {"dtypes": ("int32", None)}, "dtypes has 2 entries for 1 arguments"),
        (("batch",), {"values": [None, None]}, "values has 2 entries for 1 arguments"),
        (("batch", "batch"), {"example": (X,)}, "in_axes has 2 entries for 1 arguments"),
        (("batch",), {"example": ([1.0],)}, r"argument 0\[0\]=1.0 is no array: make it one"),
        (("batch",), {"values": "mask"}, "argument 0, which has no axis but"),
        (("batch",), {"max_batch_size": 0}, "max_batch_size=0 is below 1"),
    ],
)
def test_what_does_not_fit(in_axes, options, message):
    """What does not fit together is refused when it is asked for, not when it is drawn."""
    with pytest.raises(ConfigError, match=message):
        inputs(in_axes, **options)


def test_axes_that_the_example_does_not_have():
    """An example with other dimensions, or another structure, than declared is refused."""
    with pytest.raises(InputShapeError, match="argument 0"):
        inputs(("batch seq _ _",), example=(X,))
    with pytest.raises(InputShapeError, match="dtypes"):
        inputs(("batch",), dtypes=({"x": "int32"},))
