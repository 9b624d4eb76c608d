"""Arguments that do not fit: each is an error of our own that names it and leaves no trace."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphWarning,
    InputShapeError,
    bucket_jit,
)
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


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_options_that_name_the_arguments(by_name):
    """in_axes and pad_values by name are an error with the tuple to write, and that works."""

    def function(w, x, *, bias=0.0):
        return x * w + bias

    w, x = np.float32(2), floats(0, 2, 3)
    args, kwargs = ((), {"w": w, "x": x}) if by_name else ((w, x), {})
    for named, literal in (
        ({"in_axes": {"w": None, "x": "batch seq"}}, "in_axes=(None, 'batch seq')"),
        ({"in_axes": {"x": "batch seq", "bias": None}}, "in_axes=(None, 'batch seq')"),
        ({"pad_values": {"x": 1}}, "pad_values=(None, 1)"),
    ):
        options: dict[str, Any] = {"in_axes": (None, "batch seq"), **named}
        with pytest.raises(InputShapeError, match=f"give one entry .*, {re.escape(literal)}$"):
            bucket_jit(function, config=GRID, **options)(*args, **kwargs)
        name, _, value = literal.partition("=")
        options[name] = eval(value)
        assert_close(bucket_jit(function, config=GRID, **options)(*args, **kwargs), x * 2)
    single = bucket_jit(lambda x: x["x"], in_axes={"x": "batch", "y": "batch"}, config=GRID)
    with pytest.raises(InputShapeError, match=r"in_axes of x=.* does not match the structure"):
        single({"x": floats(0, 2)})


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


def scaled(x, y):
    return x * y


BESIDE_NATIVE = {
    ">f2": np.float16,
    ">f4": np.float32,
    ">f8": np.float32,
    ">c8": np.complex64,
    ">c16": np.complex64,
    ">i4": np.int32,
    ">i8": np.int32,
    ">u2": np.uint16,
    "longdouble": np.float32,
    "clongdouble": np.complex64,
}


@pytest.mark.parametrize("dtype", BESIDE_NATIVE)
@pytest.mark.parametrize("axes", ["batch seq", None], ids=["bucketed", "passed through"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_dtype_that_jax_does_not_have(dtype, axes, warm):
    """Foreign byte orders and long doubles name the argument, and the dtype to convert it to."""
    function = bucket_jit(scaled, in_axes=("batch seq", axes), config=GRID)
    x, near = floats(0, 2, 3), BESIDE_NATIVE[dtype]
    y = np.ones((2, 3) if axes else (1,), dtype)
    if warm:
        function(x, y.astype(near))
    said = rf"y has dtype .*, which JAX does not have.*: pass y\.astype\(numpy\.{near.__name__}\)"
    for _ in range(2):
        with pytest.raises(InputShapeError, match=said):
            function(x, y)
    assert np.array_equal(function(x, y.astype(near)), x)


def test_a_long_double_number():
    """A number of such a dtype is named, too."""
    function = bucket_jit(scaled, in_axes=("batch seq", None), config=GRID)
    with pytest.raises(InputShapeError, match=r"y has dtype .*: pass y\.astype\(numpy\.float32\)"):
        function(floats(0, 2, 3), np.longdouble(2))


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**70])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("config", [GRID, CUDAGraphConfig.disabled()], ids=["grid", "disabled"])
def test_a_number_that_no_integer_of_jax_holds(number, warm, config):
    """A Python int beyond JAX's integers names the argument, and the advice works."""
    function = bucket_jit(scaled, in_axes=("batch seq", None), config=config)
    by_keyword = bucket_jit(lambda x, *, y: x * y, in_axes="batch seq", config=config)
    nested = bucket_jit(lambda x, y: x * y["n"], in_axes=("batch seq", None), config=config)
    x = floats(0, 2, 3)
    if warm:
        function(x, 2), by_keyword(x, y=2), nested(x, {"n": 2})
    said = f"={number} does not fit into int32.*pass float"
    with pytest.raises(InputShapeError, match=f"^y{said}"):
        function(x, number)
    with pytest.raises(InputShapeError, match=f"^y{said}"):
        by_keyword(x, y=number)
    with pytest.raises(InputShapeError, match=rf"^y\['n'\]{said}"):
        nested(x, {"n": number})
    assert_close(function(x, float(number)), x * np.float32(number))
    assert_close(function(x, 2**31 - 1), x * np.float32(2**31 - 1))


