"""A led function without other processes, so that one program runs anywhere."""

from __future__ import annotations

import threading
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cudagraph_jax as cg
from cudagraph_jax import distributed
from tests.helpers.faults import through_host

CONFIG = cg.CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(8,), warmup_iterations=1)
Pair = namedtuple("Pair", "one other")


@pytest.fixture
def scaled():
    """A function of a parameter and rows."""

    @cg.bucket_jit(in_axes=(None, "batch seq"), config=CONFIG)
    def scaled(scale, x):
        return jax.tree.map(lambda leaf: leaf * scale, x)

    return scaled


def test_it_is_the_function(scaled):
    """NumPy and JAX arrays, lists and dictionaries of them; buckets are captured when asked for."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with distributed.lead(scaled, 2.0) as led:
        for _ in range(2):
            np.testing.assert_array_equal(led(x), 2 * x)
            np.testing.assert_array_equal(led(jnp.asarray(x)), 2 * x)
            np.testing.assert_array_equal(led({"a": [x]})["a"][0], 2 * x)
        assert scaled.stats()["captures"] == 2
        assert repr(led) == "Led(scaled, 1 processes)"


def test_what_cannot_be_told(scaled):
    """It is said to the caller, and what comes after is answered."""
    x = np.ones((2, 3), np.float32)
    with distributed.lead(scaled, 2.0) as led:
        with pytest.raises(cg.InputShapeError, match="lists, tuples and dictionaries"):
            led(Pair(x, x))
        with pytest.raises(cg.InputShapeError, match="float64"):
            led(np.ones((2, 3)))
        with pytest.raises(cg.DistributedError, match="would run eagerly"):
            led(np.ones((5, 3), np.float32))
        np.testing.assert_array_equal(led(x), 2 * x)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, "missing a required argument: 'x'"),
        ((1, 1), {}, "too many positional arguments"),
        ((), {"x": 1}, "got x by keyword: give its arguments by position"),
    ],
)
def test_how_many_arguments(scaled, args, kwargs, words):
    """What the function itself would say of them is said to the caller, and nothing is ignored."""
    x = np.ones((2, 3), np.float32)
    with distributed.lead(scaled, 2.0) as led:
        given = [x for _ in args], dict.fromkeys(kwargs, x)
        with pytest.raises(cg.InputShapeError) as caught:
            led(*given[0], **given[1])
        assert words in str(caught.value)
        np.testing.assert_array_equal(led(x), 2 * x)


@pytest.mark.parametrize("first", [1, 2])
def test_a_default(first):
    """It is used where it is left out, in a bucket of either way to write the call."""

    @cg.bucket_jit(in_axes=(None, "batch seq", "..."), config=CONFIG)
    def shifted(scale, x, shift=1.0):
        return x * scale + shift

    x = np.ones((2, 3), np.float32)
    calls = [(x,), (x, np.float32(5))]
    shifted(2.0, *calls[first - 1])
    with distributed.lead(shifted, 2.0) as led:
        for _ in range(2):
            np.testing.assert_array_equal(led(x), 2 * x + 1)
            np.testing.assert_array_equal(led(x, np.float32(5)), 2 * x + 5)


def test_a_static_argument_that_is_passed_through():
    """It selects the program, and is no argument of what is compiled."""

    @cg.bucket_jit(in_axes=(None, "batch seq"), static_argnames=("times",), config=CONFIG)
    def repeated(times, x):
        return sum([x] * times)

    x = np.ones((2, 3), np.float32)
    with distributed.lead(repeated, 3) as led:
        for _ in range(3):
            np.testing.assert_array_equal(led(x), 3 * x)


def test_what_is_missing_in_front_of_a_parameter():
    """The parameter does not take its place."""

    @cg.bucket_jit(in_axes=("batch seq", "batch seq", None), config=CONFIG)
    def weighed(x, y=2.0, scale=1.0):
        return (x + y) * scale

    x = np.ones((2, 3), np.float32)
    with distributed.lead(weighed, 3.0) as led:
        with pytest.raises(cg.InputShapeError, match="in front of what is passed through"):
            led(x)
        np.testing.assert_array_equal(led(x, x), 6 * x)


def test_a_trace_of_it(scaled):
    """It is refused with what to do instead."""
    x = np.ones((2, 3), np.float32)
    with distributed.lead(scaled, 2.0) as led:
        with pytest.raises(cg.InputShapeError, match=r"is led, so it cannot be traced by jax\.jit"):
            jax.jit(led)(x)
        np.testing.assert_array_equal(led(x), 2 * x)


def test_a_function_that_cannot_be_traced():
    """Its own mistake is its caller's alone, and the next call is answered."""

    @cg.bucket_jit(in_axes="batch seq", config=CONFIG)
    def picky(x):
        if x.ndim != 2:
            raise ValueError("two dimensions")
        if x.dtype == jnp.int32:
            raise ValueError("no integers")
        return x

    with distributed.lead(picky) as led:
        with pytest.raises(cg.CaptureError, match="no integers"):
            led(np.ones((2, 3), np.int32))
        assert led(np.ones((2, 3), np.float32)).shape == (2, 3)


def test_what_may_be_led(scaled):
    """What `bucket_jit` makes, with what it passes through, one at a time, within some time."""
    with pytest.raises(cg.ConfigError, match="is not what bucket_jit makes"):
        distributed.lead(len).__enter__()  # type: ignore[arg-type]
    with pytest.raises(cg.ConfigError, match="passes 1 argument"):
        distributed.lead(scaled).__enter__()
    with pytest.raises(cg.ConfigError, match="timeout_s=0"):
        distributed.lead(scaled, 2.0, timeout_s=0).__enter__()
    with pytest.raises(cg.DistributedError, match="process 0 leads"):
        distributed.follow(scaled, 2.0)
    with (
        distributed.lead(scaled, 2.0),
        pytest.raises(cg.DistributedError, match="scaled is led already"),
    ):
        distributed.lead(scaled, 2.0).__enter__()


