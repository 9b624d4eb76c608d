"""Arguments that do not fit: each is an error of our own that names it and leaves no trace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphError, InputShapeError, bucket_jit
from tests.helpers.functions import GRID, TABLE, assert_close, floats, stats_of, tokens


def embed_all(params, ids, mask):
    return params[ids] * mask[..., None]


IDS, MASK = tokens(0, 3, 4), np.ones((3, 4), bool)

BAD = {
    "wrong rank": ((TABLE, tokens(0, 3), MASK), "ids has 1 dimension"),
    "a rank too many": ((TABLE, IDS[None], MASK), "ids has 3 dimension"),
    "other batch": ((TABLE, IDS, MASK[:2]), "ids has batch=3 but mask has batch=2"),
    "other sequence": ((TABLE, IDS, MASK[:, :1]), "ids has seq=4 but mask has seq=1"),
    "batch of one": ((TABLE, IDS, MASK[:1]), "ids has batch=3 but mask has batch=1"),
    "float64": ((TABLE, IDS, MASK.astype(np.float64)), "mask has dtype float64"),
    "complex128": ((TABLE, IDS, MASK.astype(np.complex128)), "mask has dtype complex128"),
    "float64 parameters": ((TABLE.astype(np.float64), IDS, MASK), "params has dtype float64"),
    "text": ((TABLE, IDS.astype(str), MASK), "ids has dtype <U"),
    "objects": ((TABLE, IDS, MASK.astype(object)), "mask has dtype object"),
    "a list": ((TABLE, IDS.tolist(), MASK), r"ids\[0\]\[0\] is of type int, not an array"),
    "a number": ((TABLE, 3, MASK), "ids is of type int, not an array"),
    "a pytree": ((TABLE, {"a": IDS, "b": IDS[0]}, MASK), r"ids\['b'\] has 1 dimension"),
    "no JAX type": (("table", IDS, MASK), "params is a str, which is no JAX type"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_bad_input(case, warm, by_name):
    """Arguments that do not fit are an InputShapeError that names them, warm or cold."""
    function = bucket_jit(embed_all, in_axes=(None, "batch seq", "batch seq"), config=GRID)
    args, said = BAD[case]
    if warm:
        # What is passed through goes to the compiled function as it is, which JAX lets narrow it.
        if case == "float64 parameters":
            return
        function(TABLE, IDS, MASK)
        function(TABLE, IDS, MASK)
    before = stats_of(function)
    with pytest.raises(InputShapeError, match=said):
        function(**dict(zip(("params", "ids", "mask"), args, strict=True))) if by_name else (
            function(*args)
        )
    assert stats_of(function)["registry"]["num_graphs"] == before["registry"]["num_graphs"]
    assert function.registry.capture_count == before["registry"]["capture_count"]
    assert_close(function(TABLE, IDS, MASK), TABLE[IDS])


def test_float64_at_the_exact_size():
    """A float64 array is refused at a bucket's own size too, where nothing has to be padded."""
    function = bucket_jit(lambda x, w: x * w, in_axes=("batch seq", None), config=GRID)
    x, w = floats(0, 3, 5), floats(1, 1)
    for _ in range(2):
        with pytest.raises(InputShapeError, match="x has dtype float64"):
            function(x.astype(np.float64), w)
        with pytest.raises(InputShapeError, match="w has dtype float64"):
            bucket_jit(lambda x, w: x * w, in_axes=("batch", None))(x[:, 0], w.astype(np.float64))
        assert_close(function(x, w), x * w)
        assert_close(function(jnp.asarray(x), w), x * w)


