"""What `bucket_jit` takes: functions, and declarations that fit them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    ConfigError,
    CUDAGraphConfig,
    CUDAGraphManager,
    CUDAGraphMode,
    GraphStore,
    InputShapeError,
    bucket_jit,
    plan_buckets,
)
from cudagraph_jax.testing import inputs
from tests.helpers.functions import GRID, assert_close, double, floats, stats_of

DISABLED = CUDAGraphConfig.disabled()


async def coroutine(x):
    return x


def generator(x):
    yield x


async def async_generator(x):
    yield x


class AsyncModel:
    async def __call__(self, x):
        return x

    async def embed(self, x):
        return x

    @staticmethod
    async def static(x):
        return x


class YieldingModel:
    def __call__(self, x):
        yield x


DEFERRED = {
    "coroutine": coroutine,
    "generator": generator,
    "async generator": async_generator,
    "callable": AsyncModel(),
    "method": AsyncModel().embed,
    "static method": AsyncModel.static,
    "yielding callable": YieldingModel(),
    "partial": functools.partial(coroutine),
    "partial of a partial": functools.partial(functools.partial(generator)),
    "partial of a callable": functools.partial(AsyncModel()),
    "jitted": jax.jit(coroutine),
    "cached": functools.cache(coroutine),
}


@pytest.mark.parametrize("function", DEFERRED.values(), ids=DEFERRED)
def test_a_function_without_arrays_is_refused(function):
    """What gives a coroutine or a generator is refused at once, with what to do."""
    with pytest.raises(ConfigError, match=r"fn=.*(async|generator).*: give a plain function"):
        bucket_jit(function, in_axes="batch seq")
    with pytest.raises(ConfigError, match=r"(async|generator).*: give a plain function"):
        CUDAGraphManager(GRID).execute_or_capture(2, 3, function, floats(0, 2, 3))


class Waits:
    """Runs a coroutine function to its end: a plain function, whatever it wraps."""

    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __call__(self, x):
        return x * 2


def test_a_function_that_wraps_an_async_one_is_taken():
    """What counts is what a call gives, not what the function was made of."""

    @functools.wraps(coroutine)
    def waits(x):
        return x * 2

    x = floats(0, 2, 3)
    for function in (waits, Waits(coroutine)):
        assert np.array_equal(bucket_jit(function, in_axes="batch seq", config=GRID)(x), x * 2)


@pytest.mark.parametrize("unpad", ["host", {"x": "none", "other": "host"}])
def test_an_eager_answer_keeps_what_is_no_array(unpad):
    """Text, objects and None of an eager answer are the function's own; numbers become arrays."""
    thing, key = object(), jax.random.key(0)
    others = {"text": "label", "thing": thing, "none": None, "key": key, "n": 3, "f": 0.5}
    function = bucket_jit(
        lambda x: {"x": x, "other": others}, in_axes="batch seq", config=DISABLED, unpad=unpad
    )
    other = function(floats(0, 2, 3))["other"]
    assert (other["text"], other["none"]) == ("label", None)
    assert other["thing"] is thing
    assert other["key"] is key
    numbers = jax.jit(lambda: (3, 0.5))()
    for found, expected in zip((other["n"], other["f"]), numbers, strict=True):
        assert (type(found), found.dtype, found) == (np.ndarray, expected.dtype, expected)


class Eager:
    """A callable model whose attributes have names of the product's own."""

    def __init__(self):
        for name in [*dir(bucket_jit(double, in_axes="batch"))]:
            if not name.startswith("__"):
                setattr(self, name, None)
        self.width = 3
        self.stats = {"a": 1}

    def __call__(self, x):
        return x * self.width


def test_a_models_attributes_do_not_replace_methods():
    """The product's methods and attributes are there whatever the function's are called."""
    x = floats(0, 2, 3)
    plain = bucket_jit(double, in_axes="batch seq", config=GRID)
    function = bucket_jit(Eager(), in_axes="batch seq", config=GRID)
    assert function.warmup(x, progress=False).captured == 6
    assert np.array_equal(function(x), x * 3)
    assert function.stats()["hits"] == 1
    assert function.registry is function.manager.registry
    assert function.explain(x).mode.name == "REPLAY"
    names = [name for name in dir(plain) if not name.startswith("__")]
    replaced = [
        name for name in names if getattr(plain, name) is not None is getattr(function, name)
    ]
    assert replaced == []
    assert vars(function)["width"] == 3
    assert vars(function.__wrapped__)["stats"] == {"a": 1}


def test_a_function_keeps_its_own_attributes():
    """What a function is marked with, its name and its text are found on what is made of it."""

    def embed(x):
        """Gives vectors."""
        return x

    vars(embed)["version"] = 2
    function = bucket_jit(embed, in_axes="batch")
    assert (vars(function)["version"], function.__name__, function.__doc__) == (
        2,
        "embed",
        "Gives vectors.",
    )


