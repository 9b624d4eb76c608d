"""`assert_bucketing_preserves` finds what padding breaks, and accuses nothing else."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from cudagraph_jax import CUDAGraphConfig, GraphStore, InputShapeError, bucket_jit
from cudagraph_jax.errors import CaptureError, ConfigError
from cudagraph_jax.testing import (
    assert_batching_preserves,
    assert_bucketing_preserves,
    assert_padding_does_not_leak,
    sizes,
)
from tests.helpers.by_numpy import by_numpy
from tests.helpers.examples import ANY, as_a_whole, examples
from tests.helpers.mistakes import FURTHER, PLANTED, SOUND, X, elementwise, mean_of_tokens

THRICE = examples(30, thorough=300)
FEW = examples(20, thorough=100)
CONFIG = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4,))
# Twelve sizes: padded along either axis, along both and along none, by one and by more.
LONG = CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(8,))
NARROW = CUDAGraphConfig(capture_sizes=(3,), capture_seq_lens=(1, 4))


def failure(fn, **options) -> str:
    """What the assertion says of a model."""
    with pytest.raises(AssertionError) as caught:
        assert_bucketing_preserves(fn, **options)
    notes: list[str] = getattr(caught.value, "__notes__", [])
    return "\n".join([str(caught.value), *notes])


@pytest.mark.parametrize("fn", [*PLANTED, *FURTHER], ids=lambda fn: fn.__name__)
def test_mistakes_are_found(fn):
    """Each mistake is found in the default budget, and the message says where and what to do."""
    message = failure(fn, in_axes=(X,))
    assert message.startswith(f"{fn.__name__} gives another answer in a bucket than by itself\n")
    for line in ("sizes:  (batch, seq_len)=(", "is padded from", "output: the output[", "remedy: "):
        assert line in message
    assert "example=(x=array(" in message


@pytest.mark.parametrize("fn", SOUND, ids=lambda fn: fn.__name__)
def test_sound_models_are_not_accused(fn):
    """Nothing is found in a sound model over three times the default budget."""
    assert_bucketing_preserves(fn, config=NARROW, settings=THRICE, **SOUND[fn])


@pytest.mark.parametrize("fn", [*PLANTED, *FURTHER], ids=lambda fn: fn.__name__)
def test_few_sizes_are_enough(fn):
    """The sizes at which sound models are tried are enough to find each mistake."""
    assert "in the bucket (3, " in failure(fn, in_axes=(X,), config=NARROW)


def test_a_failure_is_the_simplest():
    """What is found is shrunk: the smallest size that is padded, and its worst element."""
    message = failure(mean_of_tokens, in_axes=("batch seq",))
    assert "(batch, seq_len)=(1, 1) in the bucket (1, 4): the sequence is padded from 1 to 4" in (
        message
    )
    assert "the output[0] is 0.03143" in message
    assert "the plain function gives 0.12573" in message
    assert "x=array([[0.12573]], dtype=float32)" in message


def test_why():
    """The message tells padding that is read from a padded size that is."""
    assert "moves with what the padding holds" in failure(mean_of_tokens, in_axes=(X,))
    positions = failure(lambda x: x + x.shape[1], in_axes=(X,))
    assert "its size is counted in, such as x.shape[1]" in positions
    assert "nothing is padded" not in positions
    impure = failure(lambda x: x + isinstance(x, jax.core.Tracer), in_axes=(X,))
    assert "is the function pure?" in impure


def test_what_to_do_about_receivers():
    """The remedy for an index of a scatter is padding that is out of range, which mends it."""

    @as_a_whole
    def received(nodes, edges, receivers):
        return nodes.at[receivers].add(edges + 1)

    @as_a_whole
    def sums(nodes, edges, receivers):
        return jax.ops.segment_sum(jnp.cos(edges), receivers, nodes.shape[0])

    axes = ("nodes", "edges", "edges")
    drawn: dict[str, Any] = {
        "dtypes": (None, None, "int32"),
        "values": (None, None, (0, 2)),
        "config": CUDAGraphConfig(capture_sizes=(1,), capture_axes={"nodes": (4,), "edges": (4,)}),
    }
    for fn in (received, sums):
        message = failure(fn, in_axes=axes, settings=ANY, **drawn)
        assert (
            "remedy: pad receivers with 2147483647 (pad_values), which the function ignores: a "
            "scatter and segment_sum drop an index that is out of range" in message
        )
        assert_bucketing_preserves(
            fn, in_axes=axes, pad_values=(0, 0, 2**31 - 1), settings=FEW, **drawn
        )

    @as_a_whole
    def halves(nodes, edges, receivers):
        return jnp.zeros(2 * nodes.shape[0]).at[receivers * 2].add(edges + 1)[::2]

    message = failure(halves, in_axes=axes, settings=ANY, **drawn)
    (advised,) = re.findall(r"pad receivers with (\d+) ", message)
    assert 2**20 < int(advised) < 2**30  # twice the largest wraps around
    pads = (0, 0, int(advised))
    assert_bucketing_preserves(halves, in_axes=axes, pad_values=pads, settings=FEW, **drawn)
    looked_up = failure(
        lambda x, ids: x[ids].sum(),
        in_axes=axes[:2],
        dtypes=(None, "int32"),
        values=(None, (0, 2)),
        config=drawn["config"],
        settings=ANY,
    )
    assert "pad_values that it ignores" in looked_up


def test_which_axis_is_to_blame():
    """The message names the axis whose padding is counted in, and what its size is taken for."""
    parts = {
        "that of the batch\n": lambda x: x - x.mean(axis=0),
        "that of the sequence\n": lambda x: x - x.mean(axis=1, keepdims=True),
        "x.shape[0] taken for the number of rows\n": lambda x: x / x.shape[0],
        "x.shape[1] taken for a length or a position\n": lambda x: x / x.shape[1],
    }
    for part, fn in parts.items():
        assert part in failure(by_numpy(fn), in_axes=(X,), config=NARROW)
    full = st.just((np.ones((2, 3), np.float32),))
    centred = by_numpy(lambda x: x - x.mean())
    both = failure(centred, in_axes="batch seq", inputs=full, config=NARROW)
    assert "the batch is padded from 2 to 3 and the sequence is padded from 3 to 4\n" in both
    assert "that of the batch and that of the sequence\n" in both


@as_a_whole
def packed(x, rows):
    """Sums by the row that tokens belong to, of which -1 is the last."""
    return jnp.zeros(x.shape[0]).at[rows].add(jnp.cos(x))


@as_a_whole
def strided(x):
    """Means of three tokens at each second one, from another one on where the length is odd."""
    kernel = jnp.ones((1, 1, 3)) / 3
    y = jax.lax.conv_general_dilated(x[:, None], kernel, (2,), "SAME")[:, 0]
    return jnp.repeat(y, 2, axis=1)[:, : x.shape[1]]


def test_what_is_wrong_at_few_sizes():
    """Full batches alone, and lengths that are odd: both are found, and what to do works."""
    options: dict[str, Any] = {
        "in_axes": ("batch seq", "batch seq"),
        "dtypes": (None, "int32"),
        "values": (None, (0, 0)),
        "config": CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(4,)),
    }
    message = failure(packed, pad_values=(0, -1), **options)
    assert "where the batch is full and not at (" in message
    assert_bucketing_preserves(packed, pad_values=(0, 2**31 - 1), settings=FEW, **options)
    options = {"in_axes": "batch seq", "pad_values": 0, "config": LONG}
    message = failure(strided, **options)
    assert "odd and even sizes differ" in message
    assert "give a stride or a window explicit padding" in message


@pytest.mark.parametrize("config", [CUDAGraphConfig(), CUDAGraphConfig(capture_sizes=(64, 256))])
def test_sizes_that_are_drawn(config):
    """The default budget has each axis padded alone and both, at odd and even sizes."""
    config = dataclasses.replace(
        config, capture_seq_lens=(128, 512), max_capture_seq_len=None, max_capture_batch_size=None
    )
    kinds = set()

    @hypothesis.settings(database=None)
    @hypothesis.given(sizes(config))
    def draw(size):
        bucket = config.bucket_for(*size)
        pads = tuple(one != other for one, other in zip(size, bucket, strict=True))
        kinds.add((*pads, size.seq_len % 2 if pads[1] else 0))

    draw()
    padded = {(True, False, 0), *((rows, True, odd) for rows in (True, False) for odd in (0, 1))}
    assert padded <= kinds


def test_the_named_output():
    """The output that differs is named, among several."""
    message = failure(lambda x: {"a": x, "b": [x, x.mean(axis=1)]}, in_axes=(X,))
    assert "output ['b'][1][0, " in message


def test_a_bucketed_function(tmp_path):
    """What `bucket_jit` made is tested as it is, on a manager of its own."""
    store = GraphStore(tmp_path)
    good = bucket_jit(elementwise, in_axes=("batch seq",), config=CONFIG, store=store)
    bad = bucket_jit(mean_of_tokens, in_axes=("batch seq",), config=CONFIG)
    bad.manager.seal()
    assert_bucketing_preserves(good)
    assert "(1, 1) in the bucket (2, 4)" in failure(bad)
    assert good.stats()["hits"] == good.registry.num_graphs == len(store) == 0
    with pytest.raises(ConfigError, match="bucketed already: leave out in_axes, unpad"):
        assert_bucketing_preserves(good, in_axes=("batch seq",), unpad="none")


@pytest.mark.parametrize("unpad", ["host", "device", "none", "padded"])
def test_however_outputs_are_handed_out(unpad):
    """Outputs are compared at the real sizes, for every `unpad`."""
    options: dict[str, Any] = {"in_axes": "batch seq", "unpad": unpad, "config": CONFIG}
    assert_bucketing_preserves(elementwise, settings=FEW, **options)
    assert "in the bucket" in failure(mean_of_tokens, **options)


def test_parameters_and_donation():
    """Parameters are given as they are, donated arguments are not used up, keywords pass."""
    params = {"w": jnp.arange(4.0), "b": jnp.ones(4)}

    @by_numpy
    def model(params, x, *, scale):
        return {"y": x * params["w"] * scale + params["b"]}

    example = (params, np.zeros((1, 1, 4), np.float32))
    options: dict[str, Any] = {
        "in_axes": (None, X),
        "example": example,
        "kwargs": {"scale": 0.5},
        "config": CONFIG,
        "settings": FEW,
    }
    assert_bucketing_preserves(model, **options)
    assert_bucketing_preserves(model, donate_argnums=1, **options)
    assert_bucketing_preserves(model, static_argnames="scale", **options)
    assert not params["w"].is_deleted()


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_donated_arrays_of_ones_own():
    """Arrays on the device that a call uses up are told of in the message all the same."""
    inputs = st.integers(1, 3).map(lambda seq: (jnp.ones((2, seq)),))
    message = failure(
        lambda x: x + x.mean(), in_axes="batch seq", donate_argnums=0, inputs=inputs, config=CONFIG
    )
    assert "padding is counted in" in message


def test_inputs_of_ones_own():
    """A strategy may give the arguments."""
    drawn = st.integers(1, 4).map(lambda batch: (np.full((batch, 3), 7, np.int32),))
    seen = []

    def model(ids):
        seen.append(ids.shape)
        return ids * 2

    assert_bucketing_preserves(model, in_axes=("batch seq",), inputs=drawn)
    assert {shape[0] for shape in seen} >= {1, 2, 3, 4}
    with pytest.raises(ConfigError, match="leave out example, dtypes and values"):
        assert_bucketing_preserves(model, in_axes="batch seq", inputs=drawn, dtypes="int32")


def test_another_structure():
    """Answers of another structure are not compared, and the message has both."""

    def moody(x):
        return (x,) if isinstance(x, jax.core.Tracer) else [x]

    message = failure(moody, in_axes=("batch seq",))
    assert "a bucket gives PyTreeDef((*,)), but the plain function PyTreeDef([*])" in message


def test_tolerance():
    """What is allowed can be set."""

    @by_numpy
    def nearly(x):
        return x + 1e-3 * (x.shape[0] * x.shape[1])

    assert "and 0" in failure(nearly, in_axes=(X,))
    assert_bucketing_preserves(nearly, in_axes=(X,), atol=0.1)
    assert "is allowed" in failure(nearly, in_axes=(X,), rtol=1e-6)


def test_the_cause_by_the_tolerance():
    """Where less is allowed, what the padding moves by less than usual is the cause."""

    @by_numpy
    def slightly(x):
        return x + 1e-4 * x.mean(axis=1, keepdims=True)

    message = failure(slightly, in_axes=("batch seq",), rtol=1e-6, atol=1e-6)
    assert "padding is counted in" in message


def test_bfloat16():
    """A sound model of few digits is not accused."""
    options: dict[str, Any] = {"in_axes": (X,), "dtypes": "bfloat16", "config": NARROW}
    sound = as_a_whole(lambda x: jax.nn.softmax(x @ x.mT @ x))
    assert_bucketing_preserves(sound, settings=FEW, **options)
    assert failure(mean_of_tokens, **options)


def test_lengths_that_are_not_padded():
    """Without captured lengths each is a bucket of its own, and only the batch is padded."""
    config = CUDAGraphConfig(capture_sizes=(2,))
    assert_bucketing_preserves(mean_of_tokens, in_axes="batch seq", config=config, settings=FEW)
    assert "the batch is padded" in failure(PLANTED[0], in_axes=("batch seq",), config=config)


def test_what_cannot_be_captured():
    """A model that cannot be traced, or whose outputs cannot be trimmed, is no success."""
    with pytest.raises(CaptureError, match="cannot trace"):
        assert_bucketing_preserves(lambda x: x if x.sum() > 0 else -x, in_axes=("batch seq",))
    with pytest.raises(InputShapeError, match="the output"):
        assert_bucketing_preserves(lambda x: x.ravel(), in_axes=("batch seq",))


def test_what_is_missing():
    """A plain function needs its axes, and a passed-through argument an example."""
    with pytest.raises(ConfigError, match="in_axes is missing"):
        assert_bucketing_preserves(elementwise)
    with pytest.raises(ConfigError, match="give example="):
        assert_bucketing_preserves(lambda params, x: x, in_axes=(None, X))


@pytest.mark.parametrize(
    "check",
    [assert_bucketing_preserves, assert_padding_does_not_leak, assert_batching_preserves],
    ids=lambda check: check.__name__,
)
def test_one_string_stands_for_all_arguments(check):
    """One array is drawn for each argument that a call needs: no mask, and none with a default."""

    def scaled(x, m, by=2.0, *, mask=None, plus=1.0):
        assert m.dtype == np.bool_
        return x * m * by + plus

    options: dict[str, Any] = {
        "in_axes": "batch seq",
        "config": CONFIG,
        "settings": examples(4, thorough=40),
    }
    check(scaled, dtypes=(None, "bool"), mask_argname="mask", **options)
    check(lambda x, y, /: x * y, **options)
    check(lambda *arrays: arrays[0] * 2, **options)


def test_one_string_and_what_is_given_by_name():
    """What keyword arguments give, and what is static, is not drawn."""
    assert_bucketing_preserves(
        lambda x, w, times: x * w * times,
        in_axes="batch seq",
        static_argnames="times",
        kwargs={"w": np.float32(2), "times": 3},
        config=CONFIG,
        settings=examples(4, thorough=40),
    )