class Encoding(collections.UserDict):
    """A mapping that is no dict, as tokenizers give."""


@dataclasses.dataclass
class Model:
    """An object that is no pytree and cannot be hashed."""

    def __call__(self, x):
        return x * 3


def test_a_mapping_that_is_no_pytree():
    """What is like a dict but none is to be passed as one, and that works."""
    x = floats(0, 2, 3)
    encoding = Encoding(x=x)
    padded = bucket_jit(lambda d: d["x"] * 2, in_axes="batch seq", config=GRID)
    passed = bucket_jit(lambda x, d: x + d["x"], in_axes=("batch", None), config=GRID)
    with pytest.raises(InputShapeError, match=r"d is of type Encoding, .*: pass dict\(d\)"):
        padded(encoding)
    with pytest.raises(InputShapeError, match=r"d is a Encoding, .*: pass dict\(d\)"):
        passed(x[:, 0], Encoding(x=np.float32(1)))
    assert_close(padded(dict(encoding)), x * 2)
    assert_close(passed(x[:, 0], {"x": np.float32(1)}), x[:, 0] + 1)


class Wrapped:
    """An array as other libraries hold it, with what `interface` names and nothing else."""

    def __init__(self, x, interface):
        methods: dict[str, Any] = {
            "__jax_array__": lambda _: jnp.asarray(x),
            "__array__": lambda _, dtype=None, copy=None: x,
            "__dlpack__": lambda _, **options: x.__dlpack__(**options),
            "__dlpack_device__": lambda _: x.__dlpack_device__(),
        }
        shaped = {"shape": x.shape, "dtype": "float32", "ndim": x.ndim}
        asked = {name: value for name, value in methods.items() if interface in name}
        self.__class__ = type("Wrapped", (Wrapped,), {**asked, **shaped})


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda x: Wrapped(x, "__jax_array__"), "jax.numpy.asarray({})"),
        (lambda x: Wrapped(x, "__array__"), "numpy.asarray({})"),
        (lambda x: Wrapped(x, "__dlpack"), "numpy.from_dlpack({})"),
        (memoryview, "numpy.asarray({})"),
    ],
    ids=["__jax_array__", "__array__", "__dlpack__", "memoryview"],
)
def test_what_is_nearly_an_array(make, advice):
    """Objects that turn into arrays are named with what turns them, and that works."""
    padded = bucket_jit(lambda y: y * 2, in_axes="batch seq", config=GRID)
    passed = bucket_jit(scaled, in_axes=("batch seq", None), config=GRID)
    nested = bucket_jit(lambda x, d: x * d["y"], in_axes=("batch seq", None), config=GRID)
    by_keyword = bucket_jit(lambda x, *, y: x * y, in_axes="batch seq", config=GRID)
    x, y = floats(0, 2, 3), floats(1, 1, 1)
    given = make(y)
    named = {"y": given, "d": {"y": given}, "jax": jax, "numpy": np}
    for name, call, expected in (
        ("y", padded, y * 2),
        ("y", lambda y: passed(x, y), x * y),
        ("d['y']", lambda y: nested(x, {"y": y}), x * y),
        ("y", lambda y: by_keyword(x, y=y), x * y),
    ):
        said = advice.format(name)
        with pytest.raises(
            InputShapeError, match=rf"^{re.escape(name)} is .*pass {re.escape(said)}$"
        ):
            call(given)
        assert_close(call(eval(said, named)), expected)