def keyword_mask(x, *, mask):
    return jnp.where(mask, x, 0)


def two(x, y, *, mask=None, scale=1.0):
    return x + y


def any_keywords(x, **inputs):
    return x


def behind_rest(x, *rest, mask):
    return x


REFUSED = {
    "keyword-only": (keyword_mask, {"in_axes": ("batch seq", "batch seq")}, "'mask'"),
    "the second": (two, {"in_axes": ("batch", "batch", None, "batch")}, "'scale'"),
    "nested": (keyword_mask, {"in_axes": ("batch seq", {"a": "batch"})}, "'mask'"),
    "**kwargs": (any_keywords, {"in_axes": ("batch seq", "batch seq")}, r"\*\*inputs"),
    "a dictionary": (any_keywords, {"in_axes": ("batch seq", {"a": "batch"})}, r"\*\*inputs"),
    "pad_values": (keyword_mask, {"in_axes": ("batch seq",), "pad_values": (0, 1)}, "'mask'"),
    "donated": (keyword_mask, {"in_axes": ("batch seq",), "donate_argnums": 1}, "'mask'"),
}


@pytest.mark.parametrize(("function", "options", "named"), REFUSED.values(), ids=REFUSED)
def test_a_declaration_for_a_keyword_is_refused(function, options, named):
    """What is declared by position cannot be meant for a keyword: the error says how to do it."""
    with pytest.raises(ConfigError, match=named + r".*passed by keyword.*: make it positional"):
        bucket_jit(function, **options)


def test_a_mask_argument_takes_no_entry():
    """An entry for the argument that is not the caller's to give is refused, too."""
    with pytest.raises(ConfigError, match=r"for mask, .*mask_argname"):
        bucket_jit(keyword_mask, in_axes=("batch seq", "batch seq"), mask_argname="mask")


def test_the_advice_for_a_keyword_works():
    """Made positional, the mask is padded; by mask_argname, it is built."""
    x = floats(0, 2, 3)

    def positional(x, mask):
        return keyword_mask(x, mask=mask)

    masked = bucket_jit(positional, in_axes=("batch seq", "batch seq"), config=GRID)
    assert np.array_equal(masked(x, mask=x > 0), np.where(x > 0, x, 0))
    built = bucket_jit(keyword_mask, in_axes="batch seq", mask_argname="mask", config=GRID)
    assert np.array_equal(built(x), x)
    for function in (masked, built):
        assert function.stats()["captures"] == 1


def test_entries_of_none_may_stand_for_keywords():
    """None says what is done with a keyword anyway, and entries for `*rest` have no end."""
    x = floats(0, 2, 3)
    function = bucket_jit(two, in_axes=("batch seq", "batch seq", None, None), config=GRID)
    assert np.array_equal(function(x, x, scale=2.0), x * 2)
    rest = bucket_jit(behind_rest, in_axes=("batch seq",) * 4, config=GRID)
    assert np.array_equal(rest(x, x, x, mask=1), x)


MISSPELT: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "bucket_jit": (bucket_jit, {"in_axis": "batch"}, r"bucket_jit\(\) .*'in_axis': .*'in_axes'"),
    "beside": (
        bucket_jit,
        {"fn": double, "in_axes": "batch", "static_argname": "x"},
        "'static_argname': did you mean 'static_argnames'",
    ),
    "config": (CUDAGraphConfig, {"capture_size": (1,)}, r"Config\(\) .* mean 'capture_sizes'"),
    "manager": (CUDAGraphManager, {"stor": "here"}, r"Manager\(\) .* mean 'store'"),
    "store": (GraphStore, {"path": "nowhere", "mod": "ro"}, r"GraphStore\(\) .* mean 'mode'"),
    "inputs": (inputs, {"in_axes": "batch", "exampel": ()}, r"inputs\(\) .* mean 'example'"),
    "capture": (CUDAGraphManager(GRID).capture_graph, {"input_shape": ()}, "mean 'input_shapes'"),
    "plan_buckets": (plan_buckets, {"max_graph": 2}, "did you mean 'max_graphs'"),
    "replan": (CUDAGraphManager(GRID).replan, {"batch_multiples": 2}, "mean 'batch_multiple'"),
    "function's replan": (
        bucket_jit(double, in_axes="batch").replan,
        {"max_graph": 2},
        r"replan\(\) has no argument 'max_graph': did you mean 'max_graphs'",
    ),
}


@pytest.mark.parametrize(("called", "options", "said"), MISSPELT.values(), ids=MISSPELT)
def test_a_misspelt_option_names_the_nearest(called, options, said):
    """An unknown keyword is a TypeError, as in Python, that names the one that was meant."""
    with pytest.raises(ConfigError, match=said) as caught:
        called(**options)
    assert isinstance(caught.value, TypeError)


