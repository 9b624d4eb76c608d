"""The one test that the author of a model should have: buckets do not change the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import numpy as np

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.graphs.check import Trial
from cudagraph_jax.graphs.compare import ArrayDifference, Tolerance, worst_difference
from cudagraph_jax.graphs.trial import poison, poisonable
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.testing.examples import check_examples
from cudagraph_jax.testing.subject import Answers, Subject

_FILL = 2.0


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
        in_axes: As for `bucket_jit`; leave it out where `fn` is bucketed.
        example: Positional arguments of any sizes, such as `(params, ids, mask)`; as for
            `cudagraph_jax.testing.inputs`, and so are the next two.
        dtypes: Other dtypes than those of the example.
        values: What arrays are filled with, such as `(None, (0, 999), "mask")`.
        kwargs: Keyword arguments of each call, passed through.
        inputs: A strategy for the positional arguments, in place of the three.
        config: The grid; by default that of `fn`, or for a plain function one of six buckets.
        rtol: How far answers may be apart: `atol + rtol * abs(expected)`.
        atol: If both are None: half of the digits of the largest element.
        settings: Hypothesis's, such as `settings(max_examples=1000)`.
        **options: Further options of `bucket_jit`, such as `mask_argname`, where `fn` is plain.

    Raises:
        AssertionError: An answer differs. The message names the size and the bucket, the output
            and its worst element, and what to do.
        CaptureError: A bucket cannot be captured.
        InputShapeError: The function does not take what was drawn, or an output cannot be trimmed.
        ConfigError: What is given does not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> def totals(x):
        ...     return jnp.sum(x, axis=1)  # zeros in the padding do not matter
        >>> assert_bucketing_preserves(totals, in_axes=("batch seq ...",))
    """
    subject = Subject(fn, in_axes=in_axes, config=config, kwargs=kwargs or {}, options=options)
    tolerance = Tolerance(rtol, atol)

    def check(args: tuple[PyTree, ...]) -> None:
        answers = subject.answers(args)
        for name, found, expected in zip(
            answers.names, answers.found, answers.expected, strict=True
        ):
            worst = worst_difference(found, expected, tolerance=tolerance)
            if worst is not None:
                raise AssertionError(_message(answers, name, worst, tolerance))

    drawn = subject.examples(example, dtypes, values, inputs=inputs)
    check_examples(check, drawn, settings=settings)


def _message(answers: Answers, name: str, worst: ArrayDifference, tolerance: Tolerance) -> str:
    call, bucket = answers.call, answers.entry.bucket
    allowed = f", and {worst.allowed:.2g} is allowed" if worst.allowed else ""
    off = "" if isinstance(worst.found, (np.integer, np.bool_)) else f": off by {worst.off:.3g}"
    why, remedy = _cause(answers, tolerance)
    return (
        f"{call.variant.name} gives another answer in a bucket than by itself\n"
        f"  sizes:  (batch, seq_len)={tuple(call.sizes)} in the bucket {tuple(bucket)}: "
        f"{_padded_axes(answers)}\n"
        f"  output: {name}{list(worst.at)} is {worst.found}, but the plain function gives "
        f"{worst.expected}{off}{allowed}\n"
        f"  why:    {why}\n"
        f"  remedy: {remedy}"
    )


def _padded_axes(answers: Answers) -> str:
    sizes, bucket = answers.call.sizes, answers.entry.bucket
    padded = [
        f"{name} is padded from {size} to {to}"
        for name, size, to in zip(("the batch", "the sequence"), sizes, bucket, strict=True)
        if size != to
    ]
    return " and ".join(padded) or "nothing is padded"


def _cause(answers: Answers, tolerance: Tolerance) -> tuple[str, str]:
    """Why an answer differs, as far as further runs tell, and what to do."""
    pairs = zip(answers.compiled(), answers.expected, strict=True)
    if any(worst_difference(*pair, tolerance=tolerance) is not None for pair in pairs):
        return (
            "compiled and eager differ without any padding, too: is the function pure?",
            "give what it reads besides its arguments (globals, clocks, random state) as arguments",
        )
    trial = Trial(answers.entry, answers.call)
    arrays = poisonable(answers.entry.program, answers.call)
    other = poison({**arrays.data, **arrays.doubtful}, _FILL, largest=True)
    moved = zip(trial.run(other), trial.usual, strict=True) if other else ()
    if any(worst_difference(*pair, tolerance=tolerance) is not None for pair in moved):
        return (
            "the answer moves with what the padding holds: padding is counted in",
            'leave out what is not real, by a mask (mask_argname="mask" gives one to the '
            "function) or by lengths, or choose pad_values that the function ignores (0 if it "
            "is written)",
        )
    return (
        "the answer does not move with what the padding holds: its size is counted in, such as "
        "x.shape[1] taken for a length or a position",
        'count what is real, by a mask (mask_argname="mask" gives one to the function) or by '
        "lengths that the caller gives",
    )
