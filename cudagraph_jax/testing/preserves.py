"""The one test that the author of a model should have: buckets do not change the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import numpy as np

from cudagraph_jax.config import CompareWhere, CUDAGraphConfig
from cudagraph_jax.graphs.check import cause_of, padded_axes
from cudagraph_jax.graphs.compare import Tolerance
from cudagraph_jax.graphs.trial import OutputDifference, Trial
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.testing.examples import check_examples
from cudagraph_jax.testing.subject import Subject


def assert_bucketing_preserves(
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
    rtol: float | None = None,
    atol: float | None = None,
    settings: hypothesis.settings | None = None,
    **options: Any,
) -> None:
    """Fails unless `fn` gives the plain function's answer in its buckets, whatever the sizes.

    Hypothesis draws sizes and values, and shrinks what it finds. Every call is captured in its own
    bucket of a manager of its own: policies, limits and the store of a `BucketedFunction` do not
    count here.

    Args:
        fn: The model: a plain function, or what `bucket_jit` made of it.
        in_axes: As for `bucket_jit`; leave it out where `fn` is bucketed. Where one string stands
            for all arguments, and there is no example, one array is drawn for each that `fn` needs.
        example: Positional arguments of any sizes, such as `(params, ids, mask)`; as for
            `cudagraph_jax.testing.inputs`, and so are the next two.
        dtypes: Other dtypes than those of the example.
        values: What arrays are filled with, such as `(None, (0, 999), "mask")`.
        kwargs: Keyword arguments of each call, passed through.
        inputs: A strategy for the positional arguments, in place of the three.
        config: The grid; by default that of `fn`, or for a plain function one of six buckets.
        compare_where: `"mask"`: only where the function's mask is true; by default as the
            configuration says, which is `"all"` unless set.
        rtol: How far answers may be apart: `atol + rtol * abs(expected)`.
        atol: If both are None: half of the digits of the largest element.
        settings: Hypothesis's, such as `settings(max_examples=1000)`.
        **options: Further options of `bucket_jit`, such as `mask_argname`, where `fn` is plain.

    Raises:
        AssertionError: An answer differs. The message names the size and the bucket, the output
            and its worst element, and what to do.
        CaptureError: A bucket cannot be captured.
        InputShapeError: The function does not take what was drawn, or an output cannot be trimmed.
        ConfigError: What is given does not fit together; `compare_where="mask"`, and no mask.

    Example:
        >>> import jax.numpy as jnp
        >>> def totals(x):
        ...     return jnp.sum(x, axis=1)  # zeros in the padding do not matter
        >>> assert_bucketing_preserves(totals, in_axes=("batch seq ...",))
    """
    subject = Subject(
        fn,
        in_axes=in_axes,
        config=config,
        compare_where=compare_where,
        kwargs=kwargs or {},
        options=options,
    )
    tolerance = Tolerance(rtol, atol)

    def check(args: tuple[PyTree, ...]) -> None:
        answers = subject.answers(args)
        trial = Trial(
            answers.entry,
            answers.call,
            compare_where=subject.config.compare_where,
            tolerance=tolerance,
        )
        difference = trial.difference(answers.found, answers.expected)
        if difference is not None:
            raise _DifferenceError(trial, difference)

    drawn = subject.examples(example, dtypes, values, inputs=inputs)
    try:
        check_examples(check, drawn, settings=settings)
    except _DifferenceError as found:
        error = AssertionError(_message(found.trial, found.difference))
        for note in getattr(found, "__notes__", ()):
            error.add_note(note)
        raise error from None
    subject.refuse_no_mask()


class _DifferenceError(AssertionError):
    """An answer differs in a bucket; why takes further runs, which only the simplest is worth."""

    def __init__(self, trial: Trial, difference: OutputDifference) -> None:
        super().__init__(f"{trial.place} gives another answer")
        self.trial = trial
        self.difference = difference


def _message(trial: Trial, difference: OutputDifference) -> str:
    call, bucket = trial.example, trial.entry.bucket
    name, worst, _ = difference
    allowed = f", and {worst.allowed:.2g} is allowed" if worst.allowed else ""
    off = "" if isinstance(worst.found, (np.integer, np.bool_)) else f": off by {worst.off:.3g}"
    cause = cause_of(trial, difference)
    return (
        f"{call.variant.name} gives another answer in a bucket than by itself\n"
        f"  sizes:  {call.sizes.described} in the bucket {tuple(bucket.sizes.values())}: "
        f"{padded_axes(call.sizes, bucket)}\n"
        f"  output: {name}{list(worst.at)} is {worst.found}, but the plain function gives "
        f"{worst.expected}{off}{allowed}\n"
        f"  why:    {cause.why}\n"
        f"  remedy: {cause.remedy}"
    )