def test_a_misspelt_keyword_of_a_call_names_the_nearest():
    """The function's own arguments are named, and those of warm-up beside them."""
    x = floats(0, 2, 3)
    function = bucket_jit(two, in_axes="batch seq", config=GRID)
    calls: list[Callable[..., Any]] = [function, function.explain, function.warmup]
    for call in calls:
        with pytest.raises(InputShapeError, match="'scael': did you mean 'scale'"):
            call(x, x, scael=2.0)
    for wrong, right in (("progres", "progress"), ("worker", "workers")):
        with pytest.raises(InputShapeError, match=f"{wrong!r}: did you mean {right!r}"):
            function.warmup(x, x, **{wrong: 1})  # type: ignore[arg-type]  # misspelt


AXES = CUDAGraphConfig(capture_sizes=(2,), capture_axes={"height": (8, 16), "width": (8,)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_axes": "batch sequence"}, r"'sequence', which has no sizes: .*did you mean 'seq'"),
        ({"in_axes": "Batch seq"}, r"'Batch', which has no sizes: .*did you mean 'batch'"),
        ({"in_axes": "batch heigth"}, r"'heigth', which has no sizes: .*did you mean 'height'"),
        ({"in_axes": "batch height", "out_axes": "batch width"}, "no argument carries 'width'"),
        ({"in_axes": "batch height//2"}, "no argument carries 'height' itself"),
        ({"in_axes": "batch batch"}, "one row for each of the batch"),
        ({"in_axes": "batch", "mask_argname": {"x": "batch hight"}}, "'hight', which has no sizes"),
        ({"in_axes": "batch", "mask_argname": {"x": "batch width"}}, "no argument carries 'width'"),
        ({"in_axes": "batch", "mask_argname": {"x": "batch+1"}}, "give the axes of the mask"),
        (
            {"in_axes": "batch", "mask_argname": {"x": "batch batch"}},
            r"mask_argname\['x'\]='batch batch' has the batch twice",
        ),
        ({"in_axes": "batch", "mask_argname": 3}, "name the keyword that takes the mask"),
        ({"in_axes": "batch 2height"}, "in_axes has the entry 'batch 2height' with"),
    ],
)
def test_axes_without_sizes(options, message):
    """An axis without sizes, or that no argument carries, is refused at decoration."""
    with pytest.raises(ConfigError, match=message):
        bucket_jit(lambda y, *, x=None: y, config=AXES, **options)


def positional_mask(x, mask, /):
    return x * mask


def starred_mask(x, *mask):
    return x


def keywords_mask(x, **mask):
    return x


@pytest.mark.parametrize(
    ("function", "mask", "message"),
    [
        (lambda x: x, "x", "leaves .* no array to take"),
        (lambda x, *, mask: x, {"x": "batch", "mask": "batch"}, "leaves .* no array to take"),
        (lambda *, mask: mask, "mask", "leaves .* no array to take"),
        (
            positional_mask,
            "mask",
            r"by keyword to positional_mask\(x, mask, /\): make it a keyword",
        ),
        (starred_mask, "mask", "cannot be given by keyword"),
        (keywords_mask, "mask", "cannot be given by keyword"),
    ],
)
def test_masks_that_no_call_could_have(function, mask, message):
    """A mask in the place of the only array, or that has no keyword, is refused at decoration."""
    with pytest.raises(ConfigError, match=message):
        bucket_jit(function, in_axes="batch seq", mask_argname=mask)
    for taken in (lambda x, mask: x, lambda *xs, mask: xs[0], lambda x, **masks: x):
        bucket_jit(taken, in_axes="batch seq", mask_argname="mask")(np.ones((2, 3), np.float32))


def test_arguments_of_any_name():
    """Names that the library's own functions use are an argument's like any other."""

    def scaled(self, fn, /, function, *, args=1.0, kwargs=2.0, call=3.0):
        return self * fn * function * args * kwargs * call

    def named(self, args, *, lead=1.0):
        return self * args * lead

    x = np.ones((2, 3), np.float32)
    axes = ("batch seq", None, None)
    function = bucket_jit(scaled, in_axes=axes, config=GRID)
    named_ones = bucket_jit(named, in_axes=axes[:2], config=GRID)
    for _ in range(2):
        assert_close(function(x, 2.0, function=1.0, args=5.0, kwargs=7.0), x * 210)
        assert_close(named_ones(self=x, args=2.0, lead=3.0), x * 6)
    assert stats_of(function)["eager_calls"] == stats_of(named_ones)["eager_calls"] == 0
    assert named_ones.explain(self=x, args=2.0, lead=3.0).mode is CUDAGraphMode.REPLAY
    assert not named_ones.warmup(self=x, args=2.0, lead=3.0, progress=False).failed