def test_bad_device_arrays_at_the_exact_size():
    """JAX arrays beside a warm array of a bucket's own shape are checked like any others."""
    function = bucket_jit(lambda x, y: x + y, in_axes=("batch seq", "batch seq"), config=GRID)
    x = jnp.asarray(floats(0, 3, 5))
    for _ in range(2):
        assert_close(function(x, x), x + x)
        for y in (x[:2], x[:, :1], x[:1], x[0], jnp.float32(1)):
            with pytest.raises(InputShapeError, match="y has"):
                function(x, y)
        assert_close(function(x, x.astype(jnp.int8)), x + x.astype(jnp.int8))
        assert_close(function(x.astype(bool), x), x.astype(bool) + x)
        with pytest.raises(InputShapeError, match="y has dtype float64"):
            function(x, np.asarray(x, np.float64).view(Annotated))
    assert function.registry.num_graphs == 3


class Annotated(np.ndarray):
    """A subclass, as libraries of labelled data have."""


def test_in_axes_that_do_not_match_the_arguments():
    """in_axes of another structure than the argument is an error that names the argument."""
    function = bucket_jit(
        lambda inputs: inputs["ids"], in_axes=({"ids": "batch", "mask": "batch"},), config=GRID
    )
    with pytest.raises(InputShapeError, match="in_axes of inputs"):
        function({"ids": floats(0, 2)})
    with pytest.raises(InputShapeError, match="in_axes of inputs"):
        function(floats(0, 2))
    assert function.registry.num_graphs == 0


def test_pad_values_that_do_not_match_the_arguments():
    """pad_values of another structure than the argument is an error that names the argument."""
    function = bucket_jit(lambda x: x, in_axes=("batch",), pad_values=({"ids": 1},), config=GRID)
    with pytest.raises(InputShapeError, match="pad_values of x"):
        function(floats(0, 2))


@pytest.mark.parametrize(
    ("pad", "dtype"),
    [(-1, np.uint8), (300, np.int8), (float("nan"), np.int32), (0.5, np.int32), (2, np.bool_)],
)
def test_pad_values_that_the_dtype_does_not_hold(pad, dtype):
    """A pad value that the array's dtype cannot hold is an error that names the argument."""
    function = bucket_jit(lambda x: x, in_axes=("batch",), pad_values=pad, config=GRID)
    with pytest.raises(CUDAGraphError, match="x"):
        function(np.ones(2, dtype))
    assert function.registry.num_graphs == 0


def test_parameters_that_break_the_function_break_it_as_without_us():
    """What the function itself refuses surfaces as the function's own error, and is not kept."""
    function = bucket_jit(lambda w, x: x @ w, in_axes=(None, "batch _"), config=GRID)
    x = floats(0, 2, 3)
    with pytest.raises(TypeError, match=r"dot_general|matmul"):
        function(floats(0, 4, 2), x)
    assert function.registry.num_graphs == 0
    assert_close(function(floats(0, 3, 2), x), x @ floats(0, 3, 2))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_arrays_get_the_eager_answer(shape):
    """A batch or a sequence of zero is answered by the function itself."""
    function = bucket_jit(lambda x: (x * 2, jnp.sum(x, 1)), in_axes=("batch seq",), config=GRID)
    x = np.ones(shape, np.float32)
    assert_close(function(x), (x * 2, x.sum(1)))
    assert stats_of(function)["eager_by_reason"] == {"empty": 1}
    assert function.registry.num_graphs == 0


def test_abstract_arguments_of_a_call():
    """A ShapeDtypeStruct in place of an array is an error of our own, and captures nothing."""
    function = bucket_jit(lambda x: x * 2, in_axes=("batch",), config=GRID)
    with pytest.raises(InputShapeError, match="x"):
        function(jax.ShapeDtypeStruct((2,), np.float32))
    assert function.registry.num_graphs == 0


def test_wide_integers_are_narrowed_as_jax_does():
    """64-bit integers become 32-bit ones while x64 is off, as under plain JAX."""
    function = bucket_jit(lambda x: x + 1, in_axes=("batch",), config=GRID)
    for x in (np.arange(2), np.arange(3), np.arange(2, dtype=np.uint64)):
        for _ in range(2):
            assert_close(function(x), np.asarray(jnp.asarray(x) + 1), 0)