@pytest.mark.parametrize("kind", [int, float])
def test_lists_of_numbers(kind):
    """A list of lists is named with the array to make of it, and that works."""
    function = bucket_jit(lambda d: d["x"] * 2, in_axes="batch seq", config=GRID)
    d = {"x": [[kind(1), kind(2)]]}
    with pytest.raises(InputShapeError) as caught:
        function(d)
    said = str(caught.value).rpartition("pass ")[2]
    found = function({"x": eval(said, {"d": d, "numpy": np})})
    assert_close(found, np.asarray(jnp.asarray([[kind(2), kind(4)]])))


def test_a_number_where_an_array_was_declared():
    """A number under axes of its own is to have None there, and that works."""
    x = floats(0, 2, 3)
    said = r"of type float, not an array.*give None for it in in_axes to pass the number through"
    with pytest.raises(InputShapeError, match=f"^y is {said}"):
        bucket_jit(scaled, in_axes=("batch seq", "batch seq"), config=GRID)(x, 2.0)
    assert_close(bucket_jit(scaled, in_axes=("batch seq", None), config=GRID)(x, 2.0), x * 2)
    tree = {"x": x, "y": 2.0}
    with pytest.raises(InputShapeError, match=rf"^d\['y'\] is {said}"):
        bucket_jit(lambda d: d["x"] * d["y"], in_axes="batch seq", config=GRID)(tree)
    axes = ({"x": "batch seq", "y": None},)
    assert_close(bucket_jit(lambda d: d["x"] * d["y"], in_axes=axes, config=GRID)(tree), x * 2)


def test_a_nested_array_of_no_dtype_of_jax():
    """An array of objects within a pytree is refused for its dtype, not for being an array."""
    function = bucket_jit(lambda x, d: x, in_axes=("batch", None), config=GRID)
    with pytest.raises(InputShapeError, match=r"^d\['y'\] has dtype object, which JAX does not"):
        function(floats(0, 2), {"y": np.array([None])})


def test_a_static_argument_that_fails_to_hash():
    """Whatever its hash raises, a static argument is named, and a default of it may be left out."""
    writable = memoryview(bytearray(4))

    def function(x, m=writable):
        return x * len(m)

    bucketed = bucket_jit(function, in_axes=("batch", None), static_argnames="m", config=GRID)
    with pytest.raises(InputShapeError, match="static argument m is a memoryview, which cannot be"):
        bucketed(floats(0, 2), writable)
    assert_close(bucketed(floats(0, 2)), floats(0, 2) * 4)


def test_an_object_that_can_be_neither_passed_nor_hashed():
    """Neither error sends the caller to the other: both say to close over it, which works."""
    x = floats(0, 2, 3)

    def apply(model, x):
        return model(x)

    said = r"m.* close over it \(a lambda or functools\.partial\)"
    for statics in ((), ("model",)):
        function = bucket_jit(
            apply, in_axes=(None, "batch seq"), static_argnames=statics, config=GRID
        )
        with pytest.raises(InputShapeError, match=said):
            function(Model(), x)
    closed = bucket_jit(functools.partial(apply, Model()), in_axes="batch seq", config=GRID)
    assert_close(closed(x), x * 3)


def test_a_model_of_arrays_and_functions():
    """An Equinox model is split into its arrays and the rest, as the error says."""
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x = floats(0, 2, 3)

    def apply(model, x):
        return jax.vmap(model)(x)

    for statics in ((), ("model",)):
        function = bucket_jit(
            apply, in_axes=(None, "batch _"), static_argnames=statics, config=GRID
        )
        with pytest.raises(InputShapeError, match=r"close over.*equinox\.partition"):
            function(model, x)
    arrays, rest = equinox.partition(model, equinox.is_array)
    split = bucket_jit(
        lambda arrays, x: apply(equinox.combine(arrays, rest), x),
        in_axes=(None, "batch _"),
        config=GRID,
    )
    assert_close(split(arrays, x), apply(model, x))