def test_a_batcher_of_it(scaled):
    """It takes what is passed through from what is led, and does not change it."""

    @cg.bucket_jit(in_axes=(None, "batch seq"), mask_argname="mask", config=CONFIG)
    def total(scale, x, *, mask):
        return scale * jnp.sum(x * mask, axis=1)

    total.warmup(2.0, np.ones((1, 3), np.float32), progress=False)
    with distributed.lead(total, 2.0) as led, cg.Batcher(led) as batcher:
        answers = batcher.map([np.ones(size, np.float32) for size in (1, 5, 8)])
        assert [answer.item() for answer in answers] == [2.0, 10.0, 16.0]
        with pytest.raises(cg.DistributedError, match="lead it with the new ones"):
            batcher.update(3.0)


def test_calls_while_it_closes(scaled):
    """Each call of many threads is answered or refused, whenever it is closed."""
    x, outcomes = np.ones((2, 3), np.float32), []

    def work():
        try:
            while True:
                outcomes.append(led(x).shape)
        except cg.DistributedError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with distributed.lead(scaled, 2.0) as led:
        led(x)
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert set(outcomes) <= {(2, 3), "what was led is closed: lead it again"}


def twice_late(led):
    """Two calls that do not end, and a caller who fails for another reason."""
    for _ in range(2):
        with pytest.raises(cg.DistributedError, match="has not ended in time"):
            led(np.ones((1, 3), np.float32))
    raise cg.InputShapeError("of the caller")


def test_a_call_that_does_not_end(caplog):
    """It is given up in the stated time, as those behind it; an error of the block goes first."""
    goes_on = threading.Event()

    def wait(x):
        goes_on.wait()
        return x

    @cg.bucket_jit(
        in_axes="batch seq", config=cg.CUDAGraphConfig(capture_sizes=(1,), warmup_iterations=0)
    )
    def stuck(x):
        return jax.pure_callback(wait, x, x)

    try:
        goes_on.set()
        stuck.warmup(np.ones((1, 3), np.float32), progress=False)
        goes_on.clear()
        with pytest.raises(cg.InputShapeError), distributed.lead(stuck, timeout_s=0.3) as led:
            twice_late(led)
        assert "Led(stuck, 1 processes): a call has not ended in time" in caplog.text
    finally:
        goes_on.set()


def test_a_call_that_fails():
    """Its error is its caller's alone, as nobody else has begun it; the next one is answered."""
    trouble: list[str] = []
    doubled = cg.bucket_jit(through_host(trouble), in_axes="batch seq", config=CONFIG)
    x = np.ones((2, 3), np.float32)
    with distributed.lead(doubled) as led:
        np.testing.assert_array_equal(led(x), 2 * x)
        trouble.append("the wire is broken")
        with pytest.raises(jax.errors.JaxRuntimeError, match="the wire is broken"):
            led(x)
        trouble.clear()
        np.testing.assert_array_equal(led(x), 2 * x)


@pytest.mark.parametrize(
    "number",
    [2, 2.5, True, np.float32(2.5), np.float64(2.5), np.int64(2), jnp.asarray(2.5), jnp.float32(2)],
    ids=repr,
)
def test_dtypes_of_numbers(number):
    """The answer has the dtype that the function itself gives it: numbers of Python give way."""

    @cg.bucket_jit(in_axes="batch seq", config=CONFIG)
    def scaled(x, scale):
        return x * scale

    x = np.ones((2, 3), jnp.bfloat16)
    with distributed.lead(scaled) as led:
        answer = led(x, number)
        assert answer.dtype == scaled.__wrapped__(jnp.asarray(x), number).dtype
        np.testing.assert_array_equal(answer, scaled(x, number))


def test_a_bucket_that_is_there_by_now():
    """A call that a larger bucket served is decided again, when its own may have been captured."""
    config = cg.CUDAGraphConfig(capture_sizes=(1, 4), on_miss="background", warmup_iterations=0)
    doubled = cg.bucket_jit(lambda x: x * 2, in_axes="batch seq", config=config)
    x = np.ones((1, 3), np.float32)
    doubled(np.ones((3, 3), np.float32))
    doubled.manager.wait()
    with distributed.lead(doubled) as led:
        np.testing.assert_array_equal(led(x), 2 * x)
        doubled(x)
        doubled.manager.wait()
        np.testing.assert_array_equal(led(x), 2 * x)
    replays = {str(entry.bucket): entry.replay_count for entry in doubled.registry.entries()}
    assert replays == {"4x3": 2, "1x3": 1}


def test_many_threads_that_lead_at_once():
    """One of them leads, the others are told so."""
    functions = [
        cg.bucket_jit(lambda x: x, in_axes="batch seq", config=CONFIG, name=f"f{index}")
        for index in range(8)
    ]
    together, outcomes = threading.Barrier(8), []

    def work(function):
        together.wait()
        try:
            with distributed.lead(function):
                outcomes.append("led")
                together.wait()
        except cg.DistributedError as error:
            outcomes.append(str(error))
            together.wait()

    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert outcomes.count("led") == 1
    assert sum("is led already" in outcome for outcome in outcomes) == 7
