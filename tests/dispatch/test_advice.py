"""What a warning, a report or an error advises, and that it works."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import (
    CaptureError,
    CUDAGraphConfig,
    CUDAGraphWarning,
    InputShapeError,
    bucket_jit,
)
from cudagraph_jax.program.program import Program, request_for
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.functions import GRID, assert_close, floats

X = floats(0, 2, 3)
MASK = X > 0


def by_keyword(x, *, mask):
    return jnp.where(mask, x, 0)


def by_position(x, mask):
    return jnp.where(mask, x, 0)


def in_a_tree(x, inputs):
    return jnp.where(inputs["mask"], x, 0)


UNPADDED: dict[str, tuple[Callable[..., Any], Any, dict[str, Any], str]] = {
    "keyword": (by_keyword, "batch seq", {"mask": MASK}, "mask"),
    "position": (by_position, ("batch seq", None), {"mask": MASK}, "mask"),
    "tree": (in_a_tree, ("batch seq", None), {"inputs": {"mask": MASK}}, r"inputs\['mask'\]"),
}


@pytest.mark.parametrize("case", UNPADDED)
def test_what_is_passed_at_the_calls_size_is_named(case):
    """Where a mask that is not padded makes every call run eagerly, the warning says so."""
    plain, in_axes, inputs, named = UNPADDED[case]
    function = bucket_jit(plain, in_axes=in_axes, config=GRID)
    said = rf"{named} \(2, 3\) as passed, not padded to 3x5: .*in_axes.*mask_argname"
    with pytest.warns(CUDAGraphWarning, match=said):
        assert_close(function(X, **inputs), np.where(MASK, X, 0))
    (failure,) = function.report().failures
    assert "as passed, not padded to 3x5" in failure[2]


def test_a_mask_by_keyword_in_a_warm_up():
    """A warm-up reports it for each bucket."""
    report = bucket_jit(by_keyword, in_axes="batch seq", config=GRID)
    with pytest.warns(CUDAGraphWarning, match="as passed, not padded to 4x5"):
        warmed = report.warmup(X, mask=MASK, progress=False)
    assert "mask (2, 3) as passed" in str(warmed.failed[0].error)


def test_the_advice_for_a_mask_works():
    """Positional with axes, or named in mask_argname, it is captured."""
    positional = bucket_jit(by_position, in_axes=("batch seq", "batch seq"), config=GRID)
    assert_close(positional(X, MASK), np.where(MASK, X, 0))
    assert positional.registry.num_graphs == 1


DECIDES = {
    "bool": (lambda x, flag: x * 2 if flag else x, True, X * 2),
    "int": (lambda x, flag: x.reshape(flag, *x.shape), 1, X[None]),
    "float": (lambda x, flag: x * 2 if flag > 0 else x, 0.5, X * 2),
    "size": (lambda x, flag: x + jnp.zeros(flag), 1, X),
    "range": (lambda x, flag: sum(x for _ in range(flag)), 2, X * 2),
}


@pytest.mark.parametrize("case", DECIDES)
def test_a_number_that_decides_is_to_be_static(case):
    """A number that a function branches by is named, with static_argnames, which works."""
    plain, value, expected = DECIDES[case]
    function = bucket_jit(plain, in_axes=("batch seq", None), config=GRID, out_axes=None)
    with pytest.warns(CUDAGraphWarning, match="by the value of flag, name that in static_argname"):
        assert_close(function(X, value), expected)
    static = bucket_jit(plain, in_axes=("batch seq", None), static_argnames="flag", config=GRID)
    assert_close(static(X, value), expected)
    assert static.registry.num_graphs == 1


def test_a_mistake_of_the_functions_own_gets_no_advice():
    """What has to do with neither is told as it is."""

    def broken(x, scale):
        raise RuntimeError("never")

    function = bucket_jit(broken, in_axes=("batch seq", None), config=GRID)
    with pytest.raises(CaptureError, match=r"example of the warm-up: RuntimeError: never$"):
        function.warmup(X, 2.0, progress=False)


def test_a_report_has_no_tracebacks():
    """What a host callback raises is told in one line, not with the frames that led to it."""

    def host(x):
        raise ValueError("no such row")

    def calls_host(x):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    function = bucket_jit(calls_host, in_axes="batch seq", config=GRID)
    with pytest.warns(CUDAGraphWarning, match=r"does not run: .*ValueError: no such row"):
        report = function.warmup(X, progress=False)
    told = [str(report), str(function.report()), *(str(row.error) for row in report.failed)]
    for text in told:
        assert "ValueError: no such row" in text
        assert "Traceback" not in text
        assert "File" not in text


def test_an_answer_at_the_buckets_size_passed_on():
    """Sizes that disagree are both named, with what an answer of a bucket's size is."""
    hidden = bucket_jit(lambda x: x * 2, in_axes="batch seq", unpad="none", config=GRID)
    masked = bucket_jit(lambda h, mask: h * mask, in_axes=("batch seq",) * 2, config=GRID)
    with pytest.raises(InputShapeError, match=r'h has batch=3 but mask has batch=2.*unpad="none"'):
        masked(hidden(X), MASK)
    trimmed = bucket_jit(lambda x: x * 2, in_axes="batch seq", unpad="device", config=GRID)
    assert_close(masked(trimmed(X), MASK), X * 2 * MASK)


def test_a_large_grid_is_not_listed_for_a_capture():
    """What a capture looks at grows with the ladders, not with the grid that they span."""
    config = CUDAGraphConfig(capture_sizes=range(1, 1001), capture_seq_lens=range(1, 1001))
    function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=config)
    program = Program(function.describe(X))
    request = request_for(program, Bucket(2, 3), config=config)
    assert len(request.others) <= 2000
    assert {size.batch_size for size in request.others} == set(range(1, 1001))
    assert {size.seq_len for size in request.others} == set(range(1, 1001))
