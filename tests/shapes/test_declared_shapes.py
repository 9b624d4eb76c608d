"""Declared shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.pytrees import as_structs, describe_mismatch, is_shape


class State(NamedTuple):
    cache: object
    step: object


def struct(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ((), True),
        ((3, 4), True),
        ([3, 4], True),
        ((np.int64(3), 4), True),
        ([], False),
        ((True, 4), False),
        ((3.0,), False),
        (((3, 4),), False),
        ((3, None), False),
        (3, False),
        ("34", False),
        ({3, 4}, False),
    ],
    ids=repr,
)
def test_is_shape(value, shape):
    """A shape is a tuple or list of integers; an empty list is a pytree without leaves."""
    assert is_shape(value) is shape


@pytest.mark.parametrize(
    ("shapes", "structs"),
    [
        ((3, 4), struct(3, 4)),
        ([3, 4], struct(3, 4)),
        ((), struct()),
        ([], []),
        ([(3, 4), ()], [struct(3, 4), struct()]),
        (
            {"ids": struct(3, 4, dtype=np.int32), "mask": (3, 4)},
            {"ids": struct(3, 4, dtype=np.int32), "mask": struct(3, 4)},
        ),
        (np.zeros((2, 3), np.int8), struct(2, 3, dtype=np.int8)),
        (State((2, 3), [np.bool_(True), None]), State(struct(2, 3), [struct(dtype=bool), None])),
    ],
    ids=repr,
)
def test_as_structs(shapes, structs):
    """Structs and arrays keep their dtypes, tuples of sizes are float32, containers stay."""
    assert as_structs(shapes, name="input_shapes") == structs


def test_as_structs_of_device_arrays():
    """A JAX array keeps its dtype and its sharding."""
    array = jnp.zeros((2, 3), jnp.bfloat16)
    found = as_structs([array], name="input_shapes")[0]
    assert (found.shape, found.dtype, found.sharding) == ((2, 3), jnp.bfloat16, array.sharding)


@pytest.mark.parametrize("leaf", [2.5, "batch", True])
def test_bad_leaf(leaf):
    """What has no shape is refused, with what to give."""
    with pytest.raises(InputShapeError) as caught:
        as_structs({"ids": (2, 3), "mask": (leaf, 3)}, name="input_shapes")
    assert str(caught.value) == (
        f"input_shapes has the leaf {leaf!r}: give jax.ShapeDtypeStruct(shape, dtype), an array, "
        "or a tuple of sizes (float32)"
    )


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        (struct(2), struct(2), None),
        ({"a": struct(2), "b": []}, {"a": struct(2), "b": []}, None),
        (struct(2, 3), struct(2, 4), "the array: float32[2, 3] was declared, float32[2, 4] came"),
        (
            [struct(2), {"a": struct(2)}],
            [struct(2), {"a": struct(2, dtype=np.int32)}],
            "[1]['a']: float32[2] was declared, int32[2] came",
        ),
        (
            [struct(2)],
            (struct(2),),
            "PyTreeDef([*]) was declared, PyTreeDef((*,)) came",
        ),
    ],
)
def test_describe_mismatch(expected, found, message):
    """The first difference of structure, shape or dtype is told with its place."""
    assert describe_mismatch(expected, found) == message
