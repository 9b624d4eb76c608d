"""`debug_mode`: a new bucket must give the eager answer, whatever its padding holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax._base.log import logger
from cudagraph_jax.config import CompareWhere
from cudagraph_jax.errors import CaptureError, PaddingLeakError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.trial import (
    OutputDifference,
    Poison,
    Poisonable,
    Trial,
    example_call,
    full_masks,
    poison,
    poisonable,
)
from cudagraph_jax.program.call import Call, argument_leaf_names
from cudagraph_jax.shapes.axes import least_size
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import ANY, Array, PadValue

_ORDINARY = 2.0
_HUGE = 1e4
_CALLED = {"batch": "the batch", "seq": "the sequence"}


def check_entry(
    entry: CUDAGraphEntry, call: Call, *, pads_seq: bool, compare_where: CompareWhere = "all"
) -> None:
    """Raises unless `entry` gives the eager answer for real rows, whatever the padding holds.

    It is tried at some sizes (five for batch and sequence, two more for each further axis), with
    one eager run each: all axes padded, each of them alone, and odd and even sizes. Those that the
    plain function does not take are left out; where it takes none of them, it is compared at the
    bucket's own. At each of them the padding is filled with values above and below all that is
    real, or for integers with the ends of what is valid, and the real rows must not move. NaN is
    for arrays that were declared to be padded with `"any"`: a weight of exactly zero stops numbers,
    and never NaN. A mask keeps its padding: bools, numbers that look like one, and what proves to
    be one, because padding of other arrays matters where its own says that it is real. So does an
    array whose pad value was chosen. Where there is nothing but masks, they are tried full, too: of
    `jnp.all` an element that is false hides that padding is.

    Args:
        entry: A new entry.
        call: A call of its variant, of any sizes; abstract arrays get values.
        pads_seq: Whether sequences are padded.
        compare_where: Whether outputs are compared where masks of the call are false, too.

    Raises:
        PaddingLeakError: The real rows depend on the padding.
        CaptureError: They differ from the eager answer where there is no padding, or a run failed.
    """
    is_checked = False
    refusals: list[CaptureError] = []
    for sizes in (*trial_sizes(entry, call, pads_seq=pads_seq), entry.bucket):
        if is_checked and sizes == entry.bucket:
            return
        trial = Trial(entry, example_call(entry.program, call, sizes), compare_where=compare_where)
        if (refusal := trial.refusal()) is not None:
            logger.info("debug_mode leaves out a size: %s", refusal)
            refusals.append(refusal)
            continue
        try:
            _check_trial(trial)
        except PaddingLeakError:
            # In a sequence of one, an integer of 1 is a length but no position, and 0 a position
            # but no length; likewise an index of rows where one is left.
            lengths = [axis for axis in _padded(entry, pads_seq=pads_seq) if axis != "batch"]
            is_short = any(sizes.size(axis) == 1 for axis in lengths)
            if not (is_short or sizes.batch_size == 1 < call.sizes.batch_size):
                raise
            example = example_call(entry.program, call, sizes, zeros_of_rows=True)
            _check_trial(Trial(entry, example, compare_where=compare_where))
        is_checked = True
    if not is_checked:
        raise refusals[0]


def trial_sizes(entry: CUDAGraphEntry, call: Call, *, pads_seq: bool) -> list[Bucket]:
    """The sizes that a new entry is tried at: all axes padded, each alone, all but the batch twice.

    Padding may be read only where the batch is full, or only where the sequence is, and strides may
    start elsewhere in other lengths: those tried have every remainder of two, three and four.
    """
    bucket, axes = entry.bucket, entry.program.axes
    lesser = {
        axis: _lesser(call.sizes.size(axis), bucket.size(axis), least=least_size(axes, axis))
        for axis in _padded(entry, pads_seq=pads_seq)
    }
    sizes = {axis: itertools.cycle(some) for axis, some in lesser.items() if some}
    if len(sizes) < 2:
        return [bucket.with_sizes({axis: n}) for axis in sizes for n in lesser[axis]]
    again = [[axis] for axis in sizes if axis != "batch"]
    turns = [list(sizes), *([axis] for axis in sizes), *again, list(sizes)]
    tried = [bucket.with_sizes({axis: next(sizes[axis]) for axis in turn}) for turn in turns]
    return list(dict.fromkeys(tried))


def _padded(entry: CUDAGraphEntry, *, pads_seq: bool) -> list[str]:
    """The axes along which calls are padded to the bucket."""
    axes = entry.program.carried if entry.copies_inputs else ()
    return [axis for axis in axes if axis != "seq" or pads_seq]


def _lesser(size: int, limit: int, *, least: int) -> list[int]:
    """Up to four sizes below `limit`, from `size` downwards, odd and even where there are both.

    None is below `least`, the first at which no array is empty that follows the size.
    """
    first = min(size, limit - 1)
    if first <= least:
        return list(range(least, min(least + 2, limit)))
    # Not upwards, where an array that is repeated may lose what a function relies on, such as its
    # order; nor to 1 without need, which is a length, but no position and no index.
    return list(range(first, max(least - 1 if first < least + 2 else least, first - 4), -1))


def _check_trial(trial: Trial) -> None:
    masks = trial.masks
    if trial.compare_where == "mask" and masks is not None and not masks.any_real:
        raise CaptureError(
            f'{trial.place}: compare_where="mask" leaves nothing to compare, because no element is '
            f"true in {' and '.join(masks.names)}: pad a mask of what is padding with 1 "
            "(pad_values), or leave compare_where out",
            stage="check",
        )
    _refuse_difference(trial, {}, trial.expected)
    if trial.example.sizes == trial.entry.bucket:
        return
    arrays = poisonable(trial.entry.program, trial.example)
    _check_data(trial, arrays)
    _check_doubtful(trial, arrays)
    full = full_masks(trial.entry.program, trial.example)
    if full is not None:
        whole = Trial(trial.entry, full, compare_where=trial.compare_where)
        if whole.refusal() is None:
            _refuse_difference(whole, {}, whole.expected)


def _check_data(trial: Trial, arrays: Poisonable) -> None:
    """Refuses a leak of arrays that are surely no masks."""
    data, pads = arrays.data, trial.entry.program.pad_values
    ignored = {index: array for index, array in data.items() if pads[index] == ANY}
    unknown = poison(ignored, np.nan, largest=False)
    if ignored and trial.differ(trial.run(unknown), trial.usual):
        _refuse_difference(trial, unknown, trial.usual)
    if not data:
        return
    for sign, largest in ((1, True), (-1, False)):
        moving = trial.first_move(
            [poison(data, sign * size, largest=largest) for size in (_ORDINARY, _HUGE)]
        )
        if moving is not None:
            _refuse_difference(trial, moving, trial.usual)


def _check_doubtful(trial: Trial, arrays: Poisonable) -> None:
    """Refuses a leak of an array that may be a mask, unless it proves to be one."""
    rests = [
        poison(arrays.data, _ORDINARY, largest=True),
        poison(arrays.data, -_ORDINARY, largest=False),
    ]
    moving: dict[int, PadValue] = {}
    for index, array in arrays.doubtful.items():
        is_float = jnp.issubdtype(array.dtype, np.inexact)
        values: Sequence[PadValue] = (_ORDINARY, _HUGE) if is_float else (1,)
        moved = trial.first_move([{**rests[0], index: value} for value in values])
        if moved is not None:
            moving[index] = moved[index]
            continue
        for rest in rests:
            rest[index] = values[0]
    for index, value in moving.items():
        alone = trial.run({index: value})
        is_mask = any(trial.differ(trial.run({**rest, index: value}), alone) for rest in rests)
        if not is_mask:
            _refuse_difference(trial, {index: value}, trial.usual)


def _refuse_difference(trial: Trial, padding: Poison, expected: list[Array]) -> None:
    """Raises where an output differs from `expected` by more than rounding with `padding`."""
    difference = trial.difference(trial.run(padding) if padding else trial.usual, expected)
    if difference is None:
        return
    name, worst, _ = difference
    message = (
        f"{trial.place}: {name}{list(worst.at)} is {worst.found} with {_shown(trial, padding)}, "
        f"but should be {worst.expected}"
    )
    if trial.example.sizes == trial.entry.bucket:
        raise CaptureError(
            f"{message}: the compiled function differs from the eager one; is it pure?",
            stage="check",
        )
    cause = cause_of(trial, difference, padding=padding)
    if cause.is_impure:
        raise CaptureError(f"{message}: {cause.why}", stage="check")
    changed = "only what a mask leaves out" if difference.is_masked_out else "the real rows"
    raise PaddingLeakError(
        f"{message}: the padding changes {changed} "
        f"({padded_axes(trial.example.sizes, trial.entry.bucket)}); {cause.why}; {cause.remedy}"
    )


def _shown(trial: Trial, padding: Poison) -> str:
    """What the padding holds, as errors say it."""
    if not padding:
        return "its usual padding"
    values = " and ".join(dict.fromkeys(f"{value:g}" for value in padding.values()))
    if len(padding) > 1:
        return f"{values} in the padding"
    return f"{values} in the padding of {_leaf_names(trial)[next(iter(padding))]}"


def _leaf_names(trial: Trial) -> list[str]:
    example = trial.example
    return argument_leaf_names(trial.entry.program.argument_names, example.args, example.kwargs)


def padded_axes(sizes: Bucket, bucket: Bucket) -> str:
    """Which axes are padded from `sizes` to `bucket`, as errors say it."""
    padded = [
        f"{_called(axis)} is padded from {size} to {bucket.size(axis)}"
        for axis, size in sizes.sizes.items()
        if size != bucket.size(axis)
    ]
    return " and ".join(padded) or "nothing is padded"


def _called(axis: str) -> str:
    return _CALLED.get(axis, axis)


class Cause(NamedTuple):
    """Why an answer differs in a bucket, as far as further runs tell.

    Attributes:
        why: What is wrong.
        remedy: What to do.
        is_impure: Whether it differs without any padding, too.
    """

    why: str
    remedy: str
    is_impure: bool = False


_IGNORE = (
    'let the function take a mask (mask_argname="mask" gives one; or bools or lengths of your own) '
)


def cause_of(trial: Trial, difference: OutputDifference, *, padding: Poison | None = None) -> Cause:
    """Why the answer of `trial` is not the plain function's.

    Args:
        trial: A trial in which it is not.
        difference: How it differs.
        padding: The pad values that move it; those it is padded with as usual if None or empty.
    """
    if difference.is_masked_out and trial.masks is not None:
        names = " or ".join(trial.masks.names)
        return Cause(
            f"it differs only where {names} is false, in elements that the caller's own mask "
            "leaves out",
            'where nobody reads those, set compare_where="mask" (in CUDAGraphConfig, or in an '
            "assertion of the testing kit), which compares only where a mask is true; otherwise "
            "let the function leave the padding out there, too",
        )
    if _differs_at(trial, trial.entry.bucket, {}):
        return Cause(
            "compiled and eager differ without any padding, too: is the function pure?",
            "give what it reads besides its arguments (globals, clocks, random state) as arguments",
            is_impure=True,
        )
    blamed = _blamed_axes(trial, padding or {})
    if not padding and not _moves(trial):
        return Cause(
            "the answer does not move with what the padding holds: its size is counted in, such as "
            + " and ".join(_size_taken(trial, axis) for axis in blamed),
            f"{_IGNORE}and count what is real by it",
        )
    return _cause_in_padding(trial, blamed, padding or {})


def _cause_in_padding(trial: Trial, blamed: Sequence[str], padding: Poison) -> Cause:
    """Why the answer moves with what the padding of these axes holds."""
    whose = " and ".join(f"that of {_called(axis)}" for axis in blamed)
    why = f"the answer moves with what the padding holds: padding is counted in, {whose}"
    if len(blamed) == 1 and _alternates(trial, blamed[0], padding):
        return Cause(
            f"{why}; not so where {_called(blamed[0])} is one more or one less: odd and even sizes "
            "differ",
            'give a stride or a window explicit padding: with padding="SAME" it starts elsewhere '
            "in an odd size than in an even one",
        )
    why += _full_only(trial, padding)
    if index := _index_that_mends(trial, blamed, padding):
        return Cause(
            why,
            f"pad {index} (pad_values), which the function ignores: a scatter and segment_sum drop "
            "an index that is out of range, where 0 is the first",
        )
    return Cause(
        why,
        f"{_IGNORE}and use it, or choose pad_values that it ignores; 0 counts as chosen where it "
        "is written",
    )


def _index_that_mends(trial: Trial, blamed: Sequence[str], padding: Poison) -> str:
    """The array of integers that mends the answer, padded out of range, and how; else empty."""
    program, bucket = trial.entry.program, trial.entry.bucket
    shapes = [leaf.shape for leaf in jax.tree.leaves(program.arguments(bucket))]
    beyond = 1 + max(itertools.chain(*shapes))
    arrays = poisonable(program, trial.example)

    # A negative index reaches the last of another axis, which is real where that is full.
    full = bucket.with_sizes({axis: trial.example.sizes.size(axis) for axis in blamed})

    def mends(index: int, value: int) -> bool:
        other = {**padding, index: value}
        mends_here = not trial.differ(trial.run(other), trial.expected)
        return mends_here and not _differs_at(trial, full, other)

    for index, array in {**arrays.data, **arrays.doubtful}.items():
        is_index = jnp.issubdtype(array.dtype, np.integer)
        if not is_index or set(blamed).isdisjoint(trial.example.axes[index].names):
            continue
        most = int(jnp.iinfo(array.dtype).max)  # type: ignore[no-untyped-call]
        # First what is just out of range: a loop that takes it for a length has to end. Then what
        # is so in any bucket, and does not wrap around where it is multiplied before.
        if beyond <= most and mends(index, beyond):
            for value in (most, most >> 8):
                if beyond <= value and mends(index, value):
                    return f"{_leaf_names(trial)[index]} with {value}"
    return ""


def _moves(trial: Trial) -> bool:
    """Whether the answer moves with the padding of arrays, those with chosen values included."""
    arrays = poisonable(trial.entry.program, trial.example, takes_chosen=True)
    data = {**arrays.data, **arrays.doubtful}
    # Values that are real elsewhere: with others a loop may not end.
    looks: list[dict[int, PadValue]] = [
        {index: array.max().item() for index, array in data.items()},
        {index: array.min().item() for index, array in data.items()},
    ]
    return any(trial.differ(trial.run(look), trial.usual) for look in looks)


def _blamed_axes(trial: Trial, padding: Poison) -> list[str]:
    """The padded axes that change the answer alone; all of them where none does."""
    bucket, sizes = trial.entry.bucket, trial.example.sizes
    padded = [axis for axis, size in sizes.sizes.items() if size != bucket.size(axis)]
    if len(padded) == 1:
        return padded
    alone = [bucket.with_sizes({axis: sizes.size(axis)}) for axis in padded]
    blamed = [
        axis for axis, size in zip(padded, alone, strict=True) if _differs_at(trial, size, padding)
    ]
    return blamed or padded


def _differs_at(trial: Trial, sizes: Bucket, padding: Poison) -> bool | None:
    """Whether the answer differs at other sizes, too; None where it cannot be had there."""
    other = trial.at(sizes)
    try:
        return other.differ(other.run(padding), other.expected)
    except CaptureError:  # what is explained is another error, which is raised
        return None


def _size_taken(trial: Trial, axis: str) -> str:
    """What the function may have read a padded size from."""
    name, place = next(
        (name, place)
        for name, axes in zip(_leaf_names(trial), trial.example.axes, strict=True)
        for place, length in axes.dims
        if length.axis == axis
    )
    what = "the number of rows" if axis == "batch" else "a length or a position"
    return f"{name}.shape[{place}] taken for {what}"


def _alternates(trial: Trial, axis: str, padding: Poison) -> bool:
    """Whether the answer differs at each second size of an axis, as far as its neighbours tell."""
    sizes = trial.example.sizes
    here, limit = sizes.size(axis), trial.entry.bucket.size(axis)
    least = least_size(trial.example.axes, axis)
    by_step = [
        [
            _differs_at(trial, sizes.with_sizes({axis: here + off}), padding)
            for off in (-step, step)
            if least <= here + off < limit
        ]
        for step in (1, 2)
    ]
    return set(by_step[0]) == {False} and True in by_step[1]


def _full_only(trial: Trial, padding: Poison) -> str:
    """What to say where the answer differs only while another axis is full."""
    sizes, bucket = trial.example.sizes, trial.entry.bucket
    for axis, full in bucket.sizes.items():
        if sizes.size(axis) != full or full <= least_size(trial.example.axes, axis):
            continue
        less = sizes.with_sizes({axis: full - 1})
        if _differs_at(trial, less, padding) is False:
            return (
                f", where {_called(axis)} is full and not at {less.short}: it reaches the last "
                "of it, as a negative index does"
            )
    return ""
