"""Which output dimensions follow the batch and the sequence, found without compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cudagraph_jax.errors import CUDAGraphError, InputShapeError
from cudagraph_jax.shapes.axes import LeafAxes, Shape
from cudagraph_jax.shapes.ladder import Bucket


class OutputShape(NamedTuple):
    """One output of an abstract evaluation: what errors call it, and its shape."""

    name: str
    shape: Shape


_SMALLEST = (1, 2, 3)
_SHORT = (2, 3, 4)

Evaluate = Callable[[Bucket], Sequence[OutputShape]]
"""Abstract evaluation of a function at one size, such as by `jax.eval_shape`."""


class OutputAxes(NamedTuple):
    """The axes of one output, or why it cannot be trimmed.

    Attributes:
        name: What errors call the output.
        axes: Its axes; meaningless where `problem` is not None.
        problem: What is wrong with a dimension that follows the sizes, but equals neither.
    """

    name: str
    axes: LeafAxes
    problem: str | None = None

    def checked(self) -> LeafAxes:
        """The axes.

        Raises:
            InputShapeError: They could not be found.
        """
        if self.problem is not None:
            raise InputShapeError(self.problem)
        return self.axes


def infer_output_axes(
    evaluate: Evaluate,
    *,
    base: Bucket,
    batches: Sequence[int],
    lengths: Sequence[int],
) -> tuple[OutputAxes, ...]:
    """The axes of every output, from evaluations at other sizes: two, or a few more.

    A dimension that changes with the batch alone, and equals it, is the batch; likewise the
    sequence. One that changes otherwise (batch * seq, seq - 1, both) gets a `problem`.

    Args:
        evaluate: Gives the outputs' shapes for a size; may raise for sizes it cannot take.
        base: A size that the function takes; an error here is the caller's.
        batches: Other batch sizes, tried in turn until one evaluates; empty where the inputs
            carry no batch.
        lengths: Other sequence lengths, likewise.
    """
    here = evaluate(base)
    found = None
    if batches and lengths:
        found = _from_two(evaluate, here, base=base, batches=batches)
    if found is None:
        found = _size_by_size(evaluate, here, base=base, batches=batches, lengths=lengths)
    return found


def _from_two(
    evaluate: Evaluate,
    here: Sequence[OutputShape],
    *,
    base: Bucket,
    batches: Sequence[int],
) -> tuple[OutputAxes, ...] | None:
    """The axes by two further evaluations that change both sizes; None where that is not enough.

    In the first the batch grows while the sequence shrinks: what follows one of them in another way
    (half of it, one more) does not pass for the other. In the second both shrink: what grows with
    both (their product, their sum) does not pass for a constant.
    """
    larger = next((rows for rows in batches if rows > base.batch_size), 2 * base.batch_size)
    first = _first_that_evaluates(evaluate, (Bucket(larger, length) for length in _SMALLEST))
    if first is None:
        return None
    # Not 1 by 1, where the lesser and the greater of both sizes are either of them.
    shorter = [n for n in _SHORT if n < base.seq_len and n != first[1].seq_len]
    second = _first_that_evaluates(evaluate, (Bucket(1, length) for length in shorter))
    if second is None:
        return None
    samples = [(here, base), first, second]
    names = [[out.name for out in shapes] for shapes, _ in samples]
    if names[0] != names[1] or names[0] != names[2]:
        return None
    found = []
    for index, out in enumerate(here):
        axes = _common_axes([_Sample(shapes[index], size) for shapes, size in samples])
        if axes is None:
            return None
        found.append(OutputAxes(out.name, axes))
    return tuple(found)


def _common_axes(samples: Sequence[_Sample]) -> LeafAxes | None:
    """The axes that one output has in all samples; None where a dimension is something else."""
    batch: int | None = None
    seq: int | None = None
    if len({len(sample.out.shape) for sample in samples}) > 1:
        return None
    for axis in range(len(samples[0].out.shape)):
        extents = [sample.out.shape[axis] for sample in samples]
        if len(set(extents)) == 1:
            continue
        if batch is None and extents == [sample.size.batch_size for sample in samples]:
            batch = axis
        elif seq is None and extents == [sample.size.seq_len for sample in samples]:
            seq = axis
        else:
            return None
    return LeafAxes(batch, seq)


def _size_by_size(
    evaluate: Evaluate,
    here: Sequence[OutputShape],
    *,
    base: Bucket,
    batches: Sequence[int],
    lengths: Sequence[int],
) -> tuple[OutputAxes, ...]:
    """The axes by evaluations that differ in one size at a time, which say what is wrong."""
    taller = _first_that_evaluates(evaluate, (base._replace(batch_size=n) for n in batches))
    longer = _first_that_evaluates(evaluate, (base._replace(seq_len=n) for n in lengths))
    # What is cut to a fixed length looks constant in the grid, and is not below it.
    least = [
        _first_that_evaluates(evaluate, (base._replace(**{field: n}) for n in _SMALLEST))
        for field, sizes in (("batch_size", batches), ("seq_len", lengths))
        if sizes
    ]
    for other in (taller, longer, *least):
        if other is not None and [out.name for out in other[0]] != [out.name for out in here]:
            counts = f"{len(here)} at {tuple(base)} and {len(other[0])} at {tuple(other[1])}"
            return tuple(OutputAxes(out.name, LeafAxes(), _other_tree(counts)) for out in here)
    if (batches and taller is None) or (lengths and longer is None):
        axis = "batch" if batches and taller is None else "seq"
        return tuple(OutputAxes(out.name, LeafAxes(), _one_size_only(out, axis)) for out in here)
    found = []
    for index, out in enumerate(here):
        samples = [
            None if other is None else _Sample(other[0][index], other[1])
            for other in (taller, longer, *least)
        ]
        first = _Sample(out, base)
        axes = _classify(first, samples[0], samples[1])
        found.append(_confirmed(axes, first, samples[2:]))
    return tuple(found)


class _Sample(NamedTuple):
    out: OutputShape
    size: Bucket


def _first_that_evaluates(
    evaluate: Evaluate, sizes: Iterator[Bucket]
) -> tuple[Sequence[OutputShape], Bucket] | None:
    for size in sizes:
        try:
            return evaluate(size), size
        except CUDAGraphError:
            continue
    return None


def _classify(base: _Sample, taller: _Sample | None, longer: _Sample | None) -> OutputAxes:
    batch: int | None = None
    seq: int | None = None
    name, shape = base.out
    for sample in (taller, longer):
        if sample is not None and len(sample.out.shape) != len(shape):
            return OutputAxes(name, LeafAxes(), _unclear(base, sample, "its rank"))
    for axis, extent in enumerate(shape):
        by_batch = taller is not None and taller.out.shape[axis] != extent
        by_seq = longer is not None and longer.out.shape[axis] != extent
        if not by_batch and not by_seq:
            continue
        moved = taller if by_batch else longer
        assert moved is not None  # one of the two flags is set
        is_batch = by_batch and not by_seq and _equals(base, moved, axis, "batch_size")
        is_seq = by_seq and not by_batch and _equals(base, moved, axis, "seq_len")
        if (is_batch and batch is None) or (is_seq and seq is None):
            batch, seq = (axis, seq) if is_batch else (batch, axis)
            continue
        return OutputAxes(name, LeafAxes(), _unclear(base, moved, f"dimension {axis}"))
    return OutputAxes(name, LeafAxes(batch, seq))


def _confirmed(found: OutputAxes, base: _Sample, others: Sequence[_Sample | None]) -> OutputAxes:
    """`found`, unless a further sample has another shape than these axes give."""
    for other in others:
        if found.problem is not None or other is None:
            continue
        if len(other.out.shape) != len(base.out.shape):
            return OutputAxes(found.name, LeafAxes(), _unclear(base, other, "its rank"))
        expected = found.axes.resize(base.out.shape, other.size)
        for axis, (has, needs) in enumerate(zip(other.out.shape, expected, strict=True)):
            if has != needs:
                problem = _unclear(base, other, f"dimension {axis}")
                return OutputAxes(found.name, LeafAxes(), problem)
    return found


def _equals(base: _Sample, moved: _Sample, axis: int, size: str) -> bool:
    return all(sample.out.shape[axis] == getattr(sample.size, size) for sample in (base, moved))


def _unclear(base: _Sample, moved: _Sample, what: str) -> str:
    return (
        f"{base.out.name} has the shape {base.out.shape} at (batch, seq_len)={tuple(base.size)} "
        f"and {moved.out.shape} at {tuple(moved.size)}: {what} follows the sizes, but is not the "
        'one "batch" or the one "seq" of the output, so it cannot be trimmed; return each as one '
        "dimension of its own, "
        'declare out_axes, or ask for unpad="none"'
    )


def _other_tree(counts: str) -> str:
    return (
        f"the outputs are other ones for other sizes ({counts} as (batch, seq_len)): return the "
        "same pytree for every size, with batch and seq as dimensions of its arrays"
    )


def _one_size_only(out: OutputShape, axis: str) -> str:
    return (
        f"{out.name}: its axes cannot be found, because the function takes no second {axis} size: "
        "declare out_axes"
    )
