"""`assert_padding_does_not_leak` finds what reads padding, though zeros in it do no harm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from cudagraph_jax import CUDAGraphConfig, InputShapeError, bucket_jit
from cudagraph_jax.errors import CaptureError, ConfigError
from cudagraph_jax.testing import assert_bucketing_preserves, assert_padding_does_not_leak
from tests.helpers.by_numpy import by_numpy, xp
from tests.helpers.examples import as_a_whole, examples
from tests.helpers.mistakes import PLANTED, SOUND, TABLE, X, elementwise

GRID = CUDAGraphConfig(capture_sizes=(3,), capture_seq_lens=(1, 4))
FEW = examples(10, thorough=25)


@by_numpy
def totals(x):
    """Right only while the padding is zero."""
    return x.sum(axis=1)


@by_numpy
def masked_totals(x, mask):
    return xp(x).where(mask, x, 0).sum(axis=1)


@by_numpy
def scaled(params, x, *, by):
    return {"y": x * params["w"] * by}


def leak(fn, **options) -> str:
    """What the assertion says of a function."""
    with pytest.raises(AssertionError) as caught:
        assert_padding_does_not_leak(fn, **{"config": GRID, **options})
    notes: list[str] = getattr(caught.value, "__notes__", [])
    return "\n".join([str(caught.value), *notes])


def test_zeros_that_do_no_harm():
    """A sum passes with zeros in its padding, and leaks all the same."""
    assert_bucketing_preserves(totals, in_axes=("batch seq",), config=GRID, settings=FEW)
    message = leak(totals, in_axes=("batch seq",))
    assert message.startswith("totals at (1, 2) in the bucket 3x4: the output[0] is ")
    assert "2 in the padding" in message
    assert "(the batch is padded from 1 to 3 and the sequence is padded from 2 to 4)" in message
    assert "padding is counted in, that of the sequence" in message
    assert "let the function take a mask" in message
    assert "example=(x=array(" in message


def test_a_mask_stops_it():
    """The same sum under a mask does not leak, whether the library gives the mask or the caller."""
    assert_padding_does_not_leak(
        masked_totals, in_axes=("batch seq",), mask_argname="mask", config=GRID, settings=FEW
    )
    assert_padding_does_not_leak(
        masked_totals,
        in_axes=("batch seq", "batch seq"),
        dtypes=(None, "bool"),
        values=(None, "mask"),
        config=GRID,
        settings=FEW,
    )


@by_numpy
def means_of_tokens(ids):
    """The token 0 is padding."""
    real = (ids != 0)[..., None]
    vectors = xp(ids).asarray(TABLE)[ids]
    return (vectors * real).sum(axis=1) / real.sum(axis=1).clip(1)


def test_padding_that_the_function_knows():
    """A pad value that is chosen, be it 0, is one that the function ignores; the default is not."""
    options: dict[str, Any] = {"in_axes": ("batch seq",), "dtypes": "int32"}
    assert "choose pad_values" in leak(means_of_tokens, **options)
    assert_padding_does_not_leak(
        means_of_tokens, pad_values=0, config=GRID, settings=FEW, **options
    )
    assert_bucketing_preserves(means_of_tokens, config=GRID, settings=FEW, **options)


@by_numpy
def up_to_position(x, position):
    seen = xp(x).arange(x.shape[1]) <= position[:, None]
    return xp(x).where(seen, x, 0).sum(axis=1)


def test_chosen_edges():
    """Sorted values that repeat their last one are padded with nothing else."""
    ordered = st.integers(1, 4).map(lambda seq: np.cumsum(np.ones(seq, np.float32)))
    assert_padding_does_not_leak(
        as_a_whole(jnp.interp),
        in_axes=("batch", "seq", "seq"),
        pad_values="edge",
        inputs=ordered.map(lambda times: (np.array([0.5, 2], np.float32), times, times**2)),
        name="interp",
        config=GRID,
        settings=FEW,
    )


def test_positions():
    """Positions are numbers from 0 to seq_len - 1, also where that is 0 alone."""
    assert_padding_does_not_leak(
        up_to_position,
        in_axes=("batch seq", "batch"),
        dtypes=("float32", "int32"),
        values=(None, "positions"),
        config=GRID,
        settings=FEW,
    )
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(2,), debug_mode=True)
    function = bucket_jit(up_to_position, in_axes=("batch seq", "batch"), config=config)
    function(np.ones((1, 1), np.float32), np.zeros(1, np.int32))
    assert function.registry.num_graphs == 1


def test_rows_of_integers_without_a_sequence():
    """Where there is no sequence a number for each row is no position: leaks are leaks."""
    config = CUDAGraphConfig(capture_sizes=(3,))
    message = leak(
        lambda x, kind: x + jnp.where(kind > 0, x.sum(), 0),
        in_axes=("batch", "batch"),
        dtypes=("float32", "int32"),
        values=(None, (0, 1)),
        config=config,
    )
    assert "the padding changes the real rows" in message


@pytest.mark.parametrize("fn", PLANTED, ids=lambda fn: fn.__name__)
def test_mistakes(fn):
    """What `assert_bucketing_preserves` finds, this one finds too."""
    assert fn.__name__ in leak(fn, in_axes=(X,))


@pytest.mark.parametrize("fn", SOUND, ids=lambda fn: fn.__name__)
def test_sound_models_are_not_accused(fn):
    """Nothing is found in sound models."""
    assert_padding_does_not_leak(fn, config=GRID, settings=FEW, **SOUND[fn])


def test_a_bucketed_function():
    """What `bucket_jit` made is tested as it is, and not told again how."""
    bad = bucket_jit(totals, in_axes=("batch seq",), config=GRID)
    assert "totals at (1, 2)" in leak(bad, config=None)
    assert bad.registry.num_graphs == 0
    with pytest.raises(ConfigError, match="bucketed already: leave out in_axes, mask_argname"):
        assert_padding_does_not_leak(bad, in_axes=("batch seq",), mask_argname="mask")


def test_parameters_and_keywords():
    """Parameters are given as they are, and keywords pass."""
    options: dict[str, Any] = {
        "in_axes": (None, X),
        "example": ({"w": jnp.arange(4.0)}, np.zeros((1, 1, 4), np.float32)),
    }
    assert_padding_does_not_leak(scaled, kwargs={"by": 2.0}, config=GRID, settings=FEW, **options)


def test_inputs_of_ones_own():
    """A strategy may give the arguments; a call that fills its bucket is tried with one less."""
    short = st.just((np.ones((1, 2), np.float32),))
    full = st.just((np.ones((3, 4), np.float32),))
    assert "totals at (1, 2)" in leak(totals, in_axes=("batch seq",), inputs=short)
    assert "totals at (2, 3)" in leak(totals, in_axes=("batch seq",), inputs=full)


def test_lengths_that_are_not_padded():
    """Without captured lengths only the batch is padded, and only what mixes rows leaks."""
    config = CUDAGraphConfig(capture_sizes=(3,))
    options: dict[str, Any] = {"in_axes": ("batch seq",), "config": config}
    assert_padding_does_not_leak(totals, settings=FEW, **options)
    assert "in the bucket 3x" in leak(lambda x: x - x.sum(axis=0), **options)


def test_what_cannot_be_captured():
    """What cannot be traced, or trimmed, or differs without any padding, is no success."""
    with pytest.raises(CaptureError, match="cannot trace"):
        assert_padding_does_not_leak(lambda x: x if x.sum() > 0 else -x, in_axes=("batch seq",))
    with pytest.raises(InputShapeError, match="the output"):
        assert_padding_does_not_leak(lambda x: x.ravel(), in_axes=("batch seq",))
    with pytest.raises(CaptureError, match="is it pure"):
        assert_padding_does_not_leak(
            lambda x: x + isinstance(x, jax.core.Tracer),
            in_axes=("batch seq",),
            config=CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(1,)),
        )
    with pytest.raises(ConfigError, match="in_axes is missing"):
        assert_padding_does_not_leak(elementwise)
