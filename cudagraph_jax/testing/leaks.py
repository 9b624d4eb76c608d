"""The assertion that nothing of the padding reaches the real rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis

from cudagraph_jax.config import CompareWhere, CUDAGraphConfig
from cudagraph_jax.errors import PaddingLeakError
from cudagraph_jax.graphs.check import check_entry
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.testing.examples import check_examples
from cudagraph_jax.testing.subject import Subject


def assert_padding_does_not_leak(
    fn: Callable[..., Any],
    *,
    in_axes: PyTree = None,
    example: tuple[PyTree, ...] | None = None,
    dtypes: PyTree = None,
    values: PyTree = None,
    kwargs: Mapping[str, PyTree] | None = None,
    inputs: hypothesis.strategies.SearchStrategy[tuple[PyTree, ...]] | None = None,
    config: CUDAGraphConfig | None = None,
    compare_where: CompareWhere | None = None,
    settings: hypothesis.settings | None = None,
    **options: Any,
) -> None:
    """Fails if the real rows move with what the padding holds, even where zeros do no harm.

    The padding is filled with NaN and with other numbers, or for integers with values that occur,
    as `debug_mode` does at each capture; here for many sizes and values. `sum` passes
    `assert_bucketing_preserves`, whose padding is zero, and fails here. What looks like a mask
    keeps its padding.

    Args:
        fn: As for `assert_bucketing_preserves`, and so are all others.
        in_axes: Which dimensions carry which size.
        example: Positional arguments of any sizes.
        dtypes: Other dtypes than those of the example.
        values: What arrays are filled with.
        kwargs: Keyword arguments of each call.
        inputs: A strategy for the positional arguments.
        config: The grid.
        compare_where: Where outputs are compared.
        settings: Hypothesis's.
        **options: Further options of `bucket_jit`.

    Raises:
        AssertionError: The padding leaks; the message names the output and the worst element.
        CaptureError: A bucket cannot be captured.
        InputShapeError: The function does not take what was drawn, or an output cannot be trimmed.
        ConfigError: What is given does not fit together; `compare_where="mask"`, and no mask.

    Example:
        >>> import jax.numpy as jnp
        >>> def means(x, mask):
        ...     return jnp.sum(jnp.where(mask, x, 0), axis=1) / jnp.sum(mask, axis=1)
        >>> assert_padding_does_not_leak(means, in_axes=("batch seq",), mask_argname="mask")
    """
    subject = Subject(
        fn,
        in_axes=in_axes,
        config=config,
        compare_where=compare_where,
        kwargs=kwargs or {},
        options=options,
    )
    pads_seq = subject.config.capture_seq_lens is not None
    where = subject.config.compare_where

    def check(args: tuple[PyTree, ...]) -> None:
        call = subject.described(args)
        try:
            check_entry(subject.captured(call), call, pads_seq=pads_seq, compare_where=where)
        except PaddingLeakError as error:
            raise AssertionError(str(error)) from error

    drawn = subject.examples(example, dtypes, values, inputs=inputs)
    check_examples(check, drawn, settings=settings)
    subject.refuse_no_mask()
