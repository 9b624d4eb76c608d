"""`Padded`: an array with padding that nobody takes for real."""

import copy
import pickle
from operator import add, eq, getitem, invert, le, matmul, mul, neg, pow, sub, truediv
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import InputShapeError, Padded

WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def padded():
    return Padded(jnp.asarray(WHOLE), (3, 5))


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda: Padded(jnp.zeros((4, 64)), (3, 57)), "Padded(float32[3,57] in [4,64])"),
        (lambda: Padded(jnp.zeros(4, jnp.bfloat16), (4,)), "Padded(bfloat16[4] in [4])"),
        (lambda: Padded(jnp.zeros(()), ()), "Padded(float32[] in [])"),
        (
            lambda: Padded(jnp.zeros((4, 8, 2), bool), (3, 5, 2), left=(1,)),
            "Padded(bool[3,5,2] in [4,8,2], left=(1,))",
        ),
        (lambda: jax.tree.map(lambda _: None, Padded(jnp.zeros(4), (3,))), "Padded(?[3] in [?])"),
    ],
)
def test_repr(made, text):
    """It prints what it is, in one line, also where a tree function has put something else in."""
    assert repr(made()) == text


def test_what_is_real(padded):
    """Its sizes are the real ones; the array is the one given."""
    assert (padded.shape, padded.ndim, padded.size, len(padded)) == ((3, 5), 2, 15, 3)
    assert padded.dtype == np.float32
    assert padded.array.shape == (4, 6)
    np.testing.assert_array_equal(padded, WHOLE[:3, :5])
    on_left = Padded(jnp.asarray(WHOLE), (3, 5), left=(1,))
    np.testing.assert_array_equal(on_left, WHOLE[:3, 1:])
    nothing = Padded(jnp.asarray(WHOLE), (0, 5), left=(0,))
    assert np.asarray(nothing).shape == (0, 5)


def test_numpy(padded):
    """`numpy.asarray` gives the real part, of another dtype or as a copy if asked for."""
    assert np.asarray(padded, np.float64).dtype == np.float64
    own = np.array(padded)
    own[:] = 0
    np.testing.assert_array_equal(np.asarray(padded), WHOLE[:3, :5])
    with pytest.raises(ValueError, match="copy"):
        np.asarray(padded, np.int32, copy=False)
    large: np.ndarray = np.asarray(Padded(jnp.zeros((512, 512)), (3, 5)))
    assert large.base is None or large.base.nbytes < 1000  # it does not keep the bucket
    with pytest.raises(ValueError, match="read-only"):
        large[:] = 1


@pytest.mark.parametrize(
    "use",
    [
        *(lambda x, f=f: f(x, x) for f in (add, sub, mul, truediv, pow, matmul, eq, le)),
        *(lambda x, f=f: f(x) for f in (neg, invert, abs, bool, float, iter, list)),
        lambda x: 1 + x,
        lambda x: x == 1,
        lambda x: WHOLE[:3, :5] + x,
        lambda x: jnp.ones((3, 5)) * x,
        lambda x: getitem(x, 0),
        lambda x: x[:, 0],
        lambda x: 1 in x,
        np.exp,
        jnp.exp,
        jnp.asarray,
        lambda x: jnp.stack([x, x]),
        lambda x: jnp.where(x, 1, 0),
        jax.nn.softmax,
        jax.jit(lambda x: x * 2),
        jax.jit(jnp.sin),
    ],
)
def test_what_would_mix_the_padding_in(padded, use):
    """Arithmetic, indices and functions of JAX are refused, and the error says what to do."""
    expected = r"padding of a Padded for real: use numpy\.asarray\(x\).*x\.array.*bucketed function"
    with pytest.raises(InputShapeError, match=expected) as caught:
        use(padded)
    assert isinstance(caught.value, TypeError)


def test_other_uses(padded):
    """What it has not is an `AttributeError` with the same advice; JAX's primitives refuse it."""
    with pytest.raises(AttributeError, match=r"no 'sum': use numpy\.asarray\(x\)"):
        padded.sum()
    assert not hasattr(padded, "T")
    with pytest.raises(TypeError, match="Padded"):
        jax.lax.exp(padded)
    with pytest.raises(TypeError):
        hash(padded)


def test_functions_of_trees(padded):
    """JAX's functions of pytrees do with it what they do with its array."""
    assert jax.block_until_ready(padded) is padded
    assert padded.block_until_ready() is padded
    assert padded.is_ready()
    padded.copy_to_host_async()
    on_host = jax.device_get(padded)
    assert isinstance(on_host.array, np.ndarray)
    assert on_host.is_ready()
    on_host.copy_to_host_async()
    twice = jax.tree.map(lambda array: array * 2, padded)
    np.testing.assert_array_equal(twice, 2 * WHOLE[:3, :5])
    back = jax.device_put(on_host)
    assert isinstance(back.array, jax.Array)
    for same in (on_host, back, copy.copy(padded), pickle.loads(pickle.dumps(padded))):
        assert repr(same) == repr(padded)
        np.testing.assert_array_equal(same, padded)
    paths = jax.tree_util.tree_flatten_with_path({"x": padded})[0]
    assert [jax.tree_util.keystr(path) for path, _ in paths] == ["['x'].array"]
    assert not padded.is_deleted()
    padded.array.delete()
    assert padded.is_deleted()
    assert repr(padded) == "Padded(float32[3,5] in [4,6])"


def test_structures(padded):
    """Two of one layout have one structure; what is known of the padding is a part of it."""
    structure: Any = jax.tree.structure(padded)
    assert structure == jax.tree.structure(Padded(jnp.ones((4, 6)), (3, 5)))
    for shape, options in (((3, 4), {}), ((3, 5), {"left": (1,)}), ((3, 5), {"fill": 0})):
        assert structure != jax.tree.structure(Padded(jnp.ones((4, 6)), shape, **options))
    zeros: list[Any] = [
        jax.tree.structure(Padded(jnp.ones(4), (3,), fill=fill)) for fill in (0.0, -0.0)
    ]
    assert zeros[0] != zeros[1]
    assert "Layout([3,5], fill=None)" in str(structure)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3,), {}, r"sizes \(3,\), which are no part of its array's shape \(4, 6\)"),
        ((5, 6), {}, r"are no part"),
        ((-1, 6), {}, r"are no part"),
        ((3, 5), {"left": (2,)}, r"left=\(2,\) are no dimensions"),
    ],
)
def test_what_cannot_be(shape, options, message):
    """Sizes beyond the array's, dimensions that it has not, and no arrays are refused."""
    with pytest.raises(InputShapeError, match=message):
        Padded(jnp.zeros((4, 6)), shape, **options)
    not_array: Any = [1, 2, 3]
    with pytest.raises(InputShapeError, match=r"not what is of type list"):
        Padded(not_array, (2,))
