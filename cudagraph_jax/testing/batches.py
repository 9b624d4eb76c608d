"""A batcher does not change the answer: each item alone equals its answer in any company."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from cudagraph_jax.batching.company import differing_row
from cudagraph_jax.batching.lane import Lane, SharedArguments
from cudagraph_jax.batching.rows import ItemArguments
from cudagraph_jax.config import CompareWhere, CUDAGraphConfig
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.graphs.compare import Tolerance
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.trial import behind_no_cut, example_call
from cudagraph_jax.program.call import Call
from cudagraph_jax.shapes.axes import LeafAxes, least_size, side
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.testing.examples import Example, check_examples
from cudagraph_jax.testing.subject import Subject


def assert_batching_preserves(
    fn: Callable[..., Any],
    *,
    in_axes: PyTree = None,
    example: tuple[PyTree, ...] | None = None,
    dtypes: PyTree = None,
    values: PyTree = None,
    inputs: SearchStrategy[tuple[PyTree, ...]] | None = None,
    config: CUDAGraphConfig | None = None,
    compare_where: CompareWhere | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    settings: hypothesis.settings | None = None,
    **options: Any,
) -> None:
    """Fails unless a `Batcher` of `fn` gives each item the plain function's answer to it alone.

    What `assert_bucketing_preserves` tries with rectangles, this tries with rows of their own
    lengths: each has a mask of its own, and what is right for the first row, or for the longest, is
    wrong for another. No thread runs: hypothesis draws which rows share a call, and shrinks it.

    Args:
        fn: As for `assert_bucketing_preserves`, and so are all others.
        in_axes: Which dimensions carry which size.
        example: Positional arguments of any sizes.
        dtypes: Other dtypes than those of the example.
        values: What arrays are filled with.
        inputs: A strategy for the positional arguments: rectangles, of which rows are cut.
        config: The grid.
        compare_where: Where outputs are compared.
        rtol: How far answers may be apart: `atol + rtol * abs(expected)`.
        atol: If both are None: half of the digits of the largest element.
        settings: Hypothesis's.
        **options: Further options of `bucket_jit`, such as `mask_argname`, where `fn` is plain.

    Raises:
        AssertionError: An answer differs. The message names the row, its company and what to do.
        CaptureError: A bucket cannot be captured, or the function does not take a row.
        ConfigError: What is given does not fit together, or the function cannot be batched.

    Example:
        >>> import jax.numpy as jnp
        >>> def means(x, *, mask):
        ...     return jnp.sum(x * mask, axis=1) / jnp.sum(mask, axis=1)
        >>> assert_batching_preserves(means, in_axes="batch seq", mask_argname="mask")
    """
    subject = Subject(
        fn,
        in_axes=in_axes,
        config=config,
        compare_where=compare_where,
        kwargs={},
        options=options,
    )
    if max(subject.config.capture_sizes) < 2:
        raise ConfigError(
            f"capture_sizes={tuple(subject.config.capture_sizes)} let no two rows share a call, so "
            "that nothing is tried: add a larger size"
        )
    tolerance = Tolerance(rtol, atol)
    arguments = ItemArguments(subject.bucketed, name=subject.bucketed.called)

    def check(drawn: tuple[PyTree, ...]) -> None:
        args, sizes = drawn
        call = subject.described(args)
        entry = subject.captured(call)
        lane = _lane(subject, arguments, entry, call)
        difference = differing_row(
            lane,
            entry,
            _rows(lane, call, sizes),
            compare_where=subject.config.compare_where,
            tolerance=tolerance,
        )
        if difference is not None:
            raise AssertionError(difference.message)

    drawn = subject.examples(example, dtypes, values, inputs=inputs)
    check_examples(check, _ragged(subject, drawn), settings=settings)
    subject.refuse_no_mask()


@st.composite
def _ragged(draw: st.DrawFn, /, subject: Subject, drawn: SearchStrategy[Example]) -> Example:
    """A rectangle, and the sizes that are cut from each of its rows."""
    args = draw(drawn).args
    call = subject.described(args)
    fixed = {"batch"} | ({"seq"} if subject.config.capture_seq_lens is None else set())
    free = [axis for axis in call.carried if axis not in fixed]
    rows = [
        call.sizes.with_sizes(
            {
                "batch": 1,
                **{
                    axis: draw(st.integers(_least(call, axis), call.sizes.size(axis)))
                    for axis in free
                },
            }
        )
        for _ in range(call.sizes.batch_size)
    ]
    return Example((args, rows), {"rows": [row.short for row in rows]})


def _least(call: Call, axis: str) -> int:
    """The least size to which a row is cut: in one of 1 an integer of 1 is a length, no index."""
    return min(call.sizes.size(axis), max(2, least_size(call.axes, axis)))


def _lane(subject: Subject, arguments: ItemArguments, entry: CUDAGraphEntry, call: Call) -> Lane:
    one = example_call(entry.program, call, call.sizes.with_sizes({"batch": 1}))
    passed, row = arguments.places.parted(one.args)
    shared = SharedArguments(passed)
    return Lane(
        subject.bucketed, row, (), arguments=arguments, shared=shared, clock=time.perf_counter
    )


def _rows(lane: Lane, call: Call, sizes: Sequence[Bucket]) -> list[Call]:
    """Each row of a call by itself, cut to its own sizes."""
    whole = call.sizes.with_sizes({"batch": 1})
    rows = []
    for place, size in enumerate(sizes):
        row = lane.call_of(lane.layout.arrays(call, place), whole)
        leaves = [
            leaf if axes.passes_through else _cut(np.asarray(leaf), axes, whole, size)
            for leaf, axes in zip(row.leaves, row.axes, strict=True)
        ]
        arrays = lane.layout.arrays(replace(row, leaves=tuple(leaves)))
        rows.append(lane.call_of(arrays, size))
    return rows


def _cut(array: Array, axes: LeafAxes, whole: Bucket, size: Bucket) -> Array:
    """What is left of an array at smaller sizes, where lengths and positions are lowered to fit."""
    index = [slice(None)] * array.ndim
    for place, length in axes.dims:
        index[place] = side(length.of(size), left=length.left)
    left: Array = behind_no_cut(array[tuple(index)], whole, size)
    return left
