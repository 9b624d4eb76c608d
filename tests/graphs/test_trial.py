"""Examples: a call to check a bucket with has real values of the sizes wanted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import InputShapeError
from cudagraph_jax.graphs.trial import example_call, poison, poisonable
from cudagraph_jax.program.call import Declarations, Target, describe_call
from cudagraph_jax.program.function_ref import FunctionRef
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import AxisPattern
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import UNCHOSEN
from tests.helpers.functions import double, floats, tokens

SIZES = Bucket(2, 4)


def program_of(*args, axes, pads=None, donate=()):
    patterns = [None if text is None else AxisPattern.parse(text) for text in axes]
    names = [f"arg{position}" for position in range(len(args))]
    declared = Declarations(patterns, pads or [UNCHOSEN] * len(args), names)
    target = Target(double, "double", donate_argnums=donate)
    call = describe_call(FunctionRef(double), args, {}, declared=declared, target=target)
    return Program(call), call


def example_of(*args, axes, sizes=SIZES, **options):
    program, call = program_of(*args, axes=axes, **options)
    return example_call(program, call, sizes).args


def poisonable_of(*args, axes, **options):
    program, call = program_of(*args, axes=axes, **options)
    return poisonable(program, call)


def test_what_is_too_large_is_cut_and_what_is_too_small_repeats_itself():
    """The values of an example are the caller's, whatever its sizes."""
    x = floats(0, 3, 5)
    (cut,) = example_of(x, axes=["batch seq"])
    np.testing.assert_array_equal(cut, x[:2, :4])
    (repeated,) = example_of(x, axes=["batch seq"], sizes=Bucket(4, 7))
    np.testing.assert_array_equal(repeated, x[np.arange(4) % 3][:, np.arange(7) % 5])


@pytest.mark.parametrize("on_device", [False, True])
def test_what_may_be_donated_is_a_copy(on_device):
    """Neither arrays that are padded nor donated ones share memory with the caller's."""
    x, state, table = floats(0, 2, 4), floats(1, 64), floats(2, 64)
    if on_device:
        x, state, table = map(jax.device_put, (x, state, table))
    args = example_of(x, state, table, axes=["batch seq", None, None], donate=(1,))
    assert not np.shares_memory(args[0], np.asarray(x))
    assert not np.shares_memory(args[1], np.asarray(state))
    assert args[2] is table


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.int32, np.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", [np.zeros, jax.ShapeDtypeStruct])
def test_what_says_nothing_is_one(make, dtype):
    """Abstract tokens and masks are real, and so are those of nothing but padding."""
    ids, rows, column = example_of(
        make((2, 4), dtype),
        make((2,), dtype),
        make((2, 4, 1), dtype),
        axes=["batch seq", "batch", "batch seq _"],
    )
    for value in (ids, rows, column):
        assert value.dtype == dtype
        assert np.all(value == 1)


def test_padding_of_one_makes_what_says_nothing_zero():
    """Where 1 is what padding holds, real elements are 0."""
    (mask,) = example_of(np.ones((2, 4), bool), axes=["batch seq"], pads=[True])
    assert not mask.any()


def test_lengths_are_padded_with_one():
    """Integers for rows may be lengths: they stay 1, since none is zero."""
    options = {"axes": ["batch seq", "batch"], "pads": [0, 1]}
    _, lengths = example_of(floats(0, 2, 4), np.ones(2, np.int32), **options)
    assert (lengths == 1).all()


@pytest.mark.parametrize("make", [np.zeros, jax.ShapeDtypeStruct])
def test_features_that_say_nothing_are_drawn(make):
    """Abstract features and parameters differ from each other, the same at each check."""
    args = make((2, 4, 8), np.float32), jax.ShapeDtypeStruct((8,), np.float32)
    first, second = (example_of(*args, axes=["batch seq _", None]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert len(np.unique(one)) == one.size
        np.testing.assert_array_equal(one, other)


def test_abstract_parameters_are_known_while_they_live():
    """Parameters that a program was made from stand in for their shapes."""
    table = floats(0, 8)
    x = floats(0, 2, 4)
    program, _ = program_of(table, x, axes=[None, "batch seq"])
    assert example_call(program, program.example, SIZES).args[0] is table


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([5, 3], [4, 3]),  # lengths, up to the size
        ([4, 1], [3, 1]),  # positions, counted from 0
        ([3, 1], [3, 1]),  # neither reaches behind the cut
        ([9, 1], [9, 1]),  # neither is one
    ],
)
def test_lengths_and_positions_end_at_the_cut(given, expected):
    """Integers that may refer to the sequence do not reach behind it when it is cut."""
    _, lengths = example_of(floats(0, 2, 5), np.array(given, np.int32), axes=["batch seq", "batch"])
    assert lengths.dtype == np.int32
    assert lengths.tolist() == expected


def test_counts_that_are_passed_through_end_at_the_cut():
    """Numbers are counts as well; arrays of any other axes are not touched."""
    table = np.arange(6, dtype=np.int32)
    _, number, array, kept, flag = example_of(
        floats(0, 2, 5), 5, np.int32(4), table, True, axes=["batch seq", *[None] * 4]
    )
    assert (number, array, kept is table, flag) == (4, 3, True, True)


def test_abstract_keys_are_refused():
    """A key cannot be made up."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    with pytest.raises(InputShapeError, match="give the key itself"):
        example_of(key, floats(0, 2, 4), axes=[None, "batch seq"])


def test_masks_keep_their_padding():
    """Bools, ones before zeros, and arrays with pad values of their own are not poisoned."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.int32)
    found = poisonable_of(
        *[mask.astype(dtype) for dtype in (np.bool_, np.int32, np.float32)],
        mask,
        axes=["batch seq"] * 4,
        pads=[0, 0, 0, -1],
    )
    assert not found.data
    assert not found.doubtful
    assert not poisonable_of(floats(0, 2, 4), axes=["batch seq"], pads=[-np.inf]).data


def test_what_may_be_a_mask_is_doubtful():
    """Nothing but 0 and 1 may be a mask with holes, or one of an example without padding."""
    holes = np.array([[1, 0, 1, 0], [0, 1, 1, 1]])
    args = np.ones((2, 4), np.float32), holes.astype(np.int32), np.array([1, 0], np.int32)
    found = poisonable_of(
        *args, tokens(0, 2, 4), axes=["batch seq", "batch seq", "batch", "batch seq"]
    )
    assert (list(found.doubtful), list(found.data)) == ([0, 1, 2], [3])


def test_poison_is_valid_for_every_dtype():
    """Integers stay between 0 and their real values, floats within what they can hold."""
    data = {
        0: np.array([3, 7], np.int32),
        1: np.array([-3, -7], np.int32),
        2: floats(0, 2),
        3: floats(0, 2).astype(jnp.float8_e4m3fn),
    }
    assert poison(data, 1e4, largest=True) == {0: 7, 1: 0, 2: 1e4, 3: 448.0}
    assert poison(data, -2.0, largest=False) == {0: 0, 1: -7, 2: -2.0, 3: -2.0}
    assert all(np.isnan(poison(data, np.nan, largest=True)[index]) for index in (2, 3))