def test_a_model_that_decides_by_a_number_within():
    """What a model decides by is told with how to close over it, and that works."""
    equinox = pytest.importorskip("equinox")
    model, x = equinox.nn.Dropout(0.5, inference=True), floats(0, 2, 3)

    def apply(model, x):
        return model(x, key=jax.random.key(0))

    function = bucket_jit(apply, in_axes=(None, "batch _"), config=GRID)
    said = r"by the value of model\.p, model\.inference, pass the arrays alone in model.*partition"
    with pytest.warns(CUDAGraphWarning, match=said):
        assert_close(function(model, x), x)
    arrays, rest = equinox.partition(model, equinox.is_array)
    split = bucket_jit(
        lambda arrays, x: apply(equinox.combine(arrays, rest), x),
        in_axes=(None, "batch _"),
        config=GRID,
    )
    assert_close(split(arrays, x), x)


@pytest.mark.parametrize("in_axes", ["batch _", (None, "batch _")], ids=["one", "each"])
def test_a_model_of_arrays_is_no_static(in_axes):
    """A model of arrays alone passes through as it is, with the `in_axes` that the error names."""
    equinox = pytest.importorskip("equinox")
    model, x = equinox.nn.Linear(3, 2, key=jax.random.key(0)), floats(0, 2, 3)

    def apply(model, x):
        return jax.vmap(model)(x)

    static = bucket_jit(apply, in_axes=in_axes, static_argnames="model", config=GRID)
    said = r'leave it out of static_argnames.*in_axes=\(None, "batch seq"\), passes through all'
    with pytest.raises(InputShapeError, match=said):
        static(model, x)
    passed = bucket_jit(apply, in_axes=(None, "batch _"), config=GRID)
    assert_close(passed(model, x), apply(model, x))


def test_arrays_are_no_statics():
    """Arrays that were named static are to be left out of static_argnames, and that works."""
    x = floats(0, 2, 3)
    static = bucket_jit(scaled, in_axes=("batch seq", None), static_argnames="y", config=GRID)
    with pytest.raises(InputShapeError, match=r"static argument y .* leave it out of static_argn"):
        static(x, x[:1])
    passed = bucket_jit(scaled, in_axes=("batch seq", None), config=GRID)
    assert_close(passed(x, x[:1, :1]), x * x[:1, :1])


@jax.tree_util.register_pytree_node_class
class Scaling:
    """A model with decorated methods; a pytree."""

    def __init__(self, factor):
        self.factor = factor

    def tree_flatten(self):
        return (self.factor,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    @functools.partial(bucket_jit, in_axes=(None, "batch seq"), config=GRID)
    def apply(self, x):
        return x * self.factor


class Plain:
    """The same, no pytree."""

    def __init__(self, factor):
        self.factor = factor

    @functools.partial(bucket_jit, in_axes=(None, "batch seq"), config=GRID)
    def apply(self, x):
        return x * self.factor

    @functools.partial(bucket_jit, in_axes=(None, "batch seq"), static_argnames="self", config=GRID)
    def apply_static(self, x):
        return x * self.factor

    double = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=GRID)

    def plain(self, x):
        return x * self.factor


def test_a_decorated_method():
    """A method binds to its object, which is an argument like any other, as for `jax.jit`."""
    x = floats(0, 2, 3)
    for factor in (2.0, 3.0):
        assert_close(Scaling(factor).apply(x), x * factor)
        assert_close(Scaling.apply(Scaling(factor), x), x * factor)
        assert_close(Plain(factor).apply_static(x), x * factor)
    assert stats_of(Scaling.apply)["registry"]["capture_count"] == 1
    assert_close(Plain(2.0).double(x), x * 2)


def test_a_decorated_method_of_no_pytree():
    """The error for an object that JAX does not know says what to write, and that works."""
    x, model = floats(0, 2, 3), Plain(2.0)
    said = r"self is a Plain.*self\.f = bucket_jit\(self\.f.*static_argnames=\"self\""
    for call in (model.apply, functools.partial(Plain.apply, model)):
        with pytest.raises(InputShapeError, match=said):
            call(x)
    with pytest.raises(InputShapeError, match=r"missing a required argument: 'x'.*is a method"):
        Plain.apply(x)
    vars(model)["plain"] = bucket_jit(model.plain, in_axes="batch seq", config=GRID)
    assert_close(model.plain(x), x * 2)
